"""From logits to a token, and the acceptance rule of speculation.

    temperature 0: argmax. Otherwise softmax(logits / T) cut to the smallest set of mass top_p.
    a draft d ~ q is accepted with probability min(1, p(d)/q(d)), else one is drawn from max(p - q, 0) normalised: the
    result is distributed exactly as p (arXiv 2211.17192; V3 report section 5.4.3).
Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: ask for at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature} must be >= 0 and top_p {self.top_p} in (0, 1]")


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """logits (..., V) -> probabilities (..., V) float32; one-hot at temperature 0."""
    logits = logits.float()
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    p = (logits / params.temperature).softmax(-1)
    if params.top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= params.top_p, 0.0)
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    return p / p.sum(-1, keepdim=True)


def draw(p: Tensor, generator: torch.Generator) -> int:
    """One token of p (V,)."""
    return int(torch.multinomial(p, 1, generator=generator))


def accept(draft: int, p: Tensor, q: Tensor, generator: torch.Generator) -> tuple[bool, int]:
    """Whether the draft stands, and the token that does: the draft, or one of the corrected distribution."""
    if float(torch.rand((), generator=generator)) * float(q[draft]) < float(p[draft]):
        return True, draft
    rest = (p - q).clamp(min=0)
    return False, draw(rest if float(rest.sum()) > 0 else p, generator)
