"""A pipeline's step in time: which block runs on which rank, from when to when, in the order of the schedule that is run.

    F    forward of a micro-batch through a stage           I    backward for its input
    B    the whole backward, I and W in one                 W    backward for the weights
    FB   a forward and a whole backward side by side (DualPipe and DualPipeV)

    1f1b                     as Schedule1F1B of torch.distributed.pipelining runs it: one stage a rank
    zero-bubble, dualpipev   torch's own lists of actions (ScheduleZBVZeroBubble, ScheduleDualPipeV): two stages a rank, in a V
    dualpipe                 two DualPipeV of half the ranks, each with half the micro-batches, one the mirror of the other: that
                             is where DualPipeV comes from (DualPipe's README). Rank r holds stage r, and stage P-1-r of those
                             micro-batches that come from the other end

Between a stage's I and its W the weights' gradients are a promise, which holds memory: `held` counts both kinds of waiting.

A block starts when its rank is free and what it reads is there: F the F of the stage before, a backward the one of the stage
behind. All stages take as long: the plan's slowest rank sets the pace. step.py takes the bubble from here, memory.py what
waits, draw.py the picture.
Source: V3 report section 3.2.1; ZB-V: arXiv 2401.10241. Legend: P ranks, M micro-batches.
Does not: know seconds of its own; send anything; draw interleaved stages, which are other software's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

from dsv3.parallel.stage import STAGES_A_RANK

_OF_TORCH: dict[str, Any] = {"zero-bubble": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}


class Part(NamedTuple):
    """One pass of a micro-batch through a stage. kind: F, I, W or B."""

    kind: str
    stage: int
    micro: int


class Action(NamedTuple):
    """What a rank does next. kind: that of its part, or FB for two parts."""

    kind: str
    parts: tuple[Part, ...]


class Seconds(NamedTuple):
    """Of one micro-batch through all stages of a rank; `pair`: forward and whole backward, side by side where that is done."""

    forward: float
    backward: float
    """For the input alone; the whole of it where a backward pass is not divided."""
    weights: float
    pair: float

    def of(self, kind: str) -> float:
        return {
            "F": self.forward, "I": self.backward, "W": self.weights, "B": self.backward + self.weights, "FB": self.pair,
        }[kind]  # fmt: skip


class Block(NamedTuple):
    """An action in time."""

    rank: int
    kind: str
    parts: tuple[Part, ...]
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


def order(schedule: str, ranks: int, micro_batches: int) -> list[list[Action]]:
    """What each rank does, one after the other.

    Raises:
        ValueError: there is no such schedule.
    """
    if schedule == "1f1b":
        return [_one_forward_one_backward(rank, ranks, micro_batches) for rank in range(ranks)]
    if schedule not in _OF_TORCH:
        raise ValueError(f"schedule {schedule!r} has no order here: known are 1f1b, {', '.join(_OF_TORCH)}")
    # Torch tells an order in public as a schedule's `pipeline_order`, and a schedule needs processes. The method that fills it
    # needs three numbers: tests/plan/test_timeline.py compares both, and says what to do where torch has moved.
    listing = getattr(_OF_TORCH[schedule], "_calculate_single_rank_operations", None)
    assert listing is not None, (
        f"torch {torch.__version__} lists {schedule}'s actions elsewhere: see dsv3/plan/timeline.py"
    )
    numbers = SimpleNamespace(pp_group_size=ranks, num_stages=2 * ranks, _n_microbatches=micro_batches)
    return [actions_of(listing(numbers, rank)) for rank in range(ranks)]


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """Warm-up forwards, then one backward and one forward in turn, then the backwards that are left."""
    warm = min(ranks - rank, micro_batches)
    found = [Part("F", rank, micro) for micro in range(warm)]
    for micro in range(micro_batches):
        found.append(Part("B", rank, micro))
        if warm + micro < micro_batches:
            found.append(Part("F", rank, warm + micro))
    return [Action(part.kind, (part,)) for part in found]


def actions_of(operations: Iterable[Any]) -> list[Action]:
    """From torch's, among which None is a turn in which a rank waits."""
    found = []
    for operation in operations:
        if operation is not None:
            parts = tuple(
                Part(each.computation_type.value, each.stage_index, each.microbatch_index)
                for each in operation.sub_actions or (operation,)
            )
            found.append(Action("FB" if len(parts) == 2 else parts[0].kind, parts))
    return found


