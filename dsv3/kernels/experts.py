"""The routed experts of a layer as one operation: gather, two grouped products around SwiGLU, weighted sum.

    out[t] = sum_k down_e( silu(gate_e x_t) · up_e x_t · w_tk ),   e = the k-th expert of token t

`expert_mlp` is differentiable in x, both matrices and the weights. On a CPU with bfloat16 products it runs in C
(cpu/experts.c), which gathers rows while it packs them; elsewhere it is the composition of this package's grouped products
and permutations, `expert_mlp_reference`, its second opinion.
Source: V3 report section 2.1.2. Legend: N tokens, D model, E experts, K top-k, I expert width, R = N·K rows in expert order.
Does not: route (see moe.py).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import native
from dsv3.kernels.gemm import grouped_linear
from dsv3.kernels.later import note, weight_gradients
from dsv3.kernels.moe import permute, unpermute
from dsv3.kernels.swiglu import swiglu


def expert_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor
) -> Tensor:
    """x (N, D) -> (N, D).

    Args:
        gate_up: (E, 2·I, D), rows 0 to I - 1 the gate's, the rest the up projection's; the dtype of x.
        down: (E, D, I).
        weights: (N, K) float32, of the slots in the order of `order`'s copies.
        order, inverse, counts: from `sort_by_expert`.
    """
    if native.fits(x, gate_up, down):
        return _expert_mlp(x, gate_up, down, weights, order, inverse, counts)[0]
    return expert_mlp_reference(x, gate_up, down, weights, order, inverse, counts)


def expert_mlp_reference(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor
) -> Tensor:
    """The same, an operation at a time."""
    gate, up = grouped_linear(permute(x, order, inverse), gate_up, counts).chunk(2, dim=-1)
    # Weighted before the down projection: the same sum, on I values a row instead of D.
    act = swiglu(gate, up, permute(weights.reshape(-1, 1), order, inverse))
    return unpermute(grouped_linear(act, down, counts), order, inverse, weights.shape[-1])


@torch.library.custom_op("dsv3::expert_mlp", mutates_args=())
def _expert_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """-> out (N, D) and h (R, 2·I), the products before SwiGLU."""
    x, gate_up, down, weights = (t.contiguous() for t in (x, gate_up, down, weights))
    out, h = torch.empty_like(x), x.new_empty(order.numel(), gate_up.shape[1])
    given = x, gate_up, down, weights, order, inverse, _offsets(counts)
    native.call("experts_forward", *given, h, out, *_sizes(weights, x, down))
    return out, h


@torch.library.custom_op("dsv3::expert_mlp_backward", mutates_args=())
def _backward(
    d_out: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, inverse: Tensor,
    counts: Tensor, h: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of x, gate_up, down and weights."""
    d_out, x, gate_up, down, weights = (t.contiguous() for t in (d_out, x, gate_up, down, weights))
    dx, d_gate_up, d_down, d_weights = (torch.empty_like(t) for t in (x, gate_up, down, weights))
    given = d_out, x, gate_up, down, weights, order, inverse, _offsets(counts), h
    native.call(
        "experts_backward", *given, dx, d_gate_up, d_down, d_weights, native.NULL, *_sizes(weights, x, down)
    )  # fmt: skip
    return dx, d_gate_up, d_down, d_weights


@torch.library.custom_op("dsv3::expert_mlp_dgrad", mutates_args=())
def _dgrad(
    d_out: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, inverse: Tensor,
    counts: Tensor, h: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of x and weights, and what those of the matrices are made of: (R·3·I,), rows dh (R, 2·I) and then act (R, I)."""
    d_out, x, gate_up, down, weights = (t.contiguous() for t in (d_out, x, gate_up, down, weights))
    dx, d_weights, kept = torch.empty_like(x), torch.empty_like(weights), h.new_empty(h.numel() // 2 * 3)
    given = d_out, x, gate_up, down, weights, order, inverse, _offsets(counts), h
    native.call(
        "experts_backward", *given, dx, native.NULL, native.NULL, d_weights, kept, *_sizes(weights, x, down)
    )  # fmt: skip
    return dx, d_weights, kept


def _wgrad(
    d_out: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    counts: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """-> gradients of gate_up and down."""
    d_gate_up, d_down = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate_up, down))
    given = d_out.contiguous(), x.contiguous(), order, _offsets(counts), kept
    native.call("experts_wgrad", *given, d_gate_up, d_down, *_sizes(weights, x, down))
    return d_gate_up, d_down


def _sizes(weights: Tensor, x: Tensor, down: Tensor) -> tuple[int, ...]:
    return (*weights.shape, x.shape[1], down.shape[-1], down.shape[0])


def _offsets(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


@_expert_mlp.register_fake
def _(x, gate_up, down, weights, order, inverse, counts):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(order.numel(), gate_up.shape[1])


@_backward.register_fake
def _(d_out, x, gate_up, down, weights, order, inverse, counts, h):
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, gate_up, down, weights)]
    return like[0], like[1], like[2], like[3]


@_dgrad.register_fake
def _(d_out, x, gate_up, down, weights, order, inverse, counts, h):
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weights)]
    return like[0], like[1], h.new_empty(h.numel() // 2 * 3)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # of what backward never reads
    note(ctx)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, d_out: Tensor, _: Tensor):
    saved = ctx.saved_tensors
    if ctx.later is None and ctx.next_functions[1][0] is not None:  # in one go: half the passes over memory
        return (*_backward(d_out, *saved), None, None, None)
    x, gate_up, down, weights, order, _, counts, _ = saved
    dx, d_weights, kept = _dgrad(d_out, *saved)
    make = functools.partial(_wgrad, d_out, x, gate_up, down, weights, order, counts, kept)
    d_gate_up, d_down = weight_gradients(ctx, [1, 2], make)
    return dx, d_gate_up, d_down, d_weights, None, None, None


_expert_mlp.register_autograd(_differentiate, setup_context=_save)
