"""What is evaluated: a checkpoint in our engine, or a server that speaks OpenAI's protocol. Three questions are asked of either.

    generate    answers to a prompt, several samples of it
    likeliest   log-probability of each choice after a prompt, and whether it is what greedy decoding would say
    roll        log-probability of a whole text, in windows that each see `overlap` tokens of what came before

A prompt begins a document: BOS goes before it. The split between prompt and choice is that of the whole's tokens, as in lm-eval.
Over HTTP, scores need /completions with echo and logprobs; chat endpoints cannot score (lm-eval issue 1196).
Does not: retry a refused request (400); others are tried again with growing waits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from dsv3.data.chat import ChatFormat
from dsv3.data.tokenizer import Tokenizer
from dsv3.evals.tasks import Item
from dsv3.infer.engine import Engine, Request
from dsv3.infer.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn. samples: of each item. seed: of the first sample."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: give at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples={self.samples} at temperature 0 are all alike: set a temperature")


@dataclass(frozen=True)
class Answer:
    """One sample. tokens: how many were generated; None where the server does not say."""

    text: str
    finish_reason: str
    tokens: int | None = None


@dataclass(frozen=True)
class Scored:
    """Of a choice or a text: log-probability (nats), tokens it is of, and whether each was the likeliest."""

    logprob: float
    tokens: int
    greedy: bool


@dataclass(frozen=True)
class Failure:
    """Why an item got no answer: it is counted as wrong, and said."""

    error: str


Reply = list[Answer] | list[Scored] | Failure


class Model(Protocol):
    """What the runner asks of a model. Replies come in any order, each with its item."""

    @property
    def name(self) -> str: ...
    def ask(self, items: Sequence[Item], sampling: Sampling) -> Iterator[tuple[Item, Reply]]: ...


class EngineModel:
    """A checkpoint in our engine.

    Args:
        name: for the log.
        batch: items in flight at once.
        max_length: tokens of a window when rolling; None: the model's context.
    """

    def __init__(self, engine: Engine, *, name: str = "engine", batch: int = 64, max_length: int | None = None) -> None:
        self.engine, self._name, self.batch = engine, name, batch
        self.limit = min(
            max_length or engine.model.config.max_position_embeddings, engine.model.config.max_position_embeddings
        )
        self._format: ChatFormat | None = None

    @property
    def name(self) -> str:
        return self._name

    def prompt_ids(self, item: Item) -> list[int]:
        """Ids of an item's prompt, BOS first.

        Raises:
            ValueError: it is a chat, and the tokenizer has no roles.
        """
        if not item.chat:
            return [*self._bos(), *self.engine.tokenizer.encode(item.prompt)]
        if not isinstance(self.engine.tokenizer, Tokenizer):
            raise ValueError("chat items need a dsv3.Tokenizer with role tokens")
        self._format = self._format or ChatFormat.of(self.engine.tokenizer)
        return self._format.render([{"role": "user", "content": item.prompt}]).ids

    def ask(self, items: Sequence[Item], sampling: Sampling) -> Iterator[tuple[Item, Reply]]:
        """Replies as they are finished, `batch` items in flight; a new one enters when one ends."""
        waiting, running = iter(items), list[_Asked]()
        while True:
            while len(running) < self.batch and (item := next(waiting, None)) is not None:
                try:
                    running.append(self._begin(item, sampling))
                except ValueError as error:
                    yield item, Failure(str(error))
            if not running:
                return
            for delta in self.engine.step():
                for asked in running:
                    asked.take(delta)
            for asked in [a for a in running if a.done]:
                running.remove(asked)
                yield asked.item, asked.reply()

    def _begin(self, item: Item, sampling: Sampling) -> _Asked:
        if item.kind == "generate":
            prompt = self.prompt_ids(item)
            room = self.engine.model.config.max_position_embeddings - len(prompt)
            if room < 1:
                raise ValueError(
                    f"the prompt has {len(prompt)} tokens, the context {len(prompt) + room}: no room for an answer"
                )
            params = SamplingParams(
                max_tokens=min(item.max_tokens, room),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                n=sampling.samples,
                stop=item.stop,
            )
            return _Asked(item, [self.engine.add(prompt, params)], [])
        if item.kind == "choose":
            pairs = [self.split(item.prompt, choice) for choice in item.choices]
        else:
            pairs = windows(self.engine.tokenizer.encode(item.prompt), self._bos(), self.limit)
        return _Asked(item, [score_prompt(self.engine, a + b) for a, b in pairs], [len(a) for a, _ in pairs])

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut where the context's own tokens end; trailing space belongs to the continuation."""
        space = len(context) - len(context.rstrip())
        if space:
            context, continuation = context[:-space], context[-space:] + continuation
        encode = self.engine.tokenizer.encode
        whole, head = encode(context + continuation), encode(context)
        ids = [*self._bos(), *head]
        rest = whole[len(head) :]
        if not ids or not rest:
            raise ValueError(
                f"nothing to score in {continuation!r} after {context[-40:]!r}: neither may be empty of tokens"
            )
        return [*self._bos(), *whole[: len(head)]], rest

    def _bos(self) -> list[int]:
        bos = self.engine.tokenizer.bos_id
        return [] if bos is None else [bos]


