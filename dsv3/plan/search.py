"""Which layouts fit, and which of them is fastest.

Every divisor of the devices is tried as pipeline and as expert degree, with each schedule and sharding, with and without
recomputation, and micro-batches of 1, 2 and 4 rows. What ParallelConfig refuses, and what the pipeline has too few micro-batches
for, is left out; so is what does not fit the memory. Does not: try other precisions or batches; they change the training.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.pipeline import least_micro_batches
from dsv3.plan.hardware import Hardware
from dsv3.plan.memory import Memory, memory_of
from dsv3.plan.step import Layout, StepTime, System, step_time

GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """A layout with what it takes."""

    layout: Layout
    memory: Memory
    time: StepTime


def layout_of(parallel: ParallelConfig, gpus: int, *, micro_batch: int, recompute: bool) -> Layout:
    return Layout(
        gpus=gpus, pipeline=parallel.pipeline, expert=parallel.expert, sharding=parallel.sharding, schedule=parallel.schedule,
        micro_batch=micro_batch, recompute=recompute, fp8_dispatch=True if parallel.dispatch == "fp8" else None,
    )  # fmt: skip


def examine(
    model: ModelConfig, layout: Layout, hardware: Hardware, system: System, *, rows: int, seq_len: int, precision: str
) -> Candidate:
    memory = memory_of(model, layout, seq_len=seq_len, precision=precision)
    time = step_time(model, layout, hardware, system, rows=rows, seq_len=seq_len, precision=precision)
    return Candidate(layout, memory, time)


def refusal(model: ModelConfig, layout: Layout, rows: int) -> str | None:
    """Why this package would not start it; None: it would.

    Args:
        rows: of the smallest step.
    """
    if (
        why := _refused(model, layout.gpus, layout.pipeline, layout.expert, layout.sharding, layout.schedule)
    ) is not None:
        return why
    stages = layout.pipeline * (1 if layout.schedule == "1f1b" else 2)
    if layout.pipeline > 1 and stages > model.num_hidden_layers + 1:
        return f"{stages} stages are more than {model.num_hidden_layers} layers and a head"
    # Without a pipeline a step of fewer rows than a micro-batch has is one of a smaller one.
    micro = layout.micro_batch if layout.pipeline > 1 else min(layout.micro_batch, max(1, rows // layout.data))
    each = rows / (layout.data * micro)
    least = least_micro_batches(layout.pipeline, layout.schedule) if layout.pipeline > 1 else 1
    if each < least:
        return (
            f"{rows} rows a step make {each:g} micro-batches of {micro} a rank, and it takes {least}: take at least "
            f"{least * layout.data * micro} rows (--batch-size), or fewer devices"
        )
    return None


@functools.lru_cache(maxsize=4096)
def _refused(model: ModelConfig, gpus: int, pipeline: int, expert: int, sharding: Any, schedule: Any) -> str | None:
    try:
        parallel = ParallelConfig(pipeline=pipeline, expert=expert, sharding=sharding, schedule=schedule)
        parallel.check(model, gpus)
    except ValueError as error:
        return str(error)
    return None


def candidates(
    model: ModelConfig,
    gpus: int,
    hardware: Hardware,
    system: System,
    *,
    rows: int,
    least: int,
    seq_len: int,
    precision: str,
    fp8_dispatch: bool | None = None,
) -> tuple[list[Candidate], Candidate | None]:
    """Those that fit, fastest first; and of those that do not, the smallest.

    Args:
        rows: of a step. least: of the smallest step, for a batch that grows.
    """
    fitting: list[Candidate] = []
    smallest: tuple[Layout, Memory] | None = None
    for layout in layouts(model, gpus, fp8_dispatch):
        if refusal(model, layout, least) is not None:
            continue
        memory = memory_of(model, layout, seq_len=seq_len, precision=precision)
        if memory.total > hardware.memory * hardware.usable:
            if smallest is None or memory.total < smallest[1].total:
                smallest = (layout, memory)
            continue
        time = step_time(model, layout, hardware, system, rows=rows, seq_len=seq_len, precision=precision)
        fitting.append(Candidate(layout, memory, time))
    fitting.sort(key=lambda candidate: (candidate.time.seconds, candidate.memory.total))
    if fitting or smallest is None:
        return fitting, None
    layout, memory = smallest
    time = step_time(model, layout, hardware, system, rows=rows, seq_len=seq_len, precision=precision)
    return fitting, Candidate(layout, memory, time)


def layouts(model: ModelConfig, gpus: int, fp8_dispatch: bool | None = None) -> Iterator[Layout]:
    for pipeline in _divisors(gpus, model.num_hidden_layers + 1):
        for expert in _divisors(gpus // pipeline, model.n_routed_experts):
            for schedule in ("1f1b", "zero-bubble", "dualpipev") if pipeline > 1 else ("1f1b",):
                for sharding in ("zero1", "fsdp") if gpus > pipeline else ("zero1",):
                    for recompute in (False, True):
                        for micro_batch in (1, 2, 4):
                            yield Layout(
                                gpus=gpus, pipeline=pipeline, expert=expert, sharding=sharding, schedule=schedule,
                                micro_batch=micro_batch, recompute=recompute, fp8_dispatch=fp8_dispatch if expert > 1 else None,
                            )  # fmt: skip


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def fewest(model: ModelConfig, hardware: Hardware, *, rows: int, seq_len: int, precision: str) -> int | None:
    """The least power of two of devices that some layout fits, up to MOST."""
    gpus = 1
    while gpus <= MOST:
        if _fits(model, gpus, hardware, rows=rows, seq_len=seq_len, precision=precision):
            return gpus
        gpus *= 2
    return None


def _fits(model: ModelConfig, gpus: int, hardware: Hardware, *, rows: int, seq_len: int, precision: str) -> bool:
    """Whether any layout of so many devices does."""
    room = hardware.memory * hardware.usable
    starting = (layout for layout in layouts(model, gpus) if refusal(model, layout, rows) is None)
    return any(memory_of(model, layout, seq_len=seq_len, precision=precision).total <= room for layout in starting)


MOST = 16384


def does_not_fit(
    found: Candidate, hardware: Hardware, model: ModelConfig, *, rows: int, seq_len: int, precision: str
) -> str:
    """What is over, and what would help."""
    room, memory = hardware.memory * hardware.usable, found.memory
    kinds = sorted(memory.kinds().items(), key=lambda item: -item[1])
    name, size = kinds[0]
    listed = ", ".join(f"{kind} {value / GIB:.1f}" for kind, value in kinds)
    enough = fewest(model, hardware, rows=rows, seq_len=seq_len, precision=precision)
    if enough is None:
        cure = f"no power of two of them up to {MOST} does with rows of {seq_len} tokens: take shorter rows, or precision fp8"
    elif enough > found.layout.gpus:
        cure = f"take {enough} devices: of the powers of two the first that fits"
    elif _fits(model, found.layout.gpus, hardware, rows=4 * rows, seq_len=seq_len, precision=precision):
        cure = (
            f"the layouts that would fit take more than the {rows} rows of the smallest step: give more (--batch-size), or "
            f"{enough} devices"
        )
    else:
        cure = f"the number divides badly among layers and experts: {enough} devices fit, so do most of its multiples"
    return (
        f"nothing fits {hardware.name}'s {room / GIB:.1f} GiB a device on {found.layout.gpus}: the smallest layout "
        f"({found.layout.describe()}) takes {memory.total / GIB:.1f} GiB ({listed}), most of it {name} ({size / GIB:.1f}): {cure}"
    )
