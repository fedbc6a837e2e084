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
    from dsv3.plan.hardware import Hardware
    from dsv3.plan.job import Job
    from dsv3.plan.plan import PhaseCost, Plan
    from dsv3.plan.serving import Serving

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PlanVerb:
    """Memory, time and money of a training run, and what a deployment would serve, before either is paid for.
    Examples: dsv3 plan v3 --hardware h800 --gpus 2048
    dsv3 plan config.json --hardware h100 --gpus 64 --tokens 1e12 --precision fp8
    dsv3 plan v3 --hardware h200 --gpus 16 --serving --context 8000"""

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
    serving: bool = False
    """A deployment alone, on so many devices, whether training would fit them or not."""
    context: int | None = None
    """With --serving: tokens in a request's cache, on average. None: 4,989, as on DeepSeek's day."""
    per_user: float | None = None
    """With --serving: tokens/s that a request gets at least. None: 20, as on that day."""
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
    if verb.serving:
        _serving_alone(verb, job, hardware)
        return
    if verb.context is not None or verb.per_user is not None:
        raise ValueError("--context and --per-user are a deployment's: give --serving with them")
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


def _serving_alone(verb: PlanVerb, job: Job, hardware: Hardware) -> None:
    from rich.console import Console

    from dsv3.plan.serving import CONTEXT, PER_USER, serving_of

    given = [name for name in ("search", "plot", "dry_run", "system") if getattr(verb, name)]
    if given:
        raise ValueError(f"--serving plans no training: drop --{given[0].replace('_', '-')}")
    context = CONTEXT if verb.context is None else verb.context
    per_user = PER_USER if verb.per_user is None else verb.per_user
    serving = serving_of(job.model, hardware, context=context, per_user=per_user, most=verb.gpus)
    if verb.json:
        print(
            json.dumps({"recipe": job.name, "hardware": hardware.name, "gpus": verb.gpus, "serving": serving.to_json()})
        )
        return
    on = hardware.name if verb.gpus is None else f"{verb.gpus} x {hardware.name}"
    shown = table(f"{job.name} served on {on}", ("", "", ""))
    _add_serving(shown, serving, hardware)
    Console().print(shown)
    _rates(hardware, job.name)


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
            "step" if name.startswith("products") else "", name, f"{_seconds(seconds)} ({seconds / time.seconds:.0%})"
        )
    shown.add_row("", f"together, {_number(time.micro_batches, 'micro-batch', 'es')}", _seconds(time.seconds))
    rate = made.tokens_per_second
    shown.add_row(
        "speed", "tokens/s", f"{rate:,.0f} ({rate / layout.gpus:,.0f} a device), MFU {made.mfu:.1%} of BF16's peak"
    )
    for index, phase in enumerate(made.phases):
        where = f"on {_number(phase.gpus, 'device')}" + ("" if phase.fits else "; its rows need context parallelism")
        shown.add_row(
            "cost" if index == 0 else "", f"{phase.name}, {_count(phase.tokens)} tokens", f"{_cost(phase)} ({where})"
        )
    shown.add_row("", "together", f"{_cost(*made.phases)} at ${hardware.price:g}; pre-training {_days(made.hours)}")
    if made.as_dsv3.seconds > 1.001 * time.seconds:
        hours = made.gpu_hours * made.as_dsv3.seconds / time.seconds
        shown.add_row(
            "", "this package today",
            f"{_seconds(made.as_dsv3.seconds)} a step, pre-training {hours:,.0f} GPU-hours (--system dsv3): it hides little of its "
            "all-to-all, whose two hops take turns",
        )  # fmt: skip
    _add_serving(shown, made.serving, hardware)
    console.print(shown)
    for note in made.notes:
        console.print(f"note: {note}")
    if made.alternatives:
        others = table("other layouts that fit, fastest first", ("layout", "a step", "GiB"))
        for other in made.alternatives:
            others.add_row(other.layout.describe(), _seconds(other.time.seconds), f"{other.memory.total / GIB:,.1f}")
        console.print(others)
    console.print(f"price: ${hardware.price:g} an hour and device ({hardware.priced or 'not given: --price'})")
    _rates(hardware, made.job.name)


