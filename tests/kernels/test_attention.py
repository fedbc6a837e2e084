"""attend_full against the written-out softmax: torch's path in float32, the C path in bfloat16 where this machine has it."""

import pytest
import torch

from dsv3.kernels import native
from dsv3.kernels.attention import attend_full, attend_full_reference
from tests.kernels.distance import distance


@pytest.mark.parametrize("values", [4, 12, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_full(values, masked):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 9, 12), torch.randn(2, 3, 9, 12)
    v = torch.randn(2, 3, 9, values)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().triu(-3).expand(2, 1, 9, 9) if masked else None
    got = attend_full(q, k, v, scale=0.3, mask=mask)
    torch.testing.assert_close(got, attend_full_reference(q, k, v, scale=0.3, mask=mask), atol=1e-5, rtol=1e-5)


def leaves(*shapes, strided):
    """bfloat16 tensors (B, H, T, width), as the model gives them (heads inside the row) or contiguous."""
    torch.manual_seed(0)
    made = [torch.randn(b, t, h, w).bfloat16().transpose(1, 2) for b, h, t, w in shapes]
    return [(x if strided else x.contiguous()).requires_grad_() for x in made]


@pytest.mark.parametrize("tokens", [2, 16, 31, 65, 130, 257])
@pytest.mark.parametrize(("keys", "values"), [(48, 32), (16, 16), (32, 80), (192, 128)])
def test_causal_in_bfloat16_and_its_gradients(tokens, keys, values):
    """Both paths round P, dS and the outputs to bfloat16 (2^-9 of each value): 0.002 to 0.003 in the norm, and up to 0.008
    for dQ of two tokens, where dP - delta cancels."""
    shapes = (2, 3, tokens, keys), (2, 3, tokens, keys), (2, 3, tokens, values)
    q, k, v = leaves(*shapes, strided=tokens % 2 == 0)
    d_out = torch.randn(2, 3, tokens, values).bfloat16()
    out = attend_full(q, k, v, scale=keys**-0.5)
    got = torch.autograd.grad(out, (q, k, v), d_out)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].transpose(-1, -2) * keys**-0.5
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    wanted_out = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ exact[2]
    wanted = torch.autograd.grad(wanted_out, exact, d_out.double())
    assert distance(out, wanted_out) < 0.004
    for a, b in zip(got, wanted):
        assert distance(a, b) < 0.012


@pytest.mark.skipif(native.library() is None, reason="this CPU runs the torch path")
def test_native_causal():
    q, k, v = leaves((1, 2, 70, 48), (1, 2, 70, 48), (1, 2, 70, 32), strided=True)
    args = q, k, v, 0.2
    torch.library.opcheck(torch.ops.dsv3.causal_attention.default, args)
    out, logsumexp = torch.ops.dsv3.causal_attention(*args)
    threads = torch.get_num_threads()
    try:  # the order of every sum is one thread's
        torch.set_num_threads(1)
        alone = torch.ops.dsv3.causal_attention(*args)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(out, alone[0])
    assert torch.equal(logsumexp, alone[1])


def test_any_strides():
    """Widths that do not lie side by side, and a gradient that is one number spread out."""
    torch.manual_seed(0)
    x = [torch.randn(1, 2, 32, 40).bfloat16().transpose(2, 3).requires_grad_() for _ in range(3)]
    y = [t.detach().contiguous().requires_grad_() for t in x]
    outs = [attend_full(*t, scale=0.2) for t in (x, y)]
    assert torch.equal(*outs)
    for a, b in zip(torch.autograd.grad(outs[0].sum(), x), torch.autograd.grad(outs[1].sum(), y)):
        assert torch.equal(a, b)


@pytest.mark.skipif(native.library() is None, reason="this CPU runs the torch path")
def test_large_and_non_finite_scores():
    """Scores of thousands neither overflow nor vanish; a NaN comes out as a NaN, for the trainer to stop at."""
    q, k, v = leaves((1, 1, 40, 16), (1, 1, 40, 16), (1, 1, 40, 16), strided=False)
    with torch.no_grad():
        q *= 1000.0
    out = attend_full(q, k, v, scale=1.0)
    torch.testing.assert_close(out, attend_full_reference(q, k, v, scale=1.0), atol=0.02, rtol=0.02)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    with torch.no_grad():
        k[0, 0, 3, 5] = torch.nan
    assert not attend_full(q, k, v, scale=1.0)[0, 0, 3:].isfinite().any()
