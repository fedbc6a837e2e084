"""Seconds of a training step: what a rank computes and sends, the pipeline's bubble, the optimizer.

    a rank's pair    F + B + W of one micro-batch through its layers: the slower of processors and network where the all-to-all
                     runs behind the other micro-batch's products (DualPipe), their sum where it does not
    bubble           what the schedule's own order takes beyond the pairs (timeline.py): idle time, and of forwards and backwards
                     without a partner what they take beyond a pair. Of others' software, which has no order here:
                     interleaved (P-1)(F+B) / v · zb1p (P-1)(F+B-2W)
    step             micro-batches · pair + bubble + gradients' and weights' exchange + AdamW's passes over memory

W waits where layers are computed again and in FP8 too (kernels/later.py); the head's does not: its gradients are made at once.
The slowest rank counts: layers come whole, and the head with the MTP layers sits on one rank.
All of it is divided by what a run keeps of its kernels' rates (hardware.kept).
Source: V3 report sections 3.2.1 to 3.2.3; DualPipe's README (table of bubbles). Legend: P pipeline ranks.
Does not: know memory (memory.py) or which layout is best (search.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from dsv3.model.census import memory_shapes
from dsv3.model.config import ModelConfig
from dsv3.parallel.stage import STAGES_A_RANK, Part, split
from dsv3.plan.hardware import Hardware
from dsv3.plan.timeline import Seconds, idle_seconds
from dsv3.plan.work import NOTHING, Cost, Pass, Setting, head_cost, layer_cost, mix_cost

SCHEDULES = ("1f1b", "zero-bubble", "dualpipev", "interleaved", "zb1p", "dualpipe")
"""Ours first; `zb1p` is zero-bubble with one stage a rank, as DeepSeek-V2 was trained."""


@dataclass(frozen=True, kw_only=True)
class System:
    """What the software does with a layout."""

    name: str
    overlap: bool
    """The all-to-all runs behind products of another micro-batch."""
    limited: bool
    """A token crosses once a node (work.Setting.limited)."""
    balanced_stages: bool
    """Layers are dealt out as evenly as whole layers allow; False: by dsv3.parallel.stage.split."""
    narrow_gathers: bool
    """Weights travel in bfloat16 also in FP8 training; False: as wide as FSDP2 gathers them (fsdp.py)."""
    neighbours: bool = False
    """See work.Setting, as for the next four."""
    in_turn: bool = False
    behind_shared: str = ""
    up_again: bool = False
    dispatch_again: bool = False


REPORT = System(name="report", overlap=True, limited=True, balanced_stages=True, narrow_gathers=True)
"""DeepSeek's own: DualPipe, DeepEP, DeepGEMM, FlashMLA."""
DSV3 = System(
    name="dsv3", overlap=False, limited=True, balanced_stages=False, narrow_gathers=False, in_turn=True,
    behind_shared="forward", dispatch_again=True,
)  # fmt: skip
"""This package as it stands: PyTorch's all-to-all, once a node and then, in turn, once an expert; shared experts are multiplied
during the dispatch; in FP8 the block that is computed again dispatches again (model/fp8.py keeping)."""
EAGER = System(name="exposed", overlap=False, limited=True, balanced_stages=True, narrow_gathers=True)
"""DeepEP without DualPipe, as Megatron and AutoModel run it by default."""
SYSTEMS = {system.name: system for system in (REPORT, DSV3, EAGER)}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who holds what. `data` ranks of each stage read rows of their own; `expert` of them share the experts."""

    gpus: int
    pipeline: int = 1
    expert: int = 1
    sharding: str = "zero1"
    schedule: str = "1f1b"
    chunks: int = 1
    """Stages a rank holds under `interleaved`."""
    micro_batch: int = 1
    recompute: bool = False
    fp8_dispatch: bool | None = None
    """Tokens travel as FP8 codes; None: as the precision."""
    rounds: int = 1
    """Times that a step fills and drains the pipeline."""

    @property
    def data(self) -> int:
        return self.gpus // self.pipeline

    @property
    def replicas(self) -> int:
        """Copies of each expert."""
        return self.data // self.expert

    def micro_batches(self, rows: int) -> int:
        """Of a step, on each data rank."""
        return max(1, math.ceil(rows / (self.data * self.micro_batch)))

    def describe(self) -> str:
        parts = [f"pipeline {self.pipeline}", f"expert {self.expert}", f"data {self.data}"]
        parts += [self.schedule] if self.pipeline > 1 else []
        parts += [self.sharding] if self.data > 1 else []
        return ", ".join([*parts, f"micro-batch {self.micro_batch}", *["recompute"] * self.recompute])


class StepTime(NamedTuple):
    """Seconds of one step of the slowest rank, and where they go."""

    compute: float
    network: float  # not hidden behind products
    bubble: float
    exchange: float  # of gradients and weights, once a step
    optimizer: float
    seconds: float
    micro_batches: int
    forward: float  # of one micro-batch through the rank's layers
    backward: float
    weights: float  # of the backward, what may wait
    pair: float  # a forward and a backward of one micro-batch
    schedule: str  # that the system runs

    @property
    def passes(self) -> Seconds:
        """As timeline.py lays them out."""
        return Seconds(self.forward, self.backward - self.weights, self.weights, self.pair)


def step_time(
    model: ModelConfig, layout: Layout, hardware: Hardware, system: System, *, rows: int, seq_len: int, precision: str
) -> StepTime:
    """Of a step over `rows` rows of `seq_len` tokens. In place of our schedules the report's system runs its own,
    DualPipe, over an even number of ranks."""
    if system.overlap and layout.schedule in STAGES_A_RANK and layout.pipeline % 2 == 0:
        layout = dataclasses.replace(layout, schedule="dualpipe")
    tokens = layout.micro_batch * seq_len
    setting = Setting(
        precision=precision, seq_len=seq_len, tokens=tokens, recompute=layout.recompute, expert=layout.expert,
        limited=system.limited, fp8_dispatch=layout.fp8_dispatch, neighbours=system.neighbours,
        in_turn=system.in_turn, behind_shared=system.behind_shared, up_again=system.up_again,
        dispatch_again=system.dispatch_again,
    )  # fmt: skip
    cost = rank_cost(model, layout, setting, hardware, system).times(tokens / hardware.kept)
    held = rank_elements(model, layout)
    gathered = per_micro_batch(held, layout, hardware, precision)
    touched = sum(held) / stage_copies(layout)  # a micro-batch passes one of DualPipe's two stages on a rank
    accumulate = 8 * touched / hardware.bandwidth / hardware.kept  # float32 sums, read and written
    cost += Cost(Pass(0.0, gathered / 2), Pass(0.0, gathered / 2), Pass(accumulate, 0.0))
    count = layout.micro_batches(rows)
    compute, network = pair_seconds(cost, hardware, system, layout)
    forward, to_input, weights = (sum(part) for part in cost)
    passes = Seconds(forward, to_input, weights, compute + network)
    bubble = layout.rounds * bubble_seconds(passes, layout, count)
    exchange = exchange_seconds(held, layout, hardware, precision, system) / hardware.kept
    optimizer = optimizer_seconds(held, layout, hardware, precision) / hardware.kept
    seconds = count * (compute + network) + bubble + exchange + optimizer
    return StepTime(
        count * compute, count * network, bubble, exchange, optimizer, seconds, count,
        forward, to_input + weights, weights, compute + network, layout.schedule,
    )  # fmt: skip


def pair_seconds(cost: Cost, hardware: Hardware, system: System, layout: Layout) -> tuple[float, float]:
    """One forward and one backward of a micro-batch on a rank: (products and passes, network on top)."""
    compute, wire = cost.total
    if not wire:
        return compute, 0.0
    if not system.overlap or layout.schedule not in ("dualpipe", "dualpipev"):
        return compute, wire
    shared = compute / (1 - hardware.copy_share)  # the network's kernels hold some processors
    return shared, max(0.0, wire - shared)


def bubble_seconds(passes: Seconds, layout: Layout, micro_batches: int) -> float:
    """What a step takes beyond its pairs; F, B and W are a rank's."""
    ranks, (forward, to_input, weights, _) = layout.pipeline, passes
    backward = to_input + weights
    if ranks == 1:
        return 0.0
    of_others = {
        "interleaved": (ranks - 1) * (forward + backward) / layout.chunks,
        "zb1p": max(0.0, (ranks - 1) * (forward + backward - 2 * weights)),
    }
    if layout.schedule in of_others:
        return of_others[layout.schedule]
    return idle_seconds(layout.schedule, ranks, micro_batches, passes)


