"""Generation: a prompt's tokens in, a sample out, with MTP speculation where the model has an MTP layer.

    plain        one forward a token against the latent cache (absorbed attention)
    speculative  the MTP layer drafts one token; the next forward reads the sure token and the draft and yields one token,
                 or two when the draft stands. Greedy output is that of plain decoding; sampled output has its distribution.
Source: V3 report sections 2.2 and 5.4.3. Legend: B batch, T tokens, D model, V vocabulary.
Does not: batch requests, page or stream over a network (issue 4); chain drafts of several depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv3.infer.sampling import SamplingParams, accept, distribution, draw
from dsv3.model.transformer import DeepseekV3


class Codec(Protocol):
    """What the engine asks of a tokenizer."""

    def encode(self, text: str, /) -> list[int]: ...
    def decode(self, ids: Sequence[int], /) -> str: ...
    @property
    def bos_id(self) -> int | None: ...


@dataclass(frozen=True)
class Sample:
    """A completion. `drafted` and `accepted` count MTP drafts; both 0 without speculation."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop": an end token; "length": max_tokens
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class Engine:
    """Generates with a model; holds no state between calls."""

    def __init__(self, model: DeepseekV3, tokenizer: Codec) -> None:
        self.model, self.tokenizer = model, tokenizer

    def generate(
        self, prompts: Sequence[str], params: SamplingParams = SamplingParams(), *, speculate: bool | None = None
    ) -> Iterator[Sample]:
        """A sample for each prompt, in order. A prompt is the beginning of a document: BOS goes before it, as in training.

        Args:
            speculate: draft with the MTP layer; None: when the model has one.

        Raises:
            ValueError: a prompt plus max_tokens exceeds the model's positions, or there is no MTP layer to speculate with.
        """
        for prompt in prompts:
            bos = self.tokenizer.bos_id
            ids = [*([] if bos is None else [bos]), *self.tokenizer.encode(prompt)]
            if not ids:
                raise ValueError("the prompt is empty and the tokenizer has no BOS token to start from: give a prompt")
            yield self.complete(ids, params, speculate=speculate)

    @torch.inference_mode()
    def complete(self, ids: Sequence[int], params: SamplingParams, *, speculate: bool | None = None) -> Sample:
        """The same for one prompt of token ids."""
        config = self.model.config
        if speculate and config.num_nextn_predict_layers == 0:
            raise ValueError(
                "speculate=True needs an MTP layer, the model has num_nextn_predict_layers 0: load one that has"
            )
        need = len(ids) + params.max_tokens + 1
        if need > config.max_position_embeddings:
            raise ValueError(
                f"{len(ids)} prompt tokens and max_tokens {params.max_tokens} exceed max_position_embeddings "
                f"{config.max_position_embeddings}: shorten one"
            )
        if speculate or (speculate is None and config.num_nextn_predict_layers > 0):
            return self._speculative(list(ids), params, need)
        return self._plain(list(ids), params, need)

    def _plain(self, ids: list[int], params: SamplingParams, capacity: int) -> Sample:
        generator = torch.Generator().manual_seed(params.seed)
        cache, out, tokens = self.model.new_cache(1, capacity), [], ids
        while not self._finished(out, params):
            logits = self.model(self._row(tokens), cache=cache)[0, -1]
            tokens = [draw(self._choose(logits, params), generator)]
            out += tokens
        return self._sample(out, params)

    def _speculative(self, ids: list[int], params: SamplingParams, capacity: int) -> Sample:
        model, generator = self.model, torch.Generator().manual_seed(params.seed)
        cache, mtp_cache = model.new_cache(1, capacity), model.new_cache(1, capacity, mtp=True)
        states = model.hidden(self._row(ids), cache=cache).main  # (1, T, D)
        token = draw(self._choose(model.lm_head(states[0, -1]), params), generator)
        out, followers, drafted, accepted = [token], [*ids[1:], token], 0, 0
        while not self._finished(out, params):
            # states[i] are sure, followers[i] the sure token after each: what the MTP layer reads.
            guess = model.lm_head(model.draft(states, self._row(followers), cache=mtp_cache)[0, -1])
            q = self._choose(guess, params)
            draft = draw(q, generator)
            pair = model.hidden(self._row([out[-1], draft]), cache=cache).main
            logits = model.lm_head(pair[0])
            stands, token = accept(draft, self._choose(logits[0], params), q, generator)
            drafted, accepted = drafted + 1, accepted + stands
            states, followers = (pair, [token]) if stands else (pair[:, :1], [token])
            if stands:
                followers = [token, draw(self._choose(logits[1], params), generator)]
            else:
                cache.rewind(cache.lengths - 1)
            out += followers
        return self._sample(out, params, drafted, accepted)

    def _choose(self, logits: Tensor, params: SamplingParams) -> Tensor:
        return distribution(logits.to("cpu"), params)

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.model.lm_head.weight.device)

    def _finished(self, out: list[int], params: SamplingParams) -> bool:
        ended = not params.ignore_eos and any(token in self.model.config.eos_token_ids for token in out[-2:])
        return ended or len(out) >= params.max_tokens

    def _sample(self, out: list[int], params: SamplingParams, drafted: int = 0, accepted: int = 0) -> Sample:
        out = out[: params.max_tokens]
        ends = [] if params.ignore_eos else [i for i, t in enumerate(out) if t in self.model.config.eos_token_ids]
        kept = out[: ends[0]] if ends else out
        reason = "stop" if ends else "length"
        return Sample(self.tokenizer.decode(kept), kept, reason, drafted, accepted)
