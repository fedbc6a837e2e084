"""Products of FP8 codes: every 128 along the contraction is summed, weighted with both scales, and added in float32.

    fprop   y[r, n]     = sum_t ( sum_{k in t} a[r, k] · b[e(r), n, k] ) · sa[r, t] · sb[e(r), n // 128, t]
    dgrad   the same with b turned: its strides and its scales' are given, no copy is made
    wgrad   dw[e, n, k] = sum_t ( sum_{r in t} a[n, r] · b[k, r] ) · sa[n, t] · sb[k, t],  t the tiles of expert e's rows

Rows are sorted by expert, `offsets` says where each begins; a plain Linear is one expert. On a GPU the offsets stay there.
Tensor cores keep about 14 bits of a sum of FP8 products, hence the promotion at every 128 (V3 report 3.3.2);
`sum_bits` below 24 emulates going without: sums of 32 products are cut to so many bits as they are added.

With bfloat16 rows and no scales of theirs (`a_scales` None) the weights alone are FP8: what a model kept in FP8 is served with.

On a CPU in C (cpu/fp8.c), where codes become bfloat16 only in a core's cache; on CUDA in Triton; else, and as the second
opinion, by torch (`..._reference`). Source: V3 report section 3.3.2; spec 6.3.
Legend: R rows, K contraction, N columns, E experts, T tiles. Does not: cast (see quant.py).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dsv3.kernels import native
from dsv3.kernels.quant import TILE, dequantize_blocks, tiles
from dsv3.kernels.triton import use_triton

FULL = 24  # bits of a float32's significand
_UNPROMOTED = 32  # products that a tensor core adds at once


@torch.library.custom_op("dsv3::fp8_grouped_mm", mutates_args=())
def fp8_grouped_mm(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype,
    sum_bits: int = FULL,
) -> Tensor:  # fmt: skip
    """-> y (R, N) in `dtype` (bfloat16 or float32).

    Args:
        a: (R, K) float8 codes in 1x128 tiles with a_scales (R, ceil K/128); or bfloat16 with a_scales None.
        b: (E, N, K) e4m3 codes in 128x128 blocks, K contiguous or N; b_scales (E, ceil N/128, ceil K/128), any strides.
        offsets: (E + 1,) int64: rows of expert e are offsets[e] to offsets[e + 1].
    """
    a = a.contiguous()
    if use_triton(a, b) and _plain(a, sum_bits):
        from dsv3.kernels.triton import gemm

        return gemm.grouped_mm(a, a_scales, b, b_scales, offsets, dtype)
    if a.device.type != "cpu" or native.library() is None or not a.numel():
        return fp8_grouped_mm_reference(a, a_scales, b, b_scales, offsets, dtype, sum_bits)
    experts, columns, width = b.shape
    if b.stride(-1) != 1 and b.stride(-2) != 1:
        b = b.contiguous()
    by_k = b.stride(-1) != 1 and b.stride(-2) == 1
    y = a.new_empty(a.shape[0], columns, dtype=dtype)
    native.call(
        "fp8_grouped_mm", a, native.NULL if a_scales is None else a_scales.contiguous(), native.address(b),
        native.address(b_scales), offsets.contiguous(), y, columns, width, experts,
        b.stride(0), b.stride(2) if by_k else b.stride(1), int(by_k), *b_scales.stride(), 7,
        int(dtype == torch.float32), int(a.dtype == torch.float8_e5m2), *_adder(sum_bits),
    )  # fmt: skip
    return y


def fp8_grouped_mm_reference(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor, offsets: Tensor, dtype: torch.dtype,
    sum_bits: int = FULL,
) -> Tensor:  # fmt: skip
    """The same by torch, an expert and a tile at a time."""
    y, bounds = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32), offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if a_scales is None:  # a band of rows of the weight at a time: it is never whole
            for n in range(0, b.shape[1], TILE):
                band = b[expert, n : n + TILE]
                weight = dequantize_blocks(band, b_scales[expert, n // TILE : n // TILE + 1], torch.float32)
                y[start:end, n : n + TILE] = a[start:end].float() @ weight.t()
        else:
            columns = b_scales[expert].repeat_interleave(TILE, 0)[: b.shape[1]]
            y[start:end] = _sum_tiles(a[start:end], a_scales[start:end], b[expert], columns, sum_bits)
    return y.to(dtype)


@torch.library.custom_op("dsv3::fp8_grouped_wgrad", mutates_args=())
def fp8_grouped_wgrad(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, sum_bits: int = FULL
) -> Tensor:
    """a (N, R), b (K, R) codes of `cast_columns` or `retile` with scales (N, T), (K, T) -> (E, N, K) float32."""
    if use_triton(a, b) and _plain(a, sum_bits):
        from dsv3.kernels.triton import gemm

        return gemm.grouped_wgrad(a, a_scales, b, b_scales, offsets)
    (columns, rows), width, experts = a.shape, b.shape[0], offsets.numel() - 1
    if a.device.type != "cpu" or native.library() is None or not rows:
        return fp8_grouped_wgrad_reference(a, a_scales, b, b_scales, offsets, sum_bits)
    dw = torch.empty(experts, columns, width)
    tensors = [t.contiguous() for t in (a, a_scales, b, b_scales, offsets)]
    native.call(
        "fp8_grouped_wgrad", *tensors, dw, rows, columns, width, experts, int(a.dtype == torch.float8_e5m2),
        *_adder(sum_bits),
    )  # fmt: skip
    return dw


def fp8_grouped_wgrad_reference(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor, sum_bits: int = FULL
) -> Tensor:
    """The same by torch, an expert and a tile at a time."""
    dw, bounds = a_scales.new_zeros(offsets.numel() - 1, a.shape[0], b.shape[0]), offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        first = start // TILE + expert
        used = slice(first, first + tiles(end - start))
        dw[expert] = _sum_tiles(a[:, start:end], a_scales[:, used], b[:, start:end], b_scales[:, used], sum_bits)
    return dw


def fp8_mm(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor, dtype: torch.dtype, sum_bits: int = FULL
) -> Tensor:
    """a (R, K) with its scales, b (N, K) with (ceil N/128, ceil K/128) -> (R, N): `fp8_grouped_mm` with one expert."""
    offsets = one_group(a.shape[0], a.device)
    return fp8_grouped_mm(a, a_scales, b.unsqueeze(0), b_scales.unsqueeze(0), offsets, dtype, sum_bits)


def fp8_wgrad(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, sum_bits: int = FULL) -> Tensor:
    """a (N, R), b (K, R) with scales (N, T), (K, T) -> (N, K) float32: `fp8_grouped_wgrad` with one expert."""
    return fp8_grouped_wgrad(a, a_scales, b, b_scales, one_group(a.shape[1], a.device), sum_bits)[0]


def one_group(rows: int, device: torch.device) -> Tensor:
    """Offsets of all rows as one expert's, made without waiting for the device."""
    return torch.arange(2, device=device) * rows


