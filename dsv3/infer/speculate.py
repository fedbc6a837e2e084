"""Drafting with the MTP layer: after each step it reads the step's states with the tokens that follow them, then guesses on.

    slot j      holds the pair (state j-1, token j); its output predicts token j+1
    chain       each further draft reads the output before it and the draft before it, in slots that the next step's true
                pairs overwrite (spec 5.2: the state behind shared_head.norm goes round)
A draft is the likeliest token, or one drawn from the MTP layer's own distribution q under the request's temperature; the engine
accepts it by comparing p and q (dsv3.infer.sampling.accept), so a draft changes how fast a text comes and never which text.
Source: V3 report sections 2.2, 5.4.3; spec 5.5. Legend: N rows, D model. Of several MTP layers the first drafts every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.infer.runner import Runner, Segment
from dsv3.infer.sampling import adjust, chance, distribution, draw
from dsv3.infer.scheduler import Chunk, Sequence


class Speculator:
    """
    Args:
        drafts: most tokens to guess; 0 does nothing.
        allow: takes logits to logits without the ids that no token uses.
    """

    def __init__(self, runner: Runner, drafts: int, allow: Callable[[Tensor], Tensor]) -> None:
        self.runner, self.drafts, self._allow = runner, drafts, allow

    def draft(self, done: list[tuple[Chunk, Tensor]]) -> None:
        """Read what a step computed: chunks and their states (N, D); leave drafts in the sequences that decode."""
        if not self.drafts or not done:
            return
        segments, states = [], []
        live, ends, end = [], [], -1
        for chunk, own in done:
            sequence, first = chunk.sequence, chunk.start + 1
            rows = own
            if sequence.joined is not None:
                rows = torch.cat((self.runner.store.states[sequence.joined].unsqueeze(0), rows))
                sequence.joined, first = None, chunk.start
            tokens = sequence.tokens[first : sequence.computed + 1]
            if not tokens:  # a prompt that is only scored has nothing behind its last token
                continue
            segments.append(Segment(sequence.pages, first, tokens))
            states.append(rows[: len(tokens)])
            end += len(tokens)
            if sequence.finish_reason is None and sequence.decoding and _room(sequence) > 0:
                live.append(sequence)
                ends.append(end)
        if segments:
            out = self.runner.draft(segments, torch.cat(states))
            self._chain(live, out[ends])

    def _chain(self, sequences: list[Sequence], state: Tensor) -> None:
        begun = sequences
        for step in range(self.drafts):
            keep = [i for i, s in enumerate(sequences) if len(s.drafts) == step and _room(s) > step]
            if not keep:
                break
            sequences, state = [sequences[i] for i in keep], state[keep]
            if step:
                segments = [Segment(s.pages, s.computed + step, s.drafts[-1:]) for s in sequences]
                state = self.runner.draft(segments, state)
            logits = self._allow(self.runner.logits(state))
            likeliest = logits.argmax(-1).tolist()
            for i, sequence in enumerate(sequences):
                try:
                    token, guess = _guess(sequence, logits[i], likeliest[i])
                except (
                    Exception
                ):  # a grammar that breaks here: without drafts the engine asks it itself, and fails this answer
                    sequence.drafts, sequence.guesses = [], []
                    continue
                sequence.drafts.append(token)
                sequence.guesses.append(guess)
        for sequence in begun:  # those too whose chain was the shorter one
            if sequence.work.matcher is not None:
                sequence.work.matcher.forget_guesses()


def _room(sequence: Sequence) -> int:
    """Drafts that could still be of use: the last token before max_tokens needs none."""
    return sequence.params.max_tokens - sequence.answered - 1


def _guess(sequence: Sequence, logits: Tensor, likeliest: int) -> tuple[int, Tensor | None]:
    """A draft, and the distribution it is from (None at temperature 0)."""
    params, matcher = sequence.params, sequence.work.matcher
    if not params.plain:  # guess what the engine will choose from: bias, penalties and grammar included
        prompt, answer = sequence.tokens[: sequence.prompt_length], [*sequence.answer, *sequence.drafts]
        logits = adjust(logits, params, prompt, answer)
        logits = logits if matcher is None else matcher.mask(logits)
        likeliest = int(logits.argmax())
    guess = None
    if params.temperature > 0:
        position = sequence.answered + len(sequence.drafts)
        guess = distribution(logits, params)
        likeliest = draw(guess, chance(params.seed, sequence.choice, position, "draft"))
    if matcher is not None:
        matcher.guess(likeliest)
    return likeliest, guess
