"""Answers that must have a form: JSON, JSON of a schema, a regular expression, a grammar, calls of tools; by llguidance.

    SamplingParams.grammar   a string, made by json_object, json_schema, regex or lark below
    Grammars                 a tokenizer's side of it, built once; a matcher for each answer
    Matcher                  mask -> the tokens that may come; take -> one came. Drafts are guessed ahead and forgotten again

End tokens are allowed where the text so far is complete, and only there; where nothing else may come the answer is finished.
Grammars are written by users, so they have limits: size, states of the lexer, work a step. One that breaks them in the middle
of an answer raises, and the engine ends that answer alone.
Source: llguidance's documentation. Legend: V vocabulary.
Does not: know chat templates or tools (dsv3.serve writes their grammars), or judge a schema's sense.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

MAX_GRAMMAR_BYTES = 256 * 1024
_LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 250_000,
    "max_grammar_size": 500_000,
}
# White space between JSON's tokens has a bound, or a model that likes spaces never comes to an end.
_JSON = {"whitespace_pattern": r"[\x20\x0A\x09]{0,24}"}


class Refused(ValueError):
    """What a request asks for cannot be followed any further: its own fault and not the engine's."""


class Vocabulary(Protocol):
    """What grammars ask of a tokenizer (dsv3.data.tokenizer.Tokenizer has it)."""

    def encode(self, text: str, /) -> list[int]: ...
    def token_bytes(self, token: int, /) -> bytes: ...
    def is_special(self, token: int, /) -> bool: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema: Mapping[str, Any]) -> str:
    """JSON that obeys a schema; properties come in the schema's order.

    Raises:
        ValueError: it is too large, or no schema that can be followed.
    """
    text = json.dumps(schema)
    _check_size(text)
    return _library().LLMatcher.grammar_from_json_schema(text, overrides=_JSON)


def regex(pattern: str) -> str:
    """Text that a regular expression (Rust's syntax, no look-around) matches as a whole."""
    _check_size(pattern)
    return _library().LLMatcher.grammar_from_regex(pattern)


def lark(text: str) -> str:
    """A context-free grammar in llguidance's Lark; control tokens as <[id]>, schemas by `inline_schema`."""
    _check_size(text)
    return _library().LLMatcher.grammar_from_lark(text)


def inline_schema(schema: Mapping[str, Any]) -> str:
    """A schema as a term of a `lark` grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON})}"


class Grammars:
    """Makes matchers for one vocabulary.

    Args:
        ends: ids of the end tokens. size: V, ids of the model's logits.
    """

    def __init__(self, vocabulary: Vocabulary, ends: Sequence[int], size: int) -> None:
        self._vocabulary, self._ends, self._size = vocabulary, list(ends), size
        self._made: Any = None

    def matcher(self, grammar: str) -> Matcher:
        """
        Raises:
            ValueError: the grammar is none, is beyond the limits, or no text satisfies it.
        """
        _check_size(grammar)
        library = _library()
        if self._made is None:
            wrapper = library.TokenizerWrapper(_Tokens(self._vocabulary, self._ends))
            self._made = library.LLTokenizer(wrapper, n_vocab=self._size, eos_token=self._ends)
        limits = library.LLParserLimits(**_LIMITS)
        made = library.LLMatcher(self._made, grammar, log_level=0, limits=limits)
        if made.is_error():
            raise ValueError(f"the grammar cannot be used: {_first_line(made.get_error())}")
        matcher = Matcher(made, self._ends)
        try:
            possible = bool(matcher.allowed().any())
        except Refused as error:
            raise ValueError(f"the grammar cannot be used: {error}") from None
        if not possible:
            raise ValueError("the grammar cannot be used: no text of this vocabulary satisfies it")
        return matcher


class Matcher:
    """Where one answer stands in its grammar. Guesses go on in a copy: one that breaks the grammar does not break the answer."""

    def __init__(self, made: Any, ends: Sequence[int]) -> None:
        self._made, self._ends = made, ends
        self._ahead: Any = None

    def allowed(self) -> Tensor:
        """(V,) boolean: tokens that may come next.

        Raises:
            Refused: the grammar went beyond its limits.
        """
        at = self._ahead or self._made
        bits = at.compute_bitmask()
        _check(at)
        return torch.from_numpy(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").astype(bool))

    def mask(self, logits: Tensor) -> Tensor:
        """logits (V,) with -inf where a token may not come."""
        allowed = self.allowed()[: len(logits)]
        if not allowed.any():  # after the text's end, among guesses
            allowed[list(self._ends)] = True
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """The answer goes on with this token, which was allowed. Guesses must be forgotten before."""
        assert self._ahead is None
        if token not in self._ends:
            self._made.consume_token(token)
            _check(self._made)

    def guess(self, token: int) -> None:
        """Go on for now: `forget_guesses` comes back here."""
        if self._ahead is None:
            self._ahead = self._made.deep_copy()
        if token not in self._ends and not self._ahead.is_stopped():
            self._ahead.consume_token(token)
            _check(self._ahead)

    def forget_guesses(self) -> None:
        self._ahead = None

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but an end."""
        return self._made.is_stopped()


def _check(made: Any) -> None:
    if made.is_error():
        raise Refused(f"the grammar could not be followed: {_first_line(made.get_error())}")


class _Tokens:
    """A vocabulary in the form that llguidance asks for."""

    def __init__(self, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
        self.eos_token_id, self.bos_token_id = ends[0], vocabulary.bos_id
        self.tokens = [vocabulary.token_bytes(i) for i in range(vocabulary.vocab_size)]
        self.special_token_ids = [i for i in range(vocabulary.vocab_size) if vocabulary.is_special(i)]
        self._encode: Callable[[str], list[int]] = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _check_size(text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        raise ValueError(f"the grammar has {size:,} bytes, {MAX_GRAMMAR_BYTES:,} are allowed: make it smaller")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no reason given"


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError("structured output needs llguidance: pip install 'dsv3[serve]'") from None
    return llguidance
