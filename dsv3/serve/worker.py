"""The one thread that runs the engine, and the way from it to the event loop and back.

    submit   event loop -> inbox -> engine.add in the thread -> Ticket, or the error that add raised
    deltas   one step's -> one call_soon_threadsafe -> each ticket's queue; a ticket whose reader is too slow is aborted
    close    whoever stops reading a ticket closes it: its unfinished answers are aborted before the next step

The thread outlives what it runs: should a step itself raise, the requests that run fail with it, the engine is emptied, and
the next request is served.
Does not: know prompts' text, HTTP, or what a delta means.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsv3.infer.engine import Delta, Engine, Request
from dsv3.infer.sampling import SamplingParams
from dsv3.serve.metrics import Metrics

log = logging.getLogger("dsv3.serve")


class EngineFault(Exception):
    """The engine failed while this request ran; the message names the fault."""


class TooSlow(Exception):
    """The client left too much unread."""


@dataclass(eq=False)
class Ticket:
    """Prompts in the engine, read by one coroutine.

    Attributes:
        requests: the engine's, one a prompt; their `cached` and `prompt_scores` may be read once they have ended.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    salt: bytes
    loop: asyncio.AbstractEventLoop
    max_backlog: int
    drop: Callable[[], None] = lambda: None  # have the engine abort it
    requests: list[Request] = field(default_factory=list)
    admitted: asyncio.Future[None] = field(init=False)
    born: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    ended_at: float | None = None
    closed: bool = False
    open: int = field(init=False)  # answers that have not ended
    last_at: dict[tuple[int, int], float] = field(default_factory=dict)
    _unread: deque[tuple[int, Delta]] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _fault: Exception | None = None

    def __post_init__(self) -> None:
        self.admitted = self.loop.create_future()
        self.open = len(self.prompts) * self.params.n

    def deliver(self, deltas: Sequence[tuple[int, Delta]], fault: Exception | None) -> None:
        """In the event loop: what a step gave."""
        self._unread.extend(deltas)
        self._fault = self._fault or fault
        if len(self._unread) > self.max_backlog and not self.closed:
            self._unread.clear()
            self._fault = TooSlow("the client reads too slowly: what it left unread is gone")
            self.drop()
        self._news.set()

    async def read(self, timeout: float | None = None) -> list[tuple[int, Delta]]:
        """(prompt, delta) of all that has come, at least one; nothing if `timeout` seconds were silent.

        Raises:
            EngineFault, TooSlow: it is over.
        """
        if not self._unread and self._fault is None:
            self._news.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                return []
        if self._fault is not None:
            raise self._fault
        deltas = list(self._unread)
        self._unread.clear()
        return deltas


