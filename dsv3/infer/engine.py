"""The engine: requests of token ids in, tokens, text and log-probabilities out, all requests in one batch.

    step     scheduler: what to read -> runner: states, logits -> a token or several for each sequence that is ready
             -> drafts for the next step, by the MTP layer (dsv3.infer.speculate)
    request  n sequences with one prompt, or several; each lives on pages of its own and pages it shares

One sequence's fault (numbers that are not finite, a grammar that breaks) ends that sequence alone. On a runner that computes
each row alone, a request's bytes depend on the request only: not on what else runs, nor on pages found, nor on being set aside.
Source: V3 report sections 2.2, 3.4, 5.4.3. Legend: N rows of a step, V vocabulary.
Does not: wait, thread or speak HTTP (dsv3.serve).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dsv3.infer.grammar import Grammars, Matcher, Refused
from dsv3.infer.grammar import Vocabulary as Grammatical
from dsv3.infer.pages import PAGE, PageBook, PageStore
from dsv3.infer.runner import Runner, Segment, open_runner
from dsv3.infer.sampling import SamplingParams, accept, adjust, chance, distribution, draw
from dsv3.infer.scheduler import Chunk, Scheduler, Sequence
from dsv3.infer.scores import PageScores, TokenScore, score
from dsv3.infer.speculate import Speculator
from dsv3.infer.text import Codec, TextStream
from dsv3.model.transformer import DeepseekV3

_SCORE_ROWS = 128  # prompt rows whose logits exist at once


class Tier(Protocol):
    """A second place for pages (dsv3.infer.disk.DiskTier)."""

    def fetch(self, key: bytes, store: PageStore, page: int) -> bool: ...
    def keep(self, key: bytes, store: PageStore, page: int) -> None: ...


class Vocabulary(Codec, Grammatical, Protocol):
    """What the engine asks of a tokenizer (dsv3.data.tokenizer.Tokenizer has it)."""


@dataclass(frozen=True)
class Delta:
    """What a step added to one answer. `text` is final: nothing of it is taken back. `error`: why it failed, if it did.

    Attributes:
        finish_reason: "stop" (an end token, a stop string, a finished grammar), "length", "abort" or "error".
        scores: of each token, where asked for. routes: for each token the experts it was computed from, a tuple a MoE layer.
        drafted, accepted: MTP drafts that this step looked at, and those that stand.
        refused: the fault is the request's own (a grammar beyond its limits, a bias that leaves no token).
    """

    request: int
    choice: int
    token_ids: list[int]
    text: str
    scores: list[TokenScore]
    finish_reason: str | None = None
    error: str | None = None
    routes: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    refused: bool = False


@dataclass(frozen=True)
class Sample:
    """A whole answer. `drafted` and `accepted` count MTP drafts; `cached` the prompt tokens that were not read anew."""

    text: str
    token_ids: list[int]
    finish_reason: str
    drafted: int = 0
    accepted: int = 0
    cached: int = 0
    scores: list[TokenScore] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(eq=False)
class Work:
    """What the engine keeps beside a sequence."""

    request: Request
    text: TextStream
    matcher: Matcher | None
    drafted: int = 0
    accepted: int = 0


@dataclass(eq=False)
class Request:
    """A prompt and its answers."""

    id: int
    prompt: list[int]
    params: SamplingParams
    sequences: list[Sequence] = field(default_factory=list)
    prompt_scores: list[TokenScore | None] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Prompt tokens found in pages."""
        return self.sequences[0].cached or 0


@dataclass
class Stats:
    """Counters since the engine was made. drafted[i], accepted[i]: drafts at place i of their chain."""

    steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    preemptions: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


