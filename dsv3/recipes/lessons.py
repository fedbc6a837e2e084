"""What the tiny model is taught after pre-training: the second half of `dsv3 run tiny`, read top down in `teach`.

    questions   made on the spot: sums of small numbers, in our words and in reasoning-gym's (chain_sum); some are held out
    SFT         on questions with their answers: the chat format, and a start
    distil      the model's own answers to new questions, several to each; the right ones become the next SFT set
    RL          GRPO on further questions, rewarded by rule
    table       after each stage: held-out questions answered right, and MTP drafts accepted meanwhile. One-digit sums are few
                (20 are held out, in whatever words they are asked), so beside greedy answers eight drawn ones a question count

The same functions as the verbs `dsv3 sft`, `distill` and `rl` call; only the sizes are small.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.data.chat import ChatFormat, with_template
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import load_model
from dsv3.post.distill import DistillConfig, run_distill
from dsv3.post.distill_teacher import Sampling
from dsv3.post.rewards import Rewarder
from dsv3.post.rl import RlConfig, run_rl
from dsv3.post.rollout import Prompt, Tally, sample
from dsv3.post.tasks import Arithmetic, Problem, ReasoningGym, Split, Task
from dsv3.train.metrics import write_atomic
from dsv3.train.sft import SftConfig, run_sft

Say = Callable[[str], None]
ANSWER_TOKENS = 16
DRAWN = 8


@dataclass(frozen=True, kw_only=True)
class LessonsConfig:
    """Sizes of the stages; the defaults take about six minutes on two cores. `scaled` to a shorter run."""

    samples: int = 3000
    """Questions of each task in the first SFT set: enough to know most sums, so that the later stages have something to do."""
    questions: int = 600
    """New ones of each task that the model answers itself, four times each, for the second set."""
    rl_steps: int = 60
    held_out: int = 200
    """Questions of each task that accuracy is measured on."""
    seed: int = 0

    @classmethod
    def scaled(cls, share: float, seed: int) -> LessonsConfig:
        """For a run whose pre-training is `share` of the whole one; never larger than the defaults."""
        share = min(1.0, share)
        sizes = {
            name: max(2, round(getattr(cls, name) * share)) for name in ("samples", "questions", "rl_steps", "held_out")
        }
        return cls(**sizes, seed=seed)


@dataclass(frozen=True)
class Stage:
    """A row of the table. greedy, drawn: share of right answers by task; acceptance: of MTP drafts, greedy."""

    name: str
    checkpoint: Path
    greedy: Mapping[str, float]
    drawn: Mapping[str, float]
    acceptance: float


def tasks() -> dict[str, Task]:
    return {
        "sums": Arithmetic(terms=2, digits=1, operators="+-"),
        "chain_sum": ReasoningGym("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1),
    }


def teach(base: Path, out: Path, config: LessonsConfig, say: Say) -> list[Stage]:
    """Take a pre-trained checkpoint through all stages, each in a folder of its own under `out`; each resumes or is kept.

    Raises:
        ValueError: reasoning-gym is not installed (pip install 'dsv3[post]'), or a stage's data are not usable.
    """
    known = tasks()
    stages = [examine("pre-trained", base, known, config)]
    _tell(stages[-1], say)

    data = [write_questions(out / "data" / f"{_file(name)}.jsonl", task, config) for name, task in known.items()]
    sft = run_sft(_sft(base, data, out / "sft", config, first_lr=2e-3, epochs=3), _quiet)
    stages.append(examine("SFT", Path(sft["checkpoint"]), known, config))
    _tell(stages[-1], say)

    own = run_distill(_distill(stages[-1].checkpoint, known, out, config), _quiet)
    count = own["samples"]["r1"]
    say(f"    {count:,} questions have a right answer of the model's own")
    if count >= 16:
        kept = out / "distilled" / "sft.jsonl"
        # From fresh moments the first steps are as long as the rate allows, and would unlearn what SFT taught.
        second = _sft(stages[-1].checkpoint, [kept], out / "distil", config, first_lr=1e-3, epochs=20)
        distilled = run_sft(dataclasses.replace(second, warmup_steps=6 if count >= 160 else 0), _quiet)
        stages.append(examine("distillation", Path(distilled["checkpoint"]), known, config))
        _tell(stages[-1], say)

    checkpoint = stages[-1].checkpoint
    rl = run_rl(
        load_model(checkpoint, dtype="float32"),
        Tokenizer.from_file(checkpoint),
        dict.fromkeys(known.values(), 1.0),
        _rl(config),
        out / "rl",
        say=_quiet,
    )
    stages.append(examine("RL", Path(rl["checkpoint"]), known, config))
    _tell(stages[-1], say)
    return stages


def _sft(base: Path, data: list[Path], out: Path, config: LessonsConfig, *, first_lr: float, epochs: int) -> SftConfig:
    return SftConfig(
        checkpoint=base, data=tuple(map(str, data)), out=out, epochs=epochs, batch_size=16, micro_batch=16, seq_len=256,
        first_lr=first_lr, eval_every=1000, keep_last=1, seed=config.seed,
    )  # fmt: skip


def _rl(config: LessonsConfig) -> RlConfig:
    return RlConfig(
        steps=config.rl_steps, prompts=32, group=8, minibatches=1, max_tokens=ANSWER_TOKENS, lr=2e-4,
        micro_batch=64, eval_every=10**6, eval_problems=50, save_every=20, keep_last=1, seed=config.seed,
    )  # fmt: skip


def _distill(checkpoint: Path, known: Mapping[str, Task], out: Path, config: LessonsConfig) -> DistillConfig:
    """Four answers of the model itself to each of new questions; a right one is learnt, without a system prompt."""
    path = out / "data" / "problems.jsonl"
    if not path.exists():
        sides = [Split(task, "train", seed=config.seed + 1) for task in known.values()]
        problems = [side.problem(index) for side in sides for index in range(config.questions)]
        lines = [
            json.dumps({"prompt": p.prompt, "answer": p.answer, "kind": "maths" if p.kind == "maths" else "text"})
            for p in {p.prompt: p for p in problems}.values()
        ]
        write_atomic(path, ("\n".join(lines) + "\n").encode())
    return DistillConfig(
        prompts=(path,), out=out / "distilled", checkpoint=checkpoint, samples=4, keep=1, originals=False, system="",
        thoughts="drop", sampling=Sampling(temperature=1.0, top_p=1.0, max_tokens=ANSWER_TOKENS, seed=config.seed),
        concurrency=64,
    )  # fmt: skip


def write_questions(path: Path, task: Task, config: LessonsConfig) -> Path:
    """Answered questions of the training side as JSON lines of messages, unless they are there."""
    side = Split(task, "train", seed=config.seed)
    problems = [side.problem(index) for index in range(config.samples)]
    return _write(path, [(problem, problem.answer) for problem in problems])


def examine(name: str, checkpoint: Path, known: Mapping[str, Task], config: LessonsConfig) -> Stage:
    """Answers to held-out questions, by the engine: greedy, and DRAWN of each at temperature 1."""
    model, tokenizer = load_model(checkpoint), Tokenizer.from_file(checkpoint)
    tokenizer = tokenizer if "chat_template" in tokenizer.config else with_template(tokenizer)
    greedy, drawn, tally = {}, {}, Tally()
    for task_name, task in known.items():
        problems = list(Split(task, "held-out", seed=config.seed).problems(config.held_out))
        engine = _engine(model, tokenizer)
        greedy[task_name] = _share(_answers(engine, tokenizer, problems, group=1, temperature=0.0, seed=0, tally=tally))
        drawn[task_name] = _share(_answers(engine, tokenizer, problems, group=DRAWN, temperature=1.0, seed=0))
    return Stage(name, checkpoint, greedy, drawn, next(iter(tally.acceptance()), 0.0))


def _share(groups: list[list[tuple[str, bool]]]) -> float:
    """Of right answers."""
    return sum(right for group in groups for _, right in group) / sum(map(len, groups))


def _answers(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: list[Problem],
    *,
    group: int,
    temperature: float,
    seed: int,
    tally: Tally | None = None,
) -> list[list[tuple[str, bool]]]:
    """For each problem the answers' texts, and whether they are right."""
    form, rewarder = ChatFormat.of(tokenizer), Rewarder()
    prompts = [Prompt(problem=p, ids=form.render(p.messages).ids, number=i) for i, p in enumerate(problems)]
    groups = sample(
        engine, prompts, group=group, max_tokens=ANSWER_TOKENS, seed=seed, decode=tokenizer.decode,
        temperature=temperature, tally=tally,
    )  # fmt: skip
    out = []
    for problem, answers in zip(problems, groups):
        scores = rewarder.score_all([(problem, answer.text, answer.finish == "stop") for answer in answers])
        out.append([(answer.text, score.right) for answer, score in zip(answers, scores)])
    return out


