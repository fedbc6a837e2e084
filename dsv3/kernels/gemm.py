"""Grouped GEMM: one weight matrix per expert, rows sorted by expert, no padding and no dropped row.

    y[r] = x[r] @ w[e(r)].T        rows of expert e are x[offsets[e]:offsets[e + 1]]

Three products, as any trainer needs them: fprop above, dgrad  dx[r] = dy[r] @ w[e(r)],  wgrad  dw[e] = dy_eᵀ @ x_e.
In bfloat16 on CUDA in Triton, which leaves the counts on the device; elsewhere a product an expert.
`grouped_linear` is differentiable and opaque to torch.compile (row counts are data). `grouped_linear_reference` is the slow
second opinion. Legend: R rows, E experts, I in, O out.
Does not: quantise (see fp8_gemm.py) or decide the order of rows (see moe.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels.later import note, weight_gradients
from dsv3.kernels.triton import use_triton


def grouped_linear_reference(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """The same by gathering each row's matrix: x (R, I), w (E, O, I), counts (E,) int64 -> (R, O). Memory R·O·I."""
    rows = torch.repeat_interleave(w, counts, dim=0)
    return torch.einsum("ri,roi->ro", x, rows)


@torch.library.custom_op("dsv3::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """x (R, I) sorted by expert, w (E, O, I) of the same dtype, counts (E,) int64 summing to R -> (R, O)."""
    if _in_triton(x):
        from dsv3.kernels.triton import gemm

        return gemm.grouped_mm_bfloat16(x, w, _offsets(counts))
    y = x.new_empty(x.shape[0], w.shape[1])
    start = 0
    for matrix, count in zip(w.unbind(0), counts.tolist()):
        if count:
            torch.mm(x[start : start + count], matrix.t(), out=y[start : start + count])
            start += count
    assert start == x.shape[0], f"counts sum to {start}, rows are {x.shape[0]}"
    return y


@torch.library.custom_op("dsv3::grouped_linear_wgrad", mutates_args=())
def _wgrad(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """dy (R, O), x (R, I) -> dw (E, O, I)."""
    dy = dy.contiguous()
    if _in_triton(x):
        from dsv3.kernels.triton import gemm

        return gemm.grouped_wgrad_bfloat16(dy, x.contiguous(), _offsets(counts))
    dw = x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])
    start = 0
    for d_matrix, count in zip(dw.unbind(0), counts.tolist()):
        if count:
            torch.mm(dy[start : start + count].t(), x[start : start + count], out=d_matrix)
            start += count
        else:
            d_matrix.zero_()  # an expert without a token: a true zero, never what the memory held before
    return dw


def _in_triton(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and use_triton(x)


def _offsets(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


@grouped_linear.register_fake
def _(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@_wgrad.register_fake
def _(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


def _save(ctx, inputs, output) -> None:
    note(ctx)
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor):
    x, w, counts = ctx.saved_tensors
    dx = grouped_linear(dy.contiguous(), w.mT, counts) if ctx.needs_input_grad[0] else None
    (dw,) = weight_gradients(ctx, [1], lambda: [_wgrad(dy, x, counts)])
    return dx, dw, None


grouped_linear.register_autograd(_differentiate, setup_context=_save)
