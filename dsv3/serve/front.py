"""One address for several replicas: an ASGI application that hands each request to the replica that knows its beginning.

    routing   a request's text in blocks of 256 characters, hashed as a chain with its API key: the replica that saw the longest
              known chain gets it, unless it has more than `SLACK` requests more than the idlest; then the idlest does
    loss      a replica that dies is left out until it answers again. A request of which no byte of an answer has been passed
              on is given to another one, from its beginning; that is invisible. A stream that had begun ends with an error
              event and no [DONE], so that clients count it as failed and retry: half an answer is never taken for a whole one
    /metrics  of all replicas, told apart by a label

Replicas are anything with the methods of `Backend` (dsv3.serve.replicas has Ray's). Source: SGLang's cache-aware router for the
idea of routing by known prefixes. Does not: check keys (replicas do), or start anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from dsv3.serve.errors import ApiError, json_response
from dsv3.serve.gate import LimitedBody
from dsv3.serve.settings import ServeSettings

BLOCK, SLACK = 256, 4
_KNOWN = 65536  # chains remembered
_ACCEPT_S = 5.0  # within which a living replica says that it has the request
_Message = MutableMapping[str, Any]


@dataclass(frozen=True)
class Call:
    """An HTTP request, whole."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key.lower() == name), b"")


@dataclass(frozen=True)
class Start:
    """The answer's head. Pieces of its body, bytes, follow."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]


class Lost(Exception):
    """The replica died, or does not answer."""


class Backend(Protocol):
    """A replica. `answer` yields None at once, to say that it has the request, then Start, then bytes; raises Lost."""

    def answer(self, call: Call) -> AsyncIterator[Start | bytes | None]: ...
    async def alive(self) -> bool: ...


class Router:
    """Which replica a request goes to. Pure Python.

    Attributes:
        running: requests that each replica has now. up: which are thought alive.
    """

    def __init__(self, replicas: int) -> None:
        self.running, self.up = [0] * replicas, [True] * replicas
        self._seen: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, chain: Sequence[bytes], tried: Sequence[int] = ()) -> int | None:
        """A replica, or None if none is left."""
        left = [i for i in range(len(self.up)) if self.up[i] and i not in tried]
        if not left:
            return None
        idlest = min(left, key=lambda i: self.running[i])
        known = next((self._seen[key] for key in reversed(chain) if self._seen.get(key) in left), idlest)
        chosen = known if self.running[known] <= self.running[idlest] + SLACK else idlest
        for key in chain:
            self._seen[key] = chosen
            self._seen.move_to_end(key)
        while len(self._seen) > _KNOWN:
            self._seen.popitem(last=False)
        return chosen


def chain(call: Call) -> list[bytes]:
    """Hashes of the request's text, a block more each; of one owner."""
    try:
        body = json.loads(call.body)
        asked = body.get("messages") or body.get("prompt") if isinstance(body, dict) else ""
        text = asked if isinstance(asked, str) else json.dumps(asked, sort_keys=True)
    except (ValueError, RecursionError):  # the replica says what is wrong with it
        return []
    key, out = hashlib.blake2b(call.header(b"authorization"), digest_size=16).digest(), []
    for start in range(0, len(text), BLOCK):
        key = hashlib.blake2b(key + text[start : start + BLOCK].encode("utf-8", "replace"), digest_size=16).digest()
        out.append(key)
    return out


