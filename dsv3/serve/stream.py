"""One request from plan to last byte, over ASGI: the engine's deltas out, pings while it is silent, an end if nobody listens.

    stream      Server-Sent Events: `data: JSON`, blank line, at last `data: [DONE]`; `: keep-alive` comments in silence
    JSON        a status and a body; in a long silence the 200 goes out first and blank lines after it, as DeepSeek does
    a fault     before the first byte: its status; later: {"error": ...} as an event or as the body
    no reader   a client that leaves, or does not read for too long, ends its request in the engine at once

Not sse-starlette: it ends streams when the process is told to end, where ours are to be finished.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv3.infer.engine import Delta
from dsv3.serve.errors import ApiError, dump, refuse
from dsv3.serve.keys import Owner
from dsv3.serve.plan import Plan
from dsv3.serve.replies import ChatBody, CompletionBody
from dsv3.serve.service import Service
from dsv3.serve.worker import EngineFault, Ticket, TooSlow

Body = ChatBody | CompletionBody
_SSE = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientGone(Exception):
    """Nobody reads."""


class EngineReply(Response):
    """The answer to a plan."""

    def __init__(self, service: Service, plan: Plan, owner: Owner, make: type[ChatBody] | type[CompletionBody]) -> None:
        super().__init__()
        self._service, self._plan, self._owner, self._make = service, plan, owner, make
        self._came = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._came = scope["state"]["came"]  # the gate's
        work = asyncio.create_task(self._answer(send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            with suppress(asyncio.CancelledError, ClientGone):
                await work

    async def _answer(self, send: Send) -> None:
        service, plan = self._service, self._plan
        wire = _Wire(send, service.settings.send_timeout_s)
        try:
            with service.admit(self._owner, plan.answers, sum(map(len, plan.prompts)), plan.asked):
                ticket = await self._submit()
                body = self._make(plan, service.tokenizer, ticket.requests, service.fingerprint)
                try:
                    await (self._stream if plan.stream else self._json)(wire, ticket, body)
                finally:
                    service.worker.close(ticket)
                    service.spend(self._owner, body.answered)
        except ApiError as error:
            await wire.fail(error, stream=self._plan.stream)

    async def _submit(self) -> Ticket:
        try:
            return await self._service.worker.submit(self._plan.prompts, self._plan.params, self._owner.salt)
        except ValueError as error:
            said = str(error)
            field = self._plan.bound.split()[0] if "grammar" in said else self._plan.asked
            raise refuse(field, said) from None
        except EngineFault as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> ApiError:
        return self._service.not_ready() if self._service.state == "draining" else ApiError(500, str(error))

    def _fault(self, delta: Delta) -> ApiError:
        """Of one answer."""
        error = str(delta.error)[:300]
        if not delta.refused:
            return ApiError(500, f"this request failed ({error}): others are not touched")
        said = error.partition(": ")[2]
        field = "logit_bias" if "logit_bias" in said else self._plan.bound
        return refuse(field.split()[0], f"{field}: {said}")

    async def _deltas(self, ticket: Ticket, body: Body) -> AsyncIterator[list | None]:
        """Chunks as they come; None for a silence.

        Raises:
            ApiError: an answer failed.
        """
        settings = self._service.settings
        deadline = ticket.born + settings.request_timeout_s
        while body.open:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ApiError(
                    503, f"the request ran for {settings.request_timeout_s:g} s: ask for less", retry_after=1
                )
            silence = min(left, settings.keep_alive_s or left)
            try:
                deltas = await ticket.read(silence)
            except (EngineFault, TooSlow) as error:
                raise self._failed(error) from None
            if not deltas:
                if silence < left:
                    yield None
                continue
            body.time(self._came, ticket.first_at)
            chunks = []
            for place, delta in deltas:
                if delta.error is not None:
                    raise self._fault(delta)
                if delta.finish_reason == "abort":
                    raise ApiError(503, "the server is ending: send the request again", retry_after=5)
                chunks += body.add(place, delta)
            yield chunks

    async def _stream(self, wire: _Wire, ticket: Ticket, body: Body) -> None:
        await wire.start(200, _SSE)
        first = b"".join(map(_event, body.starts()))
        if first:
            await wire.write(first)
        async for chunks in self._deltas(ticket, body):
            frames = b": keep-alive\n\n" if chunks is None else b"".join(map(_event, chunks))
            if frames:
                await wire.write(frames)
        await wire.write(b"".join(map(_event, body.ends())) + b"data: [DONE]\n\n")
        await wire.end()

    async def _json(self, wire: _Wire, ticket: Ticket, body: Body) -> None:
        async for chunks in self._deltas(ticket, body):
            if chunks is None:
                await wire.start(200, {"content-type": "application/json"})
                await wire.write(b"\n")
        content = dump(body.whole())
        await wire.start(200, {"content-type": "application/json", "content-length": str(len(content))})
        await wire.write(content)
        await wire.end()


class _Wire:
    """The way to the client. A write that takes too long means that it has gone."""

    def __init__(self, send: Send, timeout: float) -> None:
        self._send, self._timeout = send, timeout
        self.started = False

    async def start(self, status: int, headers: dict[str, str]) -> None:
        if not self.started:
            self.started = True
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await self._write({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, content: bytes) -> None:
        await self._write({"type": "http.response.body", "body": content, "more_body": True})

    async def end(self) -> None:
        await self._write({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ApiError, *, stream: bool) -> None:
        content = dump(error.body)
        if not self.started:
            headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers}
            await self.start(error.status, headers)
            await self.write(content)
        else:
            await self.write(b"data: " + content + b"\n\n" if stream else content)
        await self.end()

    async def _write(self, message: dict) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientGone from None


def _event(chunk: dict) -> bytes:
    return b"data: " + dump(chunk) + b"\n\n"


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
