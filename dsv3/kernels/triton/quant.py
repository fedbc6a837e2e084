"""Casts to FP8 for CUDA, equal to kernels/quant.py's references bit for bit.

Division is IEEE's (div_rn), and rounding to e4m3 is done here on the bits: the same integers come out on every GPU, in Triton's
CPU interpreter and in C. (The interpreter's own casts do not: it truncates to float8 and rounds bfloat16's denormals; so
bfloat16 is read as integers too.) Legend: R rows, K width, E experts, T tiles, BR and BK a program's block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = tl.constexpr(128)
_BLOCK_ROWS = 32


@triton.jit
def scale_of(amax, broken, pow2: tl.constexpr):
    """amax / 448 (the least normal float32 at least), its next power of two if asked, NaN where a value was not finite."""
    scale = tl.div_rn(tl.maximum(amax, 448.0 * 1.1754943508222875e-38), amax * 0.0 + 448.0)
    if pow2:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(broken, float("nan"), scale)


@triton.jit
def to_e4m3(x):
    """float32, already divided by its scale -> code, to nearest even, saturated at 448; 0x7f for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    u = size.to(tl.int32, bitcast=True)
    normal = ((u + 0x7FFFF + ((u >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the step is 2^-9: adding 2^14 makes float32's own rounding stop there.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(x != x, 0x7F, code).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """Code (any integer) -> float32, exactly."""
    c = code.to(tl.int32)
    mantissa, exponent = c & 7, (c >> 3) & 15
    step = ((exponent + 117) << 23).to(tl.float32, bitcast=True)  # 2^(exponent - 10)
    size = tl.where(exponent > 0, (mantissa + 8).to(tl.float32) * step, mantissa.to(tl.float32) * 0.001953125)
    size = tl.where((c & 127) == 127, float("nan"), size)
    signed = size.to(tl.int32, bitcast=True) | ((c & 128) << 24)  # keeps the sign of zero
    return signed.to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """What was loaded, float32, or bfloat16 as int16, in float32."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _finite_amax(x, axis: tl.constexpr):
    """Largest magnitude along an axis, and whether anything there is NaN or infinite."""
    size = tl.abs(x)
    good = size <= 3.4028234663852886e38
    return tl.max(tl.where(good, size, 0.0), axis), tl.min(good.to(tl.int32), axis) == 0


@triton.jit
def _tiles(x, codes, scales, rows, width, pow2: tl.constexpr, BR: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    tile, k = tl.program_id(1), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (r < rows)[:, None] & (k < width)[None, :]
    at = r[:, None] * width + k[None, :]
    values = widen(tl.load(x + at, mask=inside, other=0))
    amax, broken = _finite_amax(values, 1)
    scale = scale_of(amax, broken, pow2)
    tl.store(scales + r * tl.cdiv(width, TILE) + tile, scale, mask=r < rows)
    whole = tl.broadcast_to(scale[:, None], (BR, TILE))
    tl.store(codes + at, to_e4m3(tl.div_rn(values, whole)), mask=inside)


@triton.jit
def find_expert(offsets, slot, experts, SIDE: tl.constexpr, MOST: tl.constexpr):
    """Rows are cut into slots of SIDE an expert: expert e's begin at offsets[e] // SIDE + e. -> expert, first row, end."""
    e = tl.arange(0, MOST)
    first = tl.load(offsets + e, mask=e < experts, other=0) // SIDE + e
    expert = tl.sum(((first <= slot) & (e < experts)).to(tl.int32), 0) - 1
    start = tl.load(offsets + expert)
    return expert, start + (slot - start // SIDE - expert) * SIDE, tl.load(offsets + expert + 1)


@triton.jit
def _columns(
    x, given, offsets, codes, scales, rows, width, tiles, experts, cast: tl.constexpr, pow2: tl.constexpr,
    BK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    _, start, end = find_expert(offsets, slot, experts, 128, MOST)
    r = start + tl.arange(0, TILE)
    inside = (r < end)[:, None] & (k < width)[None, :]
    at = r[:, None].to(tl.int64) * width + k[None, :]
    if cast:  # codes of 1x128 tiles
        held = tl.load(given + r[:, None] * tl.cdiv(width, TILE) + (k // TILE)[None, :], mask=inside, other=0.0)
        values = tl.where(inside, from_e4m3(tl.load(x + at, mask=inside, other=0)) * held, 0.0)
    else:
        values = widen(tl.load(x + at, mask=inside, other=0))
    amax, broken = _finite_amax(values, 0)
    scale = tl.where(start < end, scale_of(amax, broken, pow2), 0.0)
    tl.store(scales + k.to(tl.int64) * tiles + slot, scale, mask=k < width)
    whole = tl.broadcast_to(tl.where(start < end, scale, 1.0)[None, :], (TILE, BK))
    turned = tl.trans(to_e4m3(tl.div_rn(values, whole)))
    tl.store(codes + k[:, None].to(tl.int64) * rows + r[None, :], turned, mask=tl.trans(inside))


@triton.jit
def _blocks(w, codes, scales, rows, width):
    down, across = tl.cdiv(rows, TILE), tl.cdiv(width, TILE)
    matrix = tl.program_id(0).to(tl.int64) // down
    o = tl.program_id(0) % down * TILE + tl.arange(0, TILE)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (o < rows)[:, None] & (i < width)[None, :]
    at = (matrix * rows + o[:, None]) * width + i[None, :]
    values = widen(tl.load(w + at, mask=inside, other=0))
    by_row, broken_rows = _finite_amax(values, 1)
    scale = scale_of(tl.max(by_row, 0), tl.max(broken_rows.to(tl.int32), 0) > 0, False)
    tl.store(scales + tl.program_id(0).to(tl.int64) * across + tl.program_id(1), scale)
    tl.store(codes + at, to_e4m3(tl.div_rn(values, tl.broadcast_to(scale, (TILE, TILE)))), mask=inside)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def cast_tiles(x: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """x (..., K) contiguous: see kernels.quant.cast_tiles."""
    width = x.shape[-1]
    rows, tiles = x.numel() // width, triton.cdiv(width, 128)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = x.new_empty((*x.shape[:-1], tiles), dtype=torch.float32)
    if rows:
        grid = (triton.cdiv(rows, _BLOCK_ROWS), tiles)
        _tiles[grid](_bits(x), codes.view(torch.uint8), scales, rows, width, pow2, _BLOCK_ROWS)
    return codes, scales


def cast_columns(x: Tensor, given: Tensor | None, offsets: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """x (R, K) values, or codes whose 1x128 scales are `given`: see kernels.quant.cast_columns and retile."""
    (rows, width), experts = x.shape, offsets.numel() - 1
    slots = rows // 128 + experts
    codes = torch.empty(width, rows, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(width, slots, device=x.device)
    block = 64
    _columns[(slots, triton.cdiv(width, block))](
        _bits(x) if given is None else x.view(torch.uint8), scales if given is None else given, offsets, codes.view(torch.uint8),
        scales, rows, width, slots, experts, given is not None, pow2, block, triton.next_power_of_2(experts),
    )  # fmt: skip
    return codes, scales


def cast_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (..., O, I) contiguous: see kernels.quant.cast_blocks."""
    *lead, rows, width = w.shape
    down, across = triton.cdiv(rows, 128), triton.cdiv(width, 128)
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scales = w.new_empty((*lead, down, across), dtype=torch.float32)
    if w.numel():
        _blocks[(w.numel() // (rows * width) * down, across)](_bits(w), codes.view(torch.uint8), scales, rows, width)
    return codes, scales