class Worker:
    """
    Args:
        engine: nobody else may call it from now on.
        max_open: answers that may be in the engine, running or waiting.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, max_open: int, max_backlog: int = 4096) -> None:
        self.engine, self.metrics, self.max_open, self.max_backlog = engine, metrics, max_open, max_backlog
        self.open = 0  # answers in the engine; of the event loop
        self.seconds = 1.0  # a request's time, smoothed
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, tuple[Ticket, int]] = {}  # engine request -> ticket, prompt; of the thread
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    # -- in the event loop ---------------------------------------------------------------------------------------------

    def has_room(self, answers: int) -> bool:
        return self.open + answers <= self.max_open

    @property
    def wait_estimate(self) -> float:
        """Seconds until a place may be free."""
        return min(60.0, max(1.0, self.seconds * self.open / max(self.max_open, 1)))

    async def submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams, salt: bytes) -> Ticket:
        """Hand prompts to the engine; returns when it has taken them. The caller must `close` the ticket.

        Raises:
            ValueError: the engine refuses one of them.
            EngineFault: it failed over it.
        """
        self.start()
        ticket = Ticket(prompts, params, salt, asyncio.get_running_loop(), self.max_backlog)
        ticket.drop = lambda: self._inbox.put(lambda: self._abort(ticket))
        self.open += ticket.open
        self._inbox.put(lambda: self._add(ticket))
        try:
            await asyncio.shield(ticket.admitted)
        except BaseException:
            self.close(ticket)
            raise
        return ticket

    def close(self, ticket: Ticket) -> None:
        """No more is wanted of it."""
        if not ticket.closed:
            ticket.closed = True
            self.open -= len(ticket.prompts) * ticket.params.n
            self.seconds += 0.1 * (time.monotonic() - ticket.born - self.seconds)
            self._inbox.put(lambda: self._abort(ticket))

    def start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dsv3-engine", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Abort everything and end the thread."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(None)
            thread.join()

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                order = self._inbox.get() if not self._tickets else self._inbox.get_nowait()
            except queue.Empty:
                order = self._step
            if order is None:
                self._reset(EngineFault("the server ends"))
                return
            try:
                order()
            except Exception as error:
                self._reset(self._fault(error))

    def _add(self, ticket: Ticket) -> None:
        if ticket.closed:
            return
        try:
            for prompt in ticket.prompts:
                ticket.requests.append(self.engine.add(prompt, ticket.params, salt=ticket.salt))
        except Exception as error:
            for request in ticket.requests:
                self.engine.abort(request)
            fault = error if isinstance(error, ValueError) else self._fault(error)
            self._call(ticket, lambda: ticket.admitted.done() or ticket.admitted.set_exception(fault))
            return
        for place, request in enumerate(ticket.requests):
            self._tickets[request.id] = (ticket, place)
        self._call(ticket, lambda: ticket.admitted.done() or ticket.admitted.set_result(None))

    def _abort(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            if self._tickets.pop(request.id, None) is not None:
                self.engine.abort(request)

    def _step(self) -> None:
        start = time.monotonic()
        before = self.engine.stats.steps
        deltas = self.engine.step()
        now = time.monotonic()
        if self.engine.stats.steps > before:
            self.metrics.step(now - start)
        elif not deltas:
            time.sleep(0.001)  # all wait for something
        parcels: dict[Ticket, list[tuple[int, Delta]]] = {}
        for delta in deltas:
            ticket, place = self._tickets.get(delta.request, (None, 0))
            if ticket is None:
                continue
            parcels.setdefault(ticket, []).append((place, delta))
            self._observe(ticket, place, delta, now)
            if delta.error is not None:
                kind, _, said = delta.error.partition(": ")  # a request's own mistake may quote it, which no log may
                log.error("request %d failed: %s", delta.request, kind if delta.refused else f"{kind}: {said}")
        for ticket, parcel in parcels.items():
            self._call(ticket, _delivery(ticket, parcel, None))
            if not ticket.open:
                self._forget(ticket)

    def _observe(self, ticket: Ticket, place: int, delta: Delta, now: float) -> None:
        if delta.finish_reason is not None:
            ticket.open -= 1
            ticket.ended_at = now
        if not delta.token_ids:
            return
        if ticket.first_at is None:
            ticket.first_at = now
            self.metrics.first_token(now - ticket.born)
        last = ticket.last_at.get((place, delta.choice))
        if last is not None:
            self.metrics.next_tokens(now - last, len(delta.token_ids))
        ticket.last_at[place, delta.choice] = now

    def _forget(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            self._tickets.pop(request.id, None)

    def _fault(self, error: Exception) -> EngineFault:
        log.exception("the engine failed", exc_info=error)
        return EngineFault(f"the engine failed ({type(error).__name__}): try again")

    def _reset(self, fault: EngineFault) -> None:
        """All that runs fails; the engine is empty afterwards."""
        tickets = {ticket: None for ticket, _ in self._tickets.values()}
        requests = [request for ticket in tickets for request in ticket.requests]
        self._tickets.clear()
        for request in requests:
            try:
                self.engine.abort(request)
            except Exception as error:
                log.exception("abort failed", exc_info=error)
        scheduler = self.engine.scheduler
        for sequence in [*scheduler.running, *scheduler.waiting]:  # what an abort that failed left behind
            scheduler.remove(sequence)
        for ticket in tickets:
            self._call(ticket, _delivery(ticket, [], fault))

    def _call(self, ticket: Ticket, call: Callable[[], object]) -> None:
        try:
            ticket.loop.call_soon_threadsafe(call)
        except RuntimeError:  # its event loop is gone, and its reader with it
            self._abort(ticket)


def _delivery(ticket: Ticket, parcel: Sequence[tuple[int, Delta]], fault: Exception | None) -> Callable[[], None]:
    return lambda: ticket.deliver(parcel, fault)