class Front:
    """The ASGI application.

    Args:
        wait_s: how long a request waits for a replica to come back when all are lost, before it is told 503.

    Attributes:
        state: "loading" until `ready` is called, "ready", "draining". running: requests.
    """

    def __init__(self, settings: ServeSettings, *, wait_s: float = 30.0) -> None:
        self.backends: list[Backend] = []
        self.settings, self.wait_s, self.router = settings, wait_s, Router(0)
        self.state, self.running, self.retried = "loading", 0, 0
        self._probes: dict[int, asyncio.Task[None]] = {}

    def ready(self, backends: Sequence[Backend]) -> None:
        """These answer from now on."""
        self.backends, self.router, self.state = list(backends), Router(len(backends)), "ready"

    async def drain(self) -> None:
        """Refuse what comes, wait for what runs, at most settings.drain_s."""
        self.state, end = "draining", time.monotonic() + self.settings.drain_s
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Replicas are closed by whoever started them."""

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            for probe in self._probes.values():
                probe.cancel()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["path"] == "/health":  # of this process, whatever the replicas do
            return await json_response({"status": "ok"})({"type": "http"}, _never, send)
        try:
            body = await self._body(receive)
        except ApiError as error:
            return await _refuse(send, error)
        except ConnectionResetError:
            return
        if self.state != "ready":
            said = "the model is loading" if self.state == "loading" else "the server is ending"
            return await _refuse(send, ApiError(503, f"{said}: try again", retry_after=2))
        call = Call(scope["method"], scope["path"], scope["query_string"], tuple(map(tuple, scope["headers"])), body)
        if call.path == "/metrics":
            return await self._metrics(call, send)
        self.running += 1
        passing = asyncio.ensure_future(self._pass(call, send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.running -= 1
            leaving.cancel()
            if not passing.done():
                passing.cancel()  # closes the replica's generator, which ends the request there
        await asyncio.gather(passing, return_exceptions=True)
        if passing.done() and not passing.cancelled() and (error := passing.exception()):
            raise error

    async def _body(self, receive: Any) -> bytes:
        """
        Raises:
            ApiError: 413, it is too long; 408, it took too long.
        """
        read = LimitedBody(receive, self.settings.max_body_bytes, self.settings.body_timeout_s)
        parts = []
        while True:
            message = await read()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client left while it sent")
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)

    async def _pass(self, call: Call, send: Any) -> None:
        keys, tried, reply = chain(call), [], _Reply(send)
        end = time.monotonic() + self.wait_s
        while True:
            chosen = self.router.choose(keys, tried)
            if chosen is None and time.monotonic() < end:
                tried = []
                await asyncio.sleep(0.2)
                continue
            if chosen is None:
                return await reply.fail("no replica is ready: try again", 503)
            self.router.running[chosen] += 1
            try:
                await self._once(chosen, call, reply)
                return await reply.end()
            except Lost:
                self._lose(chosen)
                if reply.committed:
                    return await reply.fail("the replica that answered was lost: send the request again", 503)
                tried.append(chosen)
                self.retried += 1
            finally:
                self.router.running[chosen] -= 1

    async def _once(self, chosen: int, call: Call, reply: _Reply) -> None:
        async with aclosing(self.backends[chosen].answer(call)) as parts:  # type: ignore[type-var]
            try:
                await asyncio.wait_for(anext(parts), _ACCEPT_S)
            except (TimeoutError, StopAsyncIteration):
                raise Lost(f"replica {chosen} does not answer") from None
            async for part in parts:
                if isinstance(part, Start):
                    await reply.start(part)
                elif part:
                    await reply.write(part)

    def _lose(self, index: int) -> None:
        self.router.up[index] = False
        if index not in self._probes:
            self._probes[index] = asyncio.ensure_future(self._probe(index))

    async def _probe(self, index: int) -> None:
        """Ask until it answers."""
        while not await self.backends[index].alive():
            await asyncio.sleep(0.5)
        self.router.up[index] = True
        del self._probes[index]

    async def _metrics(self, call: Call, send: Any) -> None:
        texts = {}
        for index, backend in enumerate(self.backends):
            parts: list[bytes] = []
            try:
                async with aclosing(backend.answer(call)) as answer:  # type: ignore[type-var]
                    async for part in answer:
                        if isinstance(part, Start) and part.status != 200:
                            return await _refuse(send, ApiError(part.status, "the replicas refuse: give a key"))
                        if isinstance(part, bytes):
                            parts.append(part)
                texts[index] = b"".join(parts).decode()
            except Lost:
                self._lose(index)
        body = merge_metrics(texts, {"dsv3_replica_up": [float(up) for up in self.router.up]}, self.retried)
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain; version=0.0.4")]}
        )
        await send({"type": "http.response.body", "body": body})


class _Reply:
    """What has gone to the client. `committed`: some of the answer itself; blank lines and comments do not count."""

    def __init__(self, send: Any) -> None:
        self._send, self._started, self._events, self.committed = send, False, False, False

    async def start(self, start: Start) -> None:
        if self._started:  # a second replica's: the head is out, and of the same kind if all goes well
            if start.status != 200:
                raise Lost("the request, given to another replica, was refused there")
            return
        self._started = True
        self._events = any(k.lower() == b"content-type" and b"event-stream" in v for k, v in start.headers)
        headers = [(k, v) for k, v in start.headers if k.lower() not in (b"content-length", b"transfer-encoding")]
        await self._send({"type": "http.response.start", "status": start.status, "headers": headers})

    async def write(self, part: bytes) -> None:
        blank = part.lstrip(b": \r\n") in (b"", part.strip() if part.startswith(b":") else b"")
        self.committed |= not (blank or (self._events and part.startswith(b":")))
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, message: str, status: int) -> None:
        error = ApiError(status, message, retry_after=1)
        if not self._started:
            return await _refuse(self._send, error)
        if self._events:
            event = f"data: {json.dumps(error.body)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
        else:
            raise ConnectionAbortedError(message)  # cuts the connection: a JSON body cannot be taken back
        await self.end()


def merge_metrics(texts: Mapping[int, str], own: Mapping[str, Sequence[float]], retried: int) -> bytes:
    """Prometheus texts of replicas as one, each sample with a label `replica`."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.parser import text_string_to_metric_families

    merged: dict[str, Metric] = {}
    for index, text in texts.items():
        for family in text_string_to_metric_families(text):
            into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, {**sample.labels, "replica": str(index)}, sample.value)
    for name, values in own.items():
        gauge = GaugeMetricFamily(name, "1: the replica answers", labels=["replica"])
        for index, value in enumerate(values):
            gauge.add_metric([str(index)], value)
        merged[name] = gauge
    counter = CounterMetricFamily("dsv3_replica_retries", "requests given to another replica")
    counter.add_metric([], retried)
    merged["dsv3_replica_retries"] = counter

    class Families:
        def collect(self) -> list[Metric]:
            return list(merged.values())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Families())  # type: ignore[arg-type]
    return generate_latest(registry)


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(send: Any, error: ApiError) -> None:
    await error.response()({"type": "http"}, _never, send)


async def _never() -> _Message:
    raise AssertionError("a response reads nothing")
