"""What one token costs in one layer: products, attention, passes over memory, bytes on the wire. Read top down.

    forward    of each matrix (in -> out): 2·in·out FLOPs, sums of `in` terms
    backward   its input's gradient, sums of `out` terms; its own gradient, sums over the tokens of a micro-batch
    attention  2·H·T/2·(qk + v) FLOPs forward (causal), 2.5 times that backward: flash attention computes the scores again
    again      what is not kept but computed anew in the backward pass: with `recompute` the layer; in FP8 the up-projections
               of queries, keys and values with what joins them, RMSNorm and SwiGLU (report 3.2.3), and no other pass
    passes     everything that is neither product nor attention reads and writes memory: norms, casts, RoPE, SwiGLU,
               permutations, residual sums
    wire       to each of the M nodes (or ranks) that its experts are on: D values out, D back; the gradient the same way. Less
               what goes on behind the shared experts' products, where a software does that

Seconds are of one device at the rates of hardware.py; the caller divides by what a run keeps of them.
Source: V3 report sections 2.1, 3.2, 3.3. Legend: D model, H heads, T tokens a row, K experts a token, I expert width.
Does not: know pipelines (step.py) or what is kept in memory (memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dsv3.model.config import ModelConfig
from dsv3.plan.hardware import Hardware


class Matrix(NamedTuple):
    """A product a token takes `times` over."""

    name: str
    inner: int
    outer: int
    times: float
    again: bool  # in FP8 its result is not kept

    @property
    def flops(self) -> float:
        return 2.0 * self.inner * self.outer * self.times


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a layer is computed."""

    precision: str
    seq_len: int
    tokens: int
    """Of a micro-batch on one device."""
    recompute: bool = False
    expert: int = 1
    """Ranks that share the experts."""
    limited: bool = True
    """A token crosses the network once a node, and is passed on inside it (the report's kernels); False: once an expert."""
    fp8_dispatch: bool | None = None
    """None: as the precision."""
    neighbours: bool = False
    """Benchmarks with a forced balance give a token K experts in a row: they sit on one node."""
    in_turn: bool = False
    """The way inside a node begins when the way there has ended, and goes once an expert (parallel/dispatch.py); False: both at
    once, as the report's kernels do, and once a rank."""
    behind_shared: str = ""
    """Where the exchange goes on while the shared experts are multiplied: nowhere, "forward" or "both" passes."""
    up_again: bool = False
    """The up-projections of queries, keys and values are computed again, as always in FP8."""
    dispatch_again: bool = False
    """In FP8 tokens travel to their experts a second time in the backward pass."""


class Pass(NamedTuple):
    """Seconds a token of one direction through something: of the processors, and of the network."""

    compute: float
    wire: float

    def __add__(self, other: Pass) -> Pass:  # type: ignore[override]
        return Pass(self.compute + other.compute, self.wire + other.wire)

    def times(self, factor: float) -> Pass:
        return Pass(self.compute * factor, self.wire * factor)


class Cost(NamedTuple):
    """Of a token: forward, backward for the input (what is computed again included), backward for the weights."""

    forward: Pass
    backward: Pass
    weights: Pass

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other)))

    def times(self, factor: float) -> Cost:
        return Cost(*(part.times(factor) for part in self))

    @property
    def total(self) -> Pass:
        return self.forward + self.backward + self.weights


NOTHING = Cost(Pass(0.0, 0.0), Pass(0.0, 0.0), Pass(0.0, 0.0))


# -- products ------------------------------------------------------------------------------------------------------------


def attention_matrices(model: ModelConfig) -> list[Matrix]:
    dim, heads, rank = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    queries = heads * model.qk_head_dim
    found = [Matrix("kv_a", dim, rank + model.qk_rope_head_dim, 1, False)]
    if model.q_lora_rank is None:
        found.append(Matrix("q", dim, queries, 1, False))
    else:
        found += [
            Matrix("q_a", dim, model.q_lora_rank, 1, False),
            Matrix("q_b", model.q_lora_rank, queries, 1, True),
        ]
    found.append(Matrix("kv_b", rank, heads * (model.qk_nope_head_dim + model.v_head_dim), 1, True))
    found.append(Matrix("o", heads * model.v_head_dim, dim, 1, False))
    return found


