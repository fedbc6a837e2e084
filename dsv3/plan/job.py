"""What is to be planned: a model, how it is trained, over which degrees, and what follows pre-training. A recipe makes one
(recipes/v3.py), or a file does: a config.json alone, or TOML as

    model = "config.json"            # or a table of ModelConfig's fields
    tokens = 1e12
    seq_len = 4096
    batch_size = 4096
    precision = "fp8"
    [parallel]
    pipeline = 8
    expert = 32

Does not: run anything.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import ParallelConfig
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Training after pre-training, at a constant batch."""

    name: str
    tokens: float
    seq_len: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a plan is made of but the hardware."""

    name: str
    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    phases: tuple[Phase, ...] = ()
    gpus: int = 1
    """Devices it is meant for."""

    def rows(self) -> Counter[int]:
        """Rows of a step -> how many steps of pre-training have so many."""
        return _rows(self.train.schedule)

    @property
    def tokens(self) -> int:
        """Of pre-training."""
        return sum(rows * steps for rows, steps in self.rows().items()) * self.train.seq_len


@functools.lru_cache(maxsize=16)
def _rows(schedule: Any) -> Counter[int]:
    return Counter(schedule.rows(step) for step in range(schedule.steps))


def steps_for(tokens: float, *, seq_len: int, batch_size: int) -> int:
    return max(1, math.ceil(tokens / (seq_len * batch_size)))


def plain_job(name: str, model: ModelConfig, **options: Any) -> Job:
    """A job from sizes alone.

    Args:
        options: tokens, seq_len, batch_size, micro_batch, precision, recompute; and parallel, a ParallelConfig.
    """
    seq_len, batch = int(options.pop("seq_len", 4096)), int(options.pop("batch_size", 1024))
    tokens, parallel = float(options.pop("tokens", 1e12)), options.pop("parallel", ParallelConfig())
    if tokens <= 0 or batch < 1 or seq_len < 1:
        raise ValueError(
            f"tokens {tokens:g}, batch_size {batch} and seq_len {seq_len} must be positive: give those of the whole run, such as "
            "1e12, of a step, and of a row"
        )
    steps = steps_for(tokens, seq_len=seq_len, batch_size=batch)
    schedule = ScheduleConfig(steps=steps, warmup_steps=min(2000, steps - 1), batch_size=batch)
    sizes: dict[str, Any] = {"micro_batch": 1, **options}
    train = TrainConfig(schedule=schedule, seq_len=seq_len, **sizes)
    return Job(name=name, model=model, train=train, parallel=parallel)


def job_from_file(path: Path, **options: Any) -> Job:
    """Of a folder with a config.json, a config.json, or a TOML file; see the header. `options` go before the file's.

    Raises:
        ValueError: it is none of these, or has fields that mean nothing.
    """
    if path.suffix != ".toml":
        return plain_job(
            path.parent.name if path.name == "config.json" else path.stem, _plain(ModelConfig.from_hf(path)), **options
        )
    if not path.exists():
        raise ValueError(f"{path} does not exist: give tiny, mini, v3, a config.json, or a TOML file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML ({error})") from None
    known = {"model", "tokens", "seq_len", "batch_size", "micro_batch", "precision", "recompute", "parallel"}
    if set(content) - known or "model" not in content:
        raise ValueError(f"{path} has {sorted(content)}: it needs `model`, and may have {', '.join(sorted(known))}")
    for name, value in content.items():
        kinds: Any = _KINDS.get(name, (int, float))
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(f"{path}: {name} = {value!r} is of the wrong kind: see the example in dsv3/plan/job.py")
    model = content.pop("model")
    config = ModelConfig.from_hf(path.parent / model if isinstance(model, str) else model)
    if "parallel" in content:
        content["parallel"] = _degrees(content["parallel"], path)
    return plain_job(path.stem, _plain(config), **{**content, **options})


_KINDS: dict[str, Any] = {"model": (str, dict), "precision": str, "recompute": bool, "parallel": dict}
"""Of a file's fields that are no numbers."""


def _plain(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, extra={})


def _degrees(content: dict[str, Any], path: Path) -> ParallelConfig:
    known = [f.name for f in dataclasses.fields(ParallelConfig)]
    if set(content) - set(known):
        raise ValueError(f"{path}: [parallel] has {sorted(content)}, known are {', '.join(known)}")
    for name, value in content.items():
        kind = type(getattr(ParallelConfig(), name))
        if type(value) is not kind:
            raise ValueError(f"{path}: [parallel] {name} = {value!r} must be of the kind {kind.__name__}")
    return ParallelConfig(**content)


def with_options(job: Job, **options: Any) -> Job:
    """The job with other sizes of its training; as many tokens as before unless `tokens` says otherwise."""
    if not options:
        return job
    batch = int(options.pop("batch_size", job.train.schedule.batch_size))
    tokens = float(options.pop("tokens", job.tokens))
    if tokens <= 0 or batch < 1:
        raise ValueError(
            f"tokens {tokens:g} and batch_size {batch} must be positive: give those of the whole run and of a step"
        )
    train = dataclasses.replace(job.train, **options)
    assert isinstance(train.schedule, ScheduleConfig)
    ramp = train.schedule.batch_ramp_from
    old = {"steps": train.schedule.steps, "batch_size": train.schedule.batch_size}
    longer = tokens / job.tokens * job.train.seq_len / train.seq_len * old["batch_size"] / batch
    steps = max(2, round(old["steps"] * longer))
    schedule = dataclasses.replace(
        train.schedule, steps=steps, batch_size=batch, warmup_steps=min(train.schedule.warmup_steps, steps - 1),
        batch_ramp_from=None if ramp is None else max(1, ramp * batch // old["batch_size"]),
    )  # fmt: skip
    return dataclasses.replace(job, train=dataclasses.replace(train, schedule=schedule))
