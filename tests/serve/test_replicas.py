"""Two replicas under a local Ray, one of them killed under load: every answer comes once, and is the right one."""

import asyncio
import dataclasses
import os
import signal

import httpx
import pytest

from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.front import Front
from dsv3.serve.replicas import start_replicas, stop_replicas
from dsv3.serve.settings import ServeSettings
from tests.model.tiny import TINY, random_model


class Loader:
    """Runs in the replicas' processes."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, number):
        import sys

        sys.path.insert(0, str(self.folder))  # the project's root: Ray's workers begin elsewhere
        from dsv3.infer.engine import Engine

        tokenizer = Tokenizer.train(["hello world"], 300)
        config = dataclasses.replace(
            TINY, vocab_size=tokenizer.vocab_size, eos_token_id=1, max_position_embeddings=2048
        )
        return Engine(random_model(config), tokenizer, cache_gb=0.01), tokenizer


@pytest.fixture(scope="module")
def replicas(request):
    pytest.importorskip("ray", reason="needs the extra ray: pip install 'dsv3[ray]'")
    settings = ServeSettings(model="tiny")
    try:
        yield settings, start_replicas(Loader(request.config.rootpath), settings, "127.0.0.1", replicas=2, threads=1)
    finally:
        stop_replicas()


def body(i, **more):
    return {
        "model": "tiny",
        "prompt": f"question {i}",
        "max_tokens": 400,
        "temperature": 1,
        "seed": i,
        "logit_bias": {"1": -100},
    } | more


@pytest.mark.slow
def test_a_killed_replica_loses_and_doubles_no_answer(replicas):
    settings, backends = replicas
    asyncio.run(_kill_under_load(settings, backends))


async def _kill_under_load(settings, backends):
    front = Front(settings, wait_s=60)
    front.ready(backends)
    transport = httpx.ASGITransport(front)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:

        async def ask(i):
            for _ in range(5):  # as clients do: 429, 503 and a cut connection are tried again
                try:
                    reply = await client.post("/v1/completions", json=body(i))
                except ConnectionAbortedError:
                    continue
                if reply.status_code == 200:
                    return reply.json()["choices"][0]["text"]
                await asyncio.sleep(float(reply.headers.get("retry-after", 1)))
            raise AssertionError(f"request {i} got no answer: {reply.status_code} {reply.text}")

        alone = [await ask(i) for i in range(24)]
        assert len(set(alone)) > 20
        victim = await front.backends[0]._handle.options(method_name="ping").remote()
        asking = [asyncio.ensure_future(ask(i)) for i in range(24)]
        while front.router.running[0] < 3:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.3)  # what Ray has not handed to the replica yet, it hands to the next by itself
        assert front.router.running[0] >= 3  # answers are long enough to be in the middle now
        os.kill(victim, signal.SIGKILL)
        assert await asyncio.gather(*asking) == alone
        assert front.retried >= 1
        for _ in range(150):  # Ray starts another in its place, which is found
            if all(front.router.up):
                break
            await asyncio.sleep(0.2)
        assert all(front.router.up)
        assert await backends[0]._handle.options(method_name="ping").remote() != victim
        metrics = (await client.get("/metrics")).text
        assert 'replica="0"' in metrics
        assert 'replica="1"' in metrics
