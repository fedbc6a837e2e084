"""What a deployment can serve: cache a request, batch, tokens/s, and the units of prefill and decoding.

    prefill    forward passes of long rows: products and attention, the all-to-all behind the other half of the batch
    decode     a token a request: weights and the requests' caches are read, products of few rows; experts' exchange behind the
               other half of the batch (two micro-batches, report 3.4)

    seconds a decode step = max(device, wire) / kept
    device = sum over layers of max(weights' bytes / bandwidth, products) + max(caches' bytes / bandwidth, absorbed attention)
    wire   = rows · K · (D · 1 byte there + D · 2 bytes back) / network, a layer

Attention is data parallel: each device holds its own requests' caches and all attention weights; experts are spread over the
unit. The unit's size is the one that serves most tokens/s a device while each user gets `per_user` tokens/s.
Source: V3 report section 3.4; DeepSeek's day of 27 February 2025 (spec 9); ISCA'25 section on the bound of decoding.
Legend: D model, H heads, K experts a token. Does not: speculate (an accepted MTP draft multiplies tokens/s by its acceptance).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dsv3.model.census import is_fp8_weight, memory_shapes, scale_shape
from dsv3.model.config import ModelConfig
from dsv3.plan.hardware import Hardware
from dsv3.plan.work import Setting, attention_matrices, layer_cost, mlp_matrices

CONTEXT = 4989  # mean length of a cache on DeepSeek's day (spec 9)
PER_USER = 20.0  # tokens/s, the same day's 20 to 22
PROMPT = 4096


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Devices that share the experts and work as one."""

    devices: int
    experts: float
    """Of a layer, on each device."""
    weight_bytes: float
    """A device."""
    batch: int
    """Requests a device (decode) or tokens of a forward a device (prefill)."""
    tokens_per_second: float
    """A device."""
    per_user: float
    """Tokens/s that a request gets (decode)."""
    limit: str
    """What stops it: memory, network, device."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    context: int
    per_user: float
    """Tokens/s that a request was to get."""
    cache_bytes_per_token: float
    cache_bytes_per_request: float
    prefill: Unit | None
    decode: Unit | None
    """None: the weights do not fit any unit that was tried."""
    bound_by_network: float
    """Tokens/s of one request if nothing but the network took time (ISCA'25's bound), 0 without a network."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def serving_of(
    model: ModelConfig,
    hardware: Hardware,
    *,
    context: int = CONTEXT,
    per_user: float = PER_USER,
    most: int | None = None,
) -> Serving:
    """The best units on this hardware.

    Args:
        context: tokens in a request's cache, on average. per_user: tokens/s that a request gets at least.
        most: devices that a unit may have; None: as many as a layer has experts.

    Raises:
        ValueError: one of them is not positive.
    """
    if context < 1 or per_user <= 0 or (most is not None and most < 1):
        raise ValueError(f"context {context}, tokens/s a user {per_user:g} and devices {most} must be positive")
    per_token = 2.0 * (model.kv_lora_rank + model.qk_rope_head_dim) * model.num_hidden_layers
    decodes = [
        decode_unit(model, hardware, devices, context=context, per_user=per_user)
        for devices in _sizes(model, hardware, most)
    ]
    prefills = [prefill_unit(model, hardware, devices) for devices in _sizes(model, hardware, most)]
    return Serving(
        context=context,
        per_user=per_user,
        cache_bytes_per_token=per_token,
        cache_bytes_per_request=per_token * context,
        prefill=max((u for u in prefills if u), key=lambda u: u.tokens_per_second, default=None),
        decode=max((u for u in decodes if u), key=lambda u: u.tokens_per_second, default=None),
        bound_by_network=network_bound(model, hardware.between),
    )


def network_bound(model: ModelConfig, rate: float, *, rows: int = 32, shared_too: bool = True) -> float:
    """ISCA'25: two micro-batches' all-to-all a layer, one byte there and two back, nothing else: tokens/s of a request."""
    experts = model.num_experts_per_tok + (model.n_shared_experts if shared_too else 0)
    pair = 3 * rows * experts * model.hidden_size / rate
    return 1 / (2 * pair * model.num_hidden_layers)


def _sizes(model: ModelConfig, hardware: Hardware, most: int | None) -> list[int]:
    """One device, a node's parts, nodes: as far as each device has an expert of its own, and there are devices."""
    sizes, most = [1], model.n_routed_experts if most is None else min(most, model.n_routed_experts)
    while sizes[-1] * 2 <= most and hardware.name != "cpu":
        sizes.append(sizes[-1] * 2)
    return sizes


# -- decoding --------------------------------------------------------------------------------------------------------------


def decode_unit(model: ModelConfig, hardware: Hardware, devices: int, *, context: int, per_user: float) -> Unit | None:
    """The largest batch that fits and still gives each user his rate; at least one request."""
    weights = weight_bytes(model, devices, hardware)
    room = hardware.memory * hardware.usable - weights
    request = 2.0 * (model.kv_lora_rank + model.qk_rope_head_dim) * model.num_layers_with_mtp * context
    most = int(room // request)
    if most < 1:
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high)
            if decode_seconds(model, hardware, devices, middle, context)[0] * per_user <= 1
            else (low, middle - 1)
        )
    seconds, limit = decode_seconds(model, hardware, devices, low, context)
    return Unit(
        devices=devices, experts=model.n_routed_experts / devices, weight_bytes=weights, batch=low,
        tokens_per_second=low / seconds, per_user=1 / seconds, limit="memory" if low == most else limit,
    )  # fmt: skip


