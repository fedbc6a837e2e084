"""How often the main model would take what the MTP layers draft: a number every stage of training watches.

    depth k at position i drafts t_{i+k+1} from the state of position i and the tokens up to i + k
    it agrees where its greedy choice is the main model's at position i + k

Tokens are given, not generated ("teacher-forced"), so one forward of held-out rows tells it; generation, which goes on only
behind drafts that stood, accepts about as many of depth 1 and at depth k those whose earlier drafts stood too. A stage that
leaves the MTP layers out lets this decay, and generation with it (MiMo issue 14).
Legend: B batch, T tokens, M MTP depth. Does not: generate (infer/speculate.py counts what generation accepts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.model.transformer import DeepseekV3, Hidden

_ROWS = 2048  # states whose logits exist at once


class Agreement:
    """Counts over batches, for MTP depths 1 to `depth`."""

    def __init__(self, depth: int) -> None:
        self.hits, self.drafts = [0] * depth, [0] * depth

    @torch.no_grad()
    def add(self, model: DeepseekV3, tokens: Tensor, *, mask: Tensor | None = None) -> None:
        """Rows of tokens (B, T + M), every position of them counted."""
        depth = len(self.hits)
        hidden = model.hidden(tokens, depth=depth, mask=mask)
        batch, length = hidden.main.shape[:2]
        every = tokens.new_ones((batch, length), dtype=torch.bool)
        self.add_hidden(model, hidden, [every[:, k:] for k in range(1, depth + 1)])

    @torch.no_grad()
    def add_hidden(self, model: DeepseekV3, hidden: Hidden, valid: Sequence[Tensor]) -> None:
        """The same from states already computed: valid[k - 1] (B, T - k) says which positions i count at depth k."""
        length = hidden.main.shape[1]
        for k, (state, counted) in enumerate(zip(hidden.mtp, valid, strict=True), start=1):
            drafts = _greedy(model, state[:, : length - k][counted])
            taken = _greedy(model, hidden.main[:, k:][counted])
            self.hits[k - 1] += int((drafts == taken).sum())
            self.drafts[k - 1] += len(drafts)

    def shares(self) -> list[float]:
        """Of each depth; 0 where nothing was drafted."""
        return [hits / drafts if drafts else 0.0 for hits, drafts in zip(self.hits, self.drafts, strict=True)]


def _greedy(model: DeepseekV3, states: Tensor) -> Tensor:
    """states (n, D) -> (n,) int64."""
    parts = [model.lm_head(part).argmax(-1) for part in states.split(_ROWS)]
    return torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.int64)
