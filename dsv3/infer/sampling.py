"""From logits to a token, and the acceptance rule of speculation.

    order        bias, penalties, mask  ->  temperature  ->  top_k, top_p, min_p  ->  a token
    penalties    repetition divides (or multiplies) the logit of every token seen, prompt included; frequency and presence
                 subtract for tokens of the answer, by count and once
    a draft d ~ q is accepted with probability min(1, p(d)/q(d)), else one is drawn from max(p - q, 0) normalised: the
                 result is distributed exactly as p (arXiv 2211.17192; V3 report section 5.4.3)

Chance comes from (seed, choice, position, purpose) alone, through a hash: what a request draws depends on nothing else in
the batch, and a request that was set aside and taken up again draws the same.
Legend: V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, what to tell of them, and when to stop.

    Attributes:
        max_tokens, min_tokens: bounds of the answer; no end token or stop string counts before min_tokens. max_tokens 0
            answers nothing: it scores the prompt.
        top_k: 0 takes all. min_p: drops tokens below min_p times the likeliest.
        logit_bias: token -> what is added to its logit; -100 or less forbids it.
        stop: strings that end the answer and are no part of it.
        logprobs: alternatives to tell a token, 0 for the chosen one alone, None for nothing; of the model's own
            distribution, before any of the above. prompt_logprobs: the same for the prompt's tokens.
        routes: tell the experts behind each token.
        n: answers to give, independent draws.
        grammar: what the answer must be, as `dsv3.infer.grammar` writes it; None: anything.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    routes: bool = False
    grammar: str | None = None

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs is not None else 1
        bounds = {
            "max_tokens": (least, 10**7), "min_tokens": (0, max(self.max_tokens, 0)), "temperature": (0.0, 100.0),
            "top_k": (0, 10**7), "min_p": (0.0, 1.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
            "repetition_penalty": (0.01, 100.0), "n": (1, 128), "logprobs": (0, MAX_LOGPROBS),
            "prompt_logprobs": (0, MAX_LOGPROBS),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails too
                raise ValueError(f"{name} is {value}: give a value from {low} to {high}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a value above 0 and at most 1")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string, which every text contains: leave it out")
        if any(not -1000 <= bias <= 1000 for bias in self.logit_bias.values()):
            raise ValueError("logit_bias must lie between -1000 and 1000")

    @property
    def plain(self) -> bool:
        """Whether the token is the likeliest, with nothing to weigh."""
        adjusts = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias
        told = self.logprobs is not None or self.grammar is not None or self.min_tokens > 0
        return self.temperature == 0 and not adjusts and not told


def adjust(logits: Tensor, params: SamplingParams, prompt: Iterable[int], answer: Iterable[int]) -> Tensor:
    """Bias and penalties: logits (V,) float32 -> (V,), a new tensor if anything changes.

    Args:
        prompt, answer: tokens so far; read only if a penalty asks.
    """
    penalised = params.presence_penalty or params.frequency_penalty
    if not (penalised or params.repetition_penalty != 1 or params.logit_bias):
        return logits
    logits = logits.clone()
    answered = torch.tensor(list(answer), dtype=torch.int64, device=logits.device)
    if params.repetition_penalty != 1:
        seen = torch.cat((torch.tensor(list(prompt), dtype=torch.int64, device=logits.device), answered)).unique()
        values = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if penalised and len(answered):
        tokens, counts = answered.unique(return_counts=True)
        logits[tokens] -= params.frequency_penalty * counts.float() + params.presence_penalty
    for token, bias in params.logit_bias.items():
        logits[token] = logits[token] + bias if bias > -100 else -torch.inf
    return logits


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """logits (..., V) -> probabilities (..., V) float32; one-hot at temperature 0."""
    logits = logits.float()
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    p = ((logits - logits.amax(-1, keepdim=True)) / params.temperature).softmax(-1)
    if 0 < params.top_k < p.shape[-1]:
        p = p.masked_fill(p < p.topk(params.top_k, dim=-1).values[..., -1:], 0.0)
    if params.top_p < 1:
        ranked, order = p.sort(stable=True, dim=-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= params.top_p * ranked.sum(-1, keepdim=True), 0.0)
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    if params.min_p > 0:
        p = p.masked_fill(p < params.min_p * p.amax(-1, keepdim=True), 0.0)
    return p / p.sum(-1, keepdim=True)


def chance(seed: int, choice: int, position: int, purpose: str) -> float:
    """A number in [0, 1) that is this and no other for these four."""
    words = hashlib.blake2b(f"{seed}/{choice}/{position}/{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(words, "little") >> 11) / 2**53


def draw(p: Tensor, u: float) -> int:
    """The token at u in [0, 1) of p (V,), which need not sum to one."""
    heights = p.double().cumsum(-1)
    token = int(torch.searchsorted(heights, u * float(heights[-1]), right=True))
    if token < len(p) and float(p[token]) > 0:
        return token
    return int(p.nonzero()[-1])  # u so near to 1 that rounding went past the last token


def accept(draft: int, p: Tensor, q: Tensor, u: float, again: float) -> tuple[bool, int]:
    """Whether the draft stands, and the token that does: the draft, or one of the corrected distribution.

    Args:
        u, again: two independent numbers in [0, 1).
    """
    if u * float(q[draft]) < float(p[draft]):
        return True, draft
    rest = (p - q).clamp(min=0)
    return False, draw(rest if float(rest.sum()) > 0 else p, again)
