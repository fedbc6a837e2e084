"""RMS norm in float32, rounded once:  y = x · rsqrt(mean x² + eps) · w.

In C for bfloat16 on the CPU (cpu/norm.c): composed of torch operations it makes a dozen passes over float32 copies, a sixth
of a small model's training step. `rms_norm_cast` casts each row to FP8 while it is at hand. `rms_norm_reference` is the second
opinion and every other device's path.
Source: arXiv 1910.07467; spec 3.6 (transformers rounds twice). Legend: N rows, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import native
from dsv3.kernels.quant import Fp8, cast_tiles, tiles


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) of any floating dtype -> (..., D) in the dtype of x."""
    if native.fits(x) and x.stride(-1) == 1:
        return _rms_norm(x.flatten(0, -2), weight.float(), eps)[0].view(x.shape)
    return rms_norm_reference(x, weight, eps)


def rms_norm_cast(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Fp8]:
    """`rms_norm` of x (..., D), and `cast_tiles` of it as rows, to the last bit."""
    if not (native.fits(x) and x.stride(-1) == 1):
        y = rms_norm(x, weight, eps)
        return y, Fp8(*cast_tiles(y.detach().flatten(0, -2)))
    y, _, codes, scales = _rms_norm_cast(x.flatten(0, -2), weight.float(), eps)
    return y.view(x.shape), Fp8(codes, scales)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same by torch."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@torch.library.custom_op("dsv3::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (N, D) -> y (N, D) and its rows' factors (N,) float32."""
    y, scale = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    native.call("norm_forward", native.address(x), weight.contiguous(), y, scale, *x.shape, x.stride(0), eps)
    return y, scale


@torch.library.custom_op("dsv3::rms_norm_cast", mutates_args=())
def _rms_norm_cast(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, factors = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    codes, scales = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(x.shape[0], tiles(x.shape[1]))
    given = native.address(x), weight.contiguous(), y, factors, codes, scales
    native.call("norm_cast", *given, *x.shape, x.stride(0), eps)
    return y, factors, codes, scales


@torch.library.custom_op("dsv3::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dx, d_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    parts = weight.new_empty(-(-x.shape[0] // 64), x.shape[1])
    tensors = dy.contiguous(), native.address(x), weight.contiguous(), scale, dx, d_weight, parts
    native.call("norm_backward", *tensors, *x.shape, x.stride(0))
    return dx, d_weight


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@_rms_norm_cast.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = x.new_empty((x.shape[0], tiles(x.shape[1])), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32), codes, scales


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # of the factors, which nothing differentiates
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx, dy: Tensor, *_: Tensor):
    return (*_backward(dy, *ctx.saved_tensors), None)


_rms_norm.register_autograd(_differentiate, setup_context=_save)
_rms_norm_cast.register_autograd(_differentiate, setup_context=_save)
