"""Bytes that a rank of this package holds while it trains, by kind.

    one process    masters 4 · N; copies that products read (bfloat16, or FP8 codes); gradients 4 · N and those of the copies
                   while a micro-batch's backward ends; moments 8 · N, in FP8 training 4 · N
    a mesh         masters and moments sharded: N_dense / data + N_experts / (expert · replicas); zero1 gathers the weights for
                   a whole step and adds up float32 gradients of all of them, fsdp a layer at a time
    activations    what the backward pass reads again, a token and layer: `kept_values`; times the micro-batches under way. Of those
                   that have only their weights' gradients to come (zero-bubble, dualpipev) what these are made of:
                   `promised_bytes`. How many wait for which, and when most do, says the schedule's order (timeline.held)
    buffers        one layer's working set, the head's block of logits, and what a gathered layer needs on top

The widths are those of parallel/fsdp.py and parallel/apply.py. tests/plan builds the model on fake tensors, on 2,048 ranks that
do not exist, and compares. Legend: D model, H heads, K experts a token, I expert width, N parameters.
Does not: know time (step.py).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace

from dsv3.model.census import is_fp8_weight, is_router_bias, memory_shapes
from dsv3.model.config import ModelConfig
from dsv3.parallel.stage import STAGES_A_RANK, Part, split
from dsv3.plan.step import Layout
from dsv3.plan.timeline import held

LOGITS_BLOCK = 1 << 21  # values that the head's loss holds at once (kernels/cross_entropy.py)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    """Masters (or this rank's shards of them), and what the products read."""
    gradients: float
    optimizer: float
    """AdamW's moments."""
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(self.kinds().values())

    def kinds(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Elements of a rank before sharding, by how they are held."""

    experts: int = 0
    swapped: int = 0
    """Other matrices that FP8 training multiplies in FP8."""
    narrow: int = 0
    """Matrices that are multiplied in bfloat16 even then: head, eh_proj."""
    wide: int = 0
    """Embedding, norms, routers: float32 always."""

    @property
    def dense(self) -> int:
        return self.swapped + self.narrow + self.wide


def memory_of(model: ModelConfig, layout: Layout, *, seq_len: int, precision: str) -> Memory:
    """Of the fullest rank."""
    return max(memories(model, layout, seq_len=seq_len, precision=precision), key=lambda memory: memory.total)


def memories(model: ModelConfig, layout: Layout, *, seq_len: int, precision: str) -> list[Memory]:
    """Of every pipeline rank."""
    return [
        _rank_memory(model, layout, rank, parts, seq_len=seq_len, precision=precision)
        for rank, parts in enumerate(ranks_of(model, layout.pipeline, layout.schedule))
    ]


def _rank_memory(
    model: ModelConfig, layout: Layout, rank: int, parts: tuple[Part, ...], *, seq_len: int, precision: str
) -> Memory:
    counted = count(model, parts, layout.expert)
    tokens = layout.micro_batch * seq_len
    layers = [layer for part in parts for layer in part.layers]
    heads = sum(1 + model.num_nextn_predict_layers for part in parts if part.last)
    stages = [_stage_bytes(model, part, precision, layout.recompute, layout.expert > 1) for part in parts]
    waiting = max(
        sum(running * kept + promised * made for (running, promised), (kept, made) in zip(moment, stages, strict=True))
        for moment in moments(layout, rank)
    )
    return Memory(
        **weights_and_gradients(counted, layout, precision),
        activations=tokens * waiting,
        buffers=buffer_bytes(model, counted, layout, layers, bool(heads), tokens, precision),
    )


def _stage_bytes(model: ModelConfig, part: Part, precision: str, recompute: bool, spread: bool) -> tuple[float, float]:
    """Of a micro-batch's token in a stage: until its backward pass, and from then until its weights' gradients are made."""
    kept = sum(layer_bytes(model, layer, precision, recompute, spread) for layer in part.layers)
    if part.last:  # states, and the head's gradient of them
        kept += (1 + model.num_nextn_predict_layers) * model.hidden_size * 2 * width(precision)
    return kept, sum(promised_bytes(model, layer, precision, spread) for layer in part.layers)


def moments(layout: Layout, rank: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """When a pipeline rank holds most: for each of its stages, micro-batches that wait for either half of their backward."""
    return held(layout.schedule, layout.pipeline)[rank] if layout.pipeline > 1 else (((1, 0),),)


@functools.cache
def ranks_of(model: ModelConfig, pipeline: int, schedule: str) -> tuple[tuple[Part, ...], ...]:
    """The parts of each pipeline rank. Under schedules that are not ours, as 1f1b deals them out."""
    parts = split(model, pipeline, schedule if schedule in STAGES_A_RANK and pipeline > 1 else "1f1b")
    return tuple(tuple(part for part in parts if part.rank == rank) for rank in range(pipeline))


def count(model: ModelConfig, parts: tuple[Part, ...], expert: int) -> Counted:
    """What the parts of one rank hold, with this rank's share of the experts."""
    whole = _count(model, parts)
    return replace(whole, experts=whole.experts // expert)


@functools.cache
def _count(model: ModelConfig, parts: tuple[Part, ...]) -> Counted:
    sums = dict.fromkeys(("experts", "swapped", "narrow", "wide"), 0)
    for name, shape in memory_shapes(model):
        copies = sum(part.holds(name) for part in parts)
        if not copies or is_router_bias(name):
            continue
        if ".mlp.experts." in name:
            kind = "experts"
        elif is_fp8_weight(name):
            kind = "swapped"
        else:
            kind = "narrow" if name == "lm_head.weight" or name.endswith("eh_proj.weight") else "wide"
        sums[kind] += copies * math.prod(shape)
    return Counted(**sums)


# -- weights, gradients, moments -------------------------------------------------------------------------------------------


def weights_and_gradients(counted: Counted, layout: Layout, precision: str) -> dict[str, float]:
    moments = 4 if precision == "fp8" else 8
    if layout.gpus == 1:
        every = counted.dense + counted.experts
        copies = 0 if precision == "float32" else copy_bytes(counted, precision)
        return {
            "weights": 4 * every + copies,
            "gradients": 4 * every + gathered_bytes(counted, precision),
            "optimizer": moments * every,
        }
    shards = counted.dense / layout.data + counted.experts / layout.replicas
    codes = code_bytes(counted) if precision == "fp8" else 0
    if layout.sharding == "fsdp":
        return {"weights": 4 * shards + codes, "gradients": 4 * shards, "optimizer": moments * shards}
    every = counted.dense + counted.experts
    # Sums of several ranks come on top of a rank's own; one rank's are its own.
    summed = (counted.dense / layout.data if layout.data > 1 else 0) + (
        counted.experts / layout.replicas if layout.replicas > 1 else 0
    )
    return {
        "weights": 4 * shards + gathered_bytes(counted, precision) + codes,
        "gradients": 4 * (every + summed),
        "optimizer": moments * shards,
    }


def gathered_bytes(counted: Counted, precision: str) -> float:
    """Weights as FSDP2 gathers them, and as one process's backward leaves its gradients: in FP8 training what is cast later is
    float32."""
    matrices = counted.experts + counted.swapped
    inner = 2 if precision == "bfloat16" else 4
    outer = 4 if precision == "float32" else 2
    return inner * matrices + outer * counted.narrow + 4 * counted.wide


def copy_bytes(counted: Counted, precision: str) -> float:
    """Of the compute copy of one process; embedding, norms and routers are the masters themselves."""
    if precision == "fp8":
        return code_bytes(counted) + 2 * counted.narrow
    return 2 * (counted.experts + counted.swapped + counted.narrow)


def code_bytes(counted: Counted) -> float:
    """FP8 codes, and a float32 scale a block of 128 x 128."""
    return (counted.experts + counted.swapped) * (1 + 4 / 128**2)


# -- activations -----------------------------------------------------------------------------------------------------------


def width(precision: str) -> int:
    return 4 if precision == "float32" else 2


def layer_bytes(model: ModelConfig, layer: int, precision: str, recompute: bool, spread: bool = False) -> float:
    """What a token leaves behind in a layer until its backward pass.

    Args:
        spread: experts are on several ranks: what arrives for a rank's are rows of their own, as many as a token has experts.
    """
    wide = width(precision)
    if recompute:
        return wide * model.hidden_size
    if precision == "fp8":
        return fp8_kept_bytes(model, layer)
    values = kept_values(model, layer, plain=precision == "float32")
    if spread and precision == "bfloat16" and model.is_moe(layer):
        values += model.num_experts_per_tok * model.hidden_size
    return values * wide + kept_besides(model, layer, precision)


def fp8_kept_bytes(model: ModelConfig, layer: int) -> float:
    """As model/fp8.py's table has it."""
    heads, tile = model.num_attention_heads, 1 + 4 / 128  # e4m3 and a float32 scale a tile
    blocks_inputs = 2 * 2 * model.hidden_size
    latents = 2 * (model.q_lora_rank or heads * model.qk_head_dim) + 2 * (model.kv_lora_rank + model.qk_rope_head_dim)
    attention = heads * model.v_head_dim * (1.5 + 4 / 128) + 4 * heads  # e5m6 with scales; and the softmax's logarithms
    rows = model.num_experts_per_tok if model.is_moe(layer) else 0
    shared = model.n_shared_experts * model.moe_intermediate_size if rows else model.intermediate_size
    gate_and_up = 2 * (rows * model.moe_intermediate_size + shared) * tile
    return blocks_inputs + latents + attention + gate_and_up + routing_bytes(model, layer)


def routing_bytes(model: ModelConfig, layer: int) -> float:
    """Scores of every expert, and of those chosen: index, weight, place in expert order and back."""
    if not model.is_moe(layer):
        return 0.0
    return 4 * model.n_routed_experts + model.num_experts_per_tok * (8 + 4 + 8 + 8)


def kept_values(model: ModelConfig, layer: int, *, plain: bool) -> float:
    """Values that autograd keeps of a layer without recomputation, each of the stream's width.

    Args:
        plain: torch's own operations (float32): a norm keeps its normalised input too, SwiGLU the gate's sigmoid side, attention
            pads values to the queries' width, experts keep their gathered rows. Else kernels of this package, which do not.
    """
    dim, heads, rank = model.hidden_size, model.num_attention_heads, model.kv_lora_rank + model.qk_rope_head_dim
    q, v = heads * model.qk_head_dim, heads * model.v_head_dim
    of_a_norm, of_swiglu = (3, 4) if plain else (2, 3)  # input and output; gate, up and their product
    norms = of_a_norm * (2 * dim + (model.q_lora_rank or 0)) + 2 * rank + (model.kv_lora_rank if plain else 0)
    attention = 4 * q + v if plain else 2 * q + heads * (model.qk_nope_head_dim + model.v_head_dim) + v
    if not model.is_moe(layer):
        return norms + attention + of_swiglu * model.intermediate_size
    rows, width = model.num_experts_per_tok, model.moe_intermediate_size
    experts = rows * (5 * width + dim) if plain else rows * 2 * width
    return norms + attention + experts + of_swiglu * model.n_shared_experts * width


def kept_besides(model: ModelConfig, layer: int, precision: str) -> float:
    """Bytes of other widths: the softmax's logarithms, and what the router reads and makes, in float32."""
    router_input = 4 * model.hidden_size if model.is_moe(layer) and precision != "float32" else 0
    return 4 * model.num_attention_heads + router_input + routing_bytes(model, layer)


def promised_bytes(model: ModelConfig, layer: int, precision: str, spread: bool = False) -> float:
    """What a token holds in a layer between the halves of its backward pass: input and output's gradient of every product whose
    weight waits (kernels/later.py), however the layer's activations are kept before. In FP8 training as the codes that they are
    multiplied in (model/fp8.py), each product its own."""
    dim, latent, mtp = model.hidden_size, model.kv_lora_rank + model.qk_rope_head_dim, layer >= model.num_hidden_layers
    heads, fp8, rows = model.num_attention_heads, precision == "fp8", model.num_experts_per_tok
    queries = heads * model.qk_head_dim + 2 * (model.q_lora_rank or 0)
    of_heads = heads * (model.qk_nope_head_dim + 2 * model.v_head_dim)
    # The inputs that two products share, of queries and latents, gate and up, are held once but as codes; and so are c_kv's own
    # values where bfloat16 holds the whole latent.
    shared = dim if fp8 else 0
    attention = 2 * dim + shared + queries + of_heads + 2 * latent - (model.qk_rope_head_dim if fp8 else 0)
    moe = model.is_moe(layer)
    inner = model.n_shared_experts * model.moe_intermediate_size if moe else model.intermediate_size
    values = attention + (2 * dim + shared + 3 * inner if inner else 0)
    if moe:
        values += 3 * rows * model.moe_intermediate_size
        values += 2 * dim if fp8 or not inner else 0  # of the experts alone
        if precision == "float32":  # grouped products of gathered rows
            values += 2 * rows * dim
        elif spread:  # a token's row for each of its experts, and of what comes back its gradient
            values += 2 * (rows - 1) * dim if fp8 else 2 * rows * dim
    each = 1 + 4 / 128 if fp8 else width(precision)
    beside = (20 if fp8 else 12) * rows if moe else 0  # order of the rows, and what they weigh
    return each * values + beside + (3 * dim * width(precision) if mtp else 0)  # eh_proj


# -- buffers ---------------------------------------------------------------------------------------------------------------


def buffer_bytes(
    model: ModelConfig, counted: Counted, layout: Layout, layers: list[int], head: bool, tokens: int, precision: str
) -> float:
    """What comes and goes: the larger of one layer being differentiated and of the head's loss, and a layer gathered ahead."""
    wide = width(precision)
    plain = precision == "float32"
    layer = max((working_values(model, index, plain) for index in layers), default=0.0) * wide * tokens
    weight_sums = (wide + 4) * model.vocab_size * model.hidden_size + 4 * LOGITS_BLOCK if head else 0.0
    gathered = 0.0
    if layout.gpus > 1 and layout.sharding == "fsdp" and layers:
        gathered = 2 * (gathered_bytes(counted, precision) + 4 * (counted.dense + counted.experts)) / len(layers)
    return max(layer, weight_sums) + gathered


def working_values(model: ModelConfig, layer: int, plain: bool) -> float:
    """Values a token of one layer while its backward runs: all that its forward made, and their gradients."""
    rows = model.num_experts_per_tok if model.is_moe(layer) else 0
    return 2 * kept_values(model, layer, plain=plain) + 2 * rows * model.hidden_size
