"""Run an ASGI app on an address: bound at once, ready when what it needs is loaded, drained before it ends.

    SIGTERM or SIGINT    new requests get 503, those that run may finish within settings.drain_s, then the server ends
    a second one         ends at once
Does not: parse a command line (dsv3.cli), or terminate TLS (put a proxy in front).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import uvicorn

from dsv3.serve.connection import guarded
from dsv3.serve.settings import ServeSettings

log = logging.getLogger("dsv3.serve")


class Drains(Protocol):
    """What admits requests (dsv3.serve.service.Service)."""

    state: Any

    async def drain(self) -> None: ...


def run_app(
    app: Any,
    admission: Drains,
    load: Callable[[], None],
    settings: ServeSettings,
    host: str,
    port: int,
    started: Callable[[str], None],
) -> None:
    """Serve until told to end. Binds first, so that a port in use fails before the model is read.

    Args:
        app: answers 503 until `load`, run in a thread, is through.
        port: 0 takes a free one.
        started: called with the URL once the address is bound.

    Raises:
        ValueError: the address is in use or none of this machine's.
        RuntimeError: loading failed; the cause is attached.
    """
    listener = _bind(host, port)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        http=guarded(
            head_s=settings.head_timeout_s, head_bytes=settings.max_head_bytes,
            message_bytes=settings.max_head_bytes + 8 * settings.max_body_bytes, most=settings.max_connections,
        ),
    )  # fmt: skip
    server = Server(config, admission)
    failure: list[BaseException] = []

    def open_app() -> None:
        try:
            load()
        except BaseException as error:
            failure.append(error)
            server.should_exit = True

    threading.Thread(target=open_app, name="dsv3-load", daemon=True).start()
    with listener:
        name, bound = host if ":" not in host else f"[{host}]", listener.getsockname()[1]
        started(f"http://{name}:{bound}")
        server.run(sockets=[listener])
    if failure:
        raise RuntimeError(f"the model did not load: {failure[0]}") from failure[0]


class Server(uvicorn.Server):
    """uvicorn, but told to end it drains first."""

    def __init__(self, config: uvicorn.Config, admission: Drains) -> None:
        super().__init__(config)
        self._admission = admission
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler. Not uvicorn's, which would raise the signal again at the end, and so give no exit code 0."""
        if self._draining is not None or self._loop is None:
            self.force_exit = self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self._draining is None:
            log.info("told to end: no more requests, those that run may finish")
            self._draining = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        await self._admission.drain()
        self.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"the port is {port}: give one from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port or --host"
        ) from None
    return listener