def _engine(model: DeepseekV3, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, cache_gb=0.3)


def table(stages: list[Stage]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, for the console and the report."""
    names = list(stages[0].greedy)
    ways = [f"{name}, {way}" for name in names for way in ("greedy", f"{DRAWN} drawn")]
    rows = [
        [
            s.name,
            *(f"{share:.1%}" for name in names for share in (s.greedy[name], s.drawn[name])),
            f"{s.acceptance:.1%}",
        ]
        for s in stages
    ]
    return ["right answers after", *ways, "MTP drafts accepted"], rows


def results(stages: list[Stage]) -> dict[str, Any]:
    """Shares of the drawn answers that are right."""
    return {f"{name}, {stage.name}": round(stage.drawn[name], 4) for stage in stages for name in stage.drawn}


def example_questions(config: LessonsConfig) -> list[Problem]:
    """A held-out question of each task, to try."""
    return [Split(task, "held-out", seed=config.seed).problem(0) for task in tasks().values()]


def _write(path: Path, answered: list[tuple[Problem, str]]) -> Path:
    lines = [
        json.dumps({"messages": [*problem.messages, {"role": "assistant", "content": answer}]}, ensure_ascii=False)
        for problem, answer in answered
    ]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path


def _file(name: str) -> str:
    return name.replace(" ", "-")


def _tell(stage: Stage, say: Say) -> None:
    right = ", ".join(f"{name} {share:.1%} (drawn {stage.drawn[name]:.1%})" for name, share in stage.greedy.items())
    say(f"    {stage.name}: {right} right; {stage.acceptance:.1%} of MTP drafts accepted")


def _quiet(text: str) -> None:
    """The stages' own words are in their folders' metrics and reports."""
