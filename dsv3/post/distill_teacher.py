"""Asking a teacher: a checkpoint in our engine, or any endpoint that speaks OpenAI's chat protocol; each answer is asked for once.

    request   (model, messages, sampling, sample number) -> key = SHA-256 of their JSON
    log       requests.jsonl: a line a finished request, written whole and synced before anything else learns of it

A run that is killed loses what was under way and no more: the next one finds the log's keys and asks for the rest. A line torn
by the kill is cut off. What the teacher refused for good (400, 422) is finished too; what failed otherwise is asked again.

Over HTTP many requests are under way at once. 408, 409, 429 and 5xx, a broken connection, a timeout and a reply that is no reply
(no JSON, no choice, neither text nor thought) are tried again after 1, 2, 4 ... seconds, or as long as Retry-After says, at most
a minute. 401, 402, 403 and 404 end the asking at once, as do `give_up` requests in a row that failed in every try, and a budget
that is spent: what was answered is kept.
Does not: judge answers (distill_filter.py), or believe a usage that is no number of tokens: it is counted as untold.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dsv3.data.chat import ChatFormat
from dsv3.data.reply import Reply as ParsedReply
from dsv3.data.reply import ReplyParser
from dsv3.data.tokenizer import Tokenizer
from dsv3.evals.models import bearer
from dsv3.infer.engine import Delta, Engine
from dsv3.infer.sampling import SamplingParams

_MOST_BYTES = 64 << 20  # of a reply
_LONGEST_WAIT = 60.0
_FATAL = (401, 402, 403, 404)
_AGAIN = (408, 409, 425, 429)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the teacher answers. DeepSeek asks for 0.6 and 0.95 of R1."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ValueError(
                f"temperature {self.temperature} must be 0 to 2, top_p {self.top_p} above 0 to 1, "
                f"max_tokens {self.max_tokens} at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to ask for."""

    model: str
    problem: str
    """The problem's id, for the log; no part of the key."""
    messages: tuple[tuple[str, str], ...]
    """(role, content)"""
    sampling: Sampling
    sample: int = 0

    @property
    def key(self) -> str:
        """The same question to the same model is the same request, wherever the model is served."""
        content = [self.model, self.messages, asdict(self.sampling), self.sample]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def seed(self) -> int:
        return self.sampling.seed + self.sample


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished answer. `refused`: the teacher will never answer this, and why. Tokens are None where they were not told."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    refused: str | None = None


@dataclass
class Asked:
    """What became of the requests of one sitting."""

    answered: int = 0
    refused: int = 0
    failed: int = 0
    retries: int = 0
    stopped: str | None = None
    """Why not all were asked."""
    faults: list[str] = field(default_factory=list)

    def fault(self, said: str) -> None:
        if said not in self.faults and len(self.faults) < 5:
            self.faults.append(said)


Done = Callable[[Request, Reply], bool]
"""Takes a finished request; False: stop asking."""


class Teacher(Protocol):
    """`name` stands in every request: answers of another teacher are other requests."""

    @property
    def name(self) -> str: ...
    def ask(self, requests: Sequence[Request], done: Done, asked: Asked) -> None: ...


# -- the log -----------------------------------------------------------------------------------------------------------


