"""Absorbed latent attention over pages for CUDA: see kernels/attention.py.

    split   a program takes one row, a block of its heads and SPLIT of its keys: the sum of exp2(s - top) · c_kv, not yet
            divided, with top and the sum of the weights, all float32
    merge   a program takes one row and head, and adds its splits in their order

Splits are counted from position 0 and a row's number of splits follows from its own position: a row's numbers are the same
whatever rows, tables or padding are beside it. A page is read once for all heads of a block, and its first C columns are both
keys and values. Blocks of the same keys are neighbours in the grid, so that the second one finds them in the cache (L2).
Source: Flash-Decoding; FlashMLA (spec 3.5). Legend: N rows, H heads, C latent, R rope; BH, BC, BR a block's heads and columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAGE = tl.constexpr(64)
_LOG2_E = 1.4426950408889634


@triton.jit
def _split(
    q, pages, tables, rows, positions, sums, tops, totals, scale, table_width, most, first,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, wide: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """sums (N, most, H, C), tops and totals (N, most, H) of the splits that a row has; the others stay as they are."""
    row, split = tl.program_id(1), tl.program_id(2)
    start, end = split * SPLIT, tl.load(positions + row).to(tl.int32) + 1
    if start >= end:
        return
    end = tl.minimum(end, start + SPLIT)
    h, c, r = tl.program_id(0) * BH + tl.arange(0, BH), tl.arange(0, BC), tl.arange(0, BR)
    n = tl.arange(0, PAGE)
    mine = q + (row.to(tl.int64) * H + h)[:, None] * (C + R)
    q_c = tl.load(mine + c[None, :], mask=(h < H)[:, None] & (c < C)[None, :], other=0.0)
    q_r = tl.load(mine + C + r[None, :], mask=(h < H)[:, None] & (r < R)[None, :], other=0.0)
    if wide:
        q_c, q_r = q_c.to(tl.float32), q_r.to(tl.float32)
    table = tables + tl.load(rows + row).to(tl.int64) * table_width
    top, total = tl.full((BH,), -1e30, tl.float32), tl.zeros((BH,), tl.float32)
    out = tl.zeros((BH, BC), tl.float32)
    for key in range(start, end, PAGE):
        page = tl.load(table + key // PAGE).to(tl.int64)
        seen = (key + n >= first) & (key + n < end)
        at = pages + (page * PAGE + n)[:, None] * (C + R)
        # What a row may not read is not loaded: it might be a number that is not finite.
        k_c = tl.load(at + c[None, :], mask=seen[:, None] & (c < C)[None, :], other=0.0)
        k_r = tl.load(at + C + r[None, :], mask=seen[:, None] & (r < R)[None, :], other=0.0)
        if wide:
            k_c, k_r = k_c.to(tl.float32), k_r.to(tl.float32)
        # Two sums, and a branch where a `where` would do (only at an end is anything hidden): where one product feeds another,
        # Triton gives each group of warps all the columns of the first, and it is computed twice (64 heads, 8 warps).
        scores = tl.dot(q_c, tl.trans(k_c), out_dtype=tl.float32) * scale
        scores += tl.dot(q_r, tl.trans(k_r), out_dtype=tl.float32) * scale
        if (key < first) | (key + PAGE > end):
            scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(k_c.dtype), k_c, out * shrink[:, None], out_dtype=tl.float32)
        top = higher
    place = (row.to(tl.int64) * most + split) * H + h
    tl.store(sums + place[:, None] * C + c[None, :], out, mask=(h < H)[:, None] & (c < C)[None, :])
    tl.store(tops + place, top, mask=h < H)
    tl.store(totals + place, total, mask=h < H)


@triton.jit
def _merge(
    sums, tops, totals, positions, out, most, H: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, BC: tl.constexpr
):
    """out (N, H, C): the splits of a row and head weighted alike, added in order, divided. Zero where nothing was read."""
    h, row, c = tl.program_id(0), tl.program_id(1), tl.arange(0, BC)
    splits = tl.load(positions + row).to(tl.int32) // SPLIT + 1
    top, total, whole = -1e30, 0.0, tl.zeros((BC,), tl.float32)
    for split in range(0, splits):
        place = (row.to(tl.int64) * most + split) * H + h
        its_top = tl.load(tops + place)
        higher = tl.maximum(top, its_top)
        shrink, weight = tl.exp2(top - higher), tl.exp2(its_top - higher)
        whole = whole * shrink + tl.load(sums + place * C + c, mask=c < C, other=0.0) * weight
        total = total * shrink + tl.load(totals + place) * weight
        top = higher
    tl.store(out + (row.to(tl.int64) * H + h) * C + c, whole / tl.where(total == 0.0, 1.0, total), mask=c < C)


def split_tokens(heads: int) -> int:
    """Keys of a split: 16 a head and 512 at least, so that writing and reading the sums moves a quarter of the pages' bytes
    at most. The same for every row of a model, whatever the batch."""
    return max(512, triton.next_power_of_2(16 * heads))


def sizes(heads: int, rank: int, rope: int, split: int) -> tuple[dict[str, int], dict[str, int]]:
    """The kernels' constants and options. 64 heads fill a Hopper tensor core's rows; fewer are padded to the 16 that any takes."""
    high = 64 if heads >= 64 else 16
    columns, turned = (max(16, triton.next_power_of_2(width)) for width in (rank, rope))
    fixed = {"H": heads, "C": rank, "R": rope, "SPLIT": split, "BH": high, "BC": columns, "BR": turned}
    return fixed, {"num_warps": 8, "num_stages": 2 if high == 64 else 3}


def attend_pages(
    q: Tensor, pages: Tensor, tables: Tensor, rows: Tensor, positions: Tensor, rank: int, scale: float, first: int,
    split: int | None = None,
) -> Tensor:  # fmt: skip
    """See kernels.attention.attend_pages. pages must be contiguous. split: keys of one, a multiple of 64."""
    assert pages.is_contiguous(), pages.stride()
    q, tables, rows, positions = (t.contiguous() for t in (q, tables, rows, positions))
    (count, heads, width), table_width = q.shape, tables.shape[1]
    fixed, options = sizes(heads, rank, width - rank, split_tokens(heads) if split is None else split)
    most = triton.cdiv(table_width * 64, fixed["SPLIT"])
    sums = torch.empty(count, most, heads, rank, dtype=torch.float32, device=q.device)
    tops, totals = (torch.empty(count, most, heads, dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty(count, heads, rank, dtype=q.dtype, device=q.device)
    if not count:
        return out
    _split[(triton.cdiv(heads, fixed["BH"]), count, most)](
        q, pages, tables, rows, positions, sums, tops, totals, scale * _LOG2_E, table_width, most, first,
        wide=q.device.type == "cpu", **fixed, **options,
    )  # fmt: skip
    whole = {name: fixed[name] for name in ("H", "C", "SPLIT", "BC")}
    _merge[(heads, count)](sums, tops, totals, positions, out, most, **whole)
    return out
