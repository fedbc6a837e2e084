"""Errors in the shape that DeepSeek's and OpenAI's clients read.

    {"error": {"message": what and how to cure it, "type": ..., "param": the field, "code": ...}}

    400 a value that is refused, or JSON that does not parse     401 no key or a wrong one      403 a Host that is not ours
    404 no such path or model      405 method      408 the body took too long      413 body too large
    422 JSON of another shape: a field missing or of the wrong type      429 limits, with Retry-After
    500 a fault, of this request alone      503 loading or draining, with Retry-After
Source: error tables of both APIs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 500: "internal_error", 503: "service_unavailable"}


class ApiError(Exception):
    """What a request is answered with instead of what it asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after
        self.code = code or _CODES.get(status, "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, round(self.retry_after)))}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def refuse(param: str, message: str, *, code: str | None = None) -> ApiError:
    """A value that cannot be honoured."""
    return ApiError(400, message, param=param, code=code)


def dump(content: Any) -> bytes:
    """JSON in ASCII: no character in it is a line break to anybody's line splitter, and lone surrogates do no harm."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump(content), status, headers, media_type="application/json")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of pydantic's errors about a body, the one to tell: that which got deepest into it."""
    first = max(errors, key=lambda error: len(error["loc"]))
    field, reason = _field(first["loc"]), first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ApiError(400, reason, param=field or reason.split(" ")[0])
    if not field:
        return ApiError(422, "the body is no JSON object: send one, as application/json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is no field of this API: leave it out", param=field, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(422, f"{field} is missing: give it", param=field, code="missing_required_parameter")
    return ApiError(422, f"{field}: {reason[:1].lower()}{reason[1:]}", param=field)


def _field(where: Sequence[Any]) -> str:
    """messages.0.content, without the names of types that pydantic puts between."""
    kept = [str(part) for part in where if isinstance(part, int) or str(part).isidentifier()]
    return ".".join(part for part in kept if part not in ("str", "int", "float", "bool", "Part", "NamedTool"))
