"""The experts as one operation against the composition of grouped products, in float64 for the exact value."""

import pytest
import torch

from dsv3.kernels import native
from dsv3.kernels.experts import expert_mlp, expert_mlp_reference
from dsv3.kernels.moe import sort_by_expert
from tests.kernels.distance import distance

SIZES = [(37, 48, 5, 2, 16), (600, 64, 4, 3, 48), (100, 256, 32, 4, 128), (1, 32, 3, 2, 32)]  # N, D, E, K, I


def inputs(tokens, dim, experts, top_k, width, dtype=torch.bfloat16):
    """Leaves (x, gate_up, down, weights), routing in which the last expert gets no token, and an output gradient."""
    torch.manual_seed(0)
    x = torch.randn(tokens, dim)
    gate_up, down = torch.randn(experts, 2 * width, dim) * dim**-0.5, torch.randn(experts, dim, width) * width**-0.5
    leaves = [t.to(dtype).requires_grad_() for t in (x, gate_up, down)]
    leaves.append(torch.rand(tokens, top_k).requires_grad_())
    indices = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)])
    return leaves, sort_by_expert(indices, experts), torch.randn(tokens, dim).to(dtype)


@pytest.mark.parametrize("sizes", SIZES)
def test_bfloat16_and_gradients_against_float64(sizes):
    """Rounding the hidden products, activations and results to bfloat16 leaves 0.003 to 0.005 in the norm."""
    leaves, order, d_out = inputs(*sizes)
    out = expert_mlp(*leaves, *order)
    got = torch.autograd.grad(out, leaves, d_out)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted_out = expert_mlp_reference(*exact, *order)
    wanted = torch.autograd.grad(wanted_out, exact, d_out.double())
    assert distance(out, wanted_out) < 0.006
    for leaf, a, b in zip(leaves, got, wanted):
        assert a.dtype == leaf.dtype
        assert distance(a, b) < 0.006
    assert not got[1][-1].any(), "an expert without tokens has a gradient of true zeros"
    assert not got[2][-1].any()


def test_float32_is_the_reference():
    leaves, order, _ = inputs(*SIZES[0], dtype=torch.float32)
    assert torch.equal(expert_mlp(*leaves, *order), expert_mlp_reference(*leaves, *order))


@pytest.mark.skipif(native.library() is None, reason="this CPU runs the torch path")
def test_native_is_registered_and_does_not_depend_on_threads():
    leaves, order, d_out = inputs(*SIZES[1])
    torch.library.opcheck(torch.ops.dsv3.expert_mlp.default, (*leaves, *order))

    def run():
        out = expert_mlp(*leaves, *order)
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    both, threads = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(both, alone))
