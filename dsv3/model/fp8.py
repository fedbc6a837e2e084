"""FP8 training: Linear and Experts swapped from outside, as DeepSeek-V3 was trained (report section 3.3).

    fprop   y  = x8 W8ᵀ           x 1x128 tiles,   W 128x128 blocks
    dgrad   dx = dy8 W8           dy 1x128 tiles
    wgrad   dW = dy8ᵀ x8          both in 128x1 tiles, float32

All codes are e4m3, every sum of 128 is promoted to float32. `swap_fp8` turns every Linear that the published checkpoint
stores as FP8, and the routed experts, into the modules below; embedding, head, router, norms, eh_proj and the attention core
keep their precision. A swapped module holds the float32 master itself (gradients reach it in float32) and the codes of its
weight, cast anew after each optimizer step: no bfloat16 copy exists.

What the backward reads again is small: `keeping` runs a block of a layer under torch's checkpoint, and of its products keeps

    q_a, kv_a, q     as they are                 the latents that the up-projections start from
    gate, up         e4m3, 1x128                 SwiGLU is computed again from them
    attention        e5m6, 12 bits               read by its own backward and by o_proj's weight gradient
    o, down          nothing                     nobody reads them in the block
    all else         nothing                     norms, up-projections, RoPE, SwiGLU and casts run again

The experts' input travels in e4m3 with power-of-two scales both ways, as it is dispatched between devices.
Source: V3 report sections 3.2.3, 3.3. Legend: N tokens, D model, E experts, I expert width, K top-k, R = N·K rows.
Does not: know how wide a step is or when to cast again (parallel/apply.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dsv3.kernels.fp8_gemm import fp8_grouped_mm, fp8_grouped_wgrad, fp8_mm, fp8_wgrad, one_group
from dsv3.kernels.later import note, weight_gradients
from dsv3.kernels.moe import permute, unpermute
from dsv3.kernels.norm import rms_norm_cast
from dsv3.kernels.quant import (
    Fp8,
    cast_blocks,
    cast_columns,
    cast_tiles,
    dequantize_blocks,
    dequantize_tiles,
    pack_e5m6,
    retile,
    unpack_e5m6,
)
from dsv3.kernels.swiglu import swiglu_cast
from dsv3.model.census import is_fp8_weight
from dsv3.model.transformer import Attention, DeepseekV3, Experts, RMSNorm

# The recipe casts gradients as it casts activations; bench.fp8_evidence puts others in their place to show why.
cast_gradient, cast_gradient_columns, retile_gradient = cast_tiles, cast_columns, retile

# What the backward of a block keeps of a product's result.
AS_IS, CODES, NOTHING, AGAIN = "as it is", "codes", "nothing", "again"
_KEEP = {
    "q_a_proj": AS_IS,
    "q_proj": AS_IS,
    "kv_a_proj_with_mqa": AS_IS,
    "gate_proj": CODES,
    "up_proj": CODES,
    "o_proj": NOTHING,
    "down_proj": NOTHING,
}


# Norms whose result goes straight into FP8 products; kv_a's is cut and joined first.
_CAST_NORMS = ("input_layernorm", "post_attention_layernorm", "q_a_layernorm")


def swap_fp8(model: DeepseekV3) -> None:
    """Replace, in place, what is multiplied in FP8. Parameters keep their names, order and identity."""
    for path, module in list(model.named_modules()):
        if isinstance(module, RMSNorm) and path.rpartition(".")[2] in _CAST_NORMS:
            module.__class__ = Fp8RMSNorm
        elif type(module) is Attention:
            module.__class__ = Fp8Attention
        if not is_swapped(path, module):
            continue
        if isinstance(module, nn.Linear):
            assert isinstance(module.weight, nn.Parameter)
            swapped = Fp8Linear(module.weight, _KEEP.get(path.rpartition(".")[2], AGAIN))
        else:
            assert isinstance(module, Experts)
            swapped = Fp8Experts(module.gate_up_proj, module.down_proj)
        model.set_submodule(path, swapped)


def is_swapped(path: str, module: nn.Module) -> bool:
    """Whether the module of that name is multiplied in FP8."""
    return isinstance(module, Experts) or (isinstance(module, nn.Linear) and is_fp8_weight(f"{path}.weight"))


def fp8_modules(model: nn.Module) -> list[Fp8Linear | Fp8Experts]:
    return [module for module in model.modules() if isinstance(module, (Fp8Linear, Fp8Experts))]


class Fp8Linear(nn.Module):
    """y = x Wᵀ in FP8. `weight` is the master; `refresh` casts it, at the next forward where the codes are said to be `stale`."""

    def __init__(self, weight: nn.Parameter, keep: str) -> None:
        super().__init__()
        self.weight, self.keep = weight, keep
        self.refresh()

    @torch.inference_mode(False)  # an engine may be the first to need them, the trainer's backward reads them too
    @torch.no_grad()
    def refresh(self) -> None:
        self.cast, self.stale = Fp8(*cast_blocks(self.weight)), False

    def casts(self) -> list[Fp8]:
        return [self.cast]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) bfloat16 -> (..., O) bfloat16."""
        if self.stale:
            self.refresh()
        flat = x.flatten(0, -2)
        y = _linear(flat, self.weight, *_tiles_of(x), *self.cast, self.keep)
        return y.unflatten(0, x.shape[:-1])


