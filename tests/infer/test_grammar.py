"""Grammars: what may come is exactly what they allow, guesses are forgotten, and hostile ones do no harm."""

import contextlib
import json
import random
import time

import pytest
import torch

from dsv3.infer.grammar import (
    MAX_GRAMMAR_BYTES,
    Grammars,
    Refused,
    inline_schema,
    json_object,
    json_schema,
    lark,
    regex,
)
from tests.infer.letters import Letters


@pytest.fixture(scope="module")
def grammars():
    return Grammars(Letters(), [95], 100)


def walk(matcher, seed: int, most: int = 400) -> list[int]:
    """Random allowed tokens, with a liking for what closes."""
    chance, out = random.Random(seed), []
    while not matcher.finished and len(out) < most:
        allowed = matcher.allowed().nonzero().flatten().tolist()
        closing = [t for t in allowed if Letters().token_bytes(t) in (b'"', b"}", b"]", b"<end>")]
        token = chance.choice(closing or allowed)
        if token == 95:
            break
        matcher.take(token)
        out.append(token)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_through_json_is_json(grammars, seed):
    assert isinstance(json.loads(Letters().decode(walk(grammars.matcher(json_object()), seed))), dict)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    said = json.loads(Letters().decode(walk(grammars.matcher(json_schema(schema)), seed)))
    assert isinstance(said["n"], int)


def test_an_end_is_allowed_only_where_the_text_is_complete(grammars):
    matcher = grammars.matcher(regex("ab?"))
    assert matcher.allowed().nonzero().flatten().tolist() == Letters().encode("a")
    matcher.take(*Letters().encode("a"))
    assert set(matcher.allowed().nonzero().flatten().tolist()) == {95, *Letters().encode("b")}
    assert not matcher.finished
    matcher.take(*Letters().encode("b"))
    assert matcher.finished


def test_the_mask_forbids_ids_beyond_the_vocabulary(grammars):
    masked = grammars.matcher(regex("[ -~]*")).mask(torch.zeros(100))
    assert masked[:95].isfinite().sum() > 90
    assert not masked[96:].isfinite().any()


def test_guesses_are_forgotten(grammars):
    matcher = grammars.matcher(regex("abc"))
    before = matcher.allowed()
    for letter in "abc":
        matcher.guess(*Letters().encode(letter))
    matcher.guess(95)
    assert matcher.mask(torch.zeros(100)).isfinite().any()
    matcher.forget_guesses()
    assert torch.equal(matcher.allowed(), before)
    for letter in "abc":
        matcher.take(*Letters().encode(letter))
    assert matcher.finished


def test_a_guess_that_breaks_the_grammar_is_forgotten_too(grammars):
    matcher = grammars.matcher(regex("abc"))
    matcher.guess(*Letters().encode("a"))
    with pytest.raises(Refused, match="could not be followed"):
        matcher.guess(*Letters().encode("!"))
    matcher.forget_guesses()
    for letter in "abc":
        matcher.take(*Letters().encode(letter))
    assert matcher.finished


def test_a_grammar_that_asks_for_too_much_work_is_refused_or_bounded(grammars):
    start = time.process_time()
    for hostile in (regex("a{1000}{1000}{1000}"), regex("(x+x+)+y"), json_schema({"minItems": 10**7, "type": "array"})):
        with contextlib.suppress(ValueError):  # refused, or compiled within the limits
            grammars.matcher(hostile).allowed()
    assert time.process_time() - start < 10


def test_control_tokens_and_schemas_in_one_grammar(grammars):
    text = f'start: <[95]> "f " {inline_schema({"enum": [7]})} <[95]>'
    matcher = Grammars(Letters(), [94], 100).matcher(lark(text))
    assert matcher.allowed().nonzero().flatten().tolist() == [95]


@pytest.mark.parametrize(
    "grammar",
    [
        lambda: regex("[0-9"),
        lambda: regex("(?=a)b"),
        lambda: regex("\\u{4e00}"),  # no text of these letters
        lambda: json_schema({"type": "nope"}),
        lambda: json_schema({"not": {}}),
        lambda: json_schema({"$ref": "#/$defs/absent"}),
        lambda: json_schema({"$ref": "http://127.0.0.1/x"}),
        lambda: lark("start: nowhere"),
        lambda: "neither",
        lambda: lark("start: " + '"a" ' * MAX_GRAMMAR_BYTES),
    ],
)
def test_what_is_no_grammar_is_refused_quickly(grammars, grammar):
    start = time.process_time()
    with pytest.raises(ValueError, match="grammar"):
        grammars.matcher(grammar())
    assert time.process_time() - start < 5