# -- what a rank holds -----------------------------------------------------------------------------------------------------


def rank_cost(model: ModelConfig, layout: Layout, setting: Setting, hardware: Hardware, system: System) -> Cost:
    """Seconds a token of the slowest rank."""
    kinds = {moe: layer_cost(model, layer, setting, hardware) for layer, moe in _kinds(model).items()}
    layers = [kinds[model.is_moe(index)] for index in range(model.num_layers_with_mtp)]
    main, depths = model.num_hidden_layers, model.num_nextn_predict_layers
    head, mix = head_cost(model, setting, hardware), mix_cost(model, setting, hardware)
    tail = _sum(layers[main:]) + head.times(1 + depths) + mix.times(depths)
    border = Pass(0.0, model.hidden_size * (4 if setting.precision == "float32" else 2) / hardware.between)
    cuts = Cost(border, border, Pass(0.0, 0.0)) if layout.pipeline > 1 else NOTHING
    if layout.pipeline == 1:
        return _sum(layers[:main]) + tail
    if system.balanced_stages:
        unit = sum(layers[main - 1].total)
        uneven = slowest(main, sum(tail.total) / unit, layout) / ((main + sum(tail.total) / unit) / layout.pipeline)
        return (_sum(layers[:main]) + tail).times(uneven / layout.pipeline) + cuts
    at_once = head.times(1 + depths).weights
    tail = Cost(tail.forward, tail.backward + at_once, tail.weights + at_once.times(-1))
    loads: list[Cost] = [NOTHING] * layout.pipeline
    for part in _split(model, layout.pipeline, layout.schedule):
        mine = _sum([layers[index] for index in part.layers if index < main])
        loads[part.rank] = loads[part.rank] + mine + (tail if part.last else NOTHING)
    return max(loads, key=lambda load: sum(load.total)) + cuts