class RequestLog:
    """The finished requests of a run: `replies` by key, `add` one.

    Raises:
        ValueError: a line before the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.replies = path, dict[str, Reply]()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._read()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _read(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        good = 0
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                key, reply = row["key"], Reply(**row["reply"])
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):
                    raise ValueError(
                        f"{self.path} line {number} of {len(lines)} is no request ({error}): the file was damaged, not torn; "
                        "remove that line to ask for it again"
                    ) from None
                break
            if not line.endswith(b"\n"):
                break
            self.replies[key] = reply
            good += len(line)
        if lines:
            os.truncate(self.path, good)

    def add(self, request: Request, reply: Reply) -> None:
        """On the disk when this returns."""
        row = {"key": request.key, "problem": request.problem, "sample": request.sample, "model": request.model}
        line = json.dumps({**row, "reply": asdict(reply)}).encode() + b"\n"
        written = 0
        while written < len(line):
            written += os.write(self._file, line[written:])
        os.fsync(self._file)
        self.replies[request.key] = reply

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


# -- a checkpoint --------------------------------------------------------------------------------------------------------


class EngineTeacher:
    """A model in our engine.

    Args:
        reasoning: open <think> for it; None: as its chat template does.
        concurrency: requests in the engine at once.
    """

    def __init__(self, engine: Engine, *, name: str, reasoning: bool | None = None, concurrency: int = 32) -> None:
        assert isinstance(engine.tokenizer, Tokenizer)
        self.engine, self._name, self.reasoning, self.concurrency = engine, name, reasoning, concurrency
        self.chat = ChatFormat.of(engine.tokenizer)

    @property
    def name(self) -> str:
        return self._name

    def ask(self, requests: Sequence[Request], done: Done, asked: Asked) -> None:
        waiting, running = list(reversed(requests)), dict[int, _Running]()
        try:
            while waiting or running:
                while waiting and len(running) < self.concurrency:
                    request = waiting.pop()
                    try:
                        begun = self._begin(request)
                    except ValueError as error:  # too long a prompt, as a rule: it would be so next time
                        asked.refused += 1
                        asked.fault(f"{request.problem}: {error}")
                        if not done(request, Reply(refused=str(error))):
                            return
                        continue
                    running[begun.request.id] = begun
                for delta in self.engine.step():
                    begun = running[delta.request]
                    reply = begun.take(delta)
                    if reply is None:
                        continue
                    del running[delta.request]
                    if delta.error:
                        asked.failed += 1
                        asked.fault(f"{begun.asked.problem}: {delta.error}")
                        continue
                    asked.answered += 1
                    if not done(begun.asked, reply):
                        return
        finally:
            for begun in running.values():
                self.engine.abort(begun.request)

    def _begin(self, request: Request) -> _Running:
        messages = [{"role": role, "content": content} for role, content in request.messages]
        rendered = self.chat.render(messages, reasoning=self.reasoning)
        sampling = request.sampling
        room = self.engine.model.config.max_position_embeddings - len(rendered.ids)
        if room < 1:
            raise ValueError(f"the prompt has {len(rendered.ids)} tokens, the model takes {len(rendered.ids) + room}")
        params = SamplingParams(
            max_tokens=min(sampling.max_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed,
        )
        return _Running(request, self.engine.add(rendered.ids, params), rendered.thinking)


class _Running:
    """A request in the engine, and what came of it so far."""

    def __init__(self, asked: Request, request: Any, thinking: bool) -> None:
        self.asked, self.request = asked, request
        self._parser, self._reply = ReplyParser(tools=False, reasoning=True, thinking=thinking), ParsedReply()
        self._tokens = 0

    def take(self, delta: Delta) -> Reply | None:
        """The reply, once it is whole."""
        self._tokens += len(delta.token_ids)
        for event in self._parser.push(delta.text):
            self._reply.add(event)
        if delta.finish_reason is None:
            return None
        for event in self._parser.finish():
            self._reply.add(event)
        return Reply(
            text=self._reply.content,
            reasoning=self._reply.reasoning,
            finish_reason=delta.finish_reason,
            prompt_tokens=len(self.request.prompt),
            answer_tokens=self._tokens,
        )


# -- an endpoint ---------------------------------------------------------------------------------------------------------


class _Fatal(Exception):
    """No request will succeed."""


class _Failed(Exception):
    """This request failed in every try."""


class HttpTeacher:
    """POST {url}/chat/completions.

    Args:
        url: up to and without /chat/completions. key: sent as a bearer token, never logged.
        concurrency: requests at once. tries: of one request. timeout: seconds for one try.
        give_up: requests in a row that may fail before the teacher counts as gone.
        wait: seconds before the second try.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 16,
        tries: int = 5,
        timeout: float = 1800.0,
        give_up: int = 8,
        wait: float = 1.0,
    ) -> None:
        if concurrency < 1 or tries < 1 or give_up < 1 or not timeout > 0:
            raise ValueError(
                f"concurrency {concurrency}, tries {tries} and give_up {give_up} must be at least 1, timeout {timeout} above 0"
            )
        self.url, self.model, self.concurrency, self.tries = url.rstrip("/"), model, concurrency, tries
        self.timeout, self.give_up, self.wait = timeout, give_up, wait
        self._headers = bearer(key)

    @property
    def name(self) -> str:
        return self.model

    def ask(self, requests: Sequence[Request], done: Done, asked: Asked) -> None:
        asyncio.run(self._ask(requests, done, asked))

    async def _ask(self, requests: Sequence[Request], done: Done, asked: Asked) -> None:
        import httpx

        waiting, in_a_row = iter(requests), 0
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        timeout = httpx.Timeout(self.timeout, connect=min(30.0, self.timeout))

        async def work(client: httpx.AsyncClient) -> None:
            nonlocal in_a_row
            for request in waiting:
                if asked.stopped is not None:
                    return
                try:
                    reply = await self._try(client, request, asked)
                except _Fatal as error:
                    asked.stopped = str(error)
                    return
                except _Failed as error:
                    asked.failed, in_a_row = asked.failed + 1, in_a_row + 1
                    asked.fault(str(error))
                    if in_a_row >= self.give_up:
                        asked.stopped = f"{in_a_row} requests in a row failed, the last so: {error}"
                    continue
                in_a_row = 0
                if reply.refused is None:
                    asked.answered += 1
                else:
                    asked.refused += 1
                    asked.fault(f"{request.problem}: {reply.refused}")
                if not done(request, reply):
                    asked.stopped = asked.stopped or "told to stop"

        opened = httpx.AsyncClient(limits=limits, timeout=timeout, headers=self._headers)
        async with opened as client, asyncio.TaskGroup() as group:
            for _ in range(min(self.concurrency, len(requests))):
                group.create_task(work(client))

    async def _try(self, client: Any, request: Request, asked: Asked) -> Reply:
        """A reply, after as many tries as it takes and may take."""
        import httpx

        said, pause = "", 0.0
        for attempt in range(self.tries):
            if attempt:
                asked.retries += 1
                await asyncio.sleep(max(pause, min(_LONGEST_WAIT, self.wait * 2 ** (attempt - 1))))
                if asked.stopped is not None:
                    break
            pause = 0.0
            try:
                status, headers, body = await self._post(client, request)
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                said = f"{self.url} does not answer ({type(error).__name__}: {error})"
                if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
                    raise _Fatal(f"{said}: give a URL such as http://localhost:8000/v1") from error
                continue
            if status == 200:
                reply = read_reply(body)
                if isinstance(reply, Reply):
                    return reply
                said = f"{self.url} answered what is no reply ({reply})"
                continue
            told = self._masked(_message(body))
            said = f"{self.url} answered {status}: {told}"
            if status in _FATAL:
                raise _Fatal(f"{said}: check URL, model {self.model!r} and key")
            if status < 500 and status not in _AGAIN:
                return Reply(refused=f"{status}: {told}")
            pause = _seconds(headers.get("retry-after"))
        raise _Failed(said)

    def _masked(self, text: str) -> str:
        """A server's words without the key, which some repeat."""
        key = self._headers.get("Authorization", "").removeprefix("Bearer ")
        return text.replace(key, "***") if key else text

    async def _post(self, client: Any, request: Request) -> tuple[int, Any, bytes]:
        sampling = request.sampling
        body = {
            "model": self.model,
            "messages": [{"role": role, "content": content} for role, content in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": request.seed,
        }
        async with client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > _MOST_BYTES:
                    raise OSError(f"the reply is longer than {_MOST_BYTES >> 20} MiB")
            return response.status_code, response.headers, b"".join(parts)


def read_reply(body: bytes) -> Reply | str:
    """A chat completion's first choice, or what is wrong with it. Reasoning in the text's own <think> is taken apart."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {str(error)[:80]}"
    choices = told.get("choices") if isinstance(told, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return f"no choices: {str(told)[:80]}"
    text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(text, str) or not isinstance(reasoning, str):
        return f"content is a {type(text).__name__}"
    try:
        (text + reasoning).encode()
    except UnicodeEncodeError:
        return "content holds half a character"
    if not reasoning and text.lstrip().startswith("<think>"):
        parser, parsed = ReplyParser(tools=False, reasoning=True), ParsedReply()
        for event in (*parser.push(text.lstrip()), *parser.finish()):
            parsed.add(event)
        text, reasoning = parsed.content, parsed.reasoning
    if not text.strip() and not reasoning.strip():
        return "neither content nor reasoning"
    usage = told.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=text,
        reasoning=reasoning,
        finish_reason=str(choice.get("finish_reason") or "unknown"),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        answer_tokens=_count(usage.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    """A number of tokens that can be."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**8 else None


def _message(body: bytes) -> str:
    try:
        told = json.loads(body)
        error = told.get("error", told) if isinstance(told, dict) else told
        said = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        said = body.decode("utf-8", "replace")
    return " ".join(str(said).split())[:200] or "no message"


def _seconds(value: str | None) -> float:
    """Of a Retry-After in seconds; a date is not waited for."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(value or 0)))
    except ValueError:
        return 0.0
