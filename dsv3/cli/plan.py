"""The verb `plan`: what a run will need before it is paid for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dsv3.cli.console import table

if TYPE_CHECKING:
    from dsv3.plan.job import Job
    from dsv3.plan.plan import Plan

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PlanVerb:
    """Memory, time and money of a training run, and what a deployment would serve, before either is paid for.
    Examples: dsv3 plan v3 --hardware h800 --gpus 2048
    dsv3 plan config.json --hardware h100 --gpus 64 --tokens 1e12 --precision fp8"""

    recipe: tyro.conf.Positional[str]
    """tiny, mini, v3; a config.json or its folder; or a TOML file (fields: see dsv3/plan/job.py)."""
    hardware: str = "h800"
    """h800, h100, h200, b200, gb200, cpu; or a TOML file (fields: see dsv3/plan/hardware.py)."""
    gpus: int | None = None
    """Devices. None: as many as the recipe is meant for."""
    json: bool = False
    """Everything as JSON."""
    search: bool = False
    """The fastest layout that fits, even where the recipe's does."""
    price: float | None = None
    """Dollars an hour and device, instead of the hardware's."""
    system: Literal["report", "exposed", "dsv3"] | None = None
    """Whose kernels: the report's (all-to-all behind products), DeepEP without that, or this package's. None: the report's;
    on a CPU this package's."""
    tokens: float | None = None
    """Of a config.json: tokens of the run, such as 1e12."""
    seq_len: int | None = None
    batch_size: int | None = None
    """Rows of a step."""
    micro_batch: int | None = None
    precision: Literal["bfloat16", "float32", "fp8"] | None = None
    plot: Path | None = None
    """Draw the step's timeline and the memory into this file (.png, .svg, .pdf)."""
    published: bool = False
    """Show instead how the planner does on published runs, each predicted from the others."""
    dry_run: bool = False
    """Also build this run's ranks on fake tensors among as many pretended processes, and compare the bytes."""


def plan(verb: PlanVerb) -> None:
    from dsv3.plan.hardware import hardware_named
    from dsv3.plan.plan import make_plan
    from dsv3.plan.step import SYSTEMS

    if verb.published:
        _published()
        return
    hardware = hardware_named(verb.hardware, price=verb.price)
    job = _job(verb)
    made = make_plan(job, hardware, verb.gpus, system=SYSTEMS[verb.system] if verb.system else None, search=verb.search)
    found = made.to_json()
    if verb.dry_run:
        from dsv3.plan.rehearse import rehearse

        found["dry_run"] = rehearse(job, made.chosen.layout)
    if verb.plot:
        from dsv3.plan.draw import draw

        draw(made, verb.plot)
    if verb.json:
        print(json.dumps(found, indent=1))
        return
    _show(made)
    if verb.dry_run:
        worst = found["dry_run"]["largest_difference"]
        differences = ", ".join(f"{kind} {share:.3%}" for kind, share in worst.items())
        print(f"dry run on {made.chosen.layout.gpus} pretended ranks: largest difference from this plan: {differences}")


def _job(verb: PlanVerb) -> Job:
    """Of the recipe's name or file; options change a file's run, not a recipe's model."""
    from dsv3.plan.job import job_from_file, with_options
    from dsv3.recipes import mini, tiny, v3

    names = ("tokens", "seq_len", "batch_size", "micro_batch", "precision")
    options: dict[str, Any] = {n: getattr(verb, n) for n in names if getattr(verb, n) is not None}
    recipes = {"tiny": tiny.job, "mini": mini.job, "v3": v3.job}
    if verb.recipe in recipes:
        return with_options(recipes[verb.recipe](), **options)
    if not re.search(r"[./]", verb.recipe) and not Path(verb.recipe).exists():
        raise ValueError(
            f"there is no recipe {verb.recipe!r}: known are {', '.join(recipes)}, or give a config.json or TOML file"
        )
    return job_from_file(Path(verb.recipe), **options)


