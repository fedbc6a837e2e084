"""A plan: the layout, memory, time and money of a job on given hardware. Read `make_plan` top down.

    tokens/s      rows · tokens a row / seconds of a step
    MFU           tokens/s · FLOPs a token (causal, no MTP, nothing computed again) / data sheet's BF16 peak, as ISCA'25 counts
    GPU-hours     devices · seconds of all steps, the batch's ramp included; money: GPU-hours · price
    phases        what follows pre-training (longer rows, fine-tuning), each step by step in the same way

Does not: print (cli/plan.py), or draw (draw.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3.model.census import census, training_flops_per_token
from dsv3.plan.hardware import Hardware
from dsv3.plan.job import Job, Phase
from dsv3.plan.memory import memory_of
from dsv3.plan.search import GIB, Candidate, candidates, does_not_fit, examine, layout_of, refusal
from dsv3.plan.serving import Serving, serving_of
from dsv3.plan.step import DSV3, REPORT, Layout, StepTime, System, step_time


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    name: str
    tokens: float
    gpu_hours: float
    dollars: float
    gpus: int
    fits: bool
    """Whether this package holds its rows in memory, computed again where need be. It has no context parallelism. False: the
    cost is of a system that has it, with layers computed again."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See the header; `to_json` has it all as plain values."""

    job: Job
    hardware: Hardware
    system: System
    chosen: Candidate
    why: str
    """Which of the recipe's layout and the search's it is."""
    alternatives: tuple[Candidate, ...]
    """Others that fit, fastest first."""
    tokens: float
    tokens_per_second: float
    mfu: float
    phases: tuple[PhaseCost, ...]
    """Pre-training first."""
    notes: tuple[str, ...]
    """What a reader of the numbers would not guess."""
    as_dsv3: StepTime
    """A step of the same layout by this package as it stands, which does not hide its all-to-all."""
    serving: Serving

    @property
    def gpu_hours(self) -> float:
        """Of pre-training."""
        return self.phases[0].gpu_hours

    @property
    def hours(self) -> float:
        return self.gpu_hours / self.chosen.layout.gpus

    def to_json(self) -> dict[str, Any]:
        layout, memory, time = self.chosen.layout, self.chosen.memory, self.chosen.time
        room = self.hardware.memory * self.hardware.usable
        return {
            "recipe": self.job.name,
            "hardware": self.hardware.name,
            "gpus": layout.gpus,
            "system": self.system.name,
            "parameters": census(self.job.model).in_memory,
            "precision": self.job.train.precision,
            "layout": {**dataclasses.asdict(layout), "data": layout.data, "replicas": layout.replicas, "why": self.why},
            "memory_bytes": {**memory.kinds(), "total": memory.total, "usable": room},
            "step": time._asdict(),
            "step_seconds": time.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second / layout.gpus,
            "mfu": self.mfu,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "gpu_hours_total": sum(phase.gpu_hours for phase in self.phases),
            "price": self.hardware.price,
            "price_source": self.hardware.priced,
            "dollars": self.phases[0].dollars,
            "dollars_total": sum(phase.dollars for phase in self.phases),
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "as_dsv3": {
                "step_seconds": self.as_dsv3.seconds,
                "gpu_hours": self.gpu_hours * self.as_dsv3.seconds / time.seconds,
            },
            "alternatives": [
                {
                    **dataclasses.asdict(other.layout),
                    "step_seconds": other.time.seconds,
                    "memory_bytes": other.memory.total,
                }
                for other in self.alternatives
            ],
            "serving": self.serving.to_json(),
            "notes": self.notes,
            "sources": self.hardware.sources,
        }


def make_plan(
    job: Job, hardware: Hardware, gpus: int | None = None, *, system: System | None = None, search: bool = False
) -> Plan:
    """The recipe's own layout if it fits so many devices, or else (or with `search`) the fastest that does.

    Args:
        gpus: None: as many as the job is meant for.
        system: None: this package on a CPU, the report's kernels elsewhere.

    Raises:
        ValueError: nothing fits; the message says what is over and what would help.
    """
    count = job.gpus if gpus is None else gpus
    if count < 1:
        raise ValueError(f"--gpus is {count}: give at least 1")
    system = system or (DSV3 if hardware.name == "cpu" else REPORT)
    rows, seq_len, precision = job.train.schedule.batch_size, job.train.seq_len, job.train.precision
    least, room = min(job.rows()), hardware.memory * hardware.usable
    own = layout_of(job.parallel, count, micro_batch=job.train.micro_batch, recompute=job.train.recompute)
    found, smallest = candidates(
        job.model, count, hardware, system, rows=rows, least=least, seq_len=seq_len, precision=precision,
        fp8_dispatch=own.fp8_dispatch,
    )  # fmt: skip
    why = refusal(job.model, own, least)
    if why is None:
        chosen = examine(job.model, own, hardware, system, rows=rows, seq_len=seq_len, precision=precision)
        if chosen.memory.total <= room and not search:
            return _plan(job, hardware, system, chosen, "the recipe's", found)
        smallest = smallest or chosen
        why = None if chosen.memory.total <= room else f"it takes {chosen.memory.total / GIB:.1f} GiB a rank"
    if not found:
        if smallest is None:
            raise ValueError(f"no layout of {count} devices suits {least} rows a step: {why or 'take another number'}")
        raise ValueError(does_not_fit(smallest, hardware, job.model, rows=least, seq_len=seq_len, precision=precision))
    notes = [] if why is None else [f"the recipe's own layout ({own.describe()}) is not taken: {why}"]
    return _plan(job, hardware, system, found[0], "the fastest that fits", found, notes)


