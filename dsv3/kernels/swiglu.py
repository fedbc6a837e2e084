"""SwiGLU in float32, rounded once:  y = silu(gate) · up · w,  silu(x) = x / (1 + exp -x).

w is a factor a row (an expert's routing weight) or absent. In C for bfloat16 on the CPU (cpu/swiglu.c); composed of torch
operations it makes several passes and rounds between them. `swiglu_cast` casts each row to FP8 while it is at hand.
Source: arXiv 2002.05202. Legend: R rows, I width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import native
from dsv3.kernels.quant import Fp8, cast_tiles, tiles


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    """gate, up (..., I), weights (R, 1) float32 for R rows -> (..., I) in the dtype of gate."""
    if not native.fits(gate, up):
        return swiglu_reference(gate, up, weights)
    rows = [x.flatten(0, -2) for x in (gate, up)]
    return _swiglu(*rows, weights).view(gate.shape)


def swiglu_cast(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Fp8]:
    """`swiglu` of gate, up (R, I), and `cast_tiles` of it, to the last bit."""
    if not native.fits(gate, up):
        y = swiglu(gate, up, weights)
        return y, Fp8(*cast_tiles(y.detach()))
    y, codes, scales = _swiglu_cast(gate, up, weights)
    return y, Fp8(codes, scales)


def swiglu_reference(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    """The same by torch."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    y = F.silu(gate.to(wide)) * up.to(wide)
    return (y if weights is None else y * weights).to(gate.dtype)


@torch.library.custom_op("dsv3::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """gate, up (R, I) with any distance between rows -> (R, I)."""
    gate, up = _rows(gate), _rows(up)
    y = gate.new_empty(gate.shape)
    native.call(
        "swiglu_forward", native.address(gate), native.address(up), _or_null(weights), y, *gate.shape,
        gate.stride(0), up.stride(0),
    )  # fmt: skip
    return y


@torch.library.custom_op("dsv3::swiglu_cast", mutates_args=())
def _swiglu_cast(gate: Tensor, up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = _rows(gate), _rows(up)
    y, codes = gate.new_empty(gate.shape), torch.empty(gate.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(gate.shape[0], tiles(gate.shape[1]))
    native.call(
        "swiglu_cast", native.address(gate), native.address(up), _or_null(weights), y, codes, scales, *gate.shape,
        gate.stride(0), up.stride(0),
    )  # fmt: skip
    return y, codes, scales


@torch.library.custom_op("dsv3::swiglu_backward", mutates_args=())
def _backward(dy: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, dy = _rows(gate), _rows(up), dy.contiguous()
    d_gate, d_up = (x.new_empty(x.shape) for x in (gate, up))
    d_weights = torch.empty(gate.shape[0] if weights is not None else 0, 1)
    native.call(
        "swiglu_backward", dy, native.address(gate), native.address(up), _or_null(weights), d_gate, d_up,
        d_weights if weights is not None else native.NULL, *gate.shape, gate.stride(0), up.stride(0),
    )  # fmt: skip
    return d_gate, d_up, d_weights


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _or_null(weights: Tensor | None) -> object:
    return native.NULL if weights is None else weights.contiguous()


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    return gate.new_empty(gate.shape)


@_swiglu_cast.register_fake
def _(gate: Tensor, up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty(gate.shape, dtype=torch.float8_e4m3fn, device=gate.device)
    return gate.new_empty(gate.shape), codes, gate.new_empty((gate.shape[0], tiles(gate.shape[1])), dtype=torch.float32)


@_backward.register_fake
def _(dy, gate, up, weights):
    d_weights = gate.new_empty((gate.shape[0] if weights is not None else 0, 1), dtype=torch.float32)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), d_weights


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # of codes and scales
    gate, up, weights = inputs
    ctx.weighted = weights is not None
    ctx.save_for_backward(gate, up, weights)


def _differentiate(ctx, dy: Tensor, *_: Tensor):
    d_gate, d_up, d_weights = _backward(dy, *ctx.saved_tensors)
    return d_gate, d_up, d_weights if ctx.weighted else None


_swiglu.register_autograd(_differentiate, setup_context=_save)
_swiglu_cast.register_autograd(_differentiate, setup_context=_save)