def decode_seconds(
    model: ModelConfig, hardware: Hardware, devices: int, batch: float, context: float
) -> tuple[float, str]:
    """Of one step of `batch` requests a device, and what it waits for."""
    device = wire = 0.0
    for layer in range(model.num_hidden_layers):
        device += attention_seconds(model, hardware, batch, context) + products_seconds(
            model, hardware, layer, devices, batch
        )
        if model.is_moe(layer):
            wire += exchange_seconds(model, hardware, devices, batch)
    device += 2 * model.vocab_size * model.hidden_size / hardware.bandwidth  # the head's weights, bfloat16
    return max(device, wire) / hardware.kept, "network" if wire > device else "device"


def attention_seconds(model: ModelConfig, hardware: Hardware, batch: float, context: float) -> float:
    """Of the absorbed form in one layer: every head reads the same C + R values of a cached token."""
    rank, rope = model.kv_lora_rank, model.qk_rope_head_dim
    read = batch * context * 2 * (rank + rope) / hardware.bandwidth
    multiplied = batch * context * 2 * model.num_attention_heads * (2 * rank + rope) / hardware.decode_attention
    return max(read, multiplied)


def products_seconds(model: ModelConfig, hardware: Hardware, layer: int, devices: int, batch: float) -> float:
    """Of one layer's matrices: reading them or multiplying by them, whichever is longer."""
    precision = "fp8" if "fp8" in hardware.products else "bfloat16"
    total = 0.0
    for matrix in attention_matrices(model) + mlp_matrices(model, layer):
        size, rows = matrix.inner * matrix.outer, batch * matrix.times
        read = size
        if "experts" in matrix.name:
            chance = 1 - (1 - model.num_experts_per_tok / model.n_routed_experts) ** (batch * devices)
            read = size * model.n_routed_experts / devices * chance
        flops = 2.0 * size * rows
        total += max(read / hardware.bandwidth, hardware.product_seconds(flops, matrix.inner, precision))
    return total


def exchange_seconds(model: ModelConfig, hardware: Hardware, devices: int, batch: float) -> float:
    """One layer's dispatch in FP8 and combine in bfloat16: a row an expert, as DeepEP's low-latency kernels send."""
    if devices == 1:
        return 0.0
    row_bytes = model.hidden_size * (1 + 4 / 128 + 2)
    rows = batch * model.num_experts_per_tok
    if devices <= hardware.node:
        return rows * (1 - 1 / devices) * row_bytes / hardware.inside + 2 * hardware.message
    return rows * row_bytes / (hardware.small or hardware.between) + 2 * hardware.message


def weight_bytes(model: ModelConfig, devices: int, hardware: Hardware) -> float:
    """FP8 as published where the hardware has it, else bfloat16; experts spread, the rest on every device."""
    wide = "fp8" not in hardware.products
    total = 0.0
    for name, shape in memory_shapes(model):
        size = 1.0
        for side in shape:
            size *= side
        narrow = ".mlp.experts." in name or is_fp8_weight(name)
        blocks = 1.0
        for side in scale_shape(shape[-2:]):
            blocks *= side
        blocks *= shape[0] if len(shape) == 3 else 1
        held = size * 2 if wide or not narrow else size + 4 * blocks
        total += held / devices if ".mlp.experts." in name else held
    return total


# -- prefill ---------------------------------------------------------------------------------------------------------------


def prefill_unit(model: ModelConfig, hardware: Hardware, devices: int, *, prompt: int = PROMPT) -> Unit | None:
    """Tokens/s of long prompts; a quarter of the memory is kept for caches and activations."""
    weights = weight_bytes(model, devices, hardware)
    if weights > 0.75 * hardware.memory * hardware.usable:
        return None
    seconds, limit = prefill_seconds(model, hardware, devices, prompt)
    return Unit(
        devices=devices, experts=model.n_routed_experts / devices, weight_bytes=weights, batch=PROMPT * 2,
        tokens_per_second=1 / seconds, per_user=0.0, limit=limit,
    )  # fmt: skip


def prefill_seconds(model: ModelConfig, hardware: Hardware, devices: int, prompt: int) -> tuple[float, str]:
    """A token's."""
    precision = "fp8" if "fp8" in hardware.products else "bfloat16"
    setting = Setting(precision=precision, seq_len=prompt, tokens=PROMPT * 2, expert=devices)
    passes = [layer_cost(model, layer, setting, hardware).forward for layer in range(model.num_hidden_layers)]
    compute, wire = sum(p.compute for p in passes), sum(p.wire for p in passes)
    if wire:
        compute /= 1 - hardware.copy_share
    return max(compute, wire) / hardware.kept, "network" if wire > compute else "device"
