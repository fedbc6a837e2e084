"""Log-probabilities that answers and prompts are told with, and those of known pages.

Scoring a prompt needs the state before every token, which a shared page does not keep. What it told is kept instead: a page's
key fixes its 64 tokens and all before them, hence their scores. So a prompt that is scored again, or with another ending, reads
only what is new (lm-eval asks for one question with each of its answers).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability under the model, and the likeliest tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def score(logits: Tensor, token: int, top: int) -> TokenScore:
    """Of a token under logits (V,), with the `top` likeliest."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, int(logprobs.isfinite().sum()))) if top else None
    pairs = zip(best.indices.tolist(), best.values.tolist()) if best is not None else ()
    return TokenScore(token, float(logprobs[token]), tuple(pairs))


class PageScores:
    """Scores of pages' tokens, the longest unused forgotten first, but never in the middle of a step.

    Args:
        limit: pages that are kept.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[bytes, int], list[TokenScore | None]] = OrderedDict()

    def __contains__(self, page: tuple[bytes, int]) -> bool:
        return page in self._kept

    def get(self, key: bytes, top: int) -> list[TokenScore | None]:
        self._kept.move_to_end((key, top))
        return self._kept[key, top]

    def put(self, key: bytes, top: int, scores: list[TokenScore | None]) -> None:
        self._kept.setdefault((key, top), scores)

    def forget(self) -> None:
        self._kept.clear()

    def shrink(self) -> None:
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
