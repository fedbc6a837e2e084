"""The training objective: L = CE(main) + lambda/M · sum_k CE(MTP k) + alpha · balance  (V3 report 2.1.2, 2.2).

`head_cross_entropy` joins the head's product and the softmax over the vocabulary, a block of rows at a time: the logits of a
batch (N, V) never exist whole, and the backward pass multiplies stored gradients instead of computing the softmax again.
Legend: N rows, D model, V vocabulary, M MTP depth. Does not: know the model's inside or the optimizer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_VALUES = 1 << 21  # logits held at once: 8 MiB of float32, which a core's cache can keep


class Losses(NamedTuple):
    """Means over the targets, in nats; detached except `total`."""

    total: Tensor
    main: Tensor
    mtp: tuple[Tensor, ...]
    balance: Tensor


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows, vocab = hidden.shape[0], weight.shape[0]
        block = max(1, _BLOCK_VALUES // vocab)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        for start in range(0, rows, block):
            part = slice(start, start + block)
            h, t = hidden[part], targets[part].unsqueeze(1)
            logits = (h @ weight.t()).float()
            logsumexp = logits.logsumexp(1, keepdim=True)
            losses[part] = (logsumexp - logits.gather(1, t)).squeeze(1)
            grad = logits.sub_(logsumexp).exp_()
            grad.scatter_add_(1, t, grad.new_full((1, 1), -1.0).expand_as(t))
            grad = grad.mul_(1 / rows).to(hidden.dtype)
            torch.mm(grad, weight, out=d_hidden[part])
            d_weight += grad.t() @ h
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return losses.mean()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (d_loss,) = grad_outputs
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss.to(d_weight.dtype), None


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of softmax(hidden @ weight.T): hidden (..., D), weight (V, D), targets (...) int64 -> scalar float32."""
    if not torch.is_grad_enabled():
        return cross_entropy_reference(hidden, weight, targets)
    return _HeadCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten())


def cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same with all logits at once: the second opinion, and what evaluation uses a batch at a time."""
    return F.cross_entropy((hidden.flatten(0, -2) @ weight.t()).float(), targets.flatten())


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
