"""A server process: bound at once, ready when loaded, drained by SIGTERM with exit code 0."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from dsv3.serve.app import serve
from dsv3.serve.settings import ServeSettings
from tests.serve.small import post, small_engine, until

ROOT = Path(__file__).parents[2]
CODE = """
import sys, threading
from dsv3.serve.app import serve
from dsv3.serve.settings import ServeSettings
from tests.serve.small import small_engine

def load():
    engine, tokenizer = small_engine()
    sys.stdin.readline()  # until the test says so
    step = engine.step
    import time
    engine.step = lambda: time.sleep(0.002) or step()
    return engine, tokenizer

serve(load, ServeSettings(model="tiny", drain_s={drain}), port=0, started=lambda url: print(url, flush=True))
"""


def start(drain: float) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(drain=drain)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    return process, process.stdout.readline().strip()


def open_up(process: subprocess.Popen, url: str) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()
    until(lambda: httpx.get(f"{url}/ready").status_code == 200, 60)


def stream(url: str, lines: list[str]) -> threading.Thread:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}

    def read() -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def test_loading_serving_draining():
    process, url = start(drain=30)
    with process:
        for path in ("/ready", "/v1/models"):
            assert httpx.get(url + path).status_code == (503 if path == "/ready" else 200)
        early = post(url, "/v1/completions", {"model": "tiny", "prompt": "hello"})
        assert (early.status_code, early.headers["retry-after"]) == (503, "5")
        assert httpx.get(f"{url}/health").status_code == 200
        with pytest.raises(httpx.HTTPError):  # the connection's own limits are on (tests/serve/test_connection.py)
            httpx.get(f"{url}/health", headers={"x-long": "a" * 2_000_000}).raise_for_status()
        open_up(process, url)
        lines: list[str] = []
        reader = stream(url, lines)
        until(lambda: "dsv3_running 1.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        late = post(url, "/v1/completions", {"model": "tiny", "prompt": "hello"})
        assert late.status_code == 503
        reader.join(60)
        assert lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in lines[-2]
        assert process.wait(60) == 0


def test_a_drain_has_a_deadline_after_which_clients_are_told():
    process, url = start(drain=0.1)
    with process:
        open_up(process, url)
        lines: list[str] = []
        reader = stream(url, lines)
        until(lambda: "dsv3_running 1.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        reader.join(60)
        assert '"service_unavailable"' in lines[-1]
        assert process.wait(60) == 0


def test_a_load_that_fails_ends_the_server_and_says_why():
    def load():
        raise ValueError("no such checkpoint")

    with pytest.raises(RuntimeError, match="no such checkpoint"):
        serve(load, ServeSettings(), port=0)


def test_a_port_in_use_fails_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="cannot listen"):
            serve(small_engine, ServeSettings(), port=taken.getsockname()[1])


def test_a_port_that_is_none_is_refused_and_not_taken_modulo_65536():
    with pytest.raises(ValueError, match="port is 99999"):
        serve(small_engine, ServeSettings(), port=99999)


def test_an_open_address_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="API key"):
        serve(small_engine, ServeSettings(), host="0.0.0.0", port=0)
