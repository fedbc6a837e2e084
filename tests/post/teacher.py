"""A local endpoint that speaks enough of OpenAI's chat protocol, and says what it is told to say."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Said = tuple[int, Any]
"""Status and body: bytes as they are, else JSON."""


class FakeTeacher:
    """`answer(question, times asked before, request)` decides each reply. `asked` counts by question."""

    def __init__(self, answer: Callable[[str, int, dict[str, Any]], Said], delay: float = 0.0) -> None:
        self.answer, self.delay = answer, delay
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.authorization: set[str | None] = set()
        self.url = ""
        self._lock = threading.Lock()

    def handle(self, path: str, body: dict[str, Any], authorization: str | None) -> Said:
        question = body["messages"][-1]["content"]
        with self._lock:
            before = self.asked[question]
            self.asked[question] += 1
            self.requests.append({"path": path, **body})
            self.authorization.add(authorization)
        time.sleep(self.delay)
        return self.answer(question, before, body)


def completion(text: str | None, *, finish: str = "stop", usage: Any = (10, 20), **message: Any) -> Said:
    """A whole reply."""
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}


@contextmanager
def serving(teacher: FakeTeacher) -> Iterator[FakeTeacher]:
    """On loopback, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, said = teacher.handle(self.path, body, self.headers.get("authorization"))
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            if status == 429:
                self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    teacher.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield teacher
    finally:
        server.shutdown()
        server.server_close()
