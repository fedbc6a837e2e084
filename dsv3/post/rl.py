"""Reinforcement learning by rule rewards: `dsv3 rl`. Read `Rounds._roll` top down.

    round   questions -> answers of the engine -> rewards -> advantages in each group -> reference -> rollouts/round-N.jsonl
    step    one minibatch of the round, through the trainer of all stages: clip, AdamW, router bias, checkpoint

The engine's model is the trainer's compute copy itself, so an update is in the next rollout without a copy. With one minibatch a
round every step is on policy and the gate (post/replay.py) looks at every answer; with more it looks at the first of each round.
A run is a pure function of its start and its seed: stopped anywhere and resumed, it makes the same rollouts and the same weights.
Reward rising while held-out accuracy falls is an alarm; a round that can teach nothing is said in plain words.
Source: V3 report section 5.2, R1 (arXiv 2501.12948). Does not: learn a reward model, or know several processes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsv3.data.chat import ChatFormat
from dsv3.data.tokenizer import Tokenizer
from dsv3.evals.sandbox import Sandbox
from dsv3.infer.engine import Engine
from dsv3.model.fingerprint import fingerprint
from dsv3.model.fp8 import fp8_modules
from dsv3.model.transformer import DeepseekV3
from dsv3.parallel.apply import PRECISIONS
from dsv3.parallel.mesh import Mesh
from dsv3.post.batch import RolloutBatch
from dsv3.post.exact import EnginePass
from dsv3.post.grpo import GrpoConfig, GrpoObjective, advantages
from dsv3.post.replay import Gate, GateConfig
from dsv3.post.rewards import Monitor, MonitorConfig, RewardConfig, Rewarder
from dsv3.post.rollout import (
    Answer,
    Prompt,
    Tally,
    add_reference,
    make_batch,
    read_rollouts,
    round_path,
    sample,
    write_rollouts,
)
from dsv3.post.tasks import Problem, Split, Task
from dsv3.post.verdict import round_metrics, verdict
from dsv3.post.view import write_view
from dsv3.train.checkpoint import latest_checkpoint
from dsv3.train.metrics import write_atomic
from dsv3.train.optim import CosineConfig
from dsv3.train.trainer import TrainConfig, Trainer


class AlarmError(ValueError):
    """Reward rose while held-out accuracy fell, and the run was told to stop then."""


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """A run. Defaults are R1's where they are published (see post/grpo.py), ours where they are not."""

    steps: int
    """Optimizer steps."""
    prompts: int = 512
    """Questions of a round."""
    group: int = 16
    """Answers to each question."""
    minibatches: int = 16
    """Steps that a round is cut into. 1: every step is on policy."""
    max_tokens: int = 32768
    """Longest answer; one that is cut off has no right answer."""
    temperature: float = 1.0
    """Of the rollouts. Ratios and KL are of temperature 1."""
    lr: float = 1e-6
    """Constant after the warm-up; small models want more (about 1e-4 at 2M parameters)."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    stop_on_alarm: bool = False
    """Stop when reward rises while held-out accuracy falls; else say so and go on."""
    replay: bool = False
    """Send each answer's tokens to the experts of the rollout in the training pass."""
    dynamic: bool = True
    """Draw more questions in the place of those whose answers all have one reward."""
    max_draws: int = 3
    """Questions drawn for a round, at most, as a multiple of `prompts`."""
    reference_every: int | None = None
    """Take the policy as the new reference after so many rounds; None: the start stays the reference."""
    gamma: float = 0.0
    """Speed of the router bias; 0 keeps it frozen."""
    alpha: float = 1e-4
    """Factor of the sequence-wise balance loss."""
    mtp_weight: float = 0.1
    """Lambda: the MTP layers learn the sampled answers, or their drafts would be accepted less and less."""
    precision: str = "bfloat16"
    """Of rollouts and training pass alike: bfloat16, float32 or fp8."""
    micro_batch: int = 8
    """Answers of one forward and backward."""
    recompute: bool = False
    eval_every: int = 10
    """Steps between greedy answers to held-out questions."""
    eval_problems: int = 200
    save_every: int = 20
    keep_last: int = 2
    seed: int = 0
    cache_gb: float = 1.0
    """Gigabytes (10^9 bytes) of the engine's cache."""
    max_running: int = 64
    """Answers that the engine samples at once."""
    max_steps: int | None = field(default=None, metadata={"run": False})
    """Stop after this many steps of this sitting."""

    def __post_init__(self) -> None:
        least = {"prompts": 1, "group": 2, "minibatches": 1, "max_draws": 1, "eval_every": 1, "eval_problems": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {low}")
        if self.prompts * self.group % self.minibatches:
            raise ValueError(
                f"{self.prompts} prompts of {self.group} answers do not divide into {self.minibatches} minibatches: change one"
            )
        if self.reference_every is not None and (self.reference_every < 1 or self.grpo.kl == 0):
            raise ValueError(
                f"reference_every {self.reference_every} with kl {self.grpo.kl}: give at least 1, and a kl above 0"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}: give one of {', '.join(PRECISIONS)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: a group needs answers that differ, give above 0")

    def train(self) -> TrainConfig:
        """What the trainer is told of it."""
        schedule = CosineConfig(
            steps=self.steps, batch_size=self.prompts * self.group // self.minibatches, first_lr=self.lr, last_lr=self.lr,
            warmup_steps=self.warmup_steps, gamma=self.gamma, mtp_weight=self.mtp_weight,
        )  # fmt: skip
        return TrainConfig(
            schedule=schedule, seq_len=self.max_tokens, micro_batch=self.micro_batch, alpha=self.alpha,
            weight_decay=self.weight_decay, precision=self.precision, recompute=self.recompute, seed=self.seed,
            save_every=self.save_every, keep_last=self.keep_last, max_steps=self.max_steps,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues, beside the trainer's."""
        full = dataclasses.asdict(self)
        for name in ("save_every", "keep_last", "max_steps", "cache_gb", "max_running", "stop_on_alarm"):
            full.pop(name)
        return full


class Rounds:
    """Makes the trainer's batches: a RowLoader (train/loss.py). `open` gives it the policy."""

    def __init__(self, task: Split, held_out: Split, rewarder: Rewarder, config: RlConfig, folder: Path) -> None:
        self.task, self.rewarder, self.config, self.folder = task, rewarder, config, Path(folder)
        self.monitor = Monitor(config.monitor)
        self.problems = list(held_out.problems(config.eval_problems))
        self.told: dict[str, Any] = {}
        """Of the last round, until `after_step` has taken it."""
        self._answers: list[Answer] = []
        self._round = self._minibatch = self._drawn = self._rows = self._reference_round = 0
        self._rewards: list[float] = []

    def open(self, trainer: Trainer, tokenizer: Tokenizer, objective: GrpoObjective) -> None:
        config = self.config
        self.trainer, self.tokenizer, self.objective = trainer, tokenizer, objective
        self.format = ChatFormat.of(tokenizer)
        self.engine = Engine(
            trainer.workers.policy, tokenizer, cache_gb=config.cache_gb, max_running=config.max_running
        )
        self.reference: DeepseekV3 | None = None
        if config.grpo.kl > 0:
            self.reference = copy.deepcopy(trainer.workers.policy).requires_grad_(False)

    # -- the loader ----------------------------------------------------------------------------------------------------

    def next_batch(self, rows: int) -> RolloutBatch:
        """The next minibatch: about `rows` answers, fewer where some could not be judged.

        Raises:
            ValueError: a round has nothing to train on (says why), or its prompts do not fit the model.
        """
        config = self.trainer.model.config
        if self._minibatch == 0:
            self._answers = self._roll()
        used, parts, fresh = self._answers, self.config.minibatches, self._minibatch == 0
        part = used[self._minibatch * len(used) // parts : (self._minibatch + 1) * len(used) // parts]
        self._rows, self._minibatch = self._rows + len(part), self._minibatch + 1
        if self._minibatch == parts:
            self._round, self._minibatch = self._round + 1, 0
        layers = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
        return make_batch(
            part,
            depth=config.num_nextn_predict_layers,
            layers=layers,
            top_k=config.num_experts_per_tok,
            fresh=fresh,
            even=rows if self.trainer.workers.pipeline is not None else None,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "round": self._round,
            "minibatch": self._minibatch,
            "drawn": self._drawn,
            "reference_round": self._reference_round,
            "rewards": self._rewards,
            "monitor": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: the run's folder lacks the round or the reference that the state is in the middle of.
        """
        self._rows, self._round, self._minibatch = state["rows"], state["round"], state["minibatch"]
        self._drawn, self._rewards = state["drawn"], list(state["rewards"])
        self.monitor.load_state_dict(state["monitor"])
        if self._minibatch:
            self._answers = [a for a in read_rollouts(round_path(self.folder, self._round)) if a.used]
        self._reference_round = state["reference_round"]
        if self._reference_round:
            path = self._reference_path(self._reference_round)
            if not path.exists():
                raise ValueError(f"the reference policy {path} is missing: resume with the run's folder whole")
            self._set_reference(torch.load(path, weights_only=True))

    # -- a round -------------------------------------------------------------------------------------------------------

    def _roll(self) -> list[Answer]:
        """Sample, reward, compare, keep: the answers of a round that are trained on, in order."""
        config, tally, before = self.config, Tally(), self.rewarder.counts.copy()
        self._ready()
        self._renew_reference()
        good: list[list[Answer]] = []  # groups with signal
        flat: list[list[Answer]] = []  # groups that all have one reward
        lost: list[list[Answer]] = []  # groups of which too little could be judged
        limit = config.prompts * (config.max_draws if config.dynamic else 1)
        first = self._drawn
        while len(good) < config.prompts and self._drawn - first < limit:
            want = min(config.prompts - len(good), limit - (self._drawn - first))
            for group in self._groups(want, tally):
                judged = [a for a in group if a.reward is not None]
                for answer, advantage in zip(judged, advantages([a.reward or 0.0 for a in judged])):
                    answer.advantage = advantage
                some = any(a.advantage for a in judged)
                (good if some else flat if len(judged) > 1 else lost).append(group)
        used = [a for group in (good + flat)[: config.prompts] for a in group if a.reward is not None]
        counts = self.rewarder.counts - before
        if len(used) < config.minibatches:
            engine, grader = tally.last_fault or "no fault", self.rewarder.last_fault or "no fault"
            raise ValueError(
                f"round {self._round + 1} has {len(used)} answers to train on, {config.minibatches} is the least: of "
                f"{self._drawn - first} questions {tally.too_long} were too long, the gold of {counts['unreadable_gold']} answers "
                f"could not be read, the grader failed on {counts['crashed']} ({grader}), the engine on {tally.failed} ({engine})"
            )
        for answer in used:
            answer.used = True
        if self.reference is not None:
            add_reference(
                used, self.reference, vocabulary=self.tokenizer.vocab_size, micro_batch=config.micro_batch,
                exact=self.objective.engine is not None,
            )  # fmt: skip
        random.Random(f"{config.seed}/{self._round}").shuffle(used)
        rest = [a for group in good + flat + lost for a in group if not a.used]
        if self.trainer.workers.leads:
            write_rollouts(round_path(self.folder, self._round), used + rest)
        self.told = round_metrics(good, flat, lost, counts, tally, end=config.max_tokens)
        self.told["verdict"] = verdict(self.told)
        self._rewards.append(self.told["reward"])
        return used

    def _groups(self, count: int, tally: Tally) -> list[list[Answer]]:
        """The next questions' answers, judged."""
        config = self.config
        problems = [self.task.problem(self._drawn + i) for i in range(count)]
        prompts = self._prompts(problems, self._drawn, tally)
        self._drawn += count
        return self._answered(
            prompts, self.rewarder, tally, group=config.group, seed=config.seed, temperature=config.temperature
        )

    def _answered(self, prompts: list[Prompt], rewarder: Rewarder, tally: Tally, **sampling: Any) -> list[list[Answer]]:
        """Groups of answers to the prompts, judged; each process answers its share of them, and all know all."""
        workers, mine, before = self.trainer.workers, Tally(), rewarder.counts.copy()
        share = workers.share(prompts)
        groups = sample(
            self.engine, share, max_tokens=self.config.max_tokens, decode=self.tokenizer.decode, tally=mine, **sampling
        )  # fmt: skip
        pairs = [(prompt.problem, answer) for prompt, group in zip(share, groups) for answer in group]
        scores = rewarder.score_all([(problem, a.text, a.finish == "stop") for problem, a in pairs])
        for (_, answer), score in zip(pairs, scores):
            answer.reward, answer.parts, answer.note = score.total, score.parts, score.note
        numbered = [(prompt.number, group) for prompt, group in zip(share, groups)]
        everyone, rewarder.counts = workers.everyone((numbered, mine, rewarder.counts - before)), before
        found: dict[int, list[Answer]] = {}
        for theirs, told, counts in everyone:
            found |= dict(theirs)
            tally.add(told)
            rewarder.counts.update(counts)
        return [found[prompt.number] for prompt in prompts]

    def _prompts(self, problems: list[Problem], first: int, tally: Tally) -> list[Prompt]:
        """Rendered; those too long to be answered are left out and tallied."""
        prompts, room = [], self.trainer.model.config.max_position_embeddings - self.config.max_tokens
        for i, problem in enumerate(problems):
            rendered = self.format.render(problem.messages)
            if len(rendered.ids) > room:
                tally.too_long += 1
                continue
            opening = "<think>\n" if rendered.thinking else ""
            prompts.append(Prompt(problem=problem, ids=rendered.ids, opening=opening, number=first + i))
        return prompts

    def _ready(self) -> None:
        """The policy is the masters', and no page of old weights is found."""
        self.trainer.workers.publish()
        self.engine.forget()

    def _renew_reference(self) -> None:
        every = self.config.reference_every
        if every is None or not self._round or self._round % every or self._round == self._reference_round:
            return
        assert self.reference is not None
        self._set_reference(self.trainer.workers.policy.state_dict())
        if self.trainer.workers.leads:
            path = self._reference_path(self._round)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.reference.state_dict(), path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        self._reference_round = self._round

    def _set_reference(self, state: Mapping[str, Any]) -> None:
        assert self.reference is not None
        self.reference.load_state_dict(state)
        for module in fp8_modules(self.reference):
            module.stale = True

    def _reference_path(self, number: int) -> Path:
        return self.folder / "reference" / f"round-{number:08d}.pt"

    # -- beside the steps ----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        """Greedy answers to the held-out questions. heldout_accuracy is over those that could be judged."""
        self._ready()
        rewarder, tally = Rewarder(self.config.rewards, self.rewarder.sandbox), Tally()
        prompts = self._prompts(self.problems, 0, tally)
        groups = self._answered(prompts, rewarder, tally, group=1, seed=0, temperature=0.0)
        judged = [answer for group in groups for answer in group if answer.reward is not None]
        if not judged:
            raise ValueError(
                f"none of {len(prompts)} held-out answers could be judged: {rewarder.last_fault or 'gold'}"
            )
        return {
            "heldout_accuracy": sum(answer.parts["accuracy"] == 1.0 for answer in judged) / len(judged),
            "heldout_problems": len(judged),
            "heldout_acceptance": tally.acceptance(),
        }

    def after_step(self, trainer: Trainer, say: Callable[[str], None]) -> dict[str, Any]:
        """What the step's record is told beside the trainer's own numbers.

        Raises:
            AlarmError: see RlConfig.stop_on_alarm.
        """
        record, self.told = self.told, {}
        if record and record["verdict"] != "learning":
            say(f"step {trainer.step_index}: {record['verdict']}")
        gate = self.objective.gate
        record |= gate.report()
        for warning in gate.warnings:
            say(f"warning, step {trainer.step_index}: {warning}")
        gate.warnings.clear()
        if trainer.step_index % self.config.eval_every and trainer.step_index != self.config.steps:
            return record
        found = self.evaluate()
        record |= found
        if self._rewards:
            reward = sum(self._rewards) / len(self._rewards)
            alarm = self.monitor.add(reward, found["heldout_accuracy"], found["heldout_problems"])
            self._rewards = []
            if alarm is not None:
                record["alarm"] = alarm
                say(f"ALARM, step {trainer.step_index}: {alarm}")
                if self.config.stop_on_alarm:
                    raise AlarmError(alarm)
        return record


def build_rl(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    tasks: Task | Mapping[Task, float],
    config: RlConfig,
    folder: Path,
    *,
    sandbox: Sandbox | None = None,
    mesh: Mesh | None = None,
) -> tuple[Trainer, Rounds]:
    """A trainer of the model's float32 masters and the rounds that feed it.

    Args:
        tasks: one, or several by weight. Some of their prompts are held out (post/tasks.py).
        sandbox: for problems that are code.
        mesh: of this process among several. Each then answers its share of a round's questions, with a whole copy of the model.

    Raises:
        ValueError: the longest answer does not fit the model's context.
    """
    if config.max_tokens >= model.config.max_position_embeddings:
        raise ValueError(
            f"max_tokens {config.max_tokens} leaves no room for a prompt in max_position_embeddings "
            f"{model.config.max_position_embeddings}: lower it"
        )
    train, held_out = (Split(tasks, side, seed=config.seed) for side in ("train", "held-out"))
    rounds = Rounds(train, held_out, Rewarder(config.rewards, sandbox), config, folder)
    gate = Gate(config.gate, config.precision)
    objective = GrpoObjective(config.grpo, tokenizer.vocab_size, gate, replay=config.replay)
    start = fingerprint(model)  # the reference policy is made of it, also when a run is resumed
    trainer = Trainer(model, rounds, config.train(), folder, tokenizer=tokenizer, objective=objective, mesh=mesh)
    trainer.identity["rl"] = {
        **config.identity(), "start": start, "task": train.name, "problems": train.fingerprint(),
    }  # fmt: skip
    rounds.open(trainer, tokenizer, objective)
    policy = trainer.workers.policy
    # On a mesh the policy is a copy, of a round's start: that is what is trained where a round is one step.
    current = mesh is None or config.minibatches == 1
    if current and not config.replay and EnginePass.fits(policy):
        objective.engine = EnginePass(policy)
    return trainer, rounds


def run_rl(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    tasks: Task | Mapping[Task, float],
    config: RlConfig,
    folder: Path,
    *,
    sandbox: Sandbox | None = None,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint of the folder when there is one; held-out accuracy before and after.

    Raises:
        GateError, AlarmError, NonFiniteError: see there; the last checkpoint is good.
    """
    folder = Path(folder)
    trainer, rounds = build_rl(model, tokenizer, tasks, config, folder, sandbox=sandbox, mesh=mesh)
    start = folder / "start.json"
    leads = trainer.workers.leads
    if trainer.newest() is None:
        found = rounds.evaluate()
        if leads:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(start, json.dumps(found).encode())
        trainer.workers.barrier()
    before = json.loads(start.read_text(encoding="utf-8"))
    say(f"held-out accuracy before: {before['heldout_accuracy']:.1%} of {before['heldout_problems']} questions")
    try:
        trainer.run(on_eval=[lambda trainer: rounds.after_step(trainer, say)])
    finally:
        view = write_view(folder, decode=tokenizer.decode) if leads else None
    after = rounds.evaluate()
    say(f"held-out accuracy after: {after['heldout_accuracy']:.1%} of {after['heldout_problems']} questions")
    checkpoint = latest_checkpoint(folder)
    return {"before": before, "after": after, "checkpoint": str(checkpoint), "view": str(view)}
