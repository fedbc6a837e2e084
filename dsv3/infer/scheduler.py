"""Which sequences run in the next step, and with how many tokens. Pure Python; never touches a tensor.

    running   a step reads one token of each sequence that decodes, and its drafts; what is left of the step's tokens goes to
              prompts, cut into chunks: a long prompt never makes the others wait for all of it
    waiting   admitted while the pages last, first of the owner that has the fewest running, of such owners by turns, of each owner
              in order of arrival; pages of a known prefix are shared and not read again
    pressure  when a running sequence needs a page and none is left, the youngest one gives up all of its pages and waits in
              front, with everything it has said: later it reads its own text and goes on, and nothing is lost

A Sequence's `tokens` are prompt and answer; `computed` of them are in its pages. While it decodes, exactly the last one is not.
Source: vLLM (arXiv 2309.06180) for pages and preemption; Sarathi-Serve (arXiv 2403.02310) for chunks beside decoding.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsv3.infer.pages import PAGE, PageBook, page_keys
from dsv3.infer.sampling import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One answer in the making.

    Attributes:
        choice: which of the request's n answers.
        after: an answer to the same prompt that goes first, so that this one finds its pages.
        salt: of the owner: pages are shared among equal salts.
        drafts: tokens guessed after the last one, and what each was drawn from (None where it was the likeliest).
        joined: the last page of the known beginning, until the MTP layer has read its state with the token after it.
        cached: prompt tokens that were found in pages, when it was first admitted.
        came: how many had been admitted when it came.
        work: what the engine keeps beside it.
    """

    tokens: list[int]
    params: SamplingParams
    choice: int = 0
    salt: bytes = b""
    after: Sequence | None = None
    prompt_length: int = field(init=False)
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    guesses: list[Any] = field(default_factory=list)
    joined: int | None = None
    cached: int | None = None
    came: int = 0
    preempted: int = 0
    finish_reason: str | None = None
    work: Any = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def answered(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def goal(self) -> int:
        """Tokens to read before the next one is drawn. One taken up again stops before its last: drafts go along with that."""
        return len(self.tokens) - (1 if self.answered else 0)

    @property
    def decoding(self) -> bool:
        return self.answered > 0 and self.computed == self.goal


@dataclass(frozen=True)
class Chunk:
    """tokens[start : start + count] of a sequence, and its drafts behind them."""

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.drafts]


