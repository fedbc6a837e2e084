"""The app of an engine, and a server for it.

create_app    for an engine that is loaded, and any ASGI server
serve         binds an address at once, loads, serves, drains (dsv3.serve.server)
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.serve.routes import build_app
from dsv3.serve.server import run_app
from dsv3.serve.service import Service
from dsv3.serve.settings import ServeSettings, check_bind


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
    """Serve until told to end by SIGTERM or SIGINT.

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
    try:
        run_app(build_app(service), service, lambda: service.open(*load()), settings, host, port, started)
    finally:
        service.close()
