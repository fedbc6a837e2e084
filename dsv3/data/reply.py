"""A reply's text to content, reasoning and tool calls, as it comes: the inverse of how data/chat.py writes a turn.

    [REASONING \\n]</think>\\n\\n CONTENT [<calls begin>] call \\n call ... <calls end>
    call:  <call begin>function<sep>NAME\\n```json\\n  ARGUMENTS  \\n```<call end>

Whatever way the text is cut into pushes, the events joined are the same, and every byte that is no markup is in exactly
one of them. What was sent is never taken back, so the rules say when something is certain:

    a call        is one when its head is whole, up to the line break after ```json. A head that goes wrong is content,
                  verbatim, with all that led to it; the search goes on behind its first character.
    its arguments stream at once and end at <call end> (or <calls end>, if that was forgotten), with the fence in front of
                  it if there is one. Inside a JSON string these are text, unless \\n``` stands before: no JSON string
                  holds a raw line break. So ``` in arguments survives, and a forgotten fence swallows no other call.
    the stream    ends inside a call: the call stays, its arguments as they are (a whole \\n``` at the end is taken for
                  the fence), and CallEnd says complete=False. Arguments are not checked to be JSON.
    between calls and after them, text is content; one line break right before a call is markup. <calls begin> is markup
                  only before a call, <calls end> only after one; a call without them is a call too.
    reasoning     runs to the first </think> or to the end; the line break before it and up to two behind it are markup.
                  Where the prompt has not opened it, <think> (and one line break) must be the reply's first characters.

With tools=False nothing is a call, with reasoning=False nothing is reasoning: it is content, verbatim.
Does not: handle the end token or stop strings (infer/text.py), give calls ids, or check names against a list of tools.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3.data.chat import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, FENCE_BEGIN, FENCE_END, TOOL_SEP
from dsv3.data.messages import FUNCTION_NAME
from dsv3.data.tokenizer import THINK_BEGIN, THINK_END

_HEAD = f"{CALL_BEGIN}function{TOOL_SEP}"
_OPENER = re.compile(f"\\n?(?:{CALLS_BEGIN})?{_HEAD}({FUNCTION_NAME}){FENCE_BEGIN}")
_OPENER_MAX = len(f"\n{CALLS_BEGIN}{_HEAD}{FENCE_BEGIN}") + 64
_CLOSER = re.compile(f"{CALL_END}|{CALLS_END}")


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallBegin:
    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    index: int
    complete: bool = True
    """Whether the model closed the call; False where the reply was cut."""


Event = Content | Reasoning | CallBegin | CallArguments | CallEnd


@dataclass(kw_only=True)
class Call:
    name: str
    arguments: str = ""
    complete: bool = False


@dataclass(kw_only=True)
class Reply:
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, event: Event) -> None:
        match event:
            case Content(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case CallBegin(_, name):
                self.calls.append(Call(name=name))
            case CallArguments(index, text):
                self.calls[index].arguments += text
            case CallEnd(index, complete):
                self.calls[index].complete = complete


class ReplyParser:
    """Push text, get events; `finish` once at the end. No event has an empty text."""

    def __init__(self, *, tools: bool, reasoning: bool = False, thinking: bool = False) -> None:
        """
        Args:
            tools: look for calls.
            reasoning: look for reasoning.
            thinking: the prompt ended inside <think> (Rendered.thinking), so the reply starts with reasoning.
        """
        self._tools = tools
        self._state = "reasoning" if thinking else "start" if reasoning else "content"
        self._held = ""
        self._calls = 0
        self._inside = False  # a call has come, and <calls end> has not
        self._breaks = 0  # line breaks behind </think> or <think> that are still markup
        self._after = "content"  # the state behind them
        self._quoted = self._escaped = False  # where in JSON the arguments stand

    def push(self, text: str) -> list[Event]:
        """The events that are now certain."""
        self._held += text
        return self._run(final=False)

    def finish(self) -> list[Event]:
        """The rest: what might have become markup and did not."""
        events = self._run(final=True)
        if self._state == "arguments":
            events.append(CallEnd(self._calls - 1, complete=False))
            self._state = "content"
        return events

    def _run(self, final: bool) -> list[Event]:
        steps = {
            "start": self._start,
            "breaks": self._skip_breaks,
            "reasoning": self._reason,
            "content": self._speak,
            "arguments": self._argue,
        }
        events: list[Event] = []
        while steps[self._state](events, final):  # each step takes what is certain off _held; True: a new state
            pass
        return events

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken

    def _start(self, events: list[Event], final: bool) -> bool:
        if self._held.startswith(THINK_BEGIN):
            self._take(len(THINK_BEGIN))
            self._state, self._breaks, self._after = "breaks", 1, "reasoning"
            return True
        if final or not THINK_BEGIN.startswith(self._held):
            self._state = "content"
            return True
        return False

    def _skip_breaks(self, events: list[Event], final: bool) -> bool:
        while self._breaks and self._held.startswith("\n"):
            self._take(1)
            self._breaks -= 1
        if self._breaks and not self._held:
            return False
        self._state = self._after
        return True

    def _reason(self, events: list[Event], final: bool) -> bool:
        at = self._held.find(THINK_END)
        if at < 0:
            keep = 0 if final else _overlap(self._held, (f"\n{THINK_END}", THINK_END))
            if text := self._take(len(self._held) - keep):
                events.append(Reasoning(text))
            return False
        if text := self._take(at).removesuffix("\n"):
            events.append(Reasoning(text))
        self._take(len(THINK_END))
        self._state, self._breaks, self._after = "breaks", 2, "content"
        return True

    def _speak(self, events: list[Event], final: bool) -> bool:
        held, size, opener, closes = self._held, len(self._held), None, False
        for found in re.finditer("[\n<]" if self._inside else "<", held) if self._tools else ():
            opener = _OPENER.match(held, found.start())
            closes = self._inside and held.startswith(CALLS_END, found.start())
            if opener or closes or (not final and self._may_be_markup(held, found.start())):
                size = found.start()
                break
        if text := self._take(size):
            events.append(Content(text))
        if opener:
            self._take(opener.end() - size)
            self._state, self._quoted, self._escaped = "arguments", False, False
            events.append(CallBegin(self._calls, opener[1]))
            self._calls += 1
        elif closes:
            self._take(len(CALLS_END))
            self._inside = False
        return opener is not None or closes

    def _may_be_markup(self, held: str, at: int) -> bool:
        """Whether all of held from `at` on is the beginning of a call's head or of <calls end>."""
        if len(held) - at > _OPENER_MAX:
            return False
        rest = held[at:]
        if self._inside and CALLS_END.startswith(rest):
            return True
        for literal, optional in (("\n", True), (CALLS_BEGIN, True), (_HEAD, False)):
            if literal.startswith(rest):
                return True
            if rest.startswith(literal):
                rest = rest[len(literal) :]
            elif not optional:
                return False
        name = re.match(f"(?:{FUNCTION_NAME})?", rest)
        assert name is not None  # it matches nothing too
        return FENCE_BEGIN.startswith(rest[name.end() :])

    def _argue(self, events: list[Event], final: bool) -> bool:
        index = self._calls - 1
        start = 0
        while found := _CLOSER.search(self._held, start):
            at = found.start()
            text = self._held[:at].removesuffix(FENCE_END)
            if len(text) == at and self._in_string(self._held[start : found.end()]):
                start = found.end()
                continue
            self._take(found.end())
            events += [CallArguments(index, text)] if text else []
            events.append(CallEnd(index))
            self._state, self._inside = "content", found[0] == CALL_END
            return True
        keep = _overlap(
            self._held[start:], [f"{fence}{end}" for fence in (FENCE_END, "") for end in (CALL_END, CALLS_END)]
        )
        self._in_string(self._held[start : len(self._held) - keep])
        text = self._take(len(self._held) - keep)
        if final and not self._held.startswith(FENCE_END):
            text += self._held
        if final:
            self._held = ""
        if text:
            events.append(CallArguments(index, text))
        return False

    def _in_string(self, text: str) -> bool:
        """Read on in the arguments: whether they now stand inside a JSON string."""
        for char in text:
            if self._escaped:
                self._escaped = False
            elif char == "\\" and self._quoted:
                self._escaped = True
            elif char == '"':
                self._quoted = not self._quoted
        return self._quoted


def parse(text: str, *, tools: bool = True, reasoning: bool = False, thinking: bool = False) -> Reply:
    """The reply that ReplyParser makes of the whole text; arguments as there."""
    parser = ReplyParser(tools=tools, reasoning=reasoning, thinking=thinking)
    reply = Reply()
    for event in [*parser.push(text), *parser.finish()]:
        reply.add(event)
    return reply


def _overlap(text: str, marks: Sequence[str]) -> int:
    """The longest end of text that is a beginning of a mark, shorter than all of it."""
    for size in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        end = text[-size:]
        if any(len(mark) > size and mark.startswith(end) for mark in marks):
            return size
    return 0
