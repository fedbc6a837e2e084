"""How often the main model would take what the MTP layers draft: a number every stage of training watches.

    depth k at position i drafts t_{i+k+1} from the state of position i and the tokens up to i + k
    it agrees where its greedy choice is the main model's at position i + k

Tokens are given, not generated ("teacher-forced"), so one forward of held-out rows tells it; generation, which goes on only
behind drafts that stood, accepts about as many of depth 1 and at depth k those whose earlier drafts stood too. A stage that
leaves the MTP layers out lets this decay, and generation with it (MiMo issue 14).
Legend: B batch, T tokens, M MTP depth. Does not: generate (infer/speculate.py counts what generation accepts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv3.model.transformer import DeepseekV3, Hidden

Head = Callable[[Tensor], Tensor]  # states -> logits
_ROWS = 2048  # states whose logits exist at once


class Agreement:
    """Counts over batches, for MTP depths 1 to `depth`."""

    def __init__(self, depth: int) -> None:
        self.hits, self.drafts = [0] * depth, [0] * depth

    @torch.no_grad()
    def add(self, model: DeepseekV3, tokens: Tensor, *, mask: Tensor | None = None) -> None:
        """Rows of tokens (B, T + M), every position of them counted."""
        self.add_states(model.lm_head, model.hidden(tokens, depth=len(self.hits), mask=mask))

    @torch.no_grad()
    def add_states(self, head: Head, hidden: Hidden) -> None:
        """The same from states already computed, every position of them counted."""
        batch, length = hidden.main.shape[:2]
        every = torch.ones(batch, length, dtype=torch.bool, device=hidden.main.device)
        self.add_hidden(head, hidden, [every[:, k:] for k in range(1, len(self.hits) + 1)])

    @torch.no_grad()
    def add_hidden(self, head: Head, hidden: Hidden, valid: Sequence[Tensor]) -> None:
        """The same from states already computed: valid[k - 1] (B, T - k) says which positions i count at depth k."""
        length = hidden.main.shape[1]
        for k, (state, counted) in enumerate(zip(hidden.mtp, valid, strict=True), start=1):
            drafts = _greedy(head, state[:, : length - k][counted])
            taken = _greedy(head, hidden.main[:, k:][counted])
            self.hits[k - 1] += int((drafts == taken).sum())
            self.drafts[k - 1] += len(drafts)

    def counts(self, device: torch.device) -> Tensor:
        """(2, M) int64: hits and drafts of each depth, to be added up over processes."""
        return torch.tensor([self.hits, self.drafts], device=device)

    def shares(self, counts: Tensor | None = None) -> list[float]:
        """Of each depth; 0 where nothing was drafted. counts: the sum over processes, None: this one's."""
        hits_drafts = zip(*(counts.tolist() if counts is not None else (self.hits, self.drafts)), strict=True)
        return [hits / drafts if drafts else 0.0 for hits, drafts in hits_drafts]


def _greedy(head: Head, states: Tensor) -> Tensor:
    """states (n, D) -> (n,) int64."""
    parts = [head(part).argmax(-1) for part in states.split(_ROWS)]
    return torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.int64)
