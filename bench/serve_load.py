"""The server under load: requests arrive whether or not earlier ones are answered; one line a load, and a JSON line.

    server    a process of its own (`dsv3.serve`, OMP_WAIT_POLICY=passive unless it is set otherwise); the 20M model of
              bench.train_step with random weights, or --checkpoint
    clients   N = 1, 8, 64. First N clients, each asking again when it is answered: the most requests a second there can be.
              Then arrivals at random (Poisson) at 0.8 of that rate, as users come: a slow server meets a growing queue
    told      requests and tokens a second; time from arrival to first text, and between pieces of text (p50, p99); errors;
              the server's resident memory after 200 requests and after all (--requests)

Every answer is a stream of 64 tokens on a prompt of 64, a quarter of them beginnings that others share.
    python -m bench.serve_load [--checkpoint RUN] [--requests 2000] [--seconds 20]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import machine

CLIENTS = (1, 8, 64)
PROMPT, NEW, VOCAB = 64, 64, 300
SHARE = 0.8  # of the rate that N clients reach


@dataclass
class Result:
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0
    errors: list[str] = field(default_factory=list)


def serve_model(checkpoint: str | None) -> None:
    """The server's side of this file."""
    import dsv3
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.infer.engine import Engine
    from dsv3.serve.app import serve
    from dsv3.serve.settings import ServeSettings

    def load() -> tuple[Engine, Tokenizer]:
        if checkpoint is not None:
            model, tokenizer = dsv3.load(checkpoint)
        else:
            import torch

            from bench.train_step import MODEL
            from dsv3.model.transformer import DeepseekV3

            texts = [path.read_text() for path in sorted(Path("dsv3").rglob("*.py"))]
            tokenizer = Tokenizer.train(texts, MODEL.vocab_size)
            torch.manual_seed(0)
            model = DeepseekV3(dataclasses.replace(MODEL, max_position_embeddings=4096))
            model.init_weights()
        return Engine(model, tokenizer, cache_gb=0.5), tokenizer

    serve(load, ServeSettings(model="bench", max_waiting=1024), port=0, started=lambda url: print(url, flush=True))


async def ask(address: tuple[str, int], seed: int, result: Result, arrived: float | None = None) -> None:
    """One streamed answer, over a bare socket: a client library would take more of the machine than the server."""
    chance = random.Random(seed)
    shared = random.Random(seed % 8)
    prompt = [shared.randrange(3, VOCAB) for _ in range(PROMPT // 4)] + [
        chance.randrange(3, VOCAB) for _ in range(PROMPT - PROMPT // 4)
    ]
    body = {"model": "bench", "prompt": prompt, "max_tokens": NEW, "ignore_eos": True, "stream": True, "seed": seed}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    start = last = time.perf_counter() if arrived is None else arrived
    pieces, event = 0, {}
    try:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(status.decode().strip())
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line[6:])
            if pieces:
                result.between.append(now - last)
            else:
                result.first.append(now - start)
            pieces, last = pieces + 1, now
        writer.close()
        if not event or event["choices"][0]["finish_reason"] != "length":
            raise RuntimeError("the stream was cut")
        result.tokens += event["usage"]["completion_tokens"]
        result.answers += 1
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        result.errors.append(f"{type(error).__name__}: {error}")


async def closed(address: tuple[str, int], clients: int, seconds: float) -> tuple[Result, float]:
    """N clients, each asking again when it is answered."""
    result, start = Result(), time.perf_counter()

    async def client(number: int) -> None:
        turn = 0
        while time.perf_counter() - start < seconds:
            await ask(address, number * 10_000 + turn, result)
            turn += 1

    await asyncio.gather(*map(client, range(clients)))
    return result, time.perf_counter() - start


async def opened(address: tuple[str, int], rate: float, count: int, seed: int) -> tuple[Result, float]:
    """Arrivals at random at a rate, however long answers take."""
    result, chance, tasks = Result(), random.Random(seed), []
    start = at = time.perf_counter()
    for number in range(count):
        at += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(address, seed * 100_000 + number, result, at)))
    await asyncio.gather(*tasks)
    return result, time.perf_counter() - start


def quantiles(values: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    ranked = sorted(values) or [0.0]
    return {
        "p50": round(statistics.median(ranked) * 1e3, 2),
        "p99": round(ranked[int(0.99 * (len(ranked) - 1))] * 1e3, 2),
    }


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def load(address: tuple[str, int], pid: int, seconds: float, total: int) -> dict[str, object]:
    rows: list[dict[str, object]] = []
    asked, memory = 0, {}
    for clients in CLIENTS:
        peak, spent = await closed(address, clients, seconds)
        best = peak.answers / spent
        count = max(20, round(SHARE * best * seconds))
        result, spent = await opened(address, SHARE * best, count, clients)
        asked += peak.answers + count
        row = {
            "clients": clients,
            "closed_requests_s": round(best, 2),
            "closed_tokens_s": round(best * NEW, 1),
            "arrivals_s": round(SHARE * best, 2),
            "tokens_s": round(result.tokens / spent, 1),
            "first_ms": quantiles(result.first),
            "between_ms": quantiles(result.between),
            "errors": len(peak.errors) + len(result.errors),
        }
        print(row, *sorted(set(peak.errors + result.errors))[:3], file=sys.stderr)
        rows.append(row)
        if asked >= 200 and not memory:
            memory["after_200"] = resident_mib(pid)
    result = Result()
    while asked < total:
        batch = min(64, total - asked)
        await asyncio.gather(*(ask(address, 10**7 + asked + i, result) for i in range(batch)))
        asked += batch
        if asked >= 200 and not memory:
            memory["after_200"] = resident_mib(pid)
    memory["after_all"] = resident_mib(pid)
    more = {name: round(value, 1) for name, value in memory.items()}
    return {"rows": rows, "requests": asked, "more_errors": len(result.errors), "resident_mib": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_model(options.checkpoint)
        return
    command = [sys.executable, "-m", "bench.serve_load", "--serve"]
    command += ["--checkpoint", options.checkpoint] if options.checkpoint else []
    # Threads that spin between the engine's steps take the event loop's core, and the clients': a third of the rate is left.
    policy = {"OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**policy, **os.environ}) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        host, port = url.removeprefix("http://").split(":")
        address = (host, int(port))
        try:
            result = asyncio.run(_when_ready(address, server.pid, options.seconds, options.requests))
        finally:
            server.terminate()
    print(json.dumps({**machine(), "prompt": PROMPT, "new": NEW, "exit": server.returncode, **result}))


async def _when_ready(address: tuple[str, int], pid: int, seconds: float, total: int) -> dict[str, object]:
    while True:
        warm = Result()
        await ask(address, 0, warm)
        if not warm.errors:
            return await load(address, pid, seconds, total)
        if "503" not in warm.errors[0]:
            raise RuntimeError(warm.errors[0])
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    main()