class _Asked:
    """An item in flight, as one request or several."""

    def __init__(self, item: Item, requests: list[Request], starts: list[int]) -> None:
        self.item, self.requests, self.starts = item, requests, starts
        self.text: dict[int, str] = {}
        self.tokens: dict[int, int] = {}
        self.errors: list[str] = []

    def take(self, delta: Any) -> None:
        if all(delta.request != request.id for request in self.requests):
            return
        self.text[delta.choice] = self.text.get(delta.choice, "") + delta.text
        self.tokens[delta.choice] = self.tokens.get(delta.choice, 0) + len(delta.token_ids)
        if delta.error:
            self.errors.append(delta.error)

    @property
    def done(self) -> bool:
        return all(s.finish_reason is not None for request in self.requests for s in request.sequences)

    def reply(self) -> Reply:
        if self.errors:
            return Failure(self.errors[0])
        if self.item.kind == "generate":
            ends = [sequence.finish_reason or "abort" for sequence in self.requests[0].sequences]
            return [Answer(self.text.get(i, ""), end, self.tokens.get(i, 0)) for i, end in enumerate(ends)]
        return [scored(request, start) for request, start in zip(self.requests, self.starts)]


def score_prompt(engine: Engine, ids: Sequence[int]) -> Request:
    """Take a prompt to be scored; `scored` reads it when it is done."""
    return engine.add(ids, SamplingParams(max_tokens=0, prompt_logprobs=1))


def scored(request: Request, start: int) -> Scored:
    """Of the prompt's tokens from `start` on."""
    told = [s for s in request.prompt_scores[start:] if s is not None]
    assert len(told) == len(request.prompt) - max(start, 1), (len(told), len(request.prompt), start)
    greedy = all(s.logprob >= s.top[0][1] for s in told)
    return Scored(sum(s.logprob for s in told), len(told), greedy)


