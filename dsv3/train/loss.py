"""The training objective: L = CE(main) + lambda/M · sum_k CE(MTP k) + alpha · balance  (V3 report 2.1.2, 2.2).

Legend: B batch, T tokens, D model, V vocabulary, M MTP depth. Does not: know the model's inside or the optimizer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.kernels.cross_entropy import head_cross_entropy


class Losses(NamedTuple):
    """Means over the targets, in nats; detached except `total`."""

    total: Tensor
    main: Tensor
    mtp: tuple[Tensor, ...]
    balance: Tensor


def training_losses(
    main: Tensor,
    mtp: tuple[Tensor, ...],
    balance: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    mtp_weight: float,
    alpha: float,
) -> Losses:
    """States (B, T, D) of the main model and of each MTP depth, targets (B, T + M): depth k is scored on targets k to k + T.

    The loader supplies M more tokens a row, so that every depth has T exact targets up to the row's end.
    """
    length = main.shape[1]
    loss = head_cross_entropy(main, head, targets[:, :length])
    depths = tuple(head_cross_entropy(state, head, targets[:, k : k + length]) for k, state in enumerate(mtp, start=1))
    total = loss + alpha * balance
    if depths:
        total = total + mtp_weight / len(depths) * torch.stack(depths).sum()
    return Losses(total, loss.detach(), tuple(d.detach() for d in depths), balance.detach())
