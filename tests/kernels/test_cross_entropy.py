"""The fused head loss against plain cross entropy, by torch and in C."""

import pytest
import torch

from dsv3.kernels import cross_entropy as module
from dsv3.kernels import native
from dsv3.kernels.cross_entropy import cross_entropy_reference, head_cross_entropy
from tests.kernels.distance import distance


def test_value_and_gradients(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_VALUES", 50 * 7)  # several blocks, the last ragged
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 10, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (3, 10))
    got, wanted = head_cross_entropy(hidden, weight, targets), cross_entropy_reference(hidden, weight, targets)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got * 3, (hidden, weight)), torch.autograd.grad(wanted * 3, (hidden, weight))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("rows", "dim", "vocab"), [(64, 16, 40), (64, 16, 48), (77, 48, 400), (1, 32, 160), (600, 64, 272)]
)
def test_bfloat16(monkeypatch, rows, dim, vocab):
    """The softmax's gradient is rounded to bfloat16 before its two products, and so is each result."""
    monkeypatch.setattr(module, "_BLOCK_VALUES", 40 * vocab)
    torch.manual_seed(0)
    hidden = torch.randn(rows, dim).bfloat16().requires_grad_()
    weight = torch.randn(vocab, dim).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (rows,))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = cross_entropy_reference(*exact, targets)
    got = head_cross_entropy(hidden, weight, targets)
    assert got.item() == pytest.approx(
        wanted.item(), rel=5e-3
    )  # by torch the logits are bfloat16: 2^-9 of values near 10
    pairs = zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(wanted, exact))
    assert all(distance(a, b) < 2e-2 for a, b in pairs)


@pytest.mark.skipif(native.library() is None, reason="this CPU runs the torch path")
def test_in_c():
    """float32 logits: closer than the path by torch; the same bits on one thread; ids outside are refused, NaN stays NaN."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 64).bfloat16().requires_grad_(), torch.randn(96, 64).bfloat16().requires_grad_()
    targets = torch.randint(0, 96, (70,))

    def run():
        loss = head_cross_entropy(hidden, weight, targets)
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    both, threads = run(), torch.get_num_threads()
    assert both[0].item() == pytest.approx(
        cross_entropy_reference(hidden.double(), weight.double(), targets).item(), rel=1e-5
    )
    try:
        torch.set_num_threads(1)
        alone = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(both, alone))
    with pytest.raises(ValueError, match="the vocabulary has 96 ids"):
        head_cross_entropy(hidden, weight, targets + 90)
    with torch.no_grad():
        hidden[3, 3] = torch.nan
    assert not head_cross_entropy(hidden, weight, targets).isfinite()
