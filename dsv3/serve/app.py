"""The app of an engine, and an address to run it on: bound at once, ready when the model is loaded, drained before it ends.

    SIGTERM or SIGINT    new requests get 503, those that run may finish within settings.drain_s, then exit code 0
    a second one         ends at once
Does not: parse a command line (dsv3.cli), terminate TLS (put a proxy in front), or run replicas.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.serve.routes import build_app
from dsv3.serve.service import Service
from dsv3.serve.settings import ServeSettings, check_bind

log = logging.getLogger("dsv3.serve")


def create_app(
    engine: Engine, tokenizer: Tokenizer, *, settings: ServeSettings = ServeSettings(), host: str = "127.0.0.1"
) -> FastAPI:
    """An app that serves this engine, which nobody else may use from now on.

    Args:
        host: the address that it will be bound to.

    Raises:
        ValueError: the address is not of this machine alone and settings.keys is empty.
    """
    check_bind(host, settings)
    service = Service(settings)
    service.open(engine, tokenizer)
    return build_app(service)


def serve(
    load: Callable[[], tuple[Engine, Tokenizer]],
    settings: ServeSettings = ServeSettings(),
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until told to end. Binds first, so that a port in use fails before the model is read.

    Args:
        load: makes engine and tokenizer, in a thread; meanwhile /ready answers 503.
        port: 0 takes a free one.
        started: called with the URL once the address is bound.

    Raises:
        ValueError: the address is in use or none of this machine's; or it is not loopback and there are no keys.
        RuntimeError: loading failed; the cause is attached.
    """
    check_bind(host, settings)
    service = Service(settings)
    listener = _bind(host, port)
    config = uvicorn.Config(
        build_app(service), log_config=None, access_log=False, server_header=False, lifespan="on", ws="none",
        limit_concurrency=settings.max_connections, timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )  # fmt: skip
    server = Server(config, service)
    failure: list[BaseException] = []

    def open_service() -> None:
        try:
            service.open(*load())
        except BaseException as error:
            failure.append(error)
            service.state, server.should_exit = "failed", True

    threading.Thread(target=open_service, name="dsv3-load", daemon=True).start()
    with listener:
        name, bound = host if ":" not in host else f"[{host}]", listener.getsockname()[1]
        started(f"http://{name}:{bound}")
        server.run(sockets=[listener])
    if failure:
        raise RuntimeError(f"the model did not load: {failure[0]}") from failure[0]


class Server(uvicorn.Server):
    """uvicorn, but told to end it drains first."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
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
            log.info("told to end: %d answers run", self._service.worker.open if self._service.state == "ready" else 0)
            self._draining = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        await self._service.drain()
        await asyncio.to_thread(self._service.close)
        self.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port or --host"
        ) from None
    return listener
