"""Sampled answers as rows of tensors: what a rollout gives and an objective reads.

Legend: B rows, T tokens of the longest row, M MTP depth, L MoE layers, K top-k. Does not: sample or judge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RolloutBatch:
    """Answers to train on, a row each, padded at the right; T the longest row.

    Row b reads tokens[b, : T]; at position t it predicts targets[b, t], the token that follows. M more tokens are there for
    the MTP layers.
    """

    tokens: Tensor
    """(B, T + M) int64."""
    targets: Tensor
    """(B, T + M) int64: tokens shifted by one."""
    answer: Tensor
    """(B, T) boolean: positions whose target is a token of the answer, its end token included."""
    lengths: Tensor
    """(B,) int64: positions that are no padding."""
    advantages: Tensor
    """(B,) float32."""
    old: Tensor
    """(B, T) float32: log-probabilities of the targets as the rollout had them, 0 where there is no answer."""
    reference: Tensor | None = None
    """(B, T) float32: the same under the reference policy; None where there is none."""
    experts: Tensor | None = None
    """(B, T, L, K) int16: the rollout's experts at each answer position, -1 elsewhere. None: not known."""
    fresh: bool = True
    """Whether the policy is still the one that made the answers: then log-probabilities and experts must be the same."""


def cut(batch: RolloutBatch, rows: slice, depth: int, device: torch.device) -> RolloutBatch:
    """Some rows, no longer than the longest of them, on the device."""
    length = int(batch.lengths[rows].max())

    def part(x: Tensor, more: int = 0) -> Tensor:
        return x[rows, : length + more].to(device)

    return RolloutBatch(
        tokens=part(batch.tokens, depth),
        targets=part(batch.targets, depth),
        answer=part(batch.answer),
        lengths=batch.lengths[rows].to(device),
        advantages=batch.advantages[rows].to(device),
        old=part(batch.old),
        reference=None if batch.reference is None else part(batch.reference),
        experts=None if batch.experts is None else part(batch.experts),
        fresh=batch.fresh,
    )