def mlp_matrices(model: ModelConfig, layer: int) -> list[Matrix]:
    dim = model.hidden_size
    if not model.is_moe(layer):
        width = model.intermediate_size
        return [Matrix("gate_up", dim, 2 * width, 1, False), Matrix("down", width, dim, 1, False)]
    width, shared = model.moe_intermediate_size, model.n_shared_experts * model.moe_intermediate_size
    found = [
        Matrix("experts' gate_up", dim, 2 * width, model.num_experts_per_tok, False),
        Matrix("experts' down", width, dim, model.num_experts_per_tok, False),
    ]
    if shared:
        found += [
            Matrix("shared gate_up", dim, 2 * shared, 1, False),
            Matrix("shared down", shared, dim, 1, False),
        ]
    return found


def attention_flops(model: ModelConfig, seq_len: int) -> float:
    """Of one token's attention core in one layer, forward: it sees half the row on average."""
    return 2.0 * model.num_attention_heads * seq_len / 2 * (model.qk_head_dim + model.v_head_dim)


# -- passes over memory --------------------------------------------------------------------------------------------------


class Passes(NamedTuple):
    """Bytes that a token reads and writes in one layer's forward outside products and attention."""

    norms: float
    joining: float  # of queries and keys, and RoPE
    swiglu: float
    others: float  # residual sums, permutations, router, the attention's cast

    @property
    def total(self) -> float:
        return sum(self)


def pass_bytes(model: ModelConfig, layer: int, setting: Setting) -> Passes:
    """`w` bytes a value, `c` a value that is cast for a product."""
    w = 4 if setting.precision == "float32" else 2
    c = 1 if setting.precision == "fp8" else w
    dim, heads = model.hidden_size, model.num_attention_heads
    values = heads * model.v_head_dim
    norms = 2 * dim * (w + c) + (model.q_lora_rank or 0) * (w + c) + model.kv_lora_rank * (w + c)
    joining = 2 * (2 * heads * model.qk_head_dim * w)  # of queries and keys: read and written
    residual = 2 * dim * 3 * w
    cast_of_attention = values * (w + c) if setting.precision == "fp8" else 0
    rows = model.num_experts_per_tok if model.is_moe(layer) else 0
    width = rows * model.moe_intermediate_size + (
        model.n_shared_experts * model.moe_intermediate_size if rows else model.intermediate_size
    )
    permutations = rows * dim * (2 * c + w) + (2 * w * dim if rows else 0)
    router = dim * w + model.n_routed_experts * 3 * 4 if rows else 0
    return Passes(norms, joining, width * (2 * w + c), residual + cast_of_attention + permutations + router)


def cast_bytes(matrices: list[Matrix], setting: Setting) -> float:
    """FP8's weight gradients read both sides in tiles along the tokens: each is cast once more."""
    if setting.precision != "fp8":
        return 0.0
    return sum((m.inner + m.outer) * (2 + 1) * m.times for m in matrices)


# -- the wire ------------------------------------------------------------------------------------------------------------