def _rates(hardware: Hardware, name: str) -> None:
    from rich.console import Console

    kept = f"; a run keeps {hardware.kept:.2f} of them (dsv3 plan {name} --published)" if hardware.kept < 1 else ""
    Console().print(f"rates: {hardware.sources}{kept}")


def _cost(*phases: PhaseCost) -> str:
    hours, dollars = sum(phase.gpu_hours for phase in phases), sum(phase.dollars for phase in phases)
    return f"{hours:,.0f} GPU-hours, ${dollars:,.0f}" if hours >= 10 else f"{hours:,.3g} GPU-hours, ${dollars:,.2g}"


def _add_serving(shown: Any, serving: Serving, hardware: Hardware) -> None:
    shown.add_row(
        "serving", f"cache of {serving.context:,} tokens",
        f"{serving.cache_bytes_per_request / 1e6:,.1f} MB ({serving.cache_bytes_per_token:,.0f} bytes a token)",
    )  # fmt: skip
    for name, unit in (("prefill unit", serving.prefill), ("decode unit", serving.decode)):
        if unit is None:
            shown.add_row("", name, "fits no unit of so few devices")
            continue
        each = ""
        if unit.per_user:
            each = f"; {_number(unit.batch, 'request')} a device, {unit.per_user:.0f} tokens/s each"
            if unit.per_user < serving.per_user:
                each += f" (fewer than the {serving.per_user:g} wanted)"
        price = f", ${hardware.price / 3.6e-3 / unit.tokens_per_second:,.2g} a million" if hardware.price else ""
        shown.add_row(
            "", name,
            f"{_number(unit.devices, 'device')}, {unit.experts:g} experts of a layer each: {unit.tokens_per_second:,.0f} tokens/s "
            f"a device{price}{each} (bound by {unit.limit})",
        )  # fmt: skip
    shown.add_row(
        "", "network's bound", f"{serving.bound_by_network:,.0f} tokens/s of a request between nodes (ISCA'25's count)"
    )


def _published() -> None:
    """V3's run as a whole, then every figure; where a run is predicted, from the others alone."""
    from rich.console import Console

    from dsv3.plan.hardware import hardware_named
    from dsv3.plan.plan import make_plan
    from dsv3.plan.published import RUNS, Comparison, all_comparisons, report_run
    from dsv3.recipes import v3

    made, table_1 = make_plan(v3.job(), hardware_named("h800"), 2048), "V3 report table 1; ours with all runs' share"
    hours, dollars = (sum(getattr(phase, kind) for phase in made.phases) for kind in ("gpu_hours", "dollars"))
    whole = [
        Comparison("V3's pre-training", 2.664e6, made.gpu_hours, "GPU-hours", table_1),
        Comparison("V3 in all", 2.788e6, hours, "GPU-hours", table_1),
        Comparison("V3 in all", 5.576e6, dollars, "dollars", table_1),
    ]
    shown, sources = (
        table("published figures, and the planner's", ("", "published", "ours", "", "error", "")),
        list[str](),
    )
    for found in [*whole, *all_comparisons()]:
        if found.source not in sources:
            sources.append(found.source)
        numbers = (f"{n:,.0f}" if n >= 1000 else f"{n:,.4g}" for n in (found.published, found.ours))
        shown.add_row(found.name, *numbers, found.unit, f"{found.error:+.1%}", f"[{sources.index(found.source) + 1}]")
    Console().print(shown)
    for number, source in enumerate(sources, 1):
        Console().print(f"[{number}] {source}", markup=False)
    errors = [report_run(RUNS[:out] + RUNS[out + 1 :])[0].error for out in range(1, len(RUNS))]
    Console().print(
        f"V3's GPU-hours a trillion tokens from the other runs' numbers alone: {report_run()[0].error:+.1%}; with any one of those "
        f"left out too {min(errors):+.1%} to {max(errors):+.1%}"
    )
    for run in RUNS:
        if run.assumed:
            Console().print(f"assumed of {run.name}: {run.assumed}")


def _number(number: int, of: str, plural: str = "s") -> str:
    return f"{number:,} {of}{'' if number == 1 else plural}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3f} s" if seconds >= 1 or not seconds else f"{1000 * seconds:,.3g} ms"


def _count(tokens: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= size:
            return f"{tokens / size:,.4g}{letter}"
    return f"{tokens:,.0f}"


def _days(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:,.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"