class _Placed(NamedTuple):
    """An action among all of a step's: every one comes behind those that it waits for, which are told by their places."""

    rank: int
    action: Action
    waits: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def _program(schedule: str, ranks: int, micro_batches: int) -> tuple[_Placed, ...]:
    orders, stages = order(schedule, ranks, micro_batches), ranks * STAGES_A_RANK[schedule]
    places: dict[tuple[bool, int, int], int] = {}  # (is a forward, stage, micro-batch) -> place
    last, done, found = [-1] * ranks, [0] * ranks, list[_Placed]()
    while any(done[rank] < len(orders[rank]) for rank in range(ranks)):
        before = len(found)
        for rank in range(ranks):
            while done[rank] < len(orders[rank]):
                action = orders[rank][done[rank]]
                reads = [read for part in action.parts if (read := _read(part, stages)) is not None]
                if any(read not in places for read in reads):
                    break
                waits = [places[read] for read in reads] + ([last[rank]] if last[rank] >= 0 else [])
                for part in action.parts:
                    if part.kind != "W":
                        places[part.kind == "F", part.stage, part.micro] = len(found)
                last[rank], done[rank] = len(found), done[rank] + 1
                found.append(_Placed(rank, action, tuple(waits)))
        assert len(found) > before, f"{schedule}'s order on {ranks} ranks waits for itself"
    return tuple(found)


def _read(part: Part, stages: int) -> tuple[bool, int, int] | None:
    """What a part needs of another stage, or of its own forward at the last one."""
    if part.kind == "F":
        return (True, part.stage - 1, part.micro) if part.stage else None
    if part.kind == "W":
        return None
    return (False, part.stage + 1, part.micro) if part.stage < stages - 1 else (True, part.stage, part.micro)


def lay_out(schedule: str, ranks: int, micro_batches: int, seconds: Seconds) -> list[Block]:
    """All blocks of a step.

    Args:
        micro_batches: of a step. dualpipe: an even number, half of them from either end.
    """
    if schedule == "dualpipe":
        half = lay_out("dualpipev", ranks // 2, micro_batches // 2, Seconds(*(2 * each for each in seconds)))
        return half + [block._replace(rank=ranks - 1 - block.rank) for block in half]
    a_stage = Seconds(*(each / STAGES_A_RANK[schedule] for each in seconds))
    ends, blocks = list[float](), list[Block]()
    for rank, action, waits in _program(schedule, ranks, micro_batches):
        start = max((ends[place] for place in waits), default=0.0)
        block = Block(rank, action.kind, action.parts, start, a_stage.of(action.kind))
        ends.append(block.end)
        blocks.append(block)
    return blocks


def idle_seconds(schedule: str, ranks: int, micro_batches: int, seconds: Seconds) -> float:
    """The bubble: what a step takes beyond `micro_batches` times a forward and a backward. It does not grow with them once the
    pipeline is full, so that no more are laid out than fill it."""
    if ranks == 1:
        return 0.0
    laid_out = min(micro_batches, filling(schedule, ranks))
    if schedule in ("dualpipe", "dualpipev"):  # they take no fewer: a step of fewer waits as long as if it were full
        laid_out = filling(schedule, ranks)
    end = max(block.end for block in lay_out(schedule, ranks, laid_out, seconds))
    return end - laid_out * seconds.pair


@functools.lru_cache(maxsize=256)
def held(schedule: str, ranks: int) -> tuple[tuple[tuple[tuple[int, int], ...], ...], ...]:
    """What each rank holds of a full step's micro-batches, at the moments when no other moment has more of everything.

    Returns:
        By rank: moments, and in each for every stage of the rank, first to last, (micro-batches whose activations wait for the
        backward, micro-batches whose weights' gradients are promised: kernels/later.py).
    """
    found = []
    for actions in order(schedule, ranks, 2 * filling(schedule, ranks)):
        stages = sorted({part.stage for action in actions for part in action.parts})
        now, moments = dict.fromkeys(stages, (0, 0)), dict[tuple[tuple[int, int], ...], None]()
        for part in (part for action in actions for part in action.parts):
            running, waiting = now[part.stage]
            more = {"F": (1, 0), "I": (-1, 1), "B": (-1, 0), "W": (0, -1)}[part.kind]
            now[part.stage] = (running + more[0], waiting + more[1])
            moments[tuple(now.values())] = None
        found.append(tuple(one for one in moments if not any(_less(one, other) for other in moments)))
    return tuple(found)


def _less(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> bool:
    return one != other and all(a <= b and c <= d for (a, c), (b, d) in zip(one, other))


def filling(schedule: str, ranks: int) -> int:
    """Micro-batches from which on every rank has work without a pause in the middle of a step."""
    return ranks if schedule == "1f1b" else 2 * ranks