def _kinds(model: ModelConfig) -> dict[int, bool]:
    """One layer of each kind: its index, and whether it routes."""
    routes = {model.is_moe(index): index for index in range(model.num_layers_with_mtp)}
    return {index: moe for moe, index in routes.items()}


def slowest(layers: int, tail: float, layout: Layout) -> float:
    """Layers' worth of the slowest rank when whole layers are dealt out at best. DualPipe's ranks share two stages in pairs."""
    places = layout.pipeline // 2 if layout.schedule == "dualpipe" else layout.pipeline
    if places == 1:
        return (layers + tail) / layout.pipeline
    best = min(max(tail + k, math.ceil((layers - k) / (places - 1))) for k in range(layers + 1))
    return best * places / layout.pipeline


@functools.cache
def _split(model: ModelConfig, pipeline: int, schedule: str) -> tuple[Part, ...]:
    return split(model, pipeline, schedule if schedule in STAGES_A_RANK else "1f1b")


def _sum(costs: list[Cost]) -> Cost:
    total = NOTHING
    for cost in costs:
        total = total + cost
    return total


class Held(NamedTuple):
    """Elements of the fullest rank before sharding: of everything but experts, and of experts."""

    dense: float
    experts: float


@functools.cache
def _elements(model: ModelConfig) -> tuple[int, int]:
    """Of everything but experts, and of experts."""
    found = [0, 0]
    for name, shape in memory_shapes(model):
        found[".mlp.experts." in name] += math.prod(shape)
    return found[0], found[1]


def stage_copies(layout: Layout) -> int:
    """How often every stage exists: DualPipe's ranks r and P-1-r hold the same two."""
    return 2 if layout.schedule == "dualpipe" else 1


def rank_elements(model: ModelConfig, layout: Layout) -> Held:
    """A pipeline's rank on average; every stage copy of DualPipe counts."""
    dense, experts = _elements(model)
    copies = stage_copies(layout) / layout.pipeline
    return Held(dense * copies, experts * copies / layout.expert)


# -- once a step, and once a micro-batch -----------------------------------------------------------------------------------


def ring_rate(ranks: int, stride: int, hardware: Hardware) -> float:
    """Of a ring over ranks that are `stride` apart. It leaves a node once for all of its ranks that are in it, over as many of
    the node's adapters: nccl-tests' bus bandwidth is that of NVLink or of the node's whole network, whichever is less."""
    if ranks * stride <= hardware.node:
        return hardware.inside
    together = max(1, hardware.node // stride)
    return min(hardware.inside, together * hardware.between) if together > 1 else hardware.between


def _ring(elements: float, width: float, ranks: int, stride: int, hardware: Hardware) -> float:
    """Reduce-scatter or all-gather: each rank sends all but its own share."""
    return elements * width * (ranks - 1) / ranks / ring_rate(ranks, stride, hardware) if ranks > 1 else 0.0


def exchange_seconds(held: Held, layout: Layout, hardware: Hardware, precision: str, system: System) -> float:
    """zero1: float32 gradients summed onto shards, weights gathered from them."""
    if layout.sharding == "fsdp":
        return 0.0
    width = 4 if precision == "float32" or (precision == "fp8" and not system.narrow_gathers) else 2
    return sum(
        _ring(elements, 4 + width, ranks, stride, hardware)
        for elements, ranks, stride in ((held.dense, layout.data, 1), (held.experts, layout.replicas, layout.expert))
    )


def per_micro_batch(held: Held, layout: Layout, hardware: Hardware, precision: str) -> float:
    """fsdp: weights gathered in both passes, gradients summed in the second, of every micro-batch."""
    if layout.sharding != "fsdp":
        return 0.0
    width = 2 * (2 if precision == "bfloat16" else 4) + 4
    return sum(
        _ring(elements, width, ranks, stride, hardware)
        for elements, ranks, stride in ((held.dense, layout.data, 1), (held.experts, layout.replicas, layout.expert))
    ) / hardware.kept  # fmt: skip


def optimizer_seconds(held: Held, layout: Layout, hardware: Hardware, precision: str) -> float:
    """AdamW reads gradient, master and both moments, and writes all but the gradient."""
    moment = 2 if precision == "fp8" else 4
    shard = (held.dense / layout.data + held.experts / layout.replicas) / stage_copies(layout)
    return shard * (4 + 2 * 4 + 4 * moment) / hardware.bandwidth
