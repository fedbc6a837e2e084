"""A whole life of a small, complete DeepSeek-V3 on a laptop CPU, in under fifteen minutes: `dsv3 run tiny`.

The architecture is V3's with every part in it (latent attention with query compression, one dense layer, 16 experts in 4
groups with a shared one, aux-free balance, one MTP layer); only the sizes are small. Read `run` top down; what follows
pre-training (SFT, distillation, RL) is in lessons.py. What comes out is in OUT/final, a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.data.chat import ChatFormat
from dsv3.data.corpus import standard_library
from dsv3.data.shards import Progress
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine, Sample
from dsv3.infer.sampling import SamplingParams
from dsv3.model.config import ModelConfig
from dsv3.model.weights import load_model
from dsv3.plan.job import Job
from dsv3.recipes import lessons
from dsv3.recipes.corpus import Texts, build_shards, parse_sources, read_texts
from dsv3.train.checkpoint import latest_checkpoint
from dsv3.train.optim import ScheduleConfig
from dsv3.train.pretrain import build_trainer
from dsv3.train.report import write_report
from dsv3.train.trainer import TrainConfig

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    moe_intermediate_size=96,
    num_hidden_layers=4,
    num_nextn_predict_layers=1,
    num_attention_heads=6,
    q_lora_rank=72,
    kv_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    max_position_embeddings=2048,
    rope_scaling=None,
    pad_token_id=2,
)
PROMPTS = ("def ", "import os\n\n", "class ", "Return the ", "The following ")


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """What one may want to change of the tiny run."""

    out: Path = Path("runs/tiny")
    """Folder of the run; the same command resumes an interrupted one."""
    data: tuple[str, ...] = ()
    """PATH or NAME=WEIGHT:PATH[,PATH] ...; none: the Python standard library's sources and documentation."""
    steps: int = 360
    """Optimizer steps of pre-training, of 16 rows of 256 tokens; the lessons after it are as long in proportion."""
    seed: int = 0
    model: ModelConfig = MODEL

    @property
    def lessons(self) -> lessons.LessonsConfig:
        return lessons.LessonsConfig.scaled(self.steps / 360, self.seed)


def train_config(config: TinyConfig) -> TrainConfig:
    return TrainConfig(
        schedule=ScheduleConfig(
            steps=config.steps,
            peak_lr=4e-3,
            warmup_steps=min(30, config.steps - 1),
            constant_until=0.4,
            cosine_until=0.9,
            second_constant_from=0.95,
            batch_size=16,
            batch_ramp_from=8,
            batch_ramp_until=0.1,
            gamma=5e-3,  # the report's 1e-3 is for 228,000 steps: here it balances too late (docs/RESULTS.md)
        ),
        seq_len=256,
        micro_batch=16,
        seed=config.seed,
        eval_every=40,
    )


def job() -> Job:
    """Its pre-training, for `dsv3 plan tiny`."""
    return Job(name="tiny", model=MODEL, train=train_config(TinyConfig()))


