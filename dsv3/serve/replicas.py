"""Several replicas under Ray Serve, each the whole app over its own engine in a process of its own, behind one Front.

    client -> uvicorn, Front (this process) -> DeploymentHandle -> Replica (a Ray actor) -> the app of dsv3.serve.app, by ASGI

Ray Serve starts the replicas, watches them and starts a dead one anew; its own HTTP proxy is not used, so that nothing but the
given address listens. A replica checks keys and limits itself: limits a key are a replica's each.
Needs: pip install 'dsv3[ray]'. Source: Ray Serve's documentation. Does not: span machines by itself (join a Ray cluster first).
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from dsv3.serve.front import Call, Front, Lost, Start
from dsv3.serve.settings import ServeSettings, check_bind

log = logging.getLogger("dsv3.serve")


class Replica:
    """What Ray runs. Args: load: makes the replica's engine and tokenizer, given its number."""

    def __init__(
        self, load: Callable[[int], Any], settings: ServeSettings, host: str, number: int, threads: int
    ) -> None:
        import torch

        from dsv3.serve.app import create_app

        torch.set_num_threads(threads)
        engine, tokenizer = load(number)
        self._app = create_app(engine, tokenizer, settings=settings, host=host)

    async def answer(self, call: Call) -> AsyncGenerator[Start | bytes | None, None]:
        yield None
        parts: asyncio.Queue[Start | bytes | None] = asyncio.Queue(64)
        running = asyncio.ensure_future(_run(self._app, call, parts))
        try:
            while (part := await parts.get()) is not None:
                yield part
            await running
        finally:
            running.cancel()  # the client has left: the app sees its request end

    async def ping(self) -> int:
        return os.getpid()


async def _run(app: Any, call: Call, parts: asyncio.Queue[Start | bytes | None]) -> None:
    """One request through an ASGI app; its answer into the queue, None at its end."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": call.method, "scheme": "http",
        "path": call.path, "raw_path": call.path.encode(), "root_path": "", "query_string": call.query,
        "headers": list(call.headers), "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0), "state": {},
    }  # fmt: skip
    asked, gone = False, asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await gone.wait()
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": call.body, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            await parts.put(Start(message["status"], tuple(tuple(pair) for pair in message["headers"])))
        elif message.get("body"):
            await parts.put(bytes(message["body"]))

    try:
        await app(scope, receive, send)
    finally:
        gone.set()
        while parts.full():  # cancelled with nobody reading
            parts.get_nowait()
        parts.put_nowait(None)


class RayBackend:
    """A replica as Front sees it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def answer(self, call: Call) -> AsyncIterator[Start | bytes | None]:
        import ray.exceptions
        from ray.serve.exceptions import RayServeException

        parts = self._handle.options(method_name="answer", stream=True).remote(call)
        try:
            async for part in parts:
                yield part
        except (ray.exceptions.RayError, RayServeException, ConnectionError) as error:
            log.warning("a replica was lost: %s", type(error).__name__)
            raise Lost(str(error)) from None
        finally:
            parts.cancel()

    async def alive(self) -> bool:
        import ray.exceptions
        from ray.serve.exceptions import RayServeException

        try:
            await asyncio.wait_for(_result(self._handle.options(method_name="ping").remote()), 2)
        except (ray.exceptions.RayError, RayServeException, TimeoutError):
            return False
        return True


async def _result(response: Any) -> Any:
    return await response


def start_replicas(
    load: Callable[[int], Any], settings: ServeSettings, host: str, *, replicas: int, threads: int | None = None
) -> list[RayBackend]:
    """Start a Ray of this machine (or use the one that runs) and the replicas on it; back when all are loaded.

    Raises:
        ValueError: ray is not installed.
    """
    try:
        import ray
        from ray import serve as ray_serve
    except ImportError:
        raise ValueError("--replicas needs Ray: pip install 'dsv3[ray]'") from None
    cores = os.cpu_count() or 1
    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=max(cores, replicas), include_dashboard=False, log_to_driver=False,
            configure_logging=False, _node_ip_address="127.0.0.1",
        )  # fmt: skip
    ray_serve.start(proxy_location="Disabled")
    share = max(1, cores // replicas) if threads is None else threads
    backends = []
    for number in range(replicas):
        deployment = ray_serve.deployment(
            name=f"replica-{number}",
            num_replicas=1,
            max_ongoing_requests=100_000,  # the engine's own limits decide
            ray_actor_options={"num_cpus": 0.1},
            health_check_period_s=1,
            health_check_timeout_s=10,
            graceful_shutdown_timeout_s=5,
        )(Replica)
        app = deployment.bind(load, settings, host, number, share)
        handle = ray_serve.run(app, name=f"dsv3-{number}", route_prefix=None, blocking=False)
        backends.append(RayBackend(handle))
    return backends


def stop_replicas() -> None:
    import ray
    from ray import serve as ray_serve

    ray_serve.shutdown()
    ray.shutdown()


def serve_replicas(
    load: Callable[[int], Any],
    settings: ServeSettings,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    replicas: int,
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """`dsv3.serve.app.serve` for several replicas: binds at once, 503 while they load, drains before it ends.

    Raises:
        ValueError: as `serve`; or ray is not installed. RuntimeError: loading failed.
    """
    from dsv3.serve.app import run_app

    check_bind(host, settings)
    front = Front(settings)

    def open_front() -> None:
        front.ready(start_replicas(load, settings, host, replicas=replicas))

    try:
        run_app(front, front, open_front, settings, host, port, started)
    finally:
        threading.Thread(target=stop_replicas, daemon=True).start() if not front.backends else stop_replicas()
