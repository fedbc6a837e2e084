"""What every request passes before a route sees it: an id, the key, the Host, and the size of its body.

    x-request-id    the client's own if it is a plain word, else a new one; on every reply
    Host, Origin    without keys, names of this machine only: a web page elsewhere can neither reach in by rebinding its name nor
                    have the server work by sending what needs no preflight
    key             asked for on all paths but the page, /health, /ready and the OpenAPI document, before the body is read
    body            counted while it arrives: 413 beyond the limit, 408 if it takes too long

Does not: parse bodies. Logs a line a request: id, path, status, seconds and the key's name; never a key, prompt or answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3.serve.errors import ApiError
from dsv3.serve.service import Service
from dsv3.serve.settings import is_loopback

log = logging.getLogger("dsv3.serve")

BASES = ("", "/v1", "/beta")
_ROUTES = (
    "/chat/completions",
    "/completions",
    "/models",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/user/balance",
)
API_PATHS = {base + route for base in BASES for route in _ROUTES} | {"/metrics"}


def _label(path: str) -> str:
    """What metrics and logs call a path: one of the API's, all of which need a key, or "other"."""
    if any(path.startswith(f"{base}/models/") for base in BASES):
        return "/models/NAME"
    return path if path in API_PATHS else "other"


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        watch = _Watch(send, _request_id(headers.get(b"x-request-id")))
        start, owner, label = time.monotonic(), None, _label(scope["path"])
        scope.setdefault("state", {})["came"] = start
        try:
            try:
                self._check_host(headers.get(b"host"), headers.get(b"origin"))
                if label != "other" and scope["method"] != "OPTIONS":
                    owner = self._service.keys.owner(headers.get(b"authorization"))
                    scope["state"]["owner"] = owner
                body = LimitedBody(
                    receive, self._service.settings.max_body_bytes, self._service.settings.body_timeout_s
                )
                body.check_length(headers.get(b"content-length"))
                await self._app(scope, body, watch)
            except ApiError as error:
                if not watch.status:
                    await error.response()(scope, receive, watch)
            except Exception as error:
                log.exception("request %s failed", watch.id, exc_info=error)
                if watch.status:
                    raise
                message = f"the server failed over this request (id {watch.id}): others are not touched"
                await ApiError(500, message).response()(scope, receive, watch)
        finally:
            name = owner.name if owner is not None else "-"
            self._service.metrics.request(label, watch.status)
            log.log(
                logging.DEBUG if label == "other" else logging.INFO,
                "%s %s %d %.3f s %s",
                watch.id,
                label,
                watch.status,
                time.monotonic() - start,
                name,
            )

    def _check_host(self, host: bytes | None, origin: bytes | None) -> None:
        settings = self._service.settings
        if settings.keys:
            return
        if host is not None and not is_loopback(_name(host.decode("latin-1"))):
            raise ApiError(
                403, "this server has no API keys and answers to this machine's names only: use 127.0.0.1, or set keys"
            )
        page = (origin or b"").decode("latin-1")
        if page and page not in settings.origins and not is_loopback(_name(page.partition("://")[2])):
            raise ApiError(
                403, f"this server does not answer web pages of {page:.100}: name it in --origins, or set keys"
            )


def _name(host: str) -> str:
    """Of a host, without its port."""
    return host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0]


class _Watch:
    """`send` with the request's id on the reply, and the status remembered."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.id, self.status = send, request_id, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self.id.encode())]}
        await self._send(message)


class LimitedBody:
    """`receive` with limits; they hold until the body is whole."""

    def __init__(self, receive: Receive, limit: int, timeout: float) -> None:
        self._receive, self._limit, self._timeout = receive, limit, timeout
        self._size, self._whole, self._deadline = 0, False, 0.0

    def check_length(self, value: bytes | None) -> None:
        with suppress(ValueError):
            if value is not None and int(value) > self._limit:
                raise self._too_large()

    async def __call__(self) -> Any:
        if self._whole:
            return await self._receive()
        self._deadline = self._deadline or time.monotonic() + self._timeout
        try:
            async with asyncio.timeout(max(self._deadline - time.monotonic(), 0)):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"the body took over {self._timeout:g} s: send it faster", code="timeout") from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limit:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limit:,} bytes: send less", code="request_too_large")


def _request_id(given: bytes | None) -> str:
    if given is not None and re.fullmatch(rb"[A-Za-z0-9._-]{1,128}", given):
        return given.decode()
    return f"req_{uuid.uuid4().hex}"