def run(
    config: TinyConfig,
    say: Callable[[str], None],
    bars: Callable[[Texts], AbstractContextManager[Progress | None]] = lambda texts: nullcontext(),
) -> dict[str, Any]:
    """Corpus, tokenizer, pre-training, held-out bits per byte, samples, speculation; SFT, distillation, RL; report. The results."""
    out = Path(config.out)
    say("1/6 corpus")
    texts = read_texts(parse_sources(config.data) or standard_library(), max_characters=8_000_000)
    for line in texts.report.lines():
        say("    " + line)
    say("2/6 tokenizer and shards")
    tokenizer = _tokenizer(texts, config.model.vocab_size, out / "tokenizer")
    with bars(texts) as progress:
        shards, held_out = build_shards(texts, tokenizer, out / "shards", seed=config.seed, progress=progress)
    say(f"    {tokenizer.vocab_size:,} tokens in the vocabulary, {shards.total_tokens:,} in the corpus")
    say(f"3/6 pre-training, {config.steps} steps")
    trainer = build_trainer(config.model, train_config(config), shards, tokenizer, out, held_out=held_out)
    trainer.run()
    say("4/6 the checkpoint, opened again")
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    model, read = load_model(checkpoint), Tokenizer.from_file(checkpoint)
    results = baselines(texts, tokenizer.vocab_size)
    if trainer.held_out is not None:
        results = {"held-out bits per byte": trainer.bits_per_byte(), **results}
    plain, speculative = generate(Engine(model, read, drafts=0)), generate(Engine(model, read))
    drafted, accepted = sum(s.drafted for s in speculative), sum(s.accepted for s in speculative)
    results |= {
        "MTP drafts accepted (greedy)": accepted / drafted if drafted else 0.0,
        "speculative text equals plain text": all(a.token_ids == b.token_ids for a, b in zip(plain, speculative)),
    }
    say("5/6 lessons: fine-tuning, distillation, reinforcement learning")
    stages = lessons.teach(checkpoint, out / "lessons", config.lessons, say)
    final = _finish(stages[-1].checkpoint, out / "final")
    say("6/6 report")
    samples = [{"prompt": p, "text": s.text} for p, s in zip(PROMPTS, plain)]
    samples += answer_questions(final, config.lessons)
    sections = {"model": config.model.to_hf(), "training": dataclasses.asdict(train_config(config))}
    report = write_report(
        out,
        title="dsv3 run tiny",
        config=sections,
        samples=samples,
        results=results,
        tables=[("Lessons", *lessons.table(stages))],
        sections=[("What to try next", "\n\n".join(next_steps(out)))],
    )
    results |= lessons.results(stages)
    return {**results, "samples": samples, "checkpoint": str(checkpoint), "final": str(final), "report": str(report)}


def baselines(texts: Texts, vocab_size: int) -> dict[str, float]:
    """Bits per byte of knowing nothing (a uniform guess of the byte) and of gzip -9, on the held-out text."""
    held = "\n".join(text for source in texts.held_out.values() for text in source).encode()
    if not held:
        return {}
    return {"uniform bits per byte": math.log2(256), "gzip bits per byte": 8 * len(gzip.compress(held, 9)) / len(held)}


def generate(engine: Engine, prompts: Sequence[str] = PROMPTS) -> list[Sample]:
    return list(engine.generate(prompts, SamplingParams(max_tokens=64)))


def answer_questions(checkpoint: Path, config: lessons.LessonsConfig) -> list[dict[str, str]]:
    """The finished model's answers to held-out questions, as a client of the server gets them."""
    tokenizer = Tokenizer.from_file(checkpoint)
    engine, form = Engine(load_model(checkpoint), tokenizer), ChatFormat.of(tokenizer)
    problems = lessons.example_questions(config)
    prompts = [form.render(problem.messages).ids for problem in problems]
    answers = engine.complete(prompts, SamplingParams(max_tokens=lessons.ANSWER_TOKENS))
    return [{"prompt": f"{problem.prompt}\n", "text": answer.text} for problem, answer in zip(problems, answers)]


def _finish(checkpoint: Path, target: Path) -> Path:
    """The checkpoint without its training state, by links where the disk allows; whole or not there."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    skip = shutil.ignore_patterns("training", "training.json")
    shutil.copytree(checkpoint, temporary, ignore=skip, copy_function=_link)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def next_steps(out: Path) -> list[str]:
    return [
        f"dsv3 serve {out}          then open http://127.0.0.1:8000 and ask: What is 17 + 25?",
        f"dsv3 chat {out}",
        f"dsv3 inspect {out}",
        "dsv3 run tiny --data YOUR_FOLDER --out runs/mine",
        f"tensorboard --logdir {out}",
    ]


def _tokenizer(texts: Texts, vocab_size: int, folder: Path) -> Tokenizer:
    """Trained once a run: a resumed run reads the one it started with."""
    if not folder.exists():
        corpus = (text for source in texts.train.values() for text in source)
        Tokenizer.train(corpus, vocab_size).save(folder)
    return Tokenizer.from_file(folder)
