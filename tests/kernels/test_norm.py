"""RMS norm in C against float64; rows of a wider tensor too."""

import pytest
import torch

from dsv3.kernels import native
from dsv3.kernels.norm import rms_norm, rms_norm_cast, rms_norm_reference
from dsv3.kernels.quant import cast_tiles
from tests.kernels.distance import distance


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (63, 48), (200, 256)])
@pytest.mark.parametrize("sliced", [False, True])
def test_bfloat16(rows, width, sliced):
    """Only the result is rounded: half a bfloat16 step (2^-9) of each value, 0.0017 in the norm."""
    torch.manual_seed(0)
    x = torch.randn(2, rows, width + 16 * sliced).bfloat16()
    leaves = [x.requires_grad_(), (torch.rand(width) + 0.5).requires_grad_()]
    dy = torch.randn(2, rows, width).bfloat16()
    y = rms_norm(leaves[0][..., :width], leaves[1], 1e-6)
    assert y.dtype == torch.bfloat16
    got = torch.autograd.grad(y, leaves, dy)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    unit = exact[0][..., :width]
    wanted_y = unit * (unit.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact[1]
    wanted = torch.autograd.grad(wanted_y, exact, dy.double())
    assert distance(y, wanted_y) < 0.003
    assert distance(got[0], wanted[0]) < 0.003
    assert distance(got[1], wanted[1]) < 1e-4 or native.library() is None


def test_float32_is_the_reference():
    x, weight = torch.randn(3, 7), torch.rand(7)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


@pytest.mark.skipif(native.library() is None, reason="this CPU runs the torch path")
def test_registered_and_not_finite():
    x, weight = torch.randn(70, 32).bfloat16().requires_grad_(), torch.rand(32, requires_grad=True)
    torch.library.opcheck(torch.ops.dsv3.rms_norm.default, (x, weight, 1e-6))
    with torch.no_grad():
        x[5, 7] = torch.nan
    y = rms_norm(x, weight, 1e-6)
    assert y[5].isnan().all()
    assert y[:5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_with_its_cast_it_is_the_composition(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 20, 272).to(dtype).requires_grad_(), (torch.rand(272) + 0.5).requires_grad_()
    y, cast = rms_norm_cast(x, weight, 1e-6)
    plain = rms_norm(x, weight, 1e-6)
    assert torch.equal(y, plain)
    codes, scales = cast_tiles(plain.detach().flatten(0, 1))
    assert torch.equal(cast.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(cast.scales, scales)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(plain, (x, weight), dy)):
        assert torch.equal(a, b)
