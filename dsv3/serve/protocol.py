"""Requests, as DeepSeek's and OpenAI's APIs have them: every field of both is here, honoured, harmless, or refused by name.

    honoured   what a field means here is said beside it; names that only vLLM or SGLang use are marked so
    harmless   hints and labels that change no answer: user, metadata, store, ... are taken and not used
    refused    400, with the field and the cure (dsv3.serve.refused)
    unknown    400: an option that is not honoured is never ignored. Inside messages unknown keys are ignored, clients add them

Ours: `details` (token, expert and draft details for the chat page), response_format of type "regex" or "grammar".
Explicit nulls are as good as absent. Source: API references of DeepSeek (April 2025; `thinking` is of August 2025) and OpenAI.
Does not: render prompts or judge one field by another (dsv3.serve.plan).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dsv3.serve.refused import check_refused

_MAX_INT = 2**63 - 1
Text = StrictStr
Number = Annotated[float, Field(strict=True)]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token <= _MAX_INT for token in value)


def _check_ids(value: Any) -> Any:
    if not _is_ids(value):
        raise PydanticCustomError("token_ids", "give a list of token ids")
    return value


def _check_prompt(value: Any) -> Any:
    """One look at each token: pydantic's unions take several, and a prompt may have a million."""
    texts = isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    lists = isinstance(value, list) and bool(value) and all(_is_ids(ids) for ids in value)
    if not (value is None or isinstance(value, str) or texts or lists or _is_ids(value)):
        raise PydanticCustomError("prompt", "give text, a list of texts, token ids, or a list of lists of token ids")
    return value


_TEXT_SCHEMA: dict[str, Any] = {"type": "string"}
_IDS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT_SCHEMA,
        {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
        {"type": "null"},
    ]
}
TokenIds = Annotated[Any, BeforeValidator(_check_ids), WithJsonSchema(_IDS_SCHEMA)]
Prompt = Annotated[Any, BeforeValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)]


class Loose(BaseModel):
    """Objects in which clients leave keys of their own."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Strict(BaseModel):
    """Objects in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


# -- parts of a chat request -------------------------------------------------------------------------------------------


class Part(Loose):
    """A piece of a message: text is what this model reads."""

    type: Text
    text: Text | None = None
    refusal: Text | None = None


Content = Text | Annotated[list[Part | Text], Field(max_length=4096)] | None


class FunctionCall(Loose):
    name: Text
    arguments: Text | dict[str, Any] = ""


class ToolCall(Loose):
    id: Text | None = None
    type: Literal["function"] | None = "function"
    function: FunctionCall


class Message(Loose):
    """
    role: "developer" counts as system, "function" as tool. content: text, or a list of text parts, which are joined.
    prefix, partial: of a last assistant message: the answer continues it. reasoning_content: used with prefix, else dropped.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: Text | None = None
    prefix: StrictBool | None = None
    partial: StrictBool | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Text | None = None


class FunctionSpec(Loose):
    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Loose):
    type: Literal["function"] = "function"
    function: FunctionSpec


class NamedFunction(Loose):
    name: Text


class NamedTool(Loose):
    type: Literal["function"] = "function"
    function: NamedFunction


class SchemaFormat(Strict):
    """`schema` is honoured whether strict or not; name and description are labels."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    """type "regex" with `regex` (Rust's syntax, no look-around) and "grammar" with `grammar` (llguidance's Lark) are ours."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: SchemaFormat | None = None
    regex: Text | None = None
    grammar: Text | None = None


class StreamOptions(Strict):
    """include_obfuscation is accepted: there is nothing to obfuscate."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class Thinking(Loose):
    type: Literal["enabled", "disabled"]


# -- requests ----------------------------------------------------------------------------------------------------------


class Sampling(Strict):
    """What both requests share. Numbers out of range are refused with 400."""

    model: Text
    temperature: Number | None = None
    top_p: Number | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    max_tokens: StrictInt | None = None
    stop: Text | Annotated[list[Text | None], Field(max_length=64)] | None = None
    n: StrictInt | None = None
    seed: Annotated[StrictInt, Field(ge=-_MAX_INT - 1, le=_MAX_INT)] | None = None
    logit_bias: Annotated[dict[str, Number], Field(max_length=1024)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # vLLM's and SGLang's names
    top_k: StrictInt | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    # ours
    details: StrictBool | None = None
    # harmless
    user: Any = None
    user_id: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return check_refused(data)
        return data


class ChatRequest(Sampling):
    """POST /chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None  # False: one call at most
    thinking: Thinking | None = None  # DeepSeek's switch
    reasoning_effort: Text | None = None  # "none" switches reasoning off; the others leave it as it is
    continue_final_message: StrictBool | None = None  # vLLM's dialect of prefix
    add_generation_prompt: StrictBool | None = None  # False goes with it
    # harmless
    prediction: Any = None


class CompletionRequest(Sampling):
    """POST /completions. `suffix` makes it fill-in-the-middle."""

    prompt: Prompt = None  # text, texts, token ids, or lists of them
    suffix: Text | None = None
    echo: StrictBool | None = None
    logprobs: StrictInt | None = None


class TokenizeRequest(Loose):
    """vLLM's. Control tokens written in the prompt are matched, so that a token's name gives its id."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None


class DetokenizeRequest(Loose):
    tokens: TokenIds
