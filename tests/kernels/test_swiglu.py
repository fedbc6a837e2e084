"""SwiGLU in C against float64; halves of one tensor and a weight a row, as the experts have them."""

import pytest
import torch

from dsv3.kernels import native
from dsv3.kernels.quant import cast_tiles
from dsv3.kernels.swiglu import swiglu, swiglu_cast, swiglu_reference
from tests.kernels.distance import distance


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (37, 48), (300, 128)])
@pytest.mark.parametrize("weighted", [False, True])
def test_bfloat16(rows, width, weighted):
    """Only results are rounded: half a bfloat16 step of each value, 0.0017 in the norm."""
    torch.manual_seed(0)
    h = torch.randn(rows, 2 * width).bfloat16().requires_grad_()
    leaves = [h, *([torch.rand(rows, 1).requires_grad_()] if weighted else [])]
    dy = torch.randn(rows, width).bfloat16()
    y = swiglu(*h.chunk(2, dim=-1), *leaves[1:])
    got = torch.autograd.grad(y, leaves, dy)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted_y = swiglu_reference(*exact[0].chunk(2, dim=-1), *exact[1:])
    wanted = torch.autograd.grad(wanted_y, exact, dy.double())
    assert distance(y, wanted_y) < 0.003
    assert all(distance(a, b) < 0.003 for a, b in zip(got, wanted))


def test_float32_is_the_reference():
    gate, up = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    assert torch.equal(swiglu(gate, up), swiglu_reference(gate, up))


@pytest.mark.skipif(native.library() is None, reason="this CPU runs the torch path")
def test_registered_and_not_finite():
    gate, up = (torch.randn(20, 32).bfloat16().requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.dsv3.swiglu.default, (gate, up, None))
    torch.library.opcheck(torch.ops.dsv3.swiglu.default, (gate, up, torch.rand(20, 1, requires_grad=True)))
    with torch.no_grad():
        gate[3, 5] = torch.nan
        up[4, 6] = torch.inf
    y = swiglu(gate, up)
    assert y[3, 5].isnan()
    assert y[4, 6].isinf() or y[4, 6].isnan()
    assert y[5:].isfinite().all()


@pytest.mark.parametrize("width", [48, 272])
def test_with_its_cast_it_is_the_composition(width):
    torch.manual_seed(0)
    h, weights = torch.randn(40, 2 * width).bfloat16().requires_grad_(), torch.rand(40, 1).requires_grad_()
    y, cast = swiglu_cast(*h.chunk(2, dim=-1), weights)
    plain = swiglu(*h.chunk(2, dim=-1), weights)
    assert torch.equal(y, plain)
    codes, scales = cast_tiles(plain.detach())
    assert torch.equal(cast.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(cast.scales, scales)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (h, weights), dy), torch.autograd.grad(plain, (h, weights), dy)):
        assert torch.equal(a, b)