def windows(
    ids: Sequence[int], start: Sequence[int], limit: int, overlap: int = 1
) -> list[tuple[list[int], list[int]]]:
    """Disjoint pieces to score, each with its context: (context, piece), together at most `limit` tokens.

    The first piece's context is `start` (BOS); without one its first token is not scored. A later piece's is the `overlap` tokens
    before it, more where a short last piece leaves room: lm-eval's rolling windows.

    Raises:
        ValueError: limit leaves no room.
    """
    if limit < overlap + 1 or limit < len(start) + 1:
        raise ValueError(f"windows of {limit} tokens with {overlap} of context hold nothing: give more")
    first = ids[: limit - len(start)] if start else ids[:limit]
    made = [(list(start), list(first))] if start else [(list(first[:1]), list(first[1:]))]
    at, step = len(first), limit - overlap
    while at < len(ids):
        piece = ids[at : at + step]
        made.append((list(ids[max(0, at + len(piece) - limit) : at]), list(piece)))
        at += len(piece)
    return [(context, piece) for context, piece in made if piece]


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries a key; none without one.

    Raises:
        ValueError: no header can hold it. The key is not shown, as an HTTP library's own error would.
    """
    if not key or not key.strip():
        return {}
    if re.fullmatch(r"[!-~]+", key.strip()) is None:
        raise ValueError(
            "the key holds spaces, line breaks or other characters that no header may: see where it is read from"
        )
    return {"Authorization": f"Bearer {key.strip()}"}


class ApiModel:
    """A server with /v1/completions (and /v1/chat/completions).

    Args:
        url: up to and without /completions: https://host/v1.
        concurrency: requests at once. timeout: seconds for one. tries: of one, with waits that double from a second.
        client: an httpx.Client to use instead of a new one.
    """

    def __init__(
        self, url: str, model: str, *, key: str | None = None, concurrency: int = 8, timeout: float = 600.0, tries: int = 4,
        window: int = 4000, client: Any = None,
    ) -> None:  # fmt: skip
        import httpx

        headers = bearer(key)
        self._client = client if client is not None else httpx.Client(timeout=timeout)
        self._headers, self.url, self.model = headers, url.rstrip("/"), model
        self.concurrency, self.tries, self.window = concurrency, tries, window

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def ask(self, items: Sequence[Item], sampling: Sampling) -> Iterator[tuple[Item, Reply]]:
        """Replies as they come. No more than `concurrency` are asked for beyond those that were taken: what is not yet taken when
        a run is killed was paid for in vain."""
        waiting, work = iter(items), dict[Future[Reply], Item]()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while True:
                    while len(work) < self.concurrency and (item := next(waiting, None)) is not None:
                        work[pool.submit(self._reply, item, sampling)] = item
                    if not work:
                        return
                    future = next(iter(wait(work, return_when=FIRST_COMPLETED).done))
                    yield work.pop(future), future.result()
            finally:
                for future in work:
                    future.cancel()

    def _reply(self, item: Item, sampling: Sampling) -> Reply:
        try:
            if item.kind == "generate":
                return self._generate(item, sampling)
            if item.kind == "choose":
                return [self._score(item.prompt, choice) for choice in item.choices]
            return [self._score(before, piece) for before, piece in _pieces(item.prompt, self.window)]
        except (ValueError, OSError) as error:
            return Failure(f"{type(error).__name__}: {error}")
        except (LookupError, TypeError, AttributeError) as error:
            return Failure(f"{self.url} answered what is no completion ({type(error).__name__}: {error})")

    def _generate(self, item: Item, sampling: Sampling) -> list[Answer]:
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": item.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        }  # fmt: skip
        if item.stop:
            body["stop"] = list(item.stop)
        if item.chat:
            body["messages"] = [{"role": "user", "content": item.prompt}]
        else:
            body["prompt"] = item.prompt
        answers = []
        for i in range(sampling.samples):  # n is not offered by all servers
            told = self._post("/chat/completions" if item.chat else "/completions", body | {"seed": sampling.seed + i})
            choice = told["choices"][0]
            text = choice["message"].get("content") if item.chat else choice["text"]
            if not isinstance(text, str | None):
                raise TypeError(f"its text is {text!r:.40}")
            tokens = (told.get("usage") or {}).get("completion_tokens")
            answers.append(Answer(text or "", choice.get("finish_reason") or "unknown", tokens))
        return answers

    def _score(self, context: str, continuation: str) -> Scored:
        body = {
            "model": self.model,
            "prompt": context + continuation,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        told = self._post("/completions", body)["choices"][0].get("logprobs")
        if not told:
            raise ValueError(f"{self.url} gives no logprobs with echo: it cannot score choices or text")
        start, end = len(context), len(context) + len(continuation)
        places = [
            i for i, at in enumerate(told["text_offset"]) if start <= at < end and told["token_logprobs"][i] is not None
        ]
        if not places:
            raise ValueError(f"{self.url} scored no token of {continuation[:40]!r}")
        logprobs = [told["token_logprobs"][i] for i in places]
        best = [max((told["top_logprobs"][i] or {"": -1e9}).values()) for i in places]
        return Scored(sum(logprobs), len(places), all(p >= b for p, b in zip(logprobs, best)))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        import httpx

        said = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                answer = self._client.post(self.url + path, json=body, headers=self._headers)
            except httpx.HTTPError as error:
                said = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == 200:
                return answer.json()
            said = f"{answer.status_code} {self._masked(answer.text)[:300]}"
            if answer.status_code not in (408, 409, 429) and answer.status_code < 500:
                break
        raise OSError(f"{self.url}{path}: {said}")

    def _masked(self, text: str) -> str:
        """A server's words without the key, which some repeat."""
        key = self._headers.get("Authorization", "").removeprefix("Bearer ")
        return text.replace(key, "***") if key else text


def _pieces(text: str, size: int) -> Iterable[tuple[str, str]]:
    """(what came before, piece) of a text, for servers whose tokens are not known here: cut at white space near `size` characters,
    an eighth as many of context. So all but the text's first token are scored, as many as there are without BOS."""
    at = 0
    while at < len(text):
        end = min(at + size, len(text))
        if end < len(text):
            end = max(text.rfind(" ", at + 1, end), text.rfind("\n", at + 1, end), at) or end
            end = end if end > at else min(at + size, len(text))
        yield text[max(0, at - max(1, size // 8)) : at], text[at:end]
        at = end
