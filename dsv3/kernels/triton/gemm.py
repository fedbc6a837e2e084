"""Grouped products for CUDA: FP8 with promotion at every 128, FP8 weights with bfloat16 rows, bfloat16. See kernels/fp8_gemm.py
and kernels/gemm.py.

A program makes one block of the result and finds its expert from the offsets, which stay on the device: the grid covers the
most slots that any routing can need, and a slot without rows ends at once. Tensor cores sum 128 products; the promotion is one
multiplication and addition in float32. Hopper wants FP8 operands contiguous along the sum, so a turned weight is copied.
Legend: R rows, K contraction, N columns, E experts, T tiles; BM, BN, BK a program's block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.kernels.triton.quant import find_expert

TILE = tl.constexpr(128)


@triton.jit
def _rows(
    a, a_scales, b, b_scales, offsets, y, rows, columns, width, experts, b_expert, b_row, s_expert, s_row, s_tile,
    by: tl.constexpr, wide: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """y (R, N) = rows of each expert times its matrix. by: "fp8", "weights" (only b is FP8) or "bfloat16"."""
    expert, start, end = find_expert(offsets, tl.program_id(1), experts, BM, MOST)
    if start >= end:
        return
    m = (start + tl.arange(0, BM)).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    tiles = tl.cdiv(width, TILE)
    for k0 in range(0, width, BK):
        k = k0 + tl.arange(0, BK)
        left = tl.load(a + m[:, None] * width + k[None, :], mask=(m < end)[:, None] & (k < width)[None, :], other=0.0)
        at = b + expert.to(tl.int64) * b_expert + n[:, None].to(tl.int64) * b_row + k[None, :]
        right = tl.load(at, mask=(n < columns)[:, None] & (k < width)[None, :], other=0.0)
        if by == "weights":
            right = right.to(tl.bfloat16)
        if wide:
            left, right = left.to(tl.float32), right.to(tl.float32)
        part = tl.dot(left, tl.trans(right), out_dtype=tl.float32)
        if by == "bfloat16":
            total += part
        else:
            column_scale = b_scales + expert * s_expert + (n // TILE) * s_row + (k0 // TILE) * s_tile
            scale = tl.load(column_scale, mask=n < columns, other=0.0)[None, :]
            if by == "fp8":
                scale = tl.load(a_scales + m * tiles + k0 // TILE, mask=m < end, other=0.0)[:, None] * scale
            total += part * scale
    tl.store(y + m[:, None] * columns + n[None, :], total, mask=(m < end)[:, None] & (n < columns)[None, :])


@triton.jit
def _wgrad(
    a, a_scales, b, b_scales, offsets, dw, rows, columns, width, tiles, by: tl.constexpr,
    wide: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dw (E, N, K). by "fp8": a (N, R), b (K, R) with a scale each tile of rows; "bfloat16": a (R, N), b (R, K)."""
    expert = tl.program_id(2)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1).to(tl.int64) * BK + tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float32)
    tile = start // TILE + expert
    for r0 in range(start, end, BR):
        r = r0 + tl.arange(0, BR)
        if by == "fp8":
            left = tl.load(
                a + n[:, None] * rows + r[None, :], mask=(n < columns)[:, None] & (r < end)[None, :], other=0.0
            )
            right = tl.load(
                b + k[:, None] * rows + r[None, :], mask=(k < width)[:, None] & (r < end)[None, :], other=0.0
            )
            part = tl.dot(left, tl.trans(right), out_dtype=tl.float32)
            row_scale = tl.load(a_scales + n * tiles + tile, mask=n < columns, other=0.0)
            total += part * (
                row_scale[:, None] * tl.load(b_scales + k * tiles + tile, mask=k < width, other=0.0)[None, :]
            )
            tile += 1
        else:
            left = tl.load(
                a + r[:, None] * columns + n[None, :], mask=(r < end)[:, None] & (n < columns)[None, :], other=0.0
            )
            right = tl.load(
                b + r[:, None] * width + k[None, :], mask=(r < end)[:, None] & (k < width)[None, :], other=0.0
            )
            if wide:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total += tl.dot(tl.trans(left), right, out_dtype=tl.float32)
    at = dw + expert.to(tl.int64) * columns * width + n[:, None] * width + k[None, :]
    tl.store(at, total, mask=(n < columns)[:, None] & (k < width)[None, :])


def grouped_mm(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """See kernels.fp8_gemm.fp8_grouped_mm; a contiguous."""
    by = "weights" if a_scales is None else "fp8"
    return _launch_rows(a, a_scales if a_scales is not None else b_scales, b, b_scales, offsets, dtype, by)


def grouped_mm_bfloat16(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x (R, K), w (E, N, K) -> (R, N), all bfloat16, sums in float32."""
    return _launch_rows(x.contiguous(), x, w, x.new_empty(1, 1, 1), offsets, torch.bfloat16, "bfloat16")


def _launch_rows(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype, by: str
) -> Tensor:
    if b.stride(-1) != 1:
        b = b.contiguous()
    (rows, width), (experts, columns, _) = a.shape, b.shape
    y = torch.empty(rows, columns, dtype=dtype, device=a.device)
    high, wide = 128 if rows > 64 * experts else 64, 128
    grid, deep = (triton.cdiv(columns, wide), rows // high + experts), 64 if by == "bfloat16" else 128
    _rows[grid](
        a, a_scales, b, b_scales, offsets, y, rows, columns, width, experts, b.stride(0), b.stride(1), *b_scales.stride(),
        by, _interpreted(a), high, wide, deep, triton.next_power_of_2(experts), num_warps=8, num_stages=3,
    )  # fmt: skip
    return y


def grouped_wgrad(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor) -> Tensor:
    """See kernels.fp8_gemm.fp8_grouped_wgrad."""
    (columns, rows), width, experts = a.shape, b.shape[0], offsets.numel() - 1
    dw = torch.empty(experts, columns, width, device=a.device)
    given = [t.contiguous() for t in (a, a_scales, b, b_scales)]
    grid = (triton.cdiv(columns, 128), triton.cdiv(width, 128), experts)
    _wgrad[grid](*given, offsets, dw, rows, columns, width, a_scales.shape[1], "fp8", False, 128, 128, 128, num_warps=8)
    return dw


def grouped_wgrad_bfloat16(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """dy (R, N), x (R, K) bfloat16 -> (E, N, K) bfloat16; an expert without rows gets zeros."""
    (rows, columns), width, experts = dy.shape, x.shape[1], offsets.numel() - 1
    dw = dy.new_empty(experts, columns, width)
    grid = (triton.cdiv(columns, 128), triton.cdiv(width, 128), experts)
    _wgrad[grid](
        dy, dy, x, x, offsets, dw, rows, columns, width, 0, "bfloat16", _interpreted(dy), 128, 128, 64, num_warps=8
    )
    return dw


def _interpreted(x: Tensor) -> bool:
    """On the CPU these kernels run in Triton's interpreter, which multiplies the bits of bfloat16 as integers: widen first."""
    return x.device.type == "cpu"
