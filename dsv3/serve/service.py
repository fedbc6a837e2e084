"""One engine's service: loading, ready, draining; admission; everything that the routes share.

    loading    until `open` is given an engine: 503          ready     requests are admitted while there is room: else 429
    draining   no new requests: 503; those that run get time to finish
Does not: know HTTP (dsv3.serve.app, dsv3.serve.gate).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.infer.grammar import json_object
from dsv3.model.fingerprint import fingerprint
from dsv3.serve.errors import ApiError
from dsv3.serve.keys import Keys, Owner
from dsv3.serve.metrics import Metrics
from dsv3.serve.plan import Planner
from dsv3.serve.settings import ServeSettings
from dsv3.serve.worker import Worker


class Service:
    """Engine, tokenizer and worker, once they are there, and who may use them.

    Attributes:
        state: what `admit` goes by. heavy: taken while the tokens of a large body are made.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.keys = Keys(settings.keys)
        self.engine: Engine | None = None
        self.metrics = Metrics(lambda: self.engine)
        self.created = int(time.time())
        self.fingerprint = settings.fingerprint
        self._worker: Worker | None = None
        self._planner: Planner | None = None
        self._tokenizer: Tokenizer | None = None
        self.heavy = asyncio.Semaphore(1)  # large bodies whose tokens are made
        self._compiling = asyncio.Semaphore(2)  # grammars at once
        self._compilers = ThreadPoolExecutor(2, "dsv3-grammar")

    def open(self, engine: Engine, tokenizer: Tokenizer) -> None:
        """Serve with these from now on."""
        settings = self.settings
        self.engine, self._tokenizer = engine, tokenizer
        self._compile(json_object())  # the vocabulary's side takes seconds: not in the first request that needs it
        self._planner = Planner(engine, tokenizer, settings)
        room = engine.scheduler.max_running + settings.max_waiting
        self._worker = Worker(engine, self.metrics, max_open=room, max_backlog=settings.max_backlog)
        self.fingerprint = self.fingerprint or f"fp_{fingerprint(engine.model)[:16]}"
        if self.state == "loading":
            self.state = "ready"

    def close(self) -> None:
        """Abort what runs and end the thread."""
        self.state = "draining"
        self._compilers.shutdown(wait=False, cancel_futures=True)
        if self._worker is not None:
            self._worker.stop()

    async def drain(self) -> None:
        """Admit nothing more; wait for what runs, for at most the settings' time."""
        self.state = "draining"
        deadline = time.monotonic() + self.settings.drain_s
        while self._worker is not None and self._worker.open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop)

    # -- what routes need ----------------------------------------------------------------------------------------------

    @property
    def worker(self) -> Worker:
        assert self._worker is not None
        return self._worker

    @property
    def planner(self) -> Planner:
        """
        Raises:
            ApiError: 503, there is none yet, or it is not to be used any more.
        """
        if self._planner is None or self.state != "ready":
            raise self.not_ready()
        return self._planner

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise self.not_ready()
        return self._tokenizer

    def not_ready(self) -> ApiError:
        said = {
            "loading": "the model is loading",
            "draining": "the server is ending",
            "failed": "the model did not load",
        }
        return ApiError(503, f"{said.get(self.state, self.state)}: try again later", retry_after=5)

    @contextmanager
    def admit(self, owner: Owner, answers: int, prompt_tokens: int, field: str = "messages") -> Iterator[None]:
        """A request runs inside. field: where its prompt stood.

        Raises:
            ApiError: 503, not ready; 429, no room or the key's limits.
        """
        if self.state != "ready":
            raise self.not_ready()
        if not self.worker.has_room(answers):
            message = f"{self.worker.open} answers run or wait, {self.worker.max_open} may: try again later"
            raise ApiError(429, message, retry_after=self.worker.wait_estimate)
        with self.keys.use(owner, prompt_tokens, field):
            self.metrics.tokens(owner.name, prompt_tokens)
            yield

    def spend(self, owner: Owner, tokens: int) -> None:
        self.keys.spend(owner, tokens)
        self.metrics.tokens(owner.name, tokens)

    async def check_grammar(self, grammar: str | None, field: str = "response_format") -> None:
        """Compile it aside from the engine, so that a costly one is refused before it holds anybody up. field: where it stood.

        Raises:
            ApiError: 400, it is none, is beyond the limits, or takes too long; 503, too many are being compiled.
        """
        if grammar is None or self.engine is None:
            return
        seconds = self.settings.grammar_s
        try:
            async with asyncio.timeout(seconds):
                await self._compiling.acquire()
        except TimeoutError:
            raise ApiError(503, "other grammars are being compiled: try again later", retry_after=seconds) from None
        made = asyncio.get_running_loop().run_in_executor(self._compilers, self._compile, grammar)
        made.add_done_callback(lambda _: self._compiling.release())  # at its end, not at our patience's
        try:
            async with asyncio.timeout(seconds):
                refused = await asyncio.shield(made)
        except TimeoutError:
            refused = f"the grammar took over {seconds:g} s to compile: make it smaller"
        if refused:
            raise ApiError(400, f"{field}: {refused}", param=field.split()[0])

    def _compile(self, grammar: str) -> str:
        """Why the engine would refuse it; empty if it would not."""
        assert self.engine is not None
        try:
            self.engine.grammars.matcher(grammar)
        except ValueError as error:
            return str(error)
        return ""
