"""OpenAI's messages, checked: every message a Turn of plain text, in an order that the chat format can say.

    {role: system | user | assistant | tool, content: text | [{type: text, text}] | null, tool_calls, tool_call_id, name,
     reasoning_content, prefix | partial}  ->  Turn(role, content, calls, reasoning, open)

Parts of a content are joined as they are. A content may be null beside tool_calls or reasoning_content. Calls wait for one
tool message each before anyone else speaks, in any order of ids; a result or call without an id is matched in order, and a
conversation may end with calls that wait. `name` is checked and unused, as in the published template; keys that are not named
here are ignored, since clients send many. System messages may stand anywhere.
Does not: render (data/chat.py), check arguments against a schema, or check a function's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FUNCTION_NAME = r"[A-Za-z0-9_-]{1,64}"
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Turn:
    role: str
    content: str
    calls: tuple[tuple[str, str], ...] = ()
    """(name, arguments as JSON text)"""
    reasoning: str = ""
    open: bool = False
    """To be continued."""


def read_messages(messages: Sequence[Mapping[str, Any]], continue_last: bool, generate: bool) -> list[Turn]:
    """Turns of messages in a right order.

    Args:
        continue_last: the last message is an assistant's to be continued, whatever it says itself.
        generate: a reply follows, so no call may be left waiting. Else they are to be learnt from, so an assistant
            may only speak after a user or a tool.

    Raises:
        ValueError: names message, field, both values and the cure.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f'messages is {_kind(messages)}: give a list of {{"role": ..., "content": ...}}')
    if not messages:
        raise ValueError("messages is empty: give at least one message")
    turns: list[Turn] = []
    pending: list[str | None] = []  # ids of calls without a result
    caller, last = 0, "system"
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, Mapping):
            raise ValueError(f'{where} is {_kind(message)}: give {{"role": ..., "content": ...}}')
        is_last = at == len(messages) - 1
        turn = _read_message(message, where, continue_last and is_last)
        turns.append(turn)
        if turn.open and not is_last:
            raise ValueError(
                f"{where}.prefix is true on message {at + 1} of {len(messages)}: only the last is continued"
            )
        if turn.role == "system":
            continue
        if turn.role == "tool":
            _answer(message.get("tool_call_id"), pending, where, last, caller)
        elif pending:
            raise ValueError(
                f"{where}.role is {turn.role!r} where messages[{caller}] waits for the results of "
                f"{len(pending)} calls ({', '.join(map(repr, pending))}): send a tool message for each first"
            )
        if turn.role == "assistant":
            if not generate and last not in ("user", "tool"):
                raise ValueError(
                    f"{where}.role is 'assistant' after {last!r}: to be learnt it must follow a user's or a tool's "
                    "message; join it to the one before or put a user's message between"
                )
            caller, pending = at, _call_ids(message.get("tool_calls") or [], where)
        last = turn.role
    if generate and pending:
        raise ValueError(
            f"messages[{caller}].tool_calls wait for {len(pending)} results ({', '.join(map(repr, pending))}): "
            "send a tool message for each before asking for a reply"
        )
    if continue_last and not turns[-1].open:
        raise ValueError(
            f"messages[{len(messages) - 1}].role is {turns[-1].role!r} and is to be continued: "
            "only an assistant's message can be"
        )
    return turns


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Name and JSON (indented by 4) of each function in OpenAI's list.

    Raises:
        ValueError: an entry is no function, its name is not allowed, or it is no JSON.
    """
    listed = []
    for at, tool in enumerate(tools):
        where = f"tools[{at}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise ValueError(f'{where} is {tool!r:.200}: give {{"type": "function", "function": {{...}}}}')
        name = _function_name(function.get("name"), f"{where}.function.name")
        listed.append((name, _json(function, f"{where}.function", indent=4)))
    return listed


def _read_message(message: Mapping[str, Any], where: str, continued: bool) -> Turn:
    role = message.get("role")
    if role not in _ROLES:
        raise ValueError(f"{where}.role is {role!r}: use one of {', '.join(_ROLES)}")
    if not isinstance(message.get("name"), str | None):
        raise ValueError(f"{where}.name is {_kind(message['name'])}: give a string or leave it out")
    flags = [message.get(name) for name in ("prefix", "partial")]
    for name, flag in zip(("prefix", "partial"), flags):
        if not isinstance(flag, bool | None):
            raise ValueError(f"{where}.{name} is {flag!r}: give true or false")
    if role != "assistant":
        for name in ("tool_calls", "prefix", "partial"):
            if message.get(name):
                raise ValueError(f"{where}.{name} stands in a message of role {role!r}: only an assistant's has it")
        return Turn(role=role, content=_content(message.get("content"), where))
    calls = message.get("tool_calls") or []
    reasoning = message.get("reasoning_content") or ""
    if not isinstance(reasoning, str):
        raise ValueError(f"{where}.reasoning_content is {_kind(reasoning)}: give a string or null")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{where}.tool_calls is {_kind(calls)}: give a list of calls")
    is_open = any(flags) or continued
    if calls and is_open:
        raise ValueError(f"{where} has tool_calls and is to be continued: a reply can only continue content")
    content = message.get("content")
    content = "" if content is None and (calls or reasoning) else _content(content, where)
    read = tuple(_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls))
    return Turn(role=role, content=content, calls=read, reasoning=reasoning, open=is_open)


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise ValueError(f"{where}.content is {_kind(content)}: give a string, or a list of text parts")
    texts = []
    for at, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError(f'{where}.content[{at}] is {part!r:.200}: give {{"type": "text", "text": ...}}')
        texts.append(text)
    return "".join(texts)


def _call(call: Any, where: str) -> tuple[str, str]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise ValueError(
            f'{where} is {call!r:.200}: give {{"id": ..., "type": "function", "function": {{"name", "arguments"}}}}'
        )
    if not isinstance(call.get("id"), str | None):
        raise ValueError(f"{where}.id is {_kind(call['id'])}: give a string")
    name = _function_name(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str | Mapping):
        raise ValueError(f"{where}.function.arguments is {_kind(arguments)}: give JSON text or an object")
    return name, arguments if isinstance(arguments, str) else _json(arguments, f"{where}.function.arguments")


def _call_ids(calls: Sequence[Mapping[str, Any]], where: str) -> list[str | None]:
    ids = [call.get("id") for call in calls]
    for at, name in enumerate(ids):
        if name is not None and name in ids[:at]:
            raise ValueError(f"{where}.tool_calls[{at}].id is {name!r}, as an earlier call's: give each its own")
    return ids


def _answer(name: Any, pending: list[str | None], where: str, last: str, caller: int) -> None:
    """Take the call that a tool's result answers off `pending`: by its id, or the next one where either has none."""
    if not isinstance(name, str | None):
        raise ValueError(f"{where}.tool_call_id is {_kind(name)}: give the call's id")
    if not pending:
        raise ValueError(
            f"{where}.role is 'tool' after {last!r} and no call waits for a result: "
            "send the assistant's message with its tool_calls first, and one result a call"
        )
    if name is None:
        pending.pop(0)
    elif name in pending or None in pending:
        pending.remove(name if name in pending else None)
    else:
        raise ValueError(
            f"{where}.tool_call_id is {name!r}, but messages[{caller}] waits for "
            f"{', '.join(map(repr, pending))}: send the id of the call it answers"
        )


def _function_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or re.fullmatch(FUNCTION_NAME, name) is None:
        raise ValueError(f"{where} is {name!r:.200}: give 1 to 64 letters, digits, _ or -")
    return name


def _json(value: Mapping[str, Any], where: str, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is no JSON ({error}): give what json.dumps can write") from None


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__} ({value!r:.80})"