def _plan(
    job: Job, hardware: Hardware, system: System, chosen: Candidate, why: str, found: list[Candidate],
    notes: Sequence[str] = (),
) -> Plan:  # fmt: skip
    rows, seq_len = job.train.schedule.batch_size, job.train.seq_len
    rate = rows * seq_len / chosen.time.seconds
    flops = training_flops_per_token(job.model, seq_len, causal=True)
    layout = chosen.layout
    peak = hardware.peak.get("bfloat16", max(hardware.peak.values()))
    dsv3 = step_time(job.model, layout, hardware, DSV3, rows=rows, seq_len=seq_len, precision=job.train.precision)
    return Plan(
        job=job, hardware=hardware, system=system, chosen=chosen, why=why,
        alternatives=tuple(other for other in found if other.layout != layout)[:10],
        tokens=job.tokens, tokens_per_second=rate, mfu=rate / layout.gpus * flops / peak,
        phases=(_pretraining(job, layout, hardware, system), *(_phase(job, p, layout, hardware, system) for p in job.phases)),
        notes=(*notes, *_notes(layout, chosen.time, system)), as_dsv3=dsv3,
        serving=serving_of(job.model, hardware, most=layout.gpus),
    )  # fmt: skip


def _notes(layout: Layout, time: StepTime, system: System) -> Iterator[str]:
    if layout.pipeline > 1 and time.schedule != layout.schedule:
        yield (
            f"times are of {time.schedule}, which the {system.name}'s system runs where this package runs {layout.schedule}; "
            "memory is this package's"
        )


def _pretraining(job: Job, layout: Layout, hardware: Hardware, system: System) -> PhaseCost:
    """Every step counts as long as its own batch takes."""
    seconds: dict[int, float] = {}
    total = 0.0
    for rows, steps in job.rows().items():
        count = layout.micro_batches(rows)
        if count not in seconds:
            seconds[count] = _seconds(job, layout, hardware, system, rows, job.train.seq_len)
        total += steps * seconds[count]
    hours = total * layout.gpus / 3600
    return PhaseCost(
        name="pre-training", tokens=job.tokens, gpu_hours=hours, dollars=hours * hardware.price, gpus=layout.gpus, fits=True
    )  # fmt: skip


def _phase(job: Job, phase: Phase, layout: Layout, hardware: Hardware, system: System) -> PhaseCost:
    """On all of the devices, or on a half, a quarter, ... of them: few long rows leave a deep pipeline idle. The most devices
    that cost at most a tenth more than the cheapest choice does, among those that hold the rows, or if none does the weights;
    layers are computed again where that is needed."""
    steps, precision = phase.tokens / (phase.rows * phase.seq_len), job.train.precision
    room, found = hardware.memory * hardware.usable, list[tuple[bool, float, Layout]]()
    gpus = layout.gpus
    while gpus and gpus % layout.pipeline == 0:
        for again in (False, True):
            tried = dataclasses.replace(
                layout, gpus=gpus, expert=min(layout.expert, gpus // layout.pipeline), micro_batch=1,
                recompute=layout.recompute or again,
            )  # fmt: skip
            memory = memory_of(job.model, tried, seq_len=phase.seq_len, precision=precision)
            fits = memory.total <= room
            if fits or (again and memory.weights + memory.gradients + memory.optimizer <= room):
                hours = steps * _seconds(job, tried, hardware, system, phase.rows, phase.seq_len) * gpus / 3600
                found.append((fits, hours, tried))
            if fits:
                break
        gpus = gpus // 2 if gpus % 2 == 0 else 0
    fits = any(fits for fits, _, _ in found)
    choices = [(hours, tried) for fit, hours, tried in found if fit == fits]
    cheapest = min(hours for hours, _ in choices)
    hours, used = next(choice for choice in choices if choice[0] <= 1.1 * cheapest)
    return PhaseCost(
        name=phase.name, tokens=phase.tokens, gpu_hours=hours, dollars=hours * hardware.price, gpus=used.gpus, fits=fits
    )  # fmt: skip


def _seconds(job: Job, layout: Layout, hardware: Hardware, system: System, rows: int, seq_len: int) -> float:
    time = step_time(job.model, layout, hardware, system, rows=rows, seq_len=seq_len, precision=job.train.precision)
    return time.seconds