class Engine:
    """Serves a model.

    Args:
        drafts: tokens that the MTP layer guesses ahead; None: one if the model has an MTP layer.
        cache_gb: gigabytes (10^9 bytes) for the latent cache.
        max_running: most sequences that run at once. step_tokens: most tokens a step reads.
        share: find the prefixes of earlier requests.
        tier: a second place for pages (dsv3.infer.disk.DiskTier).

    Raises:
        ValueError: drafts without an MTP layer; a cache too small for a page; a number that is too small.
    """

    def __init__(
        self,
        model: DeepseekV3,
        tokenizer: Vocabulary,
        *,
        drafts: int | None = None,
        cache_gb: float = 1.0,
        max_running: int = 64,
        step_tokens: int = 512,
        share: bool = True,
        tier: Tier | None = None,
    ) -> None:
        mtp = model.config.num_nextn_predict_layers
        if drafts and not mtp:
            raise ValueError(
                f"drafts={drafts} needs an MTP layer, the model has num_nextn_predict_layers 0: load one that has"
            )
        for name, value, least in (
            ("drafts", drafts, 0),
            ("max_running", max_running, 1),
            ("step_tokens", step_tokens, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: give {least} or more")
        self.model, self.tokenizer = model, tokenizer
        self.drafts = (1 if mtp else 0) if drafts is None else drafts
        self.runner: Runner = open_runner(model, cache_gb, mtp=self.drafts > 0)
        self.store: PageStore = self.runner.store
        self.tier = tier
        self.scheduler = Scheduler(
            PageBook(self.store.latents.shape[1]),
            step_tokens=max(step_tokens, max_running * (1 + self.drafts)),
            max_running=max_running,
            drafts=self.drafts,
            share=share,
            fetch=None if tier is None else lambda key, page: tier.fetch(key, self.store, page),
            usable=self._usable,
        )
        self._page_scores = PageScores()
        self.grammars = Grammars(tokenizer, model.config.eos_token_ids, model.config.vocab_size)
        self.speculator = Speculator(self.runner, self.drafts, self._forbid_unused)
        self.stats = Stats(drafted=[0] * self.drafts, accepted=[0] * self.drafts)
        self._ids, self._vocab = itertools.count(1), tokenizer.vocab_size

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, prompt: Items[int], params: SamplingParams = SamplingParams(), *, salt: bytes = b"") -> Request:
        """Take a request; `step` works on it from now on.

        Args:
            salt: whose it is: pages are shared among equal salts only.

        Raises:
            ValueError: the prompt is empty, has an id beyond the vocabulary, is too long, or the grammar is none.
        """
        prompt, config = list(prompt), self.model.config
        if not prompt:
            raise ValueError("the prompt has no tokens: give at least one")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise ValueError(f"the prompt holds token {wrong}, the vocabulary ends at {config.vocab_size - 1}")
        if len(prompt) + params.max_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{len(prompt)} prompt tokens and max_tokens {params.max_tokens} exceed max_position_embeddings "
                f"{config.max_position_embeddings}: shorten one"
            )
        for token in params.logit_bias:
            if not 0 <= token < self._vocab:
                raise ValueError(f"logit_bias names token {token}, the vocabulary ends at {self._vocab - 1}")
        request = Request(next(self._ids), prompt, params)
        matchers = [self.grammars.matcher(params.grammar) if params.grammar else None for _ in range(params.n)]
        for choice, matcher in enumerate(matchers):
            first = request.sequences[0] if request.sequences else None
            sequence = Sequence(list(prompt), params, choice, salt, first)
            sequence.work = Work(request, TextStream(self.tokenizer.stream(), params.stop), matcher)
            request.sequences.append(sequence)
        for sequence in request.sequences:
            self.scheduler.add(sequence)
        return request

    def abort(self, request: Request) -> None:
        """Its unfinished answers end here, their pages are free at once."""
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._end(sequence, "abort")

    def forget(self) -> None:
        """Call it after the model's weights have changed: pages and scores of the old ones are found no more.

        Raises:
            ValueError: requests are running, a tier keeps pages beyond this engine.
        """
        if self.busy or self.tier is not None:
            raise ValueError("an engine with running requests or a disk cache cannot take new weights: end them first")
        self.scheduler.book.forget()
        self._page_scores.forget()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def generate(self, prompts: Items[str], params: SamplingParams = SamplingParams()) -> Iterator[Sample]:
        """Samples of each prompt in order. A prompt begins a document: BOS goes before it, as in training."""
        bos = self.tokenizer.bos_id
        starts = [[*([] if bos is None else [bos]), *self.tokenizer.encode(prompt)] for prompt in prompts]
        if not all(starts):
            raise ValueError("the prompt is empty and the tokenizer has no BOS token to start from: give a prompt")
        yield from self.complete(starts, params)

    def complete(self, prompts: Items[Items[int]], params: SamplingParams = SamplingParams()) -> Iterator[Sample]:
        """The same for prompts of token ids."""
        requests = [self.add(prompt, params) for prompt in prompts]
        parts: dict[tuple[int, int], list[Delta]] = {}
        try:
            for request in requests:
                while any(sequence.finish_reason is None for sequence in request.sequences):
                    for delta in self.step():
                        parts.setdefault((delta.request, delta.choice), []).append(delta)
                for sequence in request.sequences:
                    yield _sample(sequence, parts.pop((request.id, sequence.choice)))
        finally:
            for request in requests:
                self.abort(request)

    # -- a step --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Read one step's tokens; what it added to which answers."""
        chunks = self.scheduler.next_step()
        if not chunks:
            return []
        deltas: list[Delta] = []
        ended: list[Sequence] = []
        chunks, states = self._forward(chunks, deltas)
        if not chunks:
            return deltas
        self.stats.steps, self.stats.rows = self.stats.steps + 1, self.stats.rows + len(states)
        starts = list(itertools.accumulate((len(c.tokens) for c in chunks), initial=0))
        # One that was set aside reads its own answer again: the end of its prompt is no place to draw from a second time.
        ready = [i for i, c in enumerate(chunks) if c.sequence.decoding or _ends_prompt(c)]
        rows = [row for i in ready for row in range(starts[i] + chunks[i].count - 1, starts[i + 1])]
        logits = self._forbid_unused(self.runner.logits(states[rows])) if rows else torch.empty(0, 1)
        best, at = logits.max(-1) if rows else (logits, logits), 0
        finite, likeliest = (best[0].isfinite().tolist(), best[1].tolist()) if rows else ([], [])
        for i, chunk in enumerate(chunks):
            sequence, own = chunk.sequence, states[starts[i] : starts[i + 1]]
            count = len(chunk.tokens) - chunk.count + 1 if i in ready else 0
            mine = slice(at, at + count)
            at += count
            try:
                self._score_prompt(chunk, own)
                if not all(finite[mine]):
                    raise FloatingPointError("the model's logits are not finite: see `dsv3 inspect --verify`")
                row = starts[i] + chunk.count - 1
                taken = self._decide(sequence, logits[mine], likeliest[mine], row, deltas) if count else 0
            except Exception as error:
                deltas.append(self._fail(sequence, error))
                continue
            computed = chunk.start + chunk.count + max(taken - 1, 0)
            for page, last in self.scheduler.computed(sequence, computed):
                self.store.states[page].copy_(own[last - chunk.start])
            self._keep_scores(sequence)
            if sequence.finish_reason is not None:
                ended.append(sequence)
        # Those that end now are drafted too: the pages they leave behind must be whole for the next who finds them.
        self.speculator.draft(
            [(c, states[a:b]) for c, a, b in zip(chunks, starts, starts[1:]) if c.sequence.finish_reason != "error"]
        )
        for sequence in ended:
            self._end(sequence, sequence.finish_reason or "stop")
        self._page_scores.shrink()
        return deltas

    def _forward(self, chunks: list[Chunk], deltas: list[Delta]) -> tuple[list[Chunk], Tensor]:
        """All chunks together; should that fail, each alone, so that the one at fault fails alone."""
        try:
            return chunks, self.runner.forward([_segment(c) for c in chunks])
        except Exception:
            whole, rows = [], []
            for chunk in chunks:
                try:
                    rows.append(self.runner.forward([_segment(chunk)]))
                    whole.append(chunk)
                except Exception as error:
                    deltas.append(self._fail(chunk.sequence, error))
            return whole, torch.cat(rows) if rows else torch.empty(0)

    def _decide(self, sequence: Sequence, logits: Tensor, likeliest: list[int], row: int, deltas: list[Delta]) -> int:
        """Take the drafts that stand and one token more; how many tokens that is. row: of the step, where the logits begin."""
        params, work = sequence.params, sequence.work
        before, text, scores = len(sequence.tokens), "", []
        seen = work.drafted, work.accepted
        drafts, guesses = sequence.drafts, sequence.guesses
        for i in range(len(logits)):
            draft = drafts[i] if i < len(drafts) else None
            if params.max_tokens == 0:
                sequence.finish_reason = "length"
                break
            stands, token = likeliest[i] == draft, likeliest[i]
            if not params.plain:
                stands, token = self._choose(sequence, logits[i], draft, guesses[i] if draft is not None else None)
                if params.logprobs is not None:
                    scores.append(score(logits[i], token, params.logprobs))
            if draft is not None:
                self._count_draft(work, i, stands)
            text += self._take(sequence, token)
            if sequence.finish_reason is not None or not stands:
                break
        sequence.drafts, sequence.guesses = [], []
        taken = sequence.tokens[before:]
        self.stats.answer_tokens += len(taken)
        kept = taken[:-1] if self._ends(sequence, taken) else taken
        if sequence.finish_reason is not None:
            text += work.text.finish()
        delta = Delta(
            request=work.request.id,
            choice=sequence.choice,
            token_ids=kept,
            text=text,
            scores=scores[: len(kept)],
            finish_reason=sequence.finish_reason,
            routes=self._routes(row, len(kept)) if params.routes else [],
            drafted=work.drafted - seen[0],
            accepted=work.accepted - seen[1],
        )
        deltas.append(delta)
        return len(taken)

    def _routes(self, row: int, count: int) -> list[tuple[tuple[int, ...], ...]]:
        rows = self.runner.experts[:, row : row + count].transpose(0, 1).tolist()
        return [tuple(tuple(layer) for layer in token) for token in rows]

    def _choose(self, sequence: Sequence, logits: Tensor, draft: int | None, guess: Tensor | None) -> tuple[bool, int]:
        """Whether the draft stands, and the token."""
        params, position = sequence.params, sequence.answered
        row = adjust(logits, params, sequence.tokens[: sequence.prompt_length], sequence.answer)
        if position < params.min_tokens:
            row = row.clone()
            row[list(self.model.config.eos_token_ids)] = -torch.inf
        if sequence.work.matcher is not None:
            row = sequence.work.matcher.mask(row)
        token = int(row.argmax())
        if row[token] == -torch.inf:
            raise Refused("no token may come next: logit_bias, min_tokens and the grammar leave none")
        if params.temperature == 0:
            return token == draft, token
        p = distribution(row, params)
        key = (params.seed, sequence.choice, position)
        if draft is None:
            return False, draw(p, chance(*key, "sample"))
        assert guess is not None
        return accept(draft, p, guess, chance(*key, "accept"), chance(*key, "sample"))

    def _take(self, sequence: Sequence, token: int) -> str:
        """Append a token; the text that it makes certain. Sets finish_reason if the answer ends with it."""
        params, work = sequence.params, sequence.work
        sequence.tokens.append(token)
        if work.matcher is not None:
            work.matcher.take(token)
        ended, enough = token in self.model.config.eos_token_ids, sequence.answered >= params.min_tokens
        text = ""
        if ended and not params.ignore_eos and enough:
            sequence.finish_reason = "stop"
        else:
            text = work.text.push(token, may_stop=enough)
            done = work.text.stopped or (work.matcher is not None and work.matcher.finished)
            if done or sequence.answered >= params.max_tokens:
                sequence.finish_reason = "stop" if done else "length"
        return text

    def _ends(self, sequence: Sequence, taken: list[int]) -> bool:
        """Whether the last token is an end token that is no part of the answer."""
        stop = sequence.finish_reason == "stop" and not sequence.params.ignore_eos
        return bool(taken) and stop and taken[-1] in self.model.config.eos_token_ids

    def _score_prompt(self, chunk: Chunk, states: Tensor) -> None:
        """Log-probabilities of the prompt's tokens, for those who ask; a bounded number of logits at a time."""
        sequence, want = chunk.sequence, chunk.sequence.params.prompt_logprobs
        request = sequence.work.request
        if want is None or sequence.choice > 0 or sequence.answered:
            return
        scores, start, states = request.prompt_scores, chunk.start, states[: chunk.count]
        if not scores:
            for key in sequence.keys:
                scores += self._page_scores.get(key, want)
            scores += [] if scores else [None]
        if len(scores) == start and sequence.joined is not None:  # the first token behind the known pages
            start, states = start - 1, torch.cat((self.store.states[sequence.joined].unsqueeze(0), states))
        for first in range(0, len(states), _SCORE_ROWS):
            logits = self._forbid_unused(self.runner.logits(states[first : first + _SCORE_ROWS]))
            for i, row in enumerate(logits, start + first + 1):
                if i == len(scores) and i < sequence.prompt_length:  # one set aside reads its prompt again
                    scores.append(score(row, sequence.tokens[i], want))

    def _keep_scores(self, sequence: Sequence) -> None:
        """Of pages that are full now."""
        want, scores = sequence.params.prompt_logprobs, sequence.work.request.prompt_scores
        if want is None:
            return
        for i, key in enumerate(sequence.keys):
            if len(scores) >= (i + 1) * PAGE and (key, want) not in self._page_scores:
                self._page_scores.put(key, want, scores[i * PAGE : (i + 1) * PAGE])

    def _usable(self, sequence: Sequence, key: bytes) -> bool:
        """Whether a known page spares this sequence its tokens: if they are to be scored, the scores must be known too."""
        want = sequence.params.prompt_logprobs
        return want is None or sequence.choice > 0 or (key, want) in self._page_scores

    def _forbid_unused(self, logits: Tensor) -> Tensor:
        """The published model has rows for ids that no token uses."""
        logits[:, self._vocab :] = -torch.inf
        return logits

    def _count_draft(self, work: Work, place: int, stands: bool) -> None:
        work.drafted, work.accepted = work.drafted + 1, work.accepted + stands
        self.stats.drafted[place] += 1
        self.stats.accepted[place] += stands

    def _fail(self, sequence: Sequence, error: Exception) -> Delta:
        for page in sequence.pages:
            if not self.scheduler.book.is_public(page):
                self.store.clear(page)  # what is not finite must not wait there for the next owner
        self._end(sequence, "error")
        said = f"{type(error).__name__}: {error}"
        at_fault = isinstance(error, Refused)
        return Delta(sequence.work.request.id, sequence.choice, [], "", [], "error", said, refused=at_fault)

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self.stats.preemptions += sequence.preempted
        if sequence.choice == 0:
            self.stats.prompt_tokens += sequence.prompt_length
            self.stats.cached_tokens += sequence.cached or 0
        if self.tier is not None:
            for key, page in zip(sequence.keys, sequence.pages):
                self.tier.keep(key, self.store, page)
        self.scheduler.remove(sequence)


def _ends_prompt(chunk: Chunk) -> bool:
    """Whether the answer's first token is drawn behind this chunk."""
    return not chunk.sequence.answered and chunk.start + chunk.count == chunk.sequence.prompt_length


def _segment(chunk: Chunk) -> Segment:
    return Segment(chunk.sequence.pages, chunk.start, chunk.tokens)


def _sample(sequence: Sequence, deltas: list[Delta]) -> Sample:
    work = sequence.work
    if deltas[-1].error:
        raise (ValueError if deltas[-1].refused else RuntimeError)(deltas[-1].error)
    tokens = [token for delta in deltas for token in delta.token_ids]
    text, scores = "".join(delta.text for delta in deltas), [s for delta in deltas for s in delta.scores]
    reason = sequence.finish_reason or "abort"
    return Sample(text, tokens, reason, work.drafted, work.accepted, sequence.cached or 0, scores)