def wire_seconds(model: ModelConfig, layer: int, setting: Setting, hardware: Hardware) -> float:
    """Of a token's way to its experts and back, one direction of training. Of the two networks the slower one counts where both are
    used at once, else both."""
    ranks = setting.expert
    if ranks == 1 or not model.is_moe(layer):
        return 0.0
    fp8 = setting.precision == "fp8" if setting.fp8_dispatch is None else setting.fp8_dispatch
    wide = 4 if setting.precision == "float32" else 2
    dim = model.hidden_size
    there_and_back = dim * (1 + 4 / 128 if fp8 else wide) + dim * wide
    nodes = max(1, ranks // hardware.node)
    outside = distinct(model, nodes) if setting.limited else model.num_experts_per_tok * (1 - 1 / nodes)
    inside = float(model.num_experts_per_tok) if setting.in_turn else distinct(model, ranks)
    if setting.neighbours:
        outside, inside = 1.0, max(1.0, model.num_experts_per_tok * ranks / model.n_routed_experts)
    across = there_and_back * outside / hardware.between if nodes > 1 else 0.0
    passed_on = there_and_back * inside / hardware.inside
    return across + passed_on if setting.in_turn else max(across, passed_on)


def distinct(model: ModelConfig, places: int) -> float:
    """How many of `places` a token's experts are on, on average, the groups being whole on places: of M that it may go to,
    K draws hit M·(1 - (1 - 1/M)^K). DeepEP counts its rates the same way."""
    allowed = places if model.n_group == 1 else max(1.0, model.topk_group * places / model.n_group)
    allowed = min(float(places), allowed)
    return allowed * (1 - (1 - 1 / allowed) ** model.num_experts_per_tok) if allowed > 1 else 1.0


# -- a layer -------------------------------------------------------------------------------------------------------------


def layer_cost(model: ModelConfig, layer: int, setting: Setting, hardware: Hardware) -> Cost:
    """Seconds a token, forward and backward."""
    matrices = attention_matrices(model) + mlp_matrices(model, layer)
    fp8 = setting.precision == "fp8"

    def product(flops: float, length: float) -> float:
        return hardware.product_seconds(flops, length, setting.precision)

    rows = setting.tokens * setting.expert * model.num_experts_per_tok / model.n_routed_experts
    forward = sum(product(m.flops, m.inner) for m in matrices)
    to_input = sum(product(m.flops, m.outer) for m in matrices)
    to_weights = sum(product(m.flops, rows if "experts" in m.name else setting.tokens) for m in matrices)
    up_again = fp8 or setting.up_again
    again = sum(product(m.flops, m.inner) for m in matrices if setting.recompute or (up_again and m.again))
    core = attention_flops(model, setting.seq_len)
    core_forward, core_backward = core / hardware.attention[0], 2.5 * core / hardware.attention[1]
    moved = pass_bytes(model, layer, setting)
    passes = moved.total / hardware.bandwidth
    repeated = moved.joining / hardware.bandwidth if up_again else 0.0
    if fp8:
        repeated += (moved.norms + moved.swiglu) / hardware.bandwidth
    if setting.recompute:
        repeated = passes + core_forward
    wire = wire_seconds(model, layer, setting, hardware)
    there, back = wire, wire * (2 if setting.recompute else 1)
    if setting.dispatch_again and fp8 and not setting.recompute:
        back += wire * (1 + 4 / 128) / (3 + 4 / 128)
    if setting.behind_shared:
        shared = [m for m in matrices if "shared" in m.name]
        there -= min(there / 2, sum(product(m.flops, m.inner) for m in shared))  # dispatch or combine goes on meanwhile
        if setting.behind_shared == "both":
            back -= min(back / 2, sum(product(m.flops, m.outer) + product(m.flops, setting.tokens) for m in shared))
    launches = _operations(model, layer, setting) * hardware.launch / setting.tokens
    return Cost(
        Pass(forward + core_forward + passes + launches, there),
        Pass(to_input + again + core_backward + 2 * passes + repeated + 2 * launches, back),
        Pass(to_weights + cast_bytes(matrices, setting) / hardware.bandwidth, 0.0),
    )  # fmt: skip


def _operations(model: ModelConfig, layer: int, setting: Setting) -> float:
    """Operations of a layer's forward that cost a launch each."""
    return 25.0 + (25.0 if model.is_moe(layer) else 0.0) + (15.0 if setting.precision == "fp8" else 0.0)


def head_cost(model: ModelConfig, setting: Setting, hardware: Hardware) -> Cost:
    """The head's product and the softmax over the vocabulary, once; bfloat16 at least. Its gradients are made in the forward."""
    precision = "float32" if setting.precision == "float32" else "bfloat16"
    flops = 2.0 * model.hidden_size * model.vocab_size
    one = hardware.product_seconds(flops, model.hidden_size, precision)
    softmax = (
        model.vocab_size * 6 * 4 / hardware.bandwidth
    )  # float32: written, largest, sum, and turned into its gradient
    return Cost(Pass(one + softmax, 0.0), Pass(one, 0.0), Pass(one, 0.0))


def mix_cost(model: ModelConfig, setting: Setting, hardware: Hardware) -> Cost:
    """An MTP layer's joining of state and embedding: 2·D -> D."""
    precision = "float32" if setting.precision == "float32" else "bfloat16"
    flops = 4.0 * model.hidden_size**2
    one = hardware.product_seconds(flops, 2 * model.hidden_size, precision)
    return Cost(Pass(one, 0.0), Pass(one, 0.0), Pass(one, 0.0))
