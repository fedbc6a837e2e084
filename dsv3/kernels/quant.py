"""FP8 casts and their inverses: e4m3 codes with a float32 scale for every tile of values.

    s = amax / 448        q = e4m3(x / s), to nearest even        x' = q · s

    cast_tiles      1x128 along the last dimension: activations, and gradients of activations
    cast_columns    128x1 down the rows, transposed: the operands of weight gradients, whose sum runs over tokens
    cast_blocks     128x128: weights
    pack_e5m6       1x128 in 12 bits with power-of-two scales: what the backward of attention reads again

The amax is of the values at hand (no history). What the report leaves open is fixed here, alike on every device and bit for
bit: a tile of zeros has the least scale and zero codes; a tile that holds NaN or infinity has scale NaN and codes 0x7f, so
that all of it is NaN when read and a step on it stops; a last tile is what is left, as if padded with zeros. The release's
inference code holds amax at 1e-4 at least, which flushes the gradients of a mean loss; here amax has no floor but float32's
own, and wherever its amax is above 1e-4 the codes are the same.

Source: V3 report (arXiv 2412.19437) section 3.3, appendix B; spec 6. Legend: R rows, K width, E experts, T tiles down the rows.
Does not: multiply (see gemm.py) or choose what is cast (see model/fp8.py).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import native
from dsv3.kernels.triton import use_triton

TILE = 128  # values that share a scale; side of a weight's block
E4M3_MAX = 448.0
_LEAST_AMAX = E4M3_MAX * torch.finfo(torch.float32).tiny  # its scale is the least normal float32
_NAN_CODE = 0x7F


class Fp8(NamedTuple):
    """Codes and the scales that they are multiplied with."""

    codes: Tensor  # float8_e4m3fn
    scales: Tensor  # float32, one a tile


def tiles(size: int) -> int:
    """How many tiles cover so many values."""
    return -(-size // TILE)


# -- casts -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dsv3::cast_tiles", mutates_args=())
def cast_tiles(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., K) bfloat16 or float32 -> codes (..., K) and scales (..., ceil K/128); power-of-two scales with `pow2`."""
    x = x.contiguous()
    if use_triton(x):
        from dsv3.kernels.triton import quant

        return quant.cast_tiles(x, pow2)
    if not _in_c(x):
        return cast_tiles_reference(x, pow2)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*x.shape[:-1], tiles(x.shape[-1]))
    native.call("cast_tiles", x, codes, scales, x.numel() // x.shape[-1], x.shape[-1], _wide(x), int(pow2))
    return codes, scales


def cast_tiles_reference(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """The same by torch."""
    parts = _split(x.float(), -1)  # (..., T, 128)
    scales = _scale(parts.abs().amax(-1), pow2)
    codes = _codes(parts, scales.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
    return codes.contiguous(), scales


@torch.library.custom_op("dsv3::cast_columns", mutates_args=())
def cast_columns(x: Tensor, offsets: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """x (R, K) bfloat16 or float32 -> codes (K, R) and scales (K, T) of 128 rows by 1 column.

    offsets (E + 1,) int64, from 0 to R: tiles are counted from each expert's first row, so that none holds rows of two. Expert
    e's begin at `offsets[e] // 128 + e`, known without counting, and T = R // 128 + E; scales of tiles not used are 0.
    """
    x = x.contiguous()
    if use_triton(x):
        from dsv3.kernels.triton import quant

        return quant.cast_columns(x, None, offsets, pow2)
    if not _in_c(x):
        return cast_columns_reference(x, offsets, pow2)
    return _columns_in_c(x, None, offsets, pow2)


@torch.library.custom_op("dsv3::retile", mutates_args=())
def retile(codes: Tensor, scales: Tensor, offsets: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """`cast_columns` of what `cast_tiles` gave, codes (R, K) and scales (R, ceil K/128), in one pass: saved activations become
    the operand of a weight gradient. The value between is float32, so only the second cast rounds."""
    codes = codes.contiguous()
    if use_triton(codes):
        from dsv3.kernels.triton import quant

        return quant.cast_columns(codes, scales.contiguous(), offsets, pow2)
    if codes.device.type != "cpu" or codes.shape[-1] % 16 or not codes.numel() or native.library() is None:
        return cast_columns_reference(dequantize_tiles(codes, scales, torch.float32), offsets, pow2)
    return _columns_in_c(codes, scales.contiguous(), offsets, pow2)


def _columns_in_c(x: Tensor, scales: Tensor | None, offsets: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    (rows, width), experts = x.shape, offsets.numel() - 1
    codes = torch.empty(width, rows, dtype=torch.float8_e4m3fn)
    out = torch.empty(width, rows // TILE + experts)
    given = native.NULL if scales is None else scales
    sizes = (rows, width, experts, 0 if scales is not None else _wide(x), int(pow2))
    native.call("cast_columns", x, given, offsets.contiguous(), codes, out, *sizes)
    return codes, out


def cast_columns_reference(x: Tensor, offsets: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """The same by torch, an expert at a time."""
    (rows, width), bounds = x.shape, offsets.tolist()
    codes = torch.empty(width, rows, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.zeros(width, rows // TILE + len(bounds) - 1, device=x.device)
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            codes[:, start:end], part = cast_tiles_reference(x[start:end].t(), pow2)
            first = start // TILE + expert
            scales[:, first : first + part.shape[1]] = part
    return codes, scales


@torch.library.custom_op("dsv3::cast_blocks", mutates_args=())
def cast_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (..., O, I) bfloat16 or float32 -> codes (..., O, I) and scales (..., ceil O/128, ceil I/128)."""
    w = w.contiguous()
    if use_triton(w):
        from dsv3.kernels.triton import quant

        return quant.cast_blocks(w)
    if not _in_c(w):
        return cast_blocks_reference(w)
    *lead, rows, width = w.shape
    codes, scales = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty(*lead, tiles(rows), tiles(width))
    native.call("cast_blocks", w, codes, scales, math.prod(lead), rows, width, _wide(w))
    return codes, scales


def cast_blocks_reference(w: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch."""
    rows, width = w.shape[-2:]
    parts = _split(_split(w.float(), -1), -3)  # (..., TO, 128, TI, 128)
    scales = _scale(parts.abs().amax((-3, -1)), False)
    codes = _codes(parts, scales[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return codes[..., :rows, :width].contiguous(), scales


def dequantize_tiles(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """codes (..., K), scales (..., ceil K/128) -> values (..., K): a float32 product, rounded once."""
    grid = scales.repeat_interleave(TILE, -1)[..., : codes.shape[-1]]
    return (codes.float() * grid).to(dtype)


def dequantize_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """codes (..., O, I), scales (..., ceil O/128, ceil I/128) -> values (..., O, I), ragged blocks too (spec 2.3)."""
    rows, width = codes.shape[-2:]
    grid = scales.repeat_interleave(TILE, -2)[..., :rows, :].repeat_interleave(TILE, -1)[..., :width]
    return codes.float().mul_(grid).to(dtype)


def _split(x: Tensor, dim: int) -> Tensor:
    """A dimension becomes (tiles, 128), with zeros at its end."""
    missing = -x.shape[dim] % TILE
    if missing:
        x = F.pad(x, (0, 0) * (-dim - 1) + (0, missing))
    return x.unflatten(dim, (-1, TILE))


def _scale(amax: Tensor, pow2: bool) -> Tensor:
    scale = amax.clamp_min(_LEAST_AMAX) / E4M3_MAX
    if pow2:  # on the bits: a float32 logarithm is not exact
        bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000
        scale = bits.view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def _codes(values: Tensor, scales: Tensor) -> Tensor:
    codes = (values / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(scales.isnan(), _NAN_CODE, codes).view(torch.float8_e4m3fn)


def _in_c(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32) or x.shape[-1] % 16 or not x.numel():
        return False
    return native.library() is not None


def _wide(x: Tensor) -> int:
    return int(x.dtype == torch.float32)


# -- e5m6 --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dsv3::pack_e5m6", mutates_args=())
def pack_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K), K even -> (..., 3·K/2) bytes and power-of-two scales (..., ceil K/128) float32: 12 bits a value.

    One sign, five exponent and six mantissa bits, laid out as the upper 12 of float16; two values fill three bytes.
    """
    x = x.contiguous()
    if not _in_c(x):
        return pack_e5m6_reference(x)
    packed = torch.empty(*x.shape[:-1], x.shape[-1] // 2 * 3, dtype=torch.uint8)
    scales = torch.empty(*x.shape[:-1], tiles(x.shape[-1]))
    native.call("pack_e5m6", x, packed, scales, x.numel() // x.shape[-1], x.shape[-1], _wide(x))
    return packed, scales


def pack_e5m6_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch."""
    parts = _split(x.float(), -1)
    amax = parts.abs().amax(-1)
    scales = _scale(amax, True) / 64  # amax / scale in [2^13, 2^15): inside e5m6, whose largest is 65024
    values = (parts / scales.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
    half = _round_e5m6(values).to(torch.float16)  # exact: seven significant bits
    words = torch.where(values.isnan(), 0x7E0, (half.view(torch.int16).to(torch.int32) & 0xFFFF) >> 4)
    first, second = words.unflatten(-1, (-1, 2)).unbind(-1)
    packed = torch.stack((first >> 4, ((first & 15) << 4) | (second >> 8), second & 255), -1)
    return packed.flatten(-2).to(torch.uint8), scales


def _round_e5m6(x: Tensor) -> Tensor:
    """To six mantissa bits, nearest even; below 2^-14 to steps of 2^-20."""
    bits = x.view(torch.int32)
    bits = (bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF
    rounded = torch.where(x.isnan(), x, bits.view(torch.float32))
    return torch.where(x.abs() < 2.0**-14, (x * 2.0**20).round() * 2.0**-20, rounded)


@torch.library.custom_op("dsv3::unpack_e5m6", mutates_args=())
def unpack_e5m6(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack_e5m6` gave -> values (..., K)."""
    width = packed.shape[-1] // 3 * 2
    in_c = packed.device.type == "cpu" and dtype == torch.bfloat16 and width % 16 == 0 and packed.numel()
    if not in_c or native.library() is None:
        return unpack_e5m6_reference(packed, scales, dtype)
    out = torch.empty(*packed.shape[:-1], width, dtype=dtype)
    native.call("unpack_e5m6", packed.contiguous(), scales.contiguous(), out, out.numel() // width, width)
    return out


def unpack_e5m6_reference(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by torch."""
    a, b, c = packed.unflatten(-1, (-1, 3)).to(torch.int32).unbind(-1)
    words = torch.stack(((a << 4) | (b >> 4), ((b & 15) << 8) | c), -1).flatten(-2)
    words = torch.where(words >= 2048, words - 4096, words)  # the sign bit, for int16
    return dequantize_tiles((words * 16).to(torch.int16).view(torch.float16), scales, dtype)


# -- shapes for torch.compile and meta ---------------------------------------------------------------------------------


@cast_tiles.register_fake
def _(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, x.new_empty((*x.shape[:-1], tiles(x.shape[-1])), dtype=torch.float32)


@cast_columns.register_fake
def _(x: Tensor, offsets: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape[1], x.shape[0], dtype=torch.float8_e4m3fn, device=x.device)
    return codes, x.new_empty((x.shape[1], x.shape[0] // TILE + offsets.shape[0] - 1), dtype=torch.float32)


@retile.register_fake
def _(codes: Tensor, scales: Tensor, offsets: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    turned = torch.empty(codes.shape[1], codes.shape[0], dtype=torch.float8_e4m3fn, device=codes.device)
    return turned, scales.new_empty((codes.shape[1], codes.shape[0] // TILE + offsets.shape[0] - 1))


@cast_blocks.register_fake
def _(w: Tensor) -> tuple[Tensor, Tensor]:
    *lead, rows, width = w.shape
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    return codes, w.new_empty((*lead, tiles(rows), tiles(width)), dtype=torch.float32)


@pack_e5m6.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((*x.shape[:-1], x.shape[-1] // 2 * 3), dtype=torch.uint8)
    return packed, x.new_empty((*x.shape[:-1], tiles(x.shape[-1])), dtype=torch.float32)


@unpack_e5m6.register_fake
def _(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 3 * 2), dtype=dtype)
