"""The routed experts of a layer as one operation: gather, two grouped products around SwiGLU, weighted sum.

    out[t] = sum_k down_e( silu(gate_e x_t) · up_e x_t · w_tk ),   e = the k-th expert of token t

`expert_mlp` is differentiable in x, both matrices and the weights. On a CPU with bfloat16 products it runs in C
(cpu/experts.c), which gathers rows while it packs them; elsewhere it is the composition of this package's grouped products
and permutations, `expert_mlp_reference`, its second opinion.
Source: V3 report section 2.1.2. Legend: N tokens, D model, E experts, K top-k, I expert width, R = N·K rows in expert order.
Does not: route (see moe.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import native
from dsv3.kernels.gemm import grouped_linear
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
    sizes = (*weights.shape, x.shape[1], down.shape[-1], down.shape[0])
    native.call("experts_forward", x, gate_up, down, weights, order, inverse, _offsets(counts), h, out, *sizes)
    return out, h


@torch.library.custom_op("dsv3::expert_mlp_backward", mutates_args=())
def _backward(
    d_out: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, order: Tensor, inverse: Tensor,
    counts: Tensor, h: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_out, x, gate_up, down, weights = (t.contiguous() for t in (d_out, x, gate_up, down, weights))
    grads = [torch.empty_like(t) for t in (x, gate_up, down, weights)]
    sizes = (*weights.shape, x.shape[1], down.shape[-1], down.shape[0])
    native.call(
        "experts_backward", d_out, x, gate_up, down, weights, order, inverse, _offsets(counts), h, *grads, *sizes
    )  # fmt: skip
    return grads[0], grads[1], grads[2], grads[3]


def _offsets(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


@_expert_mlp.register_fake
def _(x, gate_up, down, weights, order, inverse, counts):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(order.numel(), gate_up.shape[1])


@_backward.register_fake
def _(d_out, x, gate_up, down, weights, order, inverse, counts, h):
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, gate_up, down, weights)]
    return like[0], like[1], like[2], like[3]


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # of what backward never reads
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, d_out: Tensor, _: Tensor):
    return (*_backward(d_out, *ctx.saved_tensors), None, None, None)


_expert_mlp.register_autograd(_differentiate, setup_context=_save)
