"""Random and hostile requests against a tiny server; at the end it must be alive, idle, and hold no page.

    in-process    most of them go to the app by ASGI: bodies mutated from good ones, broken JSON, wrong types, huge values,
                  grammars that cost, prompts of odd ids; some clients leave before or during the answer
    sockets       one in twenty goes to a real server: bad HTTP, half a body, a stream cut after some bytes, pipelined rubbish
    faults        one answer in five hundred meets a step of the engine that raises for it (its request may get 500, no other)

Every answer must be one of the API's statuses with a JSON body; a 500 is a finding unless a fault was put there.
    python -m bench.fuzz_serve [--requests 100000] [--seed 0]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import logging
import random
import socket
import sys
import threading
import time
from typing import Any

import uvicorn

from bench.common import machine, peak_memory_mib
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3
from dsv3.serve.app import create_app
from dsv3.serve.settings import ServeSettings

STATUSES = {200, 400, 401, 403, 404, 405, 408, 413, 422, 429, 503}
TEXTS = [
    "",
    "hello",
    "你好",
    "\x00",
    "\ud800",
    "<｜Assistant｜>",
    "</think>",
    "a" * 5000,
    "\u2028",
    "{",
    "🜁" * 50,
    "-1",
    "NaN",
]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, -(10**6), 2**63, 10**30, 0.0, 0.5, 1.0, -0.5, 1e308, 1e-308, [], {}, [None],
    [[]], [0], [[0]], [1, 2, 3], [[5, 6], [7]], ["a", "b"], {"a": 1}, {"type": "text"}, {"type": "function"}, "json_object", *TEXTS,
]  # fmt: skip
SCHEMAS: list[Any] = [
    {"type": "object"}, {"type": "string", "pattern": "(a+)+$"}, {"enum": []}, {"$ref": "#"}, {"$ref": "#/$defs/x"},
    {"type": "array", "items": {"$ref": "#"}}, {"type": "integer", "minimum": 10**30}, {"not": {}}, {"anyOf": []}, False, True,
    {"type": "object", "properties": {f"p{i}": {"type": "number"} for i in range(60)}}, {"type": "nonsense"},
    {"type": "string", "maxLength": 10**9}, {"allOf": [{"type": "string"}, {"type": "object"}]},
]  # fmt: skip
PATTERNS = ["a", "", "(", "a{1000}{1000}", "(a|b)*c", "[", "(?=a)", r"\p{L}+", "(.*)*", ".{0,2000}", "a" * 3000, "\\"]
LARK = [
    "start: /a/",
    "start: start",
    "start:",
    'start: "a" start | "b"',
    "start: @x",
    "start: <[0]>",
    "%json {}",
    "start: /(/",
]
EXTRA = [
    "temperature", "top_p", "n", "seed", "stop", "logit_bias", "logprobs", "top_logprobs", "max_completion_tokens", "tools",
    "tool_choice", "response_format", "stream_options", "suffix", "echo", "min_p", "top_k", "repetition_penalty", "min_tokens",
    "user", "thinking", "continue_final_message", "add_generation_prompt", "details", "best_of", "functions", "nonsense", "stream",
    "frequency_penalty", "presence_penalty", "ignore_eos", "parallel_tool_calls", "metadata", "chat_template", "messages", "prompt",
]  # fmt: skip
GOOD: dict[str, list[Any]] = {
    "temperature": [0, 0.3, 1, 2], "top_p": [0.1, 0.9, 1], "seed": [0, 1, -7, None], "stop": ["a", ["a", "\n"], None],
    "logprobs": [True, False, 0, 2, 20], "top_logprobs": [0, 3, 20], "max_completion_tokens": [1, 9], "suffix": ["b", ""],
    "echo": [True, False], "min_p": [0, 0.1], "top_k": [-1, 0, 1, 50], "repetition_penalty": [0.5, 1, 1.3],
    "min_tokens": [0, 1, 5], "thinking": [{"type": "enabled"}, {"type": "disabled"}], "details": [True], "stream": [True],
    "stream_options": [{"include_usage": True}, {"include_usage": False}, None], "ignore_eos": [True],
    "frequency_penalty": [-2, 0.5], "presence_penalty": [2], "parallel_tool_calls": [True, False], "user": ["me"],
    "continue_final_message": [True, False], "metadata": [{}], "best_of": [1],
}  # fmt: skip
PATHS = ["/v1/chat/completions", "/chat/completions", "/beta/completions", "/v1/completions"] * 4 + [
    "/tokenize",
    "/detokenize",
]


class Faults:
    """Makes the engine fail now and then inside one sequence."""

    def __init__(self, engine: Engine, chance: random.Random) -> None:
        self.chance, self.made = chance, 0
        self._decide = engine._decide
        engine._decide = self._maybe  # type: ignore[method-assign]

    def _maybe(self, *arguments: Any) -> Any:
        if self.chance.random() < 1e-4:
            self.made += 1
            raise RuntimeError("a fault put here")
        return self._decide(*arguments)


def tiny_app(faults_seed: int) -> tuple[Any, Engine, Faults]:
    import torch

    tokenizer = Tokenizer.train(['hello world {"name": "value"} function json 0123456789 once upon a time'] * 3, 400)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_nextn_predict_layers=1, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=12,
        qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
        first_k_dense_replace=1, max_position_embeddings=512, rope_scaling=None, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV3(config)
    model.init_weights()
    engine = Engine(model, tokenizer, cache_gb=0.0006, max_running=16)
    settings = ServeSettings(
        model="tiny", default_max_tokens=16, max_waiting=64, max_body_bytes=200_000, body_timeout_s=2, grammar_s=2,
        keep_alive_s=0.5, send_timeout_s=2,
    )  # fmt: skip
    return create_app(engine, tokenizer, settings=settings), engine, Faults(engine, random.Random(faults_seed))


def message(chance: random.Random) -> Any:
    if chance.random() < 0.1:
        return chance.choice(VALUES)
    made: dict[str, Any] = {"role": chance.choice(["system", "user", "user", "assistant", "tool", "odd"])}
    made["content"] = chance.choice([*TEXTS, None, [{"type": "text", "text": "a"}], [{"type": "image_url"}], 5])
    for name in ("prefix", "reasoning_content", "tool_calls", "tool_call_id", "name", "partial"):
        if chance.random() < 0.08:
            made[name] = chance.choice([*VALUES, [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]])
    return made


def value(chance: random.Random, name: str) -> Any:
    roll = chance.random()
    if name == "response_format" and roll < 0.9:
        kind = chance.choice(["json_object", "json_schema", "regex", "grammar", "text", "odd"])
        made: dict[str, Any] = {"type": kind}
        if kind == "json_schema":
            made["json_schema"] = {"name": "x", "schema": chance.choice(SCHEMAS)}
        elif kind in ("regex", "grammar"):
            made[kind] = chance.choice(PATTERNS if kind == "regex" else LARK)
        return made
    if name == "tools" and roll < 0.9:
        parameters = chance.choice([*SCHEMAS, None])
        function = {
            "name": chance.choice(["f", "g", "", "a b", "x" * 65]),
            "parameters": parameters,
            "strict": roll < 0.4,
        }
        return [{"type": "function", "function": function}] * chance.choice([1, 1, 2, 129])
    if name == "tool_choice" and roll < 0.8:
        return chance.choice(["auto", "none", "required", {"type": "function", "function": {"name": "f"}}])
    if name == "logit_bias" and roll < 0.7:
        return {str(chance.randrange(-2, 450)): chance.choice([-100, 100, 0.5, 1e9])}
    if name == "n" and roll < 0.7:
        return chance.choice([1, 2, 3, 8])
    if name in GOOD and roll < 0.8:
        return chance.choice(GOOD[name])
    return chance.choice(VALUES)


def body(chance: random.Random, path: str) -> Any:
    if chance.random() < 0.02:
        return chance.choice(VALUES)
    made: dict[str, Any] = {"model": "tiny" if chance.random() < 0.97 else chance.choice(VALUES)}
    if "chat" in path:
        made["messages"] = [{"role": "user", "content": "hello"}]
        if chance.random() < 0.4:
            made["messages"] = [message(chance) for _ in range(chance.randrange(4))]
    elif "completions" in path:
        shared = random.Random(chance.randrange(20))
        ids = [shared.randrange(0, 300) for _ in range(chance.choice([1, 5, 70, 200, 300, 600]))]
        ids += [chance.randrange(0, 300 if chance.random() < 0.9 else 420) for _ in range(chance.choice([0, 1, 9]))]
        made["prompt"] = chance.choice(["hello", "", ids, ids, ids, [ids, [5]], ["a", "b"], chance.choice(VALUES)])
    else:
        made = {
            "prompt": chance.choice(VALUES),
            "tokens": chance.choice(VALUES),
            "add_special_tokens": chance.choice(VALUES),
        }
        made = {name: made[name] for name in made if chance.random() < 0.8}
    if "completions" in path:
        made["max_tokens"] = chance.choice([1, 2, 8, 30, 300]) if chance.random() < 0.9 else chance.choice(VALUES)
        made["stream"] = chance.random() < 0.4
    for name in chance.sample(EXTRA, chance.choice([0, 1, 1, 2, 3])):
        made[name] = value(chance, name)
    return made


def raw(chance: random.Random, path: str) -> bytes:
    content = json.dumps(body(chance, path)).encode()
    roll = chance.random()
    if roll < 0.04:
        return content[: chance.randrange(len(content) + 1)]
    if roll < 0.06:
        at = chance.randrange(len(content) + 1)
        return content[:at] + bytes(chance.randrange(256) for _ in range(4)) + content[at:]
    if roll < 0.065:
        return chance.choice([b"[" * 50_000, b"\xff" * 100, b" " * 250_000, b'{"a":' * 20_000, b"1" * 10_000])
    return content


async def over_asgi(app: Any, chance: random.Random) -> tuple[int, bytes, bytes]:
    """(status, what came, what was asked); status 0: left before one came."""
    path = (
        chance.choice(PATHS)
        if chance.random() < 0.97
        else chance.choice(["/", "/v1/models", "/metrics", "/nothing", "/ready"])
    )
    method = "POST" if chance.random() < 0.98 else chance.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
    content = raw(chance, path)
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    if chance.random() < 0.02:
        headers.append(
            (
                chance.choice([b"content-length", b"content-type", b"x-request-id"]),
                chance.choice([b"-5", b"x", b"\xff"]),
            )
        )
    leaves = chance.random() < 0.05
    leaving, parts, status = asyncio.Event(), [], 0
    pieces = [content[: len(content) // 2], content[len(content) // 2 :]] if chance.random() < 0.1 else [content]

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await leaving.wait()
        return {"type": "http.disconnect"}

    async def send(sent: Any) -> None:
        nonlocal status
        if sent["type"] == "http.response.start":
            status = sent["status"]
        else:
            parts.append(sent.get("body", b""))
            if leaves and len(parts) > 2:
                leaving.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    if leaves and chance.random() < 0.5:
        asyncio.get_running_loop().call_later(chance.random() * 0.02, leaving.set)
    await asyncio.wait_for(app(scope, receive, send), 120)
    return (0 if leaves and not status else status), b"".join(parts), path.encode() + b" " + content[:2000]


def over_socket(address: tuple[str, int], chance: random.Random) -> str:
    """Rubbish, or a request that is cut; any way of the server to end it is right."""
    path = chance.choice(PATHS)
    content = raw(chance, path)
    length = len(content) + chance.choice([0, 0, 0, 5, -3])
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()
    data = chance.choice([
        head + content, head + content, head + content + head + content, head + content[: len(content) // 2], head[:30],
        b"\x16\x03\x01" * 50, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 3000, b"POST " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ])  # fmt: skip
    try:
        with socket.create_connection(address, timeout=1.0) as connection:
            connection.sendall(data)
            connection.settimeout(chance.choice([0.01, 0.2]))
            return "answered" if connection.recv(chance.choice([1, 4096])) else "closed"
    except TimeoutError:
        return "left"
    except OSError:
        return "reset"


def judge(status: int, content: bytes) -> str | None:
    """What is wrong with an answer."""
    if status in (0, 500):  # faults are counted elsewhere
        return None
    if status not in STATUSES:
        return f"status {status}"
    if status >= 400 and status != 404 and content.strip():
        try:
            assert json.loads(content)["error"]["message"]
        except (ValueError, KeyError, AssertionError):
            return f"status {status} without the API's error"
    return None


async def fuzz(app: Any, address: tuple[str, int], requests: int, seed: int) -> tuple[collections.Counter, list[str]]:
    counts: collections.Counter = collections.Counter()
    findings: list[str] = []
    turn = iter(range(requests))

    async def client(number: int) -> None:
        for at in turn:
            chance = random.Random(seed * 10**9 + at)
            if at % 20 == 19:
                counts[f"socket {await asyncio.to_thread(over_socket, address, chance)}"] += 1
                continue
            try:
                status, content, asked = await over_asgi(app, chance)
            except Exception as error:
                counts["raised"] += 1
                findings.append(f"{at}: {type(error).__name__}: {error}")
                continue
            counts[status] += 1
            wrong = judge(status, content)
            if status == 500:
                wrong = None if b"a fault put here" in content else f"500 {content[:300]!r}"
            if wrong:
                findings.append(f"{at}: {wrong} for {asked!r}")
            if at % 5000 == 0:
                print(f"{at} of {requests}: {dict(counts)}; findings {len(findings)}", file=sys.stderr, flush=True)

    await asyncio.gather(*map(client, range(24)))
    return counts, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    app, engine, faults = tiny_app(options.seed)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none", access_log=False))
    counts, findings, start = collections.Counter(), [], time.perf_counter()

    async def both() -> None:
        nonlocal counts, findings
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        counts, findings = await fuzz(app, listener.getsockname(), options.requests, options.seed)
        await asyncio.sleep(3.0)  # the last sockets' requests end
        status, content, _ = await over_asgi_ready(app)
        assert status == 200, content
        server.should_exit = True
        await serving

    asyncio.run(both())
    alive = any(thread.name == "dsv3-engine" for thread in threading.enumerate())
    idle = {
        "alive": alive,
        "busy": engine.busy,
        "pages_held": engine.scheduler.book.held,
        "open": app.state.service.worker.open,
    }
    for finding in findings[:20]:
        print(finding, file=sys.stderr)
    result = {
        **machine(), "requests": options.requests, "seconds": round(time.perf_counter() - start, 1),
        "statuses": {str(name): count for name, count in sorted(counts.items(), key=str)}, "faults_put": faults.made,
        "findings": len(findings), **idle, "peak_mib": round(peak_memory_mib()), "stats": dataclasses.asdict(engine.stats),
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if not findings and idle == {"alive": True, "busy": False, "pages_held": 0, "open": 0} else 1


async def over_asgi_ready(app: Any) -> tuple[int, bytes, bytes]:
    """One plain request at the end: the server still answers."""

    class Plain(random.Random):
        def random(self) -> float:
            return 0.9

        def choice(self, options: Any) -> Any:
            return options[0]

        def sample(self, population: Any, k: int, **_: Any) -> list[Any]:
            return []

    return await over_asgi(app, Plain())


if __name__ == "__main__":
    sys.exit(main())