def _sum_tiles(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, sum_bits: int) -> Tensor:
    """sum over tiles t of (a_t b_tᵀ) · a_scales[:, t] b_scales[:, t]ᵀ: a (M, K), b (N, K), scales (M, T), (N, T) -> (M, N)."""
    out = a_scales.new_zeros(a.shape[0], b.shape[0])
    step = TILE if sum_bits == FULL else _UNPROMOTED
    for k in range(0, a.shape[1], step):
        part = a[:, k : k + step].float() @ b[:, k : k + step].float().t()
        out += part * (a_scales[:, k // TILE, None] * b_scales[:, k // TILE])
        if sum_bits < FULL:
            out = (out.view(torch.int32) & -(1 << (FULL - sum_bits))).view(torch.float32)
    return out


def _plain(a: Tensor, sum_bits: int) -> bool:
    """Not one of the ablations, which on a GPU only the reference computes."""
    return sum_bits == FULL and a.dtype != torch.float8_e5m2


def _adder(sum_bits: int) -> tuple[int, int]:
    """How many products are summed before they are added, and the mask of the bits that stay of a sum."""
    if sum_bits == FULL:
        return TILE, 0xFFFFFFFF
    return _UNPROMOTED, 0xFFFFFFFF & -(1 << (FULL - sum_bits))


@fp8_grouped_mm.register_fake
def _(a, a_scales, b, b_scales, offsets, dtype, sum_bits=FULL):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


@fp8_grouped_wgrad.register_fake
def _(a, a_scales, b, b_scales, offsets, sum_bits=FULL):
    return a_scales.new_empty((offsets.shape[0] - 1, a.shape[0], b.shape[0]))
