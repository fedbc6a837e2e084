"""Routing against published vectors and a plain loop; permutations against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.kernels.moe import permute, route, sequence_balance_loss, sort_by_expert, sum_copies, unpermute

LOGITS = torch.tensor([[1, -2, 0.5, 0.4, 3, -4, 0, 0.1]])


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ([0, -1, 0.1, 0.1, -0.6, -0.6, 0.2, 0.2], {2: 0.9446, 7: 0.7967, 6: 0.7588}),
        ([0, -1.5, -1, -1, -2, -2, -3, -3], {0: 0.9362, 2: 0.7971, 3: 0.7667}),  # masking with 0.0 gets this wrong
    ],
)
def test_published_vectors(bias, expected):
    indices, weights = route(
        LOGITS.sigmoid(), torch.tensor(bias), top_k=3, n_group=4, topk_group=2, normalise=True, scale=2.5
    )
    got = dict(zip(indices[0].tolist(), weights[0].tolist()))
    assert got == pytest.approx(expected, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([1, 2, 4]), best=st.integers(1, 4), top_k=st.integers(1, 4))
def test_against_a_plain_loop(seed, groups, best, top_k):
    torch.manual_seed(seed)
    best, experts = min(best, groups), 16
    top_k = min(top_k, experts // groups * best)
    scores, bias = torch.rand(5, experts), torch.randn(experts)
    indices, weights = route(scores, bias, top_k=top_k, n_group=groups, topk_group=best, normalise=False, scale=1.0)
    size = experts // groups
    for token in range(5):
        choice = [(scores[token, e] + bias[e]).item() for e in range(experts)]
        group = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=group.__getitem__)[-best:]
        allowed = [e for e in range(experts) if e // size in kept]
        wanted = set(sorted(allowed, key=choice.__getitem__)[-top_k:])
        assert set(indices[token].tolist()) == wanted
        assert torch.equal(weights[token], scores[token][indices[token]])


def test_permute_and_back_sums_the_copies():
    torch.manual_seed(0)
    indices = torch.randint(0, 7, (11, 3))
    order, inverse, counts = sort_by_expert(indices, 7)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [(indices == e).sum() for e in range(7)]
    assert torch.equal(indices.flatten()[order], indices.flatten().sort().values)
    x = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unpermute(permute(x, order, inverse), order, inverse, 3), 3 * x)
    assert torch.autograd.gradcheck(lambda t: permute(t, order, inverse), x)
    y = torch.randn(33, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: unpermute(t, order, inverse, 3), y)


def test_balance_loss_is_one_when_balanced_and_more_when_not():
    even = torch.full((2, 8, 4), 0.1)
    for token in range(8):
        even[:, token, token % 4] = 0.9
    assert sequence_balance_loss(even, 1).item() == pytest.approx(1.0)
    skewed = torch.full((2, 8, 4), 0.1)
    skewed[..., 0] = 0.9
    assert sequence_balance_loss(skewed, 1).item() == pytest.approx(4 * 0.9 / 1.2)


def test_copies_are_summed_in_float32_and_in_order_and_rounded_once():
    torch.manual_seed(0)
    y, order = torch.randn(40, 24).bfloat16(), torch.randperm(40)[:30]
    copies = torch.tensor([3, 0, 8, 1, 18])
    starts = copies.cumsum(0) - copies
    parts = order.split(copies.tolist())
    expected = torch.stack([y[part].float().sum(0) if len(part) else torch.zeros(24) for part in parts]).bfloat16()
    assert torch.equal(sum_copies(y, order, starts), expected)
    assert sum_copies(y[:0], order[:0], starts[:0]).shape == (0, 24)
