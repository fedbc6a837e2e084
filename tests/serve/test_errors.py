"""Errors: the body that both APIs' clients read, in JSON that any line splitter leaves whole."""

import json

import pytest
from pydantic import ValidationError

from dsv3.serve.errors import ApiError, dump, from_validation
from dsv3.serve.protocol import ChatRequest, CompletionRequest


def refused(model, body) -> ApiError:
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    return from_validation(error.value.errors(include_url=False, include_input=False))


def test_json_has_no_line_break_of_any_kind_in_it():
    text = "a\u2028b\u2029c\x85d\r\ne\x0bf 你\ud800"
    assert len(dump({"x": text}).decode().splitlines()) == 1
    assert json.loads(dump({"x": text}))["x"] == text
    with pytest.raises(ValueError, match="JSON"):
        dump({"x": float("inf")})


def test_the_body_and_headers_of_an_error():
    error = ApiError(429, "slow down", retry_after=0.2)
    assert error.body == {
        "error": {"message": "slow down", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
    }
    assert error.headers == {"retry-after": "1"}
    assert ApiError(401, "who?").headers == {"www-authenticate": "Bearer"}
    assert ApiError(418, "tea").body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("model", "body", "status", "param"),
    [
        (ChatRequest, {"model": "m"}, 422, "messages"),
        (ChatRequest, {"model": "m", "messages": [{"role": "user"}], "nonsense": 1}, 400, "nonsense"),
        (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": [{"type": 5}]}]}, 422, "messages.0.content.0.type"),
        (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 422, "tools.0.function"),
        (CompletionRequest, {"model": "m", "prompt": 5}, 422, "prompt"),
        (CompletionRequest, {"model": "m", "best_of": 2}, 400, "best_of"),
        (CompletionRequest, {"model": "m", "stop": [5]}, 422, "stop.0"),
        (CompletionRequest, {"model": "m", "logit_bias": {"a": "b"}}, 422, "logit_bias.a"),
        (CompletionRequest, [], 422, None),
    ],
)  # fmt: skip
def test_of_what_pydantic_says_the_deepest_is_told_with_its_field(model, body, status, param):
    error = refused(model, body)
    assert (error.status, error.param) == (status, param)
    assert error.message
