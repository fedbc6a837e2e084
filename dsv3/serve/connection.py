"""What a connection may do while it has no request running: uvicorn's HTTP protocols, with limits.

    time     a head (request line and headers) must be whole within `head_s` of the connection, or of its own first byte; a
             body that goes on behind its answer gets as long. Running requests have limits of their own (dsv3.serve.gate)
    bytes    of a head at most `head_bytes`, of a whole message, trailers included, at most `message_bytes`
    number   connections beyond `most` are answered 503, in the API's shape, and closed

uvicorn itself waits for a head for ever, and with httptools reads one of any size; neither takes an API key.
Does not: speak HTTP, or know routes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send

from dsv3.serve.errors import ApiError, dump

_PROTOCOL: Any = object  # which it is depends on what is installed


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    response = ApiError(503, "too many connections are open: try again later", retry_after=1).response()
    response.headers["connection"] = "close"
    await response(scope, receive, send)


def guarded(base: Any = None, *, head_s: float, head_bytes: int, message_bytes: int, most: int) -> Any:
    """A protocol class for `uvicorn.Config(http=...)`.

    Args:
        base: uvicorn's H11Protocol or HttpToolsProtocol; None: the one that it would take itself.
        head_s: seconds. head_bytes, message_bytes: give or take what one read brings (256 KiB); h11 has limits of its own.
    """
    if base is None:
        from uvicorn.protocols.http.auto import AutoHTTPProtocol

        base = AutoHTTPProtocol

    limits = {"head_s": head_s, "head_bytes": head_bytes, "message_bytes": message_bytes, "most": most}
    return type("Guarded", (_Guarded, base), limits)


class _Guarded(_PROTOCOL):
    """Goes before one of uvicorn's protocols, `super()` here; see `guarded`."""

    head_s: float
    head_bytes: int
    message_bytes: int
    most: int
    _timer: asyncio.TimerHandle | None = None
    _bytes = 0  # of the message that is being read
    _in_head = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self.app = _busy
        self._timer = self.loop.call_later(self.head_s, self._cut)

    def data_received(self, data: bytes) -> None:
        self._bytes, before = self._bytes + len(data), self.cycle
        super().data_received(data)
        if self.cycle is not before and not self._in_head:  # a new message, which h11 does not call out
            self._bytes = len(data)
        if self._bytes > (self.head_bytes if self._in_head else self.message_bytes):
            self._refuse()
        elif self.cycle is not None and not self.cycle.response_complete:
            self._end_wait()
        elif self._timer is None:  # which no further byte puts off
            self._timer = self.loop.call_later(self.head_s, self._cut)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    # httptools' callbacks

    def on_message_begin(self) -> None:
        self._bytes, self._in_head = 0, True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._bytes = 0
        super().on_message_complete()

    def _end_wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut(self) -> None:
        self._end_wait()
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self) -> None:
        if self._in_head and not self.transport.is_closing():
            body = dump(ApiError(431, f"the headers are larger than {self.head_bytes:,} bytes: send less").body)
            head = "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        self._cut()
