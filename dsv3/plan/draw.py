"""The timeline of a step and the memory of a rank, as one picture.

    above   one row a pipeline rank: forwards (light), backwards (dark), idle between; 1F1B's order, which the other schedules
            change but not the sums: each micro-batch of a rank as one block, the bubble as the plan counts it
    below   bytes of a rank by kind, against what the device has

Does not: simulate the library's schedules action by action.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.plan.plan import Plan
from dsv3.plan.step import StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 24  # micro-batches drawn: more would be a grey bar
GIB = 2**30


def blocks(
    ranks: int, micro_batches: int, forward: float, backward: float
) -> list[list[tuple[str, int, float, float]]]:
    """1F1B over ranks: per rank (kind, micro-batch, start, seconds), in order. A block starts when its rank is free and the
    neighbour's block that it reads has ended."""
    ends: dict[tuple[str, int, int], float] = {}
    orders = [_order(rank, ranks, micro_batches) for rank in range(ranks)]
    free, done = [0.0] * ranks, [0] * ranks
    found: list[list[tuple[str, int, float, float]]] = [[] for _ in range(ranks)]
    while any(done[rank] < len(orders[rank]) for rank in range(ranks)):
        moved = False
        for rank in range(ranks):
            while done[rank] < len(orders[rank]):
                kind, micro = orders[rank][done[rank]]
                before = rank - 1 if kind == "F" else rank + 1
                ready = ends.get((kind, micro, before), 0.0 if before in (-1, ranks) else None)
                if ready is None:
                    break
                start, seconds = max(free[rank], ready), forward if kind == "F" else backward
                free[rank] = ends[kind, micro, rank] = start + seconds
                found[rank].append((kind, micro, start, seconds))
                done[rank], moved = done[rank] + 1, True
        assert moved, "1F1B's order waits for itself"
    return found


def _order(rank: int, ranks: int, micro_batches: int) -> list[tuple[str, int]]:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards that are left."""
    warm = min(ranks - rank, micro_batches)
    order = [("F", micro) for micro in range(warm)]
    for micro in range(micro_batches):
        order.append(("B", micro))
        if warm + micro < micro_batches:
            order.append(("F", warm + micro))
    return order


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
    micro_batches = min(time.micro_batches, SHOWN)
    for rank, row in enumerate(blocks(ranks, micro_batches, time.forward, time.backward)):
        for kind, colour in (("F", "#9cc3e6"), ("B", "#2f6ca3")):
            bars = [(start, seconds) for which, _, start, seconds in row if which == kind]
            axes.broken_barh(bars, (rank - 0.4, 0.8), facecolors=colour, edgecolors="white", linewidth=0.3)
    axes.set_yticks(range(ranks))
    axes.invert_yaxis()
    axes.set_ylabel("pipeline rank")
    left_out = time.micro_batches - micro_batches
    note = f"; {left_out} more micro-batches follow in the middle" if left_out else ""
    axes.set_xlabel(
        f"seconds in 1F1B's order{note}. The plan's step: {time.seconds:.2f} s, of it bubble {time.bubble:.2f}, "
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
