"""The small server of the tests: a random model, a small tokenizer, an app; and a real server on a free port."""

from __future__ import annotations

import dataclasses
import functools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.serve.app import create_app
from dsv3.serve.settings import ServeSettings
from tests.model.tiny import TINY, random_model

TEXTS = [
    'hello world, the quick brown fox {"name": "value", "a": 1} function get_weather(location) json user assistant '
    "once upon a time there was a system that answered questions in 0123456789 words 你好世界"
] * 3


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 420)


def small_engine(*, context: int = 2048, cache_gb: float = 0.02, seed: int = 0, **options) -> tuple[Engine, Tokenizer]:
    tokenizer = small_tokenizer()
    config = dataclasses.replace(
        TINY, vocab_size=tokenizer.vocab_size, max_position_embeddings=context, eos_token_id=tokenizer.eos_id
    )
    return Engine(random_model(config, seed), tokenizer, cache_gb=cache_gb, **options), tokenizer


def small_app(settings: ServeSettings | None = None, **options):
    engine, tokenizer = small_engine(**options)
    return create_app(engine, tokenizer, settings=settings or ServeSettings(model="tiny"))


@contextmanager
def running(app) -> Iterator[str]:
    """A real server on a free port of this machine; its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, lifespan="on", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        until(lambda: server.started)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(60)


def until(condition, seconds: float = 60.0) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def post(url: str, path: str, body: dict, **more) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60, **more)
