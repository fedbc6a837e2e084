"""The head's product and the softmax over the vocabulary as one operation, a block of rows at a time.

    loss = mean_n ( logsumexp(z_n) - z_n[t_n] ),  z = h Wᵀ        dz = (softmax(z) - onehot(t)) / N

The logits of a batch (N, V) never exist whole. The forward already makes both gradients, since it has the softmax at hand; the
backward pass multiplies them by the loss's own. In C for bfloat16 on the CPU (cpu/head.c), else by torch.
Legend: N rows, D model, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import native

_BLOCK_VALUES = 1 << 21  # logits held at once: 8 MiB of float32, which a core's cache can keep


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of softmax(hidden @ weight.T): hidden (..., D), weight (V, D), targets (...) int64 -> scalar float32."""
    if not torch.is_grad_enabled():
        return cross_entropy_reference(hidden, weight, targets)
    return _HeadCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten())


def cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same with all logits at once: the second opinion, and what evaluation uses a batch at a time."""
    return F.cross_entropy((hidden.flatten(0, -2) @ weight.t()).float(), targets.flatten())


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        block = max(1, _BLOCK_VALUES // weight.shape[0])
        by = _in_c if native.fits(hidden, weight) and weight.shape[0] % 16 == 0 else _by_torch
        losses, d_hidden, d_weight = by(hidden, weight, targets, block)
        ctx.save_for_backward(d_hidden, d_weight)
        return losses.mean()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (d_loss,) = grad_outputs
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss.to(d_weight.dtype), None


def _by_torch(hidden: Tensor, weight: Tensor, targets: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
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
    return losses, d_hidden, d_weight.to(weight.dtype)


def _in_c(hidden: Tensor, weight: Tensor, targets: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    if bool((targets < 0).any()) or bool((targets >= vocab).any()):
        raise ValueError(f"targets reach from {targets.min()} to {targets.max()}, the vocabulary has {vocab} ids")
    block = min(rows, (block + 15) // 16 * 16)
    losses, d_hidden = hidden.new_empty(rows, dtype=torch.float32), torch.empty_like(hidden)
    d_weight, grad = torch.empty_like(weight), hidden.new_empty(block, vocab)
    sums = torch.empty(weight.shape, dtype=torch.float32)
    tensors = hidden, weight, targets, losses, d_hidden, d_weight, grad, sums
    native.call("head_cross_entropy", *tensors, rows, dim, vocab, block)
    return losses, d_hidden, d_weight
