"""A real Chromium, and a small server that plays the API: what tests/serve/test_page.py drives.

`Fake` serves dsv3/serve/web under the headers of dsv3.serve.routes and answers POST /v1/chat/completions from a script: one
list of steps a request, in order. A step is a chunk's dict, a `Wait` for the test to let it go on, or a `Refuse`.
`text_chunks`, `token_chunks` and `last_chunk` build what the server sends with `details: true`.
Does not: look at what is asked; it only keeps it (`Fake.requests`).
"""

from __future__ import annotations

import json
import math
import mimetypes
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Dialog, Page, sync_playwright

from dsv3.serve.routes import _PAGE_HEADERS

WEB = Path(__file__).parents[2] / "dsv3" / "serve" / "web"
_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
_ARGS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium under Playwright's core; its own browsers are not used.

    Raises:
        RuntimeError: there is no Chromium.
    """
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise RuntimeError(
            "the tests of the chat page drive a real Chromium and there is none: apt-get install chromium"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=_ARGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Wait:
    """The stream pauses here until `event` is set (or the test is over)."""

    event: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Refuse:
    """An answer with an error's status instead of a stream."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


class Cut:
    """The connection ends here, without [DONE]."""


Step = dict[str, Any] | Wait | Refuse | Cut


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def text_chunks(text: str, size: int = 7) -> list[Step]:
    """An answer in pieces of `size` characters, to its end."""
    pieces = [delta(content=text[i : i + size]) for i in range(0, len(text), size)]
    return [*pieces, finish(), {"choices": [], "usage": usage(12, len(pieces))}]


def finish(reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_cache_hit_tokens": cached,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def token_chunks(words: Sequence[tuple[str, float]], layers: int = 3, experts: int = 16, width: int = 4) -> list[Step]:
    """Chunks of one token each with its probability, two alternatives and experts, as `details: true` gives them."""
    chunks: list[Step] = []
    for i, (text, p) in enumerate(words):
        rest = (1 - p) / 2 or 1e-9
        top = [[text, math.log(p)], ["other", math.log(rest * 1.5)], ["third", math.log(rest * 0.5)]]
        chosen = [[(i * 5 + layer * 3 + k * 7) % experts for k in range(width)] for layer in range(layers)]
        token = {"id": i, "text": text, "logprob": math.log(p), "top": top, "experts": chosen}
        chunks.append(delta(content=text) | {"dsv3": {"tokens": [token], "drafted": 1, "accepted": i % 2}})
    return chunks


def last_chunk(prompt: int, completion: int, cached: int, drafted: list[int], accepted: list[int]) -> dict[str, Any]:
    totals = {
        "drafted": sum(drafted),
        "accepted": sum(accepted),
        "places": list(zip(drafted, accepted, strict=True)),
        "cached_tokens": cached,
        "seconds": 2.0,
        "first_token_seconds": 0.25,
        "tokens_per_second": 41.5,
    }
    return {"choices": [], "usage": usage(prompt, completion, cached), "dsv3": {"totals": totals}}


SKY = [("The", 0.99), (" sky", 0.6), (" is", 0.95), (" blue", 0.1), (".", 0.8), ("\n", 0.97)]


def detailed() -> list[Step]:
    """A whole answer with details: six tokens, 40 of the prompt with 32 cached, 13 of 18 drafts accepted."""
    return [*token_chunks(SKY), finish(), last_chunk(40, len(SKY), 32, [10, 8], [9, 4])]


class Fake:
    """The server. `script` holds the steps of the requests to come; an empty one is answered by the text "ok"."""

    def __init__(self) -> None:
        self.script: list[list[Step]] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.key: str | None = None
        self.stopping = threading.Event()
        self.gone = threading.Event()  # a client left in the middle of a stream
        fake = self

        class Handler(_Handler):
            owner = fake

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: Fake
    protocol_version = "HTTP/1.1"  # one connection for all files

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if not self._allowed():
                return
            self._json(
                200, {"object": "list", "data": [{"id": "dsv3-tiny", "max_model_len": 1000}, {"id": "dsv3-mini"}]}
            )
            return
        path = WEB / ("index.html" if self.path == "/" else self.path.lstrip("/"))
        if path.parent != WEB or not path.is_file():
            self._json(404, {"error": {"message": "not found"}})
            return
        body = path.read_bytes()
        kind = "text/javascript" if path.suffix == ".js" else mimetypes.guess_type(path.name)[0]
        self._head(200, kind or "application/octet-stream", {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.owner.requests.append(body)
        steps = self.owner.script.pop(0) if self.owner.script else text_chunks("ok")
        if isinstance(steps[0], Refuse):
            self._json(steps[0].status, {"error": {"message": steps[0].message}}, steps[0].headers)
            return
        self._head(200, "text/event-stream", {"Cache-Control": "no-store", "Connection": "close"})
        try:
            if self._stream(steps):
                self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.owner.gone.set()

    def _stream(self, steps: Sequence[Step]) -> bool:
        self.wfile.write(b": keep-alive\n\n")
        for step in steps:
            if isinstance(step, Cut):
                return False
            if isinstance(step, Wait):
                while not step.event.wait(0.02) and not self.owner.stopping.is_set():
                    self.wfile.write(b": keep-alive\n\n")
                continue
            self.wfile.write(f"data: {json.dumps(step)}\n\n".encode())
        return True

    def _allowed(self) -> bool:
        sent = self.headers.get("Authorization")
        self.owner.keys.append(sent)
        if self.owner.key is None or sent == f"Bearer {self.owner.key}":
            return True
        self._json(401, {"error": {"message": "no API key"}})
        return False

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self._head(status, "application/json", {"Content-Length": str(len(data))} | (headers or {}))
        self.wfile.write(data)

    def _head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in {**_PAGE_HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def opened(browser: Browser, url: str, *, expected: Sequence[str] = (), **context: Any) -> Iterator[Page]:
    """The page in a context of its own. On leaving, nothing may have gone wrong: no error or warning in the console (a
    breach of the policy is one), no exception, no dialog, no request to another origin. `expected` lists parts of
    messages that the test provokes."""
    problems: list[str] = []
    with closing(browser.new_context(**{"viewport": {"width": 1180, "height": 800}, **context})) as own:
        own.set_default_timeout(20000)  # of a machine under load
        page = own.new_page()
        watch(page, url, problems)
        page.goto(url, wait_until="commit")
        page.wait_for_selector("html[data-ready]")
        yield page
        page.wait_for_timeout(20)  # what is still on its way to the console
    assert [text for text in problems if not any(part in text for part in expected)] == []


def watch(page: Page, url: str, problems: list[str]) -> None:
    """Writes into `problems` whatever this page must never do."""

    def dismiss(dialog: Dialog) -> None:
        problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", lambda m: problems.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("dialog", dismiss)
    page.on("popup", lambda other: problems.append(f"popup: {other.url}"))
    page.on("request", lambda r: None if r.url.startswith((url, "blob:")) else problems.append(f"request: {r.url}"))


def say(page: Page, text: str) -> None:
    """Sends a message by keyboard and waits for the whole answer."""
    send(page, text)
    finished(page)


def send(page: Page, text: str) -> None:
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def finished(page: Page) -> None:
    page.wait_for_selector(".turn.assistant:last-child:not(.running)")


def module(page: Page, name: str, code: str, argument: Any = None) -> Any:
    """What `code`, a function of (module, argument), returns in the page; the module is a file of dsv3/serve/web."""
    return page.evaluate(f"async (argument) => ({code})(await import('/{name}'), argument)", argument)
