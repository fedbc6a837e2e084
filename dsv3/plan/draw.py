"""The timeline of a step and the memory of a rank, as one picture.

    above   one row a pipeline rank: every forward and backward in the order of the schedule that is run (timeline.py), with the
            plan's seconds; white is the bubble. Of two stages a rank the second is paler; two passes side by side share a block
    below   bytes of a rank by kind, against what the device has

So many micro-batches are drawn as fill the pipeline, or SHOWN: the rest would repeat the middle.
Does not: count anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.plan.plan import Plan
from dsv3.plan.step import StepTime
from dsv3.plan.timeline import Block, filling, lay_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 24  # micro-batches drawn: more would be a grey bar
GIB = 2**30
KINDS = "FBIW"
COLOURS = {
    "F": ("forward", "#5b95c7", "#a9cbe8"),
    "B": ("backward", "#1f4e79", "#6f8fb0"),
    "I": ("backward for the input", "#2e8b57", "#8fc9a7"),
    "W": ("backward for the weights", "#e3a857", "#f2d6a8"),
}


def drawn(time: StepTime, ranks: int) -> list[Block]:
    """The blocks of the picture: a step of as many micro-batches as are shown."""
    return lay_out(time.schedule, ranks, _shown(time, ranks), time.passes)


def _shown(time: StepTime, ranks: int) -> int:
    """Micro-batches; of DualPipe's half come from either end."""
    number = min(time.micro_batches, max(SHOWN, filling(time.schedule, ranks)))
    return number // 2 * 2 if time.schedule == "dualpipe" else number


def draw(plan: Plan, path: Path) -> None:
    """Write the picture; the suffix decides its format.

    Raises:
        ValueError: matplotlib does not write such files.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 6), height_ratios=(3, 1), layout="constrained")
    if path.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        plt.close(figure)
        raise ValueError(f"--plot {path}: name a file that ends in .png, .svg or .pdf")
    _timeline(above, plan.chosen.layout.pipeline, plan.chosen.time)
    above.set_title(
        f"{plan.job.name} on {plan.chosen.layout.gpus} x {plan.hardware.name}: {plan.chosen.layout.describe()}"
    )
    _memory(below, plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _timeline(axes: Axes, ranks: int, time: StepTime) -> None:
    found = drawn(time, ranks)
    bars: dict[tuple[str, bool], list[tuple[float, float, int, float, float]]] = {}
    for block in found:
        height = 0.8 / len(block.parts)
        for place, part in enumerate(block.parts):
            # Of a V's two stages the first is the one in the upper half of the model: 0 .. ranks - 1.
            second = part.stage >= (ranks // 2 if time.schedule == "dualpipe" else ranks)
            bar = (block.start, block.seconds, block.rank, place * height - 0.4, height)
            bars.setdefault((part.kind, second), []).append(bar)
    for (kind, second), places in sorted(bars.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1])):
        name, *colours = COLOURS[kind]
        for start, seconds, rank, offset, height in places:
            axes.broken_barh(
                [(start, seconds)],
                (rank + offset, height),
                facecolors=colours[second],
                edgecolors="white",
                linewidth=0.2,
            )
        if not second:
            axes.barh([0], [0], color=colours[0], label=name)
    axes.set_yticks(range(ranks))
    axes.set_xlim(0, max(block.end for block in found))
    axes.invert_yaxis()
    axes.set_ylabel("pipeline rank")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, fontsize=8)
    left_out = time.micro_batches - _shown(time, ranks)
    note = f"; {left_out} more micro-batches follow in the middle" if left_out else ""
    axes.set_xlabel(
        f"seconds in {time.schedule}'s order{note}. The plan's step: {time.seconds:.2f} s, of it bubble {time.bubble:.2f}, "
        f"network {time.network + time.exchange:.2f}"
    )


def _memory(axes: Axes, plan: Plan) -> None:
    left = 0.0
    colours: Any = ("#2f6ca3", "#5b95c7", "#9cc3e6", "#e3a857", "#b9b9b9")
    for (kind, value), colour in zip(plan.chosen.memory.kinds().items(), colours, strict=True):
        axes.barh([0], [value / GIB], left=left, color=colour, label=f"{kind} {value / GIB:.1f}")
        left += value / GIB
    axes.axvline(plan.hardware.memory * plan.hardware.usable / GIB, color="black", linestyle="--")
    axes.set_yticks([])
    axes.set_xlabel("GiB a rank; dashed: what the device has")
    axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.45), frameon=False)