def _show(made: Plan) -> None:
    from rich.console import Console

    layout, time, hardware = made.chosen.layout, made.chosen.time, made.hardware
    console = Console()
    shown = table(f"{made.job.name} on {layout.gpus} x {hardware.name}: {layout.describe()} ({made.why})", ("", "", ""))
    room = hardware.memory * hardware.usable
    for kind, value in made.chosen.memory.kinds().items():
        shown.add_row("memory a rank" if kind == "weights" else "", kind, f"{value / GIB:,.2f} GiB")
    shown.add_row("", "together", f"{made.chosen.memory.total / GIB:,.2f} of {room / GIB:,.1f} GiB usable")
    parts = {
        "products and passes": time.compute, "network on top": time.network, "bubble": time.bubble,
        "gradients and weights": time.exchange, "optimizer": time.optimizer,
    }  # fmt: skip
    for name, seconds in parts.items():
        shown.add_row(
            "step" if name.startswith("products") else "", name, f"{seconds:,.3f} s ({seconds / time.seconds:.0%})"
        )
    shown.add_row("", f"together, {time.micro_batches} micro-batches", f"{time.seconds:,.3f} s")
    rate = made.tokens_per_second
    shown.add_row(
        "speed", "tokens/s", f"{rate:,.0f} ({rate / layout.gpus:,.0f} a device), MFU {made.mfu:.1%} of BF16's peak"
    )
    for index, phase in enumerate(made.phases):
        where = f"on {phase.gpus} devices" + ("" if phase.fits else "; rows too long for one device here")
        shown.add_row(
            "cost" if index == 0 else "", f"{phase.name}, {_count(phase.tokens)} tokens",
            f"{phase.gpu_hours:,.0f} GPU-hours, ${phase.dollars:,.0f} ({where})",
        )  # fmt: skip
    hours, dollars = sum(p.gpu_hours for p in made.phases), sum(p.dollars for p in made.phases)
    shown.add_row(
        "",
        "together",
        f"{hours:,.0f} GPU-hours, ${dollars:,.0f} at ${hardware.price:g}; pre-training {_days(made.hours)}",
    )
    if made.system.name != "dsv3":
        slower = made.as_dsv3.seconds
        shown.add_row("", "this package today", f"{slower:,.2f} s a step: its all-to-all is not hidden (--system dsv3)")
    _add_serving(shown, made)
    console.print(shown)
    for note in made.notes:
        console.print(f"note: {note}")
    if made.alternatives:
        others = table("other layouts that fit, fastest first", ("layout", "s a step", "GiB"))
        for other in made.alternatives:
            others.add_row(other.layout.describe(), f"{other.time.seconds:,.2f}", f"{other.memory.total / GIB:,.1f}")
        console.print(others)
    console.print(
        f"rates: {hardware.sources}; a run keeps {hardware.kept:.2f} of them (dsv3 plan {made.job.name} --published)"
    )


def _add_serving(shown: Any, made: Plan) -> None:
    serving = made.serving
    shown.add_row(
        "serving", f"cache of {serving.context:,} tokens",
        f"{serving.cache_bytes_per_request / 1e6:,.1f} MB ({serving.cache_bytes_per_token:,.0f} bytes a token)",
    )  # fmt: skip
    for name, unit in (("prefill unit", serving.prefill), ("decode unit", serving.decode)):
        if unit is None:
            shown.add_row("", name, "the weights do not fit")
            continue
        each = f"; {unit.batch} requests a device, {unit.per_user:.0f} tokens/s each" if unit.per_user else ""
        shown.add_row(
            "", name,
            f"{unit.devices} devices, {unit.experts:g} experts of a layer each: {unit.tokens_per_second:,.0f} tokens/s a device"
            f"{each} (bound by {unit.limit})",
        )  # fmt: skip


def _published() -> None:
    from rich.console import Console

    from dsv3.plan.published import all_comparisons

    shown = table("published figures, and the planner's", ("", "published", "ours", "", "error", "source"))
    for found in all_comparisons():
        shown.add_row(
            found.name, f"{found.published:,.4g}", f"{found.ours:,.4g}", found.unit, f"{found.error:+.1%}", found.source
        )
    Console().print(shown)


def _count(tokens: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= size:
            return f"{tokens / size:,.4g}{letter}"
    return f"{tokens:,.0f}"


def _days(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:,.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"
