"""Sampled answers as rows of tensors: what a rollout gives and an objective reads.

A pipeline takes micro-batches of one shape and a number of rows that fills them: there rows are all as long as the batch's longest
(`even`), and blank rows, of length 0, stand behind the others where there are too few. Neither padding nor blank rows count.
What is looked at is found where the batch is, on the CPU, and goes to the device as places: so no device is asked how much it is.
Legend: B rows, T tokens of the longest row, M MTP depth, n answer tokens, L MoE layers, K top-k. Does not: sample or judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsv3.train.loss import places


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
    """(B,) int64: positions that are no padding; 0 of a blank row."""
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
    even: bool = False
    """Whether any of its rows are cut to T, and not to the longest of them."""

    @cached_property
    def rows(self) -> int:
        """Rows that are not blank."""
        return int((self.lengths > 0).sum())


@dataclass(frozen=True)
class Learnt:
    """Positions of some rows whose target is to be learnt, in their order: n of them."""

    at: Tensor
    """(n,) int64: in the flattened (B, T)."""
    row: Tensor
    """(n,) int64."""
    targets: Tensor
    """(n,) int64."""
    count: Tensor
    """(B,) float32: how many there are of each row, 1 at least."""
    rows: int
    """Rows that are not blank: they are the first."""

    def of(self, states: Tensor) -> Tensor:
        """(B, T, ...) -> (n, ...)."""
        return states.flatten(0, 1).index_select(0, self.at)

    def sum(self, values: Tensor) -> Tensor:
        """(n,) -> (B,): of each row."""
        return values.new_zeros(len(self.count)).index_add(0, self.row, values)

    def mean(self, values: Tensor) -> Tensor:
        """(n,) -> (B,): of each row."""
        return self.sum(values) / self.count

    def over(self, values: Tensor) -> Tensor:
        """(B,) -> (): the mean over rows that are not blank, 0 of none."""
        return values[: self.rows].mean() if self.rows else values.sum() * 0.0


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, on the device; T of them."""

    tokens: Tensor
    """(B, T + M) int64."""
    lengths: list[int]
    """(B): without padding."""
    real: Tensor
    """Places in the flattened (B, T) that are no padding."""
    learnt: tuple[Learnt, ...]
    """Of the main model, and of MTP depths 1 to M: the answers' tokens from the (k + 1)-th on."""
    advantages: Tensor
    """(B,) float32."""
    old: Tensor
    """(n,) float32."""
    reference: Tensor | None
    """(n,) float32."""
    experts: Tensor | None
    """(B, T, L, K) int16."""
    fresh: bool

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        return len(self.lengths), self.tokens.shape[1] - len(self.learnt) + 1

    @property
    def rows(self) -> int:
        """Rows that are not blank."""
        return self.learnt[0].rows


def longest(batch: RolloutBatch, rows: slice) -> int:
    """T of some rows: of the longest of them, or of the batch, if it is even."""
    return batch.answer.shape[1] if batch.even else int(batch.lengths[rows].max())


def cut(batch: RolloutBatch, rows: slice, depth: int, device: torch.device) -> Part:
    """Some rows, as long as `longest` says, on the device."""
    lengths, length = batch.lengths[rows].tolist(), longest(batch, rows)
    answer, targets = batch.answer[rows, :length], batch.targets[rows]
    at = places(answer)

    def chosen(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows, :length].flatten().index_select(0, at).to(device)

    learnt, known = [], answer
    for k in range(depth + 1):
        if k:  # position t predicts the target k places on, which must be the answer's too
            known = known.clone()
            known[:, : length - k] &= answer[:, k:]
            known[:, length - k :] = False
        learnt.append(_learnt(known, targets[:, k : k + length], sum(n > 0 for n in lengths), device))
    old = chosen(batch.old)
    assert old is not None
    return Part(
        tokens=batch.tokens[rows, : length + depth].to(device),
        lengths=lengths,
        real=places(torch.arange(length) < batch.lengths[rows].unsqueeze(1)).to(device),
        learnt=tuple(learnt),
        advantages=batch.advantages[rows].to(device),
        old=old,
        reference=chosen(batch.reference),
        experts=None if batch.experts is None else batch.experts[rows, :length].to(device),
        fresh=batch.fresh,
    )


def _learnt(known: Tensor, targets: Tensor, rows: int, device: torch.device) -> Learnt:
    at = places(known)
    return Learnt(
        at=at.to(device),
        row=(at // known.shape[1]).to(device),
        targets=targets.flatten().index_select(0, at).to(device),
        count=known.sum(1).clamp(min=1).float().to(device),
        rows=rows,
    )
