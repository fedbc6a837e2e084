"""FP8 casts: in C equal to torch's reference in every bit, equal to the release's formula where both are defined, and what happens
to zeros, denormals, NaN and infinity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.kernels import quant
from dsv3.kernels.quant import (
    cast_blocks,
    cast_blocks_reference,
    cast_columns,
    cast_columns_reference,
    cast_tiles,
    cast_tiles_reference,
    dequantize_blocks,
    dequantize_tiles,
    pack_e5m6,
    pack_e5m6_reference,
    retile,
    tiles,
    unpack_e5m6,
    unpack_e5m6_reference,
)
from tests.kernels.distance import distance
from tests.kernels.test_triton import hard_values, same


@pytest.mark.parametrize("shape", [(37, 128), (37, 48), (37, 576), (37, 24)])  # 24: no multiple of 16, torch's path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pow2", [False, True])
def test_c_equals_torch(shape, dtype, pow2):
    x = hard_values(*shape, dtype)
    same(cast_tiles(x, pow2), cast_tiles_reference(x, pow2))
    same(cast_tiles(x.view(1, *shape), pow2), [t.unsqueeze(0) for t in cast_tiles_reference(x, pow2)])
    offsets = torch.tensor([0, 0, 9, 37])
    same(cast_columns(x, offsets, pow2), cast_columns_reference(x, offsets, pow2))
    codes, scales = cast_tiles(x)
    between = dequantize_tiles(codes, scales, torch.float32)
    same(retile(codes, scales, offsets, pow2), cast_columns_reference(between, offsets, pow2))
    same(cast_blocks(x), cast_blocks_reference(x))


def test_every_bfloat16_and_a_strided_input():
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()][: 65024 // 128 * 128].view(-1, 128)
    same(cast_tiles(x), cast_tiles_reference(x))
    same(cast_tiles(x.t()[:, :112]), cast_tiles_reference(x.t()[:, :112].contiguous()))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.integers(1, 5))
def test_columns_of_any_routing(counts, sixteenths):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = int(offsets[-1])
    x = torch.randn(rows, 16 * sixteenths, generator=torch.Generator().manual_seed(rows)).bfloat16()
    codes, scales = cast_columns(x, offsets)
    same((codes, scales), cast_columns_reference(x, offsets))
    for expert, count in enumerate(counts):
        start, first = int(offsets[expert]), int(offsets[expert]) // 128 + expert
        part = dequantize_tiles(codes[:, start : start + count], scales[:, first : first + tiles(count)], torch.float32)
        if count:
            torch.testing.assert_close(part.t(), x[start : start + count].float(), rtol=2**-4, atol=1e-2)


@pytest.mark.parametrize("pow2", [False, True])
def test_equals_the_release(pow2):
    """act_quant of the release (spec 6.2): a = max(amax, 1e-4), s = a / 448, next power of two for ue8m0, q = x / s."""
    torch.manual_seed(0)
    x = torch.randn(50, 4, 128) * 0.1
    scale = x.abs().amax(-1).clamp_min(1e-4) / 448
    if pow2:
        scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
    codes, scales = cast_tiles(x.flatten(1), pow2)
    assert torch.equal(scales, scale)
    assert torch.equal(codes.float(), (x / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).float().flatten(1))


@pytest.mark.parametrize(("pow2", "error"), [(False, 0.0257), (True, 0.0265)])
def test_error_on_normal_values(pow2, error):
    """Relative Frobenius error as measured for spec 6.2."""
    torch.manual_seed(0)
    x = torch.randn(2048, 512)
    assert distance(dequantize_tiles(*cast_tiles(x, pow2), torch.float32), x) == pytest.approx(error, abs=2e-4)


def test_zeros_tiny_values_and_not_finite_ones():
    x = torch.zeros(5, 256)
    x[1, :128] = 1e-7  # the release would make it 2^-9 · 1e-4 / 448 or nothing
    x[2, 3], x[3, 3], x[4, 200] = torch.nan, torch.inf, -torch.inf
    codes, scales = cast_tiles(x)
    back = dequantize_tiles(codes, scales, torch.float32)
    assert not back[0].any()
    assert scales[0].isfinite().all()
    torch.testing.assert_close(back[1, :128], x[1, :128], rtol=1e-6, atol=0)
    assert back[2, :128].isnan().all()
    assert back[3, :128].isnan().all()
    assert back[4, 128:].isnan().all()
    assert back[:, 128:][:4].isfinite().all()
    assert back[4, :128].isfinite().all()
    assert (codes.view(torch.uint8)[2, :128] == 0x7F).all()


def test_blocks_of_a_ragged_matrix():
    """576 rows as kv_a_proj has them: 5 scale rows, the last over 64 (spec 2.1)."""
    torch.manual_seed(0)
    w = torch.randn(2, 576, 272)
    codes, scales = cast_blocks(w)
    assert scales.shape == (2, 5, 3)
    assert distance(dequantize_blocks(codes, scales, torch.float32), w) < 0.028
    assert scales[1, 4, 2] == w[1, 512:, 256:].abs().max() / 448
    again = cast_blocks(dequantize_blocks(codes, scales, torch.float32))
    assert torch.equal(again[0].float(), codes.float()), "codes survive a round trip through float32"


def test_e5m6():
    """Six bits behind the point: 2^-7 of each value at most, down to 2^-28 of its tile's largest; 12 bits a value."""
    torch.manual_seed(0)
    x = torch.randn(64, 320) * torch.exp(torch.randn(64, 320) * 2)
    packed, scales = pack_e5m6(x)
    assert packed.shape == (64, 480)
    assert packed.dtype == torch.uint8
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5)), "powers of two"
    back = unpack_e5m6(packed, scales, torch.float32)
    assert ((back - x).abs() <= x.abs() * 2**-7).all()
    assert torch.equal(unpack_e5m6(*pack_e5m6(back), torch.float32), back)
    assert not unpack_e5m6(*pack_e5m6(torch.zeros(1, 128)), torch.float32).any()
    bad = torch.ones(1, 128)
    bad[0, 1] = torch.nan
    assert unpack_e5m6(*pack_e5m6(bad), torch.float32).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_e5m6_in_c_equals_torch(dtype):
    x = hard_values(37, 272, dtype)
    packed, scales = pack_e5m6(x)
    wanted = pack_e5m6_reference(x)
    assert torch.equal(packed, wanted[0])
    assert torch.equal(scales.nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))
    back = unpack_e5m6(packed, scales, torch.bfloat16)
    assert torch.equal(
        back.view(torch.int16)[7:], unpack_e5m6_reference(packed, scales, torch.bfloat16).view(torch.int16)[7:]
    )
    assert torch.equal(back.isnan(), unpack_e5m6_reference(packed, scales, torch.bfloat16).isnan())


def test_registered():
    x, offsets = torch.randn(150, 48), torch.tensor([0, 20, 20, 150])
    codes, scales = cast_tiles(x)
    packed = pack_e5m6(x)
    for op, arguments in (
        (torch.ops.dsv3.cast_tiles, (x, True)),
        (torch.ops.dsv3.cast_columns, (x, offsets)),
        (torch.ops.dsv3.retile, (codes, scales, offsets)),
        (torch.ops.dsv3.cast_blocks, (x,)),
        (torch.ops.dsv3.pack_e5m6, (x,)),
        (torch.ops.dsv3.unpack_e5m6, (*packed, torch.bfloat16)),
    ):
        # opcheck's test_schema multiplies arguments and results, which torch cannot do in float8.
        torch.library.opcheck(op.default, arguments, test_utils=("test_autograd_registration", "test_faketensor"))


def test_an_empty_input():
    codes, scales = cast_tiles(torch.zeros(0, 48))
    assert codes.shape == (0, 48)
    assert scales.shape == (0, 1)
    assert quant.cast_columns(torch.zeros(0, 48), torch.tensor([0, 0]))[1].shape == (48, 1)
