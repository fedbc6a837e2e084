"""A conversation in the terminal: `dsv3 chat`. Lines in, text out, whatever reads and writes them.

    /system TEXT    say who the model is, and start anew        /reset    start anew
    /retry          answer the last question again              /undo     forget the last question and its answer
    /save FILE      write the conversation as a line of JSON    /set NAME VALUE    temperature, top_p, max_tokens, seed
    /help           these lines                                 /exit     leave (end of input does the same)

A line that ends in a backslash goes on in the next. History is what a client of the API would send: messages, rendered by
dsv3.data.chat; earlier turns are found in the engine's pages, so that each turn reads only what is new.
Does not: know the console (the caller passes functions), or keep anything that was not /save'd.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsv3.data.chat import ChatFormat
from dsv3.data.reply import CallArguments, CallBegin, Content, Event, Reasoning, Reply, ReplyParser
from dsv3.infer.engine import Engine, Request
from dsv3.infer.pages import PAGE
from dsv3.infer.sampling import SamplingParams

HELP = "\n".join(__doc__.split("\n\n")[1].splitlines())
_SETTINGS = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


class Conversation:
    """Messages and the engine that answers them.

    Args:
        params: how to answer; each turn draws with a seed of its own, derived from `seed`.

    Attributes:
        told: (tokens of the last answer, prompt tokens found in the cache, drafts, accepted drafts).
    """

    def __init__(self, engine: Engine, form: ChatFormat, params: SamplingParams, system: str = "") -> None:
        self.engine, self.form, self.params = engine, form, params
        self.messages: list[dict[str, Any]] = []
        self.told = (0, 0, 0, 0)
        self._turns = 0
        self.reset(system)

    @property
    def system(self) -> str:
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    def reset(self, system: str) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def undo(self) -> bool:
        """Forget the last question and what followed it; whether there was one."""
        at = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=None)
        if at is None:
            return False
        del self.messages[at:]
        return True

    def ask(self, text: str) -> Iterator[Event]:
        """Say something; the answer as it comes. Closed half way, the half answer stays in the history, as one would expect."""
        self.messages.append({"role": "user", "content": text})
        try:
            request, thinking = self._submit()
        except ValueError:
            self.messages.pop()
            raise
        yield from self._answer(request, thinking)

    def retry(self) -> Iterator[Event]:
        """Answer the last question anew.

        Raises:
            ValueError: nothing was asked yet.
        """
        asked = next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), None)
        if asked is None:
            raise ValueError("nothing was asked yet: say something first")
        self.undo()
        yield from self.ask(asked)

    def _submit(self) -> tuple[Request, bool]:
        """Hand the conversation to the engine; also whether the answer begins with reasoning."""
        rendered = self.form.render(self.messages)
        slots = self.engine.scheduler.book.total * PAGE - 2 * self.engine.drafts
        limit = min(self.engine.model.config.max_position_embeddings, slots)
        room = limit - len(rendered.ids)
        if room < 1:
            said = (
                f"the conversation has {len(rendered.ids)} tokens, there is room for {limit} with the answer: /reset it"
            )
            raise ValueError(said)
        params = dataclasses.replace(
            self.params, max_tokens=min(self.params.max_tokens, room), seed=self.params.seed + self._turns
        )
        request = self.engine.add(rendered.ids, params)
        self._turns += 1
        return request, rendered.thinking

    def _answer(self, request: Request, thinking: bool) -> Iterator[Event]:
        parser, reply = ReplyParser(tools=False, reasoning=thinking, thinking=thinking), Reply()
        counts = [0, 0, 0]
        try:
            for delta in self._deltas(request):
                counts = [a + b for a, b in zip(counts, (len(delta.token_ids), delta.drafted, delta.accepted))]
                for event in parser.push(delta.text):
                    reply.add(event)
                    yield event
                if delta.error:
                    raise RuntimeError(delta.error)
            for event in parser.finish():
                reply.add(event)
                yield event
        finally:
            self.engine.abort(request)
            self.told = (counts[0], request.cached, counts[1], counts[2])
            thought = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
            self.messages.append({"role": "assistant", "content": reply.content, **thought})

    def _deltas(self, request: Request) -> Iterator[Any]:
        while any(sequence.finish_reason is None for sequence in request.sequences):
            yield from (delta for delta in self.engine.step() if delta.request == request.id)


def talk(
    conversation: Conversation,
    read: Callable[[str], str],
    write: Callable[[str, str], None],
) -> None:
    """Until the input ends.

    Args:
        read: shows a prompt, returns a line; raises EOFError at the end, KeyboardInterrupt to leave.
        write: shows text of a kind: "content", "reasoning", "note" or "error".
    """
    while True:
        try:
            line = _read(read)
        except (EOFError, KeyboardInterrupt):
            write("\n", "note")
            return
        if line.strip() in ("/exit", "/quit"):
            return
        try:
            for event in _obey(conversation, line, write):
                _show(event, write)
        except KeyboardInterrupt:
            write("\n[stopped]", "note")
        except (ValueError, OSError, RuntimeError) as error:
            write(f"{error}\n", "error")
            continue
        if not line.startswith("/") or line.strip() == "/retry":
            tokens, cached, drafted, accepted = conversation.told
            drafts = f", {accepted} of {drafted} drafts accepted" if drafted else ""
            write(f"\n[{tokens} tokens, {cached} of the prompt cached{drafts}]\n", "note")


def _read(read: Callable[[str], str]) -> str:
    line = read("> ")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read(". ")
    return line


def _obey(conversation: Conversation, line: str, write: Callable[[str, str], None]) -> Iterator[Event]:
    """Do what a line says; the events of an answer if it asks for one."""
    word, _, rest = line.strip().partition(" ")
    if not line.strip():
        return
    if not line.startswith("/"):
        yield from conversation.ask(line)
    elif word == "/retry":
        yield from conversation.retry()
    elif word in ("/system", "/reset"):
        conversation.reset(rest if word == "/system" else conversation.system)
        write("a new conversation\n", "note")
    elif word == "/undo":
        write("forgotten\n" if conversation.undo() else "there is nothing to forget\n", "note")
    elif word == "/save":
        if not rest:
            raise ValueError("/save needs the name of a file")
        Path(rest).write_text(
            json.dumps({"messages": conversation.messages}, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        write(f"{len(conversation.messages)} messages in {rest}\n", "note")
    elif word == "/set":
        conversation.params = _set(conversation.params, rest)
        write(f"{rest}\n", "note")
    elif word == "/help":
        write(HELP + "\n", "note")
    else:
        raise ValueError(f"{word} is no command: /help lists them; a message that begins with / needs a space in front")


def _set(params: SamplingParams, text: str) -> SamplingParams:
    name, _, value = text.partition(" ")
    if name not in _SETTINGS:
        raise ValueError(f"/set knows {', '.join(_SETTINGS)}, not {name!r}")
    try:
        number: Any = _SETTINGS[name](value)
    except ValueError:
        raise ValueError(f"/set {name} needs a number, not {value!r}") from None
    return dataclasses.replace(params, **{name: number})


def _show(event: Event, write: Callable[[str, str], None]) -> None:
    if isinstance(event, Content):
        write(event.text, "content")
    elif isinstance(event, Reasoning):
        write(event.text, "reasoning")
    elif isinstance(event, CallBegin):
        write(f"\n{event.name}: ", "content")
    elif isinstance(event, CallArguments):
        write(event.text, "content")
