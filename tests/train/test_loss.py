"""Exact MTP targets to the row's end, and the weights of the parts."""

import torch

from dsv3.kernels.cross_entropy import cross_entropy_reference
from dsv3.train.loss import training_losses


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
