"""Bodies of replies: from the engine's deltas to chat.completion, text_completion and their chunks.

    add      a delta -> the chunks of a stream that it makes
    whole    all deltas, joined -> the body of a reply that is not streamed
    ends     the chunks behind the last delta: usage, if asked for

A text is told once, in order, whatever way the engine cut it. Log-probabilities of a token go with the first chunk at or behind
it: text may be held back for a while, tokens are not. -9999.0 stands for minus infinity, as in DeepSeek's API.
usage stands in a chunk of its own with include_usage (and is null in all others), else in the last chunk, as DeepSeek documents.
Source: API references of DeepSeek and OpenAI. Does not: know HTTP or wait.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv3.data.reply import CallArguments, CallBegin, CallEnd, Content, Event, Reasoning, Reply, ReplyParser
from dsv3.data.tokenizer import THINK_END, Tokenizer
from dsv3.infer.engine import Delta, Request, TokenScore
from dsv3.serve.plan import Plan

Json = dict[str, Any]


@dataclass(kw_only=True)
class Tally:
    """What one answer cost."""

    tokens: int = 0
    reasoning: int = 0


class Body:
    """What chat and completion replies share.

    Args:
        requests: the engine's, one a prompt.
    """

    object = ""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, requests: Sequence[Request], fingerprint: str) -> None:
        self.plan, self.tokenizer, self.requests = plan, tokenizer, requests
        self.id, self.created, self.fingerprint = str(uuid.uuid4()), int(time.time()), fingerprint
        self.born: float = time.monotonic()
        self.first_at: float | None = None
        self.tallies = [Tally() for _ in range(plan.answers)]
        self.open = plan.answers
        self.places: list[list[int]] = []  # MTP drafts looked at and accepted, by place in their chain
        self._details: dict[int, Json] = {}  # of deltas that made no chunk yet

    def time(self, born: float, first_at: float | None) -> None:
        """When the request came, and its first token (time.monotonic)."""
        self.born, self.first_at = born, first_at

    @property
    def head(self) -> Json:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.plan.model,
            "system_fingerprint": self.fingerprint,
        }

    @property
    def answered(self) -> int:
        return sum(tally.tokens for tally in self.tallies)

    def usage(self) -> Json:
        prompt, cached = (sum(sizes) for sizes in zip(*((len(r.prompt), r.cached) for r in self.requests)))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.answered,
            "total_tokens": prompt + self.answered,
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": prompt - cached,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(tally.reasoning for tally in self.tallies)},
        }

    def count(self, index: int, delta: Delta) -> None:
        tally = self.tallies[index]
        tally.tokens += len(delta.token_ids)
        for place in range(delta.drafted):
            if place == len(self.places):
                self.places.append([0, 0])
            self.places[place][0] += 1
            self.places[place][1] += place < delta.accepted
        if delta.finish_reason is not None:
            self.open -= 1

    def ends(self) -> list[Json]:
        """Chunks behind the last."""
        if not self.plan.usage:
            return []
        return [{**self.head, "choices": [], "usage": self.usage(), **self.totals()}]

    def chunk(self, choice: Json, *, last: bool, details: Json | None) -> Json:
        """`last`: no answer is left open."""
        at_end = last and not self.plan.usage
        chunk: Json = {**self.head, "choices": [choice], "usage": self.usage() if at_end else None}
        if details is not None:
            chunk["dsv3"] = details
        return {**chunk, **self.totals(chunk.get("dsv3"))} if at_end else chunk

    def details(self, index: int, delta: Delta) -> None:
        """Ours: what the chat page shows of each token."""
        if not self.plan.details:
            return
        told = self._details.setdefault(index, {"tokens": [], "drafted": 0, "accepted": 0})
        for at, token in enumerate(delta.token_ids):
            entry: Json = {"id": token, "text": self.tokenizer.decode([token])}
            if at < len(delta.scores):
                score = delta.scores[at]
                entry["logprob"] = finite(score.logprob)
                entry["top"] = [[self.tokenizer.decode([t]), finite(p)] for t, p in score.top]
            if at < len(delta.routes):
                entry["experts"] = [list(layer) for layer in delta.routes[at]]
            told["tokens"].append(entry)
        told["drafted"] += delta.drafted
        told["accepted"] += delta.accepted

    def take_details(self, index: int) -> Json | None:
        return self._details.pop(index, None)

    def totals(self, beside: Json | None = None) -> Json:
        """Ours, on the last chunk."""
        if not self.plan.details:
            return {}
        now, tokens = time.monotonic(), self.answered
        seconds = now - (self.first_at or self.born)
        totals = {
            "tokens": tokens,
            "cached_tokens": sum(request.cached for request in self.requests),
            "drafted": sum(drafted for drafted, _ in self.places),
            "accepted": sum(accepted for _, accepted in self.places),
            "places": self.places,
            "seconds": round(now - self.born, 4),
            "first_token_seconds": round((self.first_at or now) - self.born, 4),
            "tokens_per_second": round((tokens - 1) / seconds, 2) if tokens > 1 and seconds > 0 else None,
        }
        return {"dsv3": {**(beside or {}), "totals": totals}}


# -- chat --------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Answer:
    """A chat answer so far."""

    parser: ReplyParser
    reply: Reply = field(default_factory=Reply)
    logprobs: list[Json] = field(default_factory=list)
    untold: list[Json] = field(default_factory=list)  # log-probabilities that no chunk has told
    thinking: bool = False
    finish: str | None = None


class ChatBody(Body):
    object = "chat.completion"

    def __init__(self, plan: Plan, tokenizer: Tokenizer, requests: Sequence[Request], fingerprint: str) -> None:
        super().__init__(plan, tokenizer, requests, fingerprint)
        self._answers = [
            _Answer(
                parser=ReplyParser(tools=plan.tools, reasoning=plan.reasoning, thinking=plan.thinking),
                thinking=plan.thinking,
            )
            for _ in range(plan.answers)
        ]
        self._think_end = tokenizer.token_id(THINK_END)
        if plan.stream:
            self.object = "chat.completion.chunk"

    def starts(self) -> list[Json]:
        """The first chunk of each answer."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, dict(delta), None) for index in range(self.plan.answers)]

    def add(self, prompt: int, delta: Delta) -> list[Json]:
        """The chunks that a delta makes; they may be none."""
        index, answer = delta.choice, self._answers[delta.choice]
        self.count(index, delta)
        self.details(index, delta)
        self._count_reasoning(answer, self.tallies[index], delta.token_ids)
        if self.plan.logprobs is not None:
            told = [self._logprob(score) for score in delta.scores]
            (answer.untold if self.plan.stream else answer.logprobs).extend(told)
        events = answer.parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            events = [*events, *answer.parser.finish()]
            answer.finish = delta.finish_reason
        if self.plan.single_call:
            events = [event for event in events if getattr(event, "index", 0) == 0]
        for event in events:
            answer.reply.add(event)
        if not self.plan.stream:
            return []
        pieces = _merge(events)
        if answer.finish is not None:
            pieces = pieces or [{"content": ""}]
        elif not pieces and self.plan.details:
            pieces = [{"content": ""}]
        return [
            self._chunk(index, piece, self._finish(answer) if at == len(pieces) - 1 else None)
            for at, piece in enumerate(pieces)
        ]

    def whole(self) -> Json:
        choices = []
        for index, answer in enumerate(self._answers):
            reply = answer.reply
            message: Json = {"role": "assistant", "content": reply.content}
            if self.plan.reasoning:
                message["reasoning_content"] = reply.reasoning
            if reply.calls:
                message["tool_calls"] = [_call(at, call.name, call.arguments) for at, call in enumerate(reply.calls)]
            logprobs = {"content": answer.logprobs} if self.plan.logprobs is not None else None
            choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._finish(answer)}
            choices.append(choice)
        return {**self.head, "choices": choices, "usage": self.usage(), **self._whole_details()}

    def _whole_details(self) -> Json:
        told = [self.take_details(index) or {} for index in range(self.plan.answers)]
        return self.totals({"choices": told}) if self.plan.details else {}

    def _chunk(self, index: int, delta: Json, finish: str | None) -> Json:
        answer = self._answers[index]
        logprobs = {"content": answer.untold} if answer.untold else None
        answer.untold = []
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self.chunk(choice, last=finish is not None and self.open == 0, details=self.take_details(index))

    def _finish(self, answer: _Answer) -> str | None:
        called = any(call.complete for call in answer.reply.calls)
        return "tool_calls" if answer.finish == "stop" and called else answer.finish

    def _count_reasoning(self, answer: _Answer, tally: Tally, tokens: Sequence[int]) -> None:
        """Tokens up to </think>, itself included."""
        if answer.thinking:
            ended = self._think_end in tokens
            tally.reasoning += tokens.index(self._think_end) + 1 if ended else len(tokens)
            answer.thinking = not ended

    def _logprob(self, score: TokenScore) -> Json:
        top = [self._token(token, logprob) for token, logprob in score.top[: self.plan.logprobs]]
        return {**self._token(score.token, score.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> Json:
        raw = self.tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}


def _merge(events: Sequence[Event]) -> list[Json]:
    """Deltas of a chat stream; neighbours of one kind are one."""
    deltas: list[Json] = []
    for event in events:
        match event:
            case Content(text) | Reasoning(text):
                name = "content" if isinstance(event, Content) else "reasoning_content"
                if deltas and name in deltas[-1]:
                    deltas[-1][name] += text
                else:
                    deltas.append({name: text})
            case CallBegin(index, name):
                deltas.append({"tool_calls": [_call(index, name, "")]})
            case CallArguments(index, text):
                deltas.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            case CallEnd():
                pass
    return deltas


def _call(index: int, name: str, arguments: str) -> Json:
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


# -- completions -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Text:
    """A completion so far; `offset` counts the characters that its tokens have told."""

    text: str = ""
    finish: str | None = None
    offset: int = 0
    logprobs: Json = field(default_factory=lambda: _no_logprobs())


class CompletionBody(Body):
    object = "text_completion"

    def __init__(self, plan: Plan, tokenizer: Tokenizer, requests: Sequence[Request], fingerprint: str) -> None:
        super().__init__(plan, tokenizer, requests, fingerprint)
        self._texts = [_Text() for _ in range(plan.answers)]
        self._begun: set[int] = set()

    def starts(self) -> list[Json]:
        return []

    def add(self, prompt: int, delta: Delta) -> list[Json]:
        index = prompt * self.plan.params.n + delta.choice
        text = self._texts[index]
        self.count(index, delta)
        self.details(index, delta)
        piece = "" if self.plan.scoring else delta.text  # an end token has no text, and scoring wants none
        if self.plan.scoring and delta.token_ids and not self._ends(delta.token_ids[-1]):
            piece = delta.text
        logprobs = _no_logprobs() if self.plan.logprobs is not None else None
        if index not in self._begun:
            self._begun.add(index)
            piece = self._echo(prompt, text, logprobs) + piece
        if logprobs is not None:
            for score in delta.scores:
                self._tell(text, logprobs, score.token, score)
        text.text += piece
        text.finish = delta.finish_reason
        if logprobs is not None and not self.plan.stream:
            for name, values in logprobs.items():
                text.logprobs[name] += values
        told = (
            bool(piece) or text.finish is not None or self.plan.details or (logprobs is not None and logprobs["tokens"])
        )
        if not self.plan.stream or not told:
            return []
        choice = {"index": index, "text": piece, "logprobs": logprobs, "finish_reason": text.finish}
        last = text.finish is not None and self.open == 0
        return [self.chunk(choice, last=last, details=self.take_details(index))]

    def whole(self) -> Json:
        choices = [
            {
                "index": index,
                "text": text.text,
                "logprobs": text.logprobs if self.plan.logprobs is not None else None,
                "finish_reason": text.finish,
            }
            for index, text in enumerate(self._texts)
        ]
        told = [self.take_details(index) or {} for index in range(self.plan.answers)]
        extra = self.totals({"choices": told}) if self.plan.details else {}
        return {**self.head, "choices": choices, "usage": self.usage(), **extra}

    def _echo(self, prompt: int, text: _Text, logprobs: Json | None) -> str:
        if not self.plan.echo:
            return ""
        request = self.requests[prompt]
        if logprobs is not None:
            scores: Sequence[TokenScore | None] = request.prompt_scores
            for token, score in list(zip(request.prompt, scores))[self.plan.echo_skip :]:
                self._tell(text, logprobs, token, score)
        return self.plan.echo[prompt]

    def _tell(self, text: _Text, logprobs: Json, token: int, score: TokenScore | None) -> None:
        name = self._name(token)
        logprobs["tokens"].append(name)
        logprobs["text_offset"].append(text.offset)
        text.offset += 0 if self._ends(token) and self.plan.scoring else len(self.tokenizer.decode([token]))
        logprobs["token_logprobs"].append(None if score is None else finite(score.logprob))
        top: dict[str, float] | None = None
        if score is not None:
            top = {self._name(other): finite(logprob) for other, logprob in score.top[: self.plan.logprobs]}
            top[name] = finite(score.logprob)
        logprobs["top_logprobs"].append(top)

    def _name(self, token: int) -> str:
        """The token's text; of bytes that are none, as OpenAI writes them: a name for each token."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _ends(self, token: int) -> bool:
        return token == self.tokenizer.eos_id


def _no_logprobs() -> Json:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def finite(logprob: float) -> float:
    return logprob if logprob > -9999.0 else -9999.0  # NaN too
