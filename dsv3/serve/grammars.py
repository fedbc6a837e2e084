"""Grammars of replies: what response_format and tool_choice ask for, in one text for the engine.

    [reasoning </think> \\n\\n] ( content | calls )

    calls     <calls begin> call (\\n call)* <calls end>, each: <call begin>function<sep>NAME\\n```json\\nARGUMENTS\\n```<call end>
              with arguments by the function's schema, so that forced and strict calls always parse
    auto      without strict functions and response_format: no grammar, the model is free
Control tokens are written by id: no text of the model's or the user's can stand for one.
Source: llguidance's Lark; the calls of V3-0324's template (dsv3.data.chat).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv3.data.chat import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, TOOL_SEP
from dsv3.data.tokenizer import THINK_END, Tokenizer
from dsv3.infer import grammar as engine_grammar
from dsv3.serve.errors import refuse
from dsv3.serve.protocol import FunctionSpec, ResponseFormat

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def reply_grammar(
    tokenizer: Tokenizer,
    form: ResponseFormat | None,
    functions: Sequence[FunctionSpec],
    *,
    choice: str,
    single: bool,
    thinking: bool,
) -> str | None:
    """
    Args:
        functions: that may be called. choice: "none", "auto" or "required"; a named function is required and alone.
        single: one call at most. thinking: the reply begins inside <think>.

    Raises:
        ApiError: the parts cannot be combined, or one of them is malformed.
        ValueError: a schema is too large.
    """
    calls = choice == "required" or (choice == "auto" and any(f.strict for f in functions))
    free = form is None or form.type == "text"
    if not calls and not (functions and not free and choice == "auto"):
        return None if form is None or free else _content_grammar(tokenizer, form, thinking)
    rules = []
    if choice == "required":
        body = "calls"
    elif form is None or free:
        body = "text calls?"
        rules.append("text: /(?s:.*)/")
    else:
        body = "content | calls"
        rules.append(f"content: {engine_grammar.inline_schema(_schema(form, 'beside tools'))}")
    rules += _calls_rules(tokenizer, functions, single)
    return engine_grammar.lark(_after_reasoning(tokenizer, body, thinking) + "\n".join(rules) + "\n")


def _content_grammar(tokenizer: Tokenizer, form: ResponseFormat, thinking: bool) -> str:
    if thinking:
        rule = f"content: {engine_grammar.inline_schema(_schema(form, 'after reasoning'))}\n"
        return engine_grammar.lark(_after_reasoning(tokenizer, "content", True) + rule)
    if form.type == "regex":
        if not form.regex:
            raise refuse("response_format.regex", "response_format.regex is missing: give a regular expression")
        return engine_grammar.regex(form.regex)
    if form.type == "grammar":
        if not form.grammar:
            raise refuse("response_format.grammar", "response_format.grammar is missing: give a Lark grammar")
        return engine_grammar.lark(form.grammar)
    return engine_grammar.json_schema(_schema(form, ""))


def _schema(form: ResponseFormat, where: str) -> Mapping[str, Any]:
    if form.type == "json_object":
        return {"type": "object"}
    if form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise refuse("response_format.json_schema.schema", "response_format.json_schema.schema is missing: give it")
        return form.json_schema.schema_
    raise refuse(
        "response_format.type", f"response_format.type {form.type!r} cannot stand {where}: use json_schema, or drop one"
    )


def _after_reasoning(tokenizer: Tokenizer, body: str, thinking: bool) -> str:
    if not thinking:
        return f"start: {body}\n"
    return f'start: reasoning <[{tokenizer.token_id(THINK_END)}]> "\\n\\n" ({body})\nreasoning: /(?s:.*)/\n'


def _calls_rules(tokenizer: Tokenizer, functions: Sequence[FunctionSpec], single: bool) -> list[str]:
    begin, end, call, over, sep = (
        f"<[{tokenizer.token_id(name)}]>" for name in (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, TOOL_SEP)
    )
    names = " | ".join(f"function{at}" for at in range(len(functions)))
    more = "" if single else ' ("\\n" call)*'
    rules = [f"calls: {begin} call{more} {end}", f'call: {call} "function" {sep} ({names}) {over}']
    for at, function in enumerate(functions):
        schema = _NO_ARGUMENTS if function.parameters is None else _closed(function.parameters)
        if "type" not in schema and not {"anyOf", "oneOf", "allOf", "$ref"} & schema.keys():
            schema = {"type": "object", **schema}
        rules.append(f'function{at}: "{function.name}\\n```json\\n" arguments{at} "\\n```"')
        rules.append(f"arguments{at}: {engine_grammar.inline_schema(schema)}")
    return rules


_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name -> schema
_VALUES = ("enum", "const", "default", "examples")


def _closed(schema: Any) -> Any:
    """A schema whose objects have the properties they name and no others, unless it says otherwise."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, part in schema.items():
        if key in _NAMED and isinstance(part, dict):
            closed[key] = {name: _closed(inner) for name, inner in part.items()}
        else:
            closed[key] = part if key in _VALUES else _closed(part)
    says = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf"} & schema.keys()
    if isinstance(schema.get("properties"), dict) and not says:
        closed["additionalProperties"] = False
    return closed
