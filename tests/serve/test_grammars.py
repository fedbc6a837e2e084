"""Grammars of replies accept what the renderer would write, and nothing else."""

import pytest

from dsv3.data.chat import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, TOOL_SEP
from dsv3.data.tokenizer import THINK_END
from dsv3.infer.grammar import Grammars
from dsv3.serve.errors import ApiError
from dsv3.serve.grammars import _closed, reply_grammar
from dsv3.serve.protocol import FunctionSpec, ResponseFormat
from tests.serve.small import small_tokenizer

TOKENIZER = small_tokenizer()
GRAMMARS = Grammars(TOKENIZER, [TOKENIZER.eos_id], TOKENIZER.vocab_size)
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
F, G = FunctionSpec(name="f", parameters=PLACE), FunctionSpec(name="g")


def call(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}function{TOOL_SEP}{name}\n```json\n{arguments}\n```{CALL_END}"


ONE = CALLS_BEGIN + call("f", '{"place": "x"}') + CALLS_END
TWO = ONE.replace(CALLS_END, f"\n{call('g', '{}')}{CALLS_END}")


def accepts(grammar: str, text: str) -> bool:
    """Whether the whole text is one that the grammar allows."""
    matcher = GRAMMARS.matcher(grammar)
    for token in TOKENIZER.encode(text, special=True):
        if not matcher.allowed()[token]:
            return False
        matcher.take(token)
    return matcher.finished or bool(matcher.allowed()[TOKENIZER.eos_id])


def made(form=None, functions=(F, G), choice="required", single=False, thinking=False):
    form = None if form is None else ResponseFormat.model_validate(form)
    return reply_grammar(TOKENIZER, form, functions, choice=choice, single=single, thinking=thinking)


def test_forced_calls_are_as_the_renderer_writes_them():
    grammar = made()
    assert accepts(grammar, ONE)
    assert accepts(grammar, TWO)
    assert not accepts(grammar, "hello")
    assert not accepts(grammar, ONE.replace("place", "other"))
    assert not accepts(grammar, ONE.replace('"x"', '"x", "more": 1'))
    assert not accepts(grammar, TWO.replace("{}", '{"a": 1}'))
    assert not accepts(grammar, ONE.replace(CALLS_END, ""))
    assert not accepts(made(single=True), TWO)


def test_the_models_own_text_cannot_spell_a_control_token():
    spelled = TOKENIZER.encode(CALLS_BEGIN)  # as text: several tokens
    assert not GRAMMARS.matcher(made()).allowed()[spelled[0]]


def test_strict_functions_leave_text_free_and_bind_calls():
    grammar = made(functions=(FunctionSpec(name="f", parameters=PLACE, strict=True),), choice="auto")
    assert accepts(grammar, "hello\nworld")
    assert accepts(grammar, f"hello{ONE}")
    assert not accepts(grammar, f"hello{ONE.replace('place', 'other')}")
    assert made(choice="auto") is None
    assert made(choice="none", functions=()) is None


def test_reasoning_comes_first():
    grammar = made({"type": "json_object"}, functions=(), choice="none", thinking=True)
    assert accepts(grammar, f"some\nthoughts{THINK_END}\n\n{{}}")
    assert accepts(grammar, f"{THINK_END}\n\n{{}}")
    assert not accepts(grammar, "{}")
    assert accepts(made(thinking=True), f"hm{THINK_END}\n\n{ONE}")


def test_json_object_is_never_empty():
    grammar = made({"type": "json_object"}, functions=(), choice="none")
    assert accepts(grammar, '{"a": [1, null]}')
    for text in ("", " ", "[]", "1"):
        assert not accepts(grammar, text)


def test_a_form_that_cannot_be_combined_is_refused():
    form = {"type": "regex", "regex": "a"}
    for options in (dict(thinking=True, functions=(), choice="none"), dict(choice="auto")):
        with pytest.raises(ApiError, match="cannot stand"):
            made(form, **options)


def test_closing_a_schema_touches_objects_alone():
    inner = {"type": "object", "properties": {"properties": {"type": "string"}}}
    schema = {
        "properties": {"properties": inner, "open": {"properties": {}, "additionalProperties": True}},
        "$defs": {"properties": {"enum": [{"properties": {}}]}},
    }
    closed = _closed(schema)
    assert closed["additionalProperties"] is False
    assert set(closed["properties"]) == {"properties", "open"}
    assert closed["properties"]["properties"] == {**inner, "additionalProperties": False}
    assert closed["properties"]["open"]["additionalProperties"] is True
    assert closed["$defs"] == schema["$defs"]