class Scheduler:
    """
    Args:
        step_tokens: most tokens a step reads, drafts included.
        max_running: most sequences in a step.
        drafts: draft tokens that a decoding sequence may have.
        share: whether prefixes are looked up.
        fetch: asked for a page's key that memory lacks; fills the given page if it has it (a disk tier).
        usable: whether a sequence may begin behind the page with this key instead of reading its tokens.
    """

    def __init__(
        self,
        book: PageBook,
        *,
        step_tokens: int,
        max_running: int,
        drafts: int = 0,
        share: bool = True,
        fetch: Callable[[bytes, int], bool] | None = None,
        usable: Callable[[Sequence, bytes], bool] = lambda sequence, key: True,
    ) -> None:
        if step_tokens < 1 + drafts:
            raise ValueError(f"step_tokens {step_tokens} cannot hold a token and its {drafts} drafts: give more")
        self.book, self.step_tokens, self.max_running = book, step_tokens, max_running
        self.drafts, self.share, self.fetch, self.usable = drafts, share, fetch, usable
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._admitted = 0
        self._turns: dict[bytes, int] = {}  # of owners with something waiting: when one of theirs was admitted last

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of so many tokens takes at most: drafts, and drafts of drafts, are written behind it."""
        return -(-(tokens + 2 * self.drafts) // PAGE)

    def add(self, sequence: Sequence) -> None:
        """
        Raises:
            ValueError: it could never fit.
        """
        need = self.pages_for(sequence.prompt_length + sequence.params.max_tokens)
        if need > self.book.total:
            raise ValueError(
                f"{sequence.prompt_length} prompt tokens and max_tokens {sequence.params.max_tokens} need {need} cache pages, "
                f"there are {self.book.total}: shorten one, or give the engine more cache"
            )
        sequence.came = self._admitted
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is done, failed or not wanted any more; its pages are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def next_step(self) -> list[Chunk]:
        """What to read now; empty if there is nothing to do."""
        chunks, left = [], self.step_tokens
        for sequence in [s for s in self.running if s.decoding]:
            count = 1 + len(sequence.drafts)
            if count > left or sequence not in self.running:  # or set aside for an older one just now
                continue
            if self._reserve(sequence, len(sequence.tokens) + len(sequence.drafts)):
                chunks.append(Chunk(sequence, sequence.computed, 1, tuple(sequence.drafts)))
                left -= count
        for sequence in [s for s in self.running if not s.decoding]:
            left -= self._read(sequence, left, chunks)
        while left > 0 and self.waiting and len(self.running) < self.max_running:
            sequence = self._turn()
            if sequence is None or not self._admit(
                sequence
            ):  # nor then anyone else, or a large one would wait for ever
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._count(sequence.salt)
            left -= self._read(sequence, left, chunks)
        return [chunk for chunk in chunks if chunk.sequence in self.running]

    def computed(self, sequence: Sequence, upto: int) -> list[tuple[int, int]]:
        """Tokens before `upto` are in its pages. Full pages are published: (page, position of its last token) for each."""
        sequence.computed = upto
        fresh = []
        known = len(sequence.keys)
        if self.share and upto // PAGE > known:
            sequence.keys = page_keys(sequence.tokens[: upto // PAGE * PAGE], sequence.salt, sequence.keys)
            for i in range(known, len(sequence.keys)):
                if self.book.publish(sequence.pages[i], sequence.keys[i]):
                    fresh.append((sequence.pages[i], (i + 1) * PAGE - 1))
        return fresh

    def _read(self, sequence: Sequence, left: int, chunks: list[Chunk]) -> int:
        """Plan the next chunk of its prompt; how many tokens that is."""
        if left <= 0 or sequence not in self.running:
            return 0
        count = min(left, sequence.goal - sequence.computed)
        if count <= 0 or not self._reserve(sequence, sequence.computed + count):
            return 0
        chunks.append(Chunk(sequence, sequence.computed, count))
        return count

    def _turn(self) -> Sequence | None:
        """Who is admitted next: what was set aside, else the first of the owner (salt) with the fewest running, of several such
        the one whose turn is longest ago, so that many requests of some owners make another's wait for a place a busy owner and not
        for all of them. None: all wait for a first choice."""
        if self.waiting[0].preempted:
            return self.waiting[0]
        busy = Counter(sequence.salt for sequence in self.running)
        ready = (s for s in self.waiting if s.after is None or s.after.finish_reason is not None or s.after.answered)

        def claim(sequence: Sequence) -> tuple[int, int, int]:
            last = self._turns.get(sequence.salt, 0)
            return (
                busy[sequence.salt],
                max(last, sequence.came),
                last,
            )  # who comes anew has no claim on turns of the past

        return min(ready, key=claim, default=None)  # the first of equals

    def _count(self, owner: bytes) -> None:
        """An owner's turn. What is older than all that wait, or come from now on, decides nothing and is forgotten."""
        self._admitted += 1
        self._turns[owner] = self._admitted
        waiting = {sequence.salt for sequence in self.waiting}
        self._turns = {salt: turn for salt, turn in self._turns.items() if salt in waiting}

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the pages of its known beginning, if the rest of its tokens fits beside them."""
        keys = page_keys(sequence.tokens[: sequence.goal - 1], sequence.salt) if self.share else []
        keys = list(itertools.takewhile(lambda key: self.usable(sequence, key), keys))
        found = 0
        while found < len(keys) and self.book.knows(keys[found]):
            found += 1
        idle = sum(self.book.is_idle(key) for key in keys[:found])
        if self.pages_for(len(sequence.tokens)) - found > self.book.available - idle:
            return False
        pages = []
        for key in keys[:found]:
            page = self.book.find(key)
            assert page is not None
            pages.append(page)
        sequence.pages = pages  # from here on whoever removes it gives them back
        for key in keys[found:] if self.fetch else ():
            pages.append(self.book.take())
            assert self.fetch is not None
            if not self.fetch(key, pages[-1]):
                self.book.release([pages.pop()])
                break
            self.book.publish(pages[-1], key)
        sequence.keys = keys[: len(pages)]
        sequence.computed, sequence.joined = len(pages) * PAGE, pages[-1] if pages else None
        if sequence.cached is None:
            sequence.cached = sequence.computed
        return True

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Make its pages hold so many tokens, taking them from younger sequences if need be. False: it had to wait itself."""
        while len(sequence.pages) < self.pages_for(tokens):
            if self.book.available:
                sequence.pages.append(self.book.take())
                continue
            youngest = self.running[-1]
            self._set_aside(youngest)
            if youngest is sequence:
                return False
        return True

    def _set_aside(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed, sequence.preempted = 0, sequence.preempted + 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.book.release(sequence.pages)
        sequence.pages, sequence.keys, sequence.joined = [], [], None
        sequence.drafts, sequence.guesses = [], []
