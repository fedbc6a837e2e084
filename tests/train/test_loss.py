"""The fused head loss against plain cross entropy; exact MTP targets to the row's end."""

import pytest
import torch

from dsv3.train import loss as module
from dsv3.train.loss import cross_entropy_reference, head_cross_entropy, training_losses


def test_value_and_gradients(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_VALUES", 50 * 7)  # several blocks, the last ragged
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 10, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (3, 10))
    got, wanted = head_cross_entropy(hidden, weight, targets), cross_entropy_reference(hidden, weight, targets)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got * 3, (hidden, weight)), torch.autograd.grad(wanted * 3, (hidden, weight))):
        torch.testing.assert_close(a, b)


def test_bfloat16_rounds_the_gradient_once():
    torch.manual_seed(0)
    hidden = torch.randn(64, 16).bfloat16().requires_grad_()
    weight = torch.randn(40, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 40, (64,))
    exact = cross_entropy_reference(hidden.float(), weight.float(), targets)
    got = head_cross_entropy(hidden, weight, targets)
    assert got.item() == pytest.approx(exact.item(), rel=5e-3)  # bfloat16 logits: 2^-9 of values near 10
    wanted = torch.autograd.grad(exact, (hidden, weight))
    for a, b in zip(torch.autograd.grad(got, (hidden, weight)), wanted):
        assert (a - b).float().norm() / b.float().norm() < 2e-2


def test_depth_k_is_scored_on_the_kth_later_target():
    torch.manual_seed(0)
    states = [torch.randn(2, 6, 8) for _ in range(3)]
    head, targets = torch.randn(30, 8), torch.randint(0, 30, (2, 8))
    with torch.no_grad():
        losses = training_losses(
            states[0], tuple(states[1:]), torch.tensor(2.0), head, targets, mtp_weight=0.3, alpha=0.01
        )
        parts = [cross_entropy_reference(s, head, targets[:, k : k + 6]) for k, s in enumerate(states)]
    torch.testing.assert_close(losses.total, parts[0] + 0.15 * (parts[1] + parts[2]) + 0.02)