class Fp8Experts(nn.Module):
    """The routed experts in FP8: see model.transformer.Experts."""

    def __init__(self, gate_up_proj: nn.Parameter, down_proj: nn.Parameter) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        self.gate_up, self.down = Fp8(*cast_blocks(self.gate_up_proj)), Fp8(*cast_blocks(self.down_proj))
        self.stale = False

    def casts(self) -> list[Fp8]:
        return [self.gate_up, self.down]

    def forward(self, x: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        """x (N, D) bfloat16, weights (N, K) float32 -> (N, D), weighted and summed."""
        if self.stale:
            self.refresh()
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        tiles = cast_tiles(x.detach(), pow2=True)
        h = _experts_up(x, self.gate_up_proj, *tiles, *self.gate_up, order, inverse, offsets)
        gate, up = h.chunk(2, dim=-1)
        act, cast = swiglu_cast(gate, up, permute(weights.reshape(-1, 1), order, inverse))
        return _experts_down(act, self.down_proj, *cast, *self.down, order, inverse, offsets, weights.shape[-1])


class Fp8Attention(Attention):
    """Attention whose absorbed form, which engines run and no training does, reads kv_b_proj's codes: the matrix that is multiplied
    in training. Queries and sums of latents stay bfloat16, where the expanded form casts the latents."""

    def _kv_b(self) -> Tensor:
        swapped = self.kv_b_proj
        assert isinstance(swapped, Fp8Linear)
        if swapped.stale:
            swapped.refresh()
        return dequantize_blocks(*swapped.cast).unflatten(0, (self.config.num_attention_heads, -1))


class Fp8RMSNorm(RMSNorm):
    """RMSNorm whose result brings its tiles along for the Linears that read it."""

    def forward(self, x: Tensor) -> Tensor:
        y, cast = rms_norm_cast(x, self.weight, self.eps)
        _keep_tiles(y, cast)
        return y


def _tiles_of(x: Tensor) -> Fp8:
    """The tiles of x (..., D) as rows, cast once for all that read these very values (gate and up, q_a and kv_a): kept on the
    tensor, or on the one that it is another shape of, and gone with it."""
    held = _root(x).__dict__.get("_dsv3_tiles")
    if held is None or held[0] != _writes(x):
        return _keep_tiles(x, Fp8(*cast_tiles(x.detach().flatten(0, -2))))
    return held[1]


def _keep_tiles(x: Tensor, cast: Fp8) -> Fp8:
    _root(x).__dict__["_dsv3_tiles"] = (_writes(x), cast)
    return cast


def _writes(x: Tensor) -> int:
    """How often x was written to. Inference tensors do not count: no forward writes to what a product has read."""
    return 0 if x.is_inference() else x._version


def _root(x: Tensor) -> Tensor:
    base = x._base
    if base is None or base.numel() != x.numel() or base.shape[-1] != x.shape[-1]:
        return x
    return base if base.is_contiguous() and x.is_contiguous() else x


# -- products with their gradients ---------------------------------------------------------------------------------------


@torch.library.custom_op("dsv3::fp8_linear", mutates_args=())
def _linear(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, w_codes: Tensor, w_scales: Tensor, keep: str
) -> Tensor:
    """x (N, D) is only for its gradient; codes and scales are its tiles -> (N, O) bfloat16."""
    return fp8_mm(codes, scales, w_codes, w_scales, torch.bfloat16)


@torch.library.custom_op("dsv3::fp8_linear_dgrad", mutates_args=())
def _linear_dgrad(dy: Tensor, w_codes: Tensor, w_scales: Tensor) -> Tensor:
    codes, scales = cast_gradient(dy)
    return fp8_mm(codes, scales, w_codes.t(), w_scales.t(), torch.bfloat16)


@torch.library.custom_op("dsv3::fp8_linear_wgrad", mutates_args=())
def _linear_wgrad(dy: Tensor, x: Tensor) -> Tensor:
    rows = one_group(dy.shape[0], dy.device)
    return fp8_wgrad(*cast_gradient_columns(dy, rows), *cast_columns(x, rows))


@torch.library.custom_op("dsv3::fp8_experts_up", mutates_args=())
def _experts_up(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, w_codes: Tensor, w_scales: Tensor, order: Tensor,
    inverse: Tensor, offsets: Tensor,
) -> Tensor:  # fmt: skip
    """-> h (R, 2·I) bfloat16: the tokens' codes are dispatched, not their values."""
    rows = _dispatch(codes, scales, order, inverse)
    return fp8_grouped_mm(*rows, w_codes, w_scales, offsets, torch.bfloat16)


@torch.library.custom_op("dsv3::fp8_experts_up_dgrad", mutates_args=())
def _experts_up_dgrad(
    dh: Tensor, w_codes: Tensor, w_scales: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, tokens: int
) -> Tensor:
    d_rows = fp8_grouped_mm(*cast_gradient(dh), w_codes.mT, w_scales.mT, offsets, torch.bfloat16)
    return unpermute(d_rows, order, inverse, order.numel() // tokens)


@torch.library.custom_op("dsv3::fp8_experts_up_wgrad", mutates_args=())
def _experts_up_wgrad(
    dh: Tensor, codes: Tensor, scales: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor
) -> Tensor:
    rows = _dispatch(codes, scales, order, inverse)
    return fp8_grouped_wgrad(*cast_gradient_columns(dh, offsets), *retile(*rows, offsets), offsets)


@torch.library.custom_op("dsv3::fp8_experts_down", mutates_args=())
def _experts_down(
    act: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, w_codes: Tensor, w_scales: Tensor, order: Tensor,
    inverse: Tensor, offsets: Tensor, top_k: int,
) -> Tensor:  # fmt: skip
    """act (R, I), its codes and scales -> the sum over each token's K rows (N, D), combined in bfloat16."""
    y = fp8_grouped_mm(codes, scales, w_codes, w_scales, offsets, torch.bfloat16)
    return unpermute(y, order, inverse, top_k)


@torch.library.custom_op("dsv3::fp8_experts_down_dgrad", mutates_args=())
def _experts_down_dgrad(
    codes: Tensor, scales: Tensor, w_codes: Tensor, w_scales: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor
) -> Tensor:
    """codes and scales are d_out's, cast once for both halves: they travel."""
    rows = _dispatch(codes, scales, order, inverse)
    return fp8_grouped_mm(*rows, w_codes.mT, w_scales.mT, offsets, torch.bfloat16)


@torch.library.custom_op("dsv3::fp8_experts_down_wgrad", mutates_args=())
def _experts_down_wgrad(
    codes: Tensor, scales: Tensor, act: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor
) -> Tensor:
    rows = _dispatch(codes, scales, order, inverse)
    return fp8_grouped_wgrad(*retile_gradient(*rows, offsets), *cast_columns(act, offsets), offsets)


def _up_wgrad_of_codes(
    dh: Fp8, codes: Tensor, scales: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor
) -> Tensor:
    rows = _dispatch(codes, scales, order, inverse)
    return fp8_grouped_wgrad(*dh, *retile(*rows, offsets), offsets)


def _down_wgrad_of_codes(
    codes: Tensor, scales: Tensor, act: Fp8, order: Tensor, inverse: Tensor, offsets: Tensor
) -> Tensor:
    rows = _dispatch(codes, scales, order, inverse)
    return fp8_grouped_wgrad(*retile_gradient(*rows, offsets), *act, offsets)


def _dispatch(codes: Tensor, scales: Tensor, order: Tensor, inverse: Tensor) -> Fp8:
    """A token's tiles (N, D) to its K rows in expert order (R, D)."""
    return Fp8(permute(codes.view(torch.uint8), order, inverse).view(codes.dtype), permute(scales, order, inverse))


@_linear.register_fake
def _(x, weight, codes, scales, w_codes, w_scales, keep):
    return x.new_empty((x.shape[0], w_codes.shape[0]), dtype=torch.bfloat16)


@_linear_dgrad.register_fake
def _(dy, w_codes, w_scales):
    return dy.new_empty((dy.shape[0], w_codes.shape[1]), dtype=torch.bfloat16)


@_linear_wgrad.register_fake
def _(dy, x):
    return dy.new_empty((dy.shape[1], x.shape[1]), dtype=torch.float32)


@_experts_up.register_fake
def _(x, weight, codes, scales, w_codes, w_scales, order, inverse, offsets):
    return x.new_empty((order.shape[0], w_codes.shape[1]), dtype=torch.bfloat16)


@_experts_up_dgrad.register_fake
def _(dh, w_codes, w_scales, order, inverse, offsets, tokens):
    return dh.new_empty(tokens, w_codes.shape[2])


@_experts_up_wgrad.register_fake
def _(dh, codes, scales, order, inverse, offsets):
    return dh.new_empty((offsets.shape[0] - 1, dh.shape[1], codes.shape[1]), dtype=torch.float32)


@_experts_down.register_fake
def _(act, weight, codes, scales, w_codes, w_scales, order, inverse, offsets, top_k):
    return act.new_empty((act.shape[0] // top_k, w_codes.shape[1]))


@_experts_down_dgrad.register_fake
def _(codes, scales, w_codes, w_scales, order, inverse, offsets):
    return scales.new_empty((order.shape[0], w_codes.shape[2]), dtype=torch.bfloat16)


@_experts_down_wgrad.register_fake
def _(codes, scales, act, order, inverse, offsets):
    return act.new_empty((offsets.shape[0] - 1, codes.shape[1], act.shape[1]), dtype=torch.float32)


def _save_linear(ctx, inputs, output) -> None:
    x, _, _, _, w_codes, w_scales, _ = inputs
    note(ctx)
    ctx.save_for_backward(x, w_codes, w_scales)


def _differentiate_linear(ctx, dy: Tensor):
    x, w_codes, w_scales = ctx.saved_tensors
    dx = _linear_dgrad(dy, w_codes, w_scales)
    if _may_wait(ctx):
        rows = one_group(dy.shape[0], dy.device)
        make = functools.partial(_one, fp8_wgrad, *cast_gradient_columns(dy, rows), *cast_columns(x, rows))
    else:
        make = functools.partial(_one, _linear_wgrad, dy, x)
    (dw,) = weight_gradients(ctx, [1], make)
    return dx, dw, None, None, None, None, None


def _may_wait(ctx: Any) -> bool:
    """Whether the product's weight has a gradient that may be promised. What a promise holds is cast first: half the memory, and
    the codes that it is made of in any case."""
    return ctx.later is not None and ctx.next_functions[1][0] is not None


def _one(wgrad: Callable[..., Tensor], *args: Any) -> list[Tensor]:
    return [wgrad(*args)]


def _save_up(ctx, inputs, output) -> None:
    note(ctx)
    ctx.save_for_backward(*inputs[2:])


def _differentiate_up(ctx, dh: Tensor):
    dh = dh.contiguous()
    codes, scales, w_codes, w_scales, order, inverse, offsets = ctx.saved_tensors
    dx = _experts_up_dgrad(dh, w_codes, w_scales, order, inverse, offsets, codes.shape[0])
    rows = codes, scales, order, inverse, offsets
    if _may_wait(ctx):
        make = functools.partial(_one, _up_wgrad_of_codes, cast_gradient_columns(dh, offsets), *rows)
    else:
        make = functools.partial(_one, _experts_up_wgrad, dh, *rows)
    (dw,) = weight_gradients(ctx, [1], make)
    return dx, dw, *(None,) * 7


def _save_down(ctx, inputs, output) -> None:
    act, _, _, _, *rest, _ = inputs
    note(ctx)
    ctx.save_for_backward(act, *rest)


def _differentiate_down(ctx, d_out: Tensor):
    act, w_codes, w_scales, order, inverse, offsets = ctx.saved_tensors
    codes, scales = cast_gradient(d_out.contiguous(), pow2=True)
    d_act = _experts_down_dgrad(codes, scales, w_codes, w_scales, order, inverse, offsets)
    rows = order, inverse, offsets
    if _may_wait(ctx):
        make = functools.partial(_one, _down_wgrad_of_codes, codes, scales, cast_columns(act, offsets), *rows)
    else:
        make = functools.partial(_one, _experts_down_wgrad, codes, scales, act, *rows)
    (dw,) = weight_gradients(ctx, [1], make)
    return d_act, dw, *(None,) * 8


_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)
_experts_up.register_autograd(_differentiate_up, setup_context=_save_up)
_experts_down.register_autograd(_differentiate_down, setup_context=_save_down)


# -- what is kept for the backward ---------------------------------------------------------------------------------------


def keeping(block: Callable[..., Any]) -> Callable[..., Any]:
    """The same block of a layer, its activations kept in FP8 and otherwise computed again in its backward pass."""

    return functools.partial(_run_keeping, block)  # which a deep copy of the layer binds to the copy


def _run_keeping(block: Callable[..., Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, context_fn=_contexts, preserve_rng_state=False)


def _contexts() -> tuple[_Keep, _Replay]:
    kept: list[Callable[[], Any]] = []
    return _Keep(kept), _Replay(kept)


class _Keep(TorchDispatchMode):
    """The block's first run: of each product that must not run twice, a recipe that gives its result again."""

    def __init__(self, kept: list[Callable[[], Any]]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _KEPT:
            self._kept.append(_KEPT[func](result, args))
        return result


class _Replay(TorchDispatchMode):
    """The block's second run, in the backward pass: products that were kept come from there, in order."""

    def __init__(self, kept: list[Callable[[], Any]]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _KEPT:
            given = self._kept.pop(0)()
            if given is not None:
                return given
        return func(*args, **(kwargs or {}))


def _keep_linear(y: Tensor, args: tuple[Any, ...]) -> Callable[[], Any]:
    keep = args[-1]
    if keep == AGAIN:
        return lambda: None
    if keep == AS_IS:
        return lambda: y
    return _keep_codes(y, args) if keep == CODES else _keep_nothing(y, args)


def _keep_codes(y: Tensor, args: tuple[Any, ...]) -> Callable[[], Any]:
    codes, scales = cast_tiles(y)
    return lambda: dequantize_tiles(codes, scales)


def _keep_nothing(y: Tensor, args: tuple[Any, ...]) -> Callable[[], Any]:
    # Should anything read it after all, it must not pass unseen.
    shape, like = y.shape, y.new_full((), torch.nan)
    return lambda: like.expand(shape)


def _keep_attention(result: tuple[Tensor, ...], args: tuple[Any, ...]) -> Callable[[], Any]:
    out, *rest = result
    if out.dtype != torch.bfloat16 or out.shape[-1] % 2:
        return lambda: result
    packed, scales = pack_e5m6(out.flatten(-2) if out.is_contiguous() else out)
    shape = out.shape
    return lambda: (unpack_e5m6(packed, scales, torch.bfloat16).view(shape), *rest)


_KEPT: dict[Any, Callable[[Any, tuple[Any, ...]], Callable[[], Any]]] = {
    torch.ops.dsv3.fp8_linear.default: _keep_linear,
    torch.ops.dsv3.fp8_experts_up.default: _keep_codes,
    torch.ops.dsv3.fp8_experts_down.default: _keep_nothing,
    torch.ops.dsv3.causal_attention.default: _keep_attention,
    **{
        getattr(torch.ops.aten, name).default: _keep_attention
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
        )
        if hasattr(torch.ops.aten, name)
    },
}
