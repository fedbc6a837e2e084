"""Routing and the two permutations of a mixture of experts.

`route` is section 4.1 of the reference order: selection by score + bias inside the best groups, weights from the unbiased
scores. The permutations bring a token's K copies into expert order and sum them back; their backward passes are each other,
so no scattered addition (index_put) is ever run and sums over K are rounded once.
Source: V3 report section 2.1.2; arXiv 2408.15664 for the bias. Legend: N tokens, D model, E experts, K top-k, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(
    scores: Tensor, bias: Tensor, *, top_k: int, n_group: int, topk_group: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """scores (N, E) float32 in (0, 1), bias (E,) float32 -> indices (N, K) int64 and weights (N, K) float32.

    Experts outside the chosen groups are masked with -inf: with 0 an expert outside would beat one inside whose biased score
    is negative. The bias touches the choice only; `weights` is differentiable in `scores`.
    """
    with torch.no_grad():
        choice = scores + bias
        if topk_group < n_group:
            groups = choice.unflatten(-1, (n_group, -1))
            group_scores = groups.topk(2, dim=-1).values.sum(-1)
            best = group_scores.topk(topk_group, dim=-1).indices
            outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
            choice = groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)
        indices = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, indices)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return indices, weights * scale


def sequence_balance_loss(scores: Tensor, top_k: int) -> Tensor:
    """The complementary sequence-wise balance loss of scores (B, T, E), before its factor alpha: a scalar, 1 when balanced.

    sum_i f_i·P_i a sequence, mean over sequences; f from the top-K of the raw scores as the report's indicator has it.
    """
    experts, tokens = scores.shape[-1], scores.shape[-2]
    with torch.no_grad():
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(top_k, dim=-1, sorted=False).indices, 1.0)
        frequency = chosen.sum(-2) * (experts / (top_k * tokens))
    probability = (scores / scores.sum(-1, keepdim=True)).mean(-2)
    return (frequency * probability).sum(-1).mean()


@torch.library.custom_op("dsv3::sort_by_expert", mutates_args=())
def sort_by_expert(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """indices (N, K) -> order (N·K,), inverse (N·K,), counts (E,), all int64.

    Row r of the expert order is copy order[r] = token·K + slot; inverse undoes it; counts are exact integers.
    """
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    counts = flat.new_zeros(n_experts).scatter_add_(0, flat, torch.ones_like(flat))  # bincount would wait for a GPU
    return order, inverse, counts


@sort_by_expert.register_fake
def _(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = indices.new_empty(indices.numel())
    return flat, torch.empty_like(flat), indices.new_empty(n_experts)


@torch.library.custom_op("dsv3::permute", mutates_args=())
def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x (N, D) -> its K copies in expert order (N·K, D)."""
    return x.index_select(0, order // (order.numel() // x.shape[0]))


@torch.library.custom_op("dsv3::unpermute", mutates_args=())
def unpermute(y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """y (N·K, D) in expert order -> the sum over each token's K rows (N, D), accumulated in float32, rounded once."""
    return y.index_select(0, inverse).view(-1, top_k, y.shape[-1]).sum(1)


def sum_copies(y: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """y (R, D) -> (N, D): row n is the sum of y[order[starts[n] : starts[n + 1]]], in that order, accumulated in float32, rounded
    once. order (R,), starts (N,) ascending from 0. Without a gradient of its own."""
    wide = y if y.is_cuda else y.float()  # a GPU's bag is summed in float32, a CPU's in the dtype of y
    return F.embedding_bag(order, wide, starts, mode="sum").to(y.dtype)


@permute.register_fake
def _(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(order.numel(), x.shape[1])


@unpermute.register_fake
def _(y: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return y.new_empty(y.shape[0] // top_k, y.shape[1])


def _save_permute(ctx, inputs, output) -> None:
    x, order, inverse = inputs
    ctx.save_for_backward(order, inverse)
    ctx.top_k = order.numel() // x.shape[0]


def _save_unpermute(ctx, inputs, output) -> None:
    _, order, inverse, _ = inputs
    ctx.save_for_backward(order, inverse)


permute.register_autograd(
    lambda ctx, dy: (unpermute(dy, *ctx.saved_tensors, ctx.top_k), None, None), setup_context=_save_permute
)
unpermute.register_autograd(
    lambda ctx, dx: (permute(dx, *ctx.saved_tensors), None, None, None), setup_context=_save_unpermute
)
