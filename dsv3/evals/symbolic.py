"""Whether two LaTeX expressions are equal, by math-verify, in a process of its own.

math-verify bounds its time by SIGALRM: that fails off the main thread, disturbs alarms of others, and cannot interrupt an integer
power inside C. Here a helper process computes, one question a line, and is killed when it takes too long; the next question gets
a new one. Only its LaTeX parser is used: its other one evaluates text as Python.
Source: github.com/huggingface/Math-Verify (extra `eval`). Does not: find the answer in a response (dsv3.evals.grade).
"""

from __future__ import annotations

import functools
import json
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_START = 120.0  # seconds that the helper may take to import sympy on a busy machine
_MEMORY = 4 << 30


class JudgeError(RuntimeError):
    """The helper cannot be started here."""


class Judge:
    """The helper process. May be used from several threads; they wait for each other.

    Args:
        seconds: for one question; beyond it the answer is unknown.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds, self._lock, self._process = seconds, threading.Lock(), None
        self._process: subprocess.Popen[bytes] | None

    def parses(self, expression: str) -> bool:
        """Whether it is an expression at all."""
        return self._ask({"parse": expression}) is True

    def equal(self, gold: str, answer: str) -> bool:
        """Whether the two are equal as mathematics; False too where that could not be found out in time."""
        return self._ask({"gold": gold, "answer": answer}) is True

    def matches(self, gold: str, text: str) -> bool:
        """math-verify as it is: what it finds in a whole text against gold, its own rules for which match counts."""
        return self._ask({"gold": gold, "text": text}) is True

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, question: dict[str, str]) -> Any:
        with self._lock:
            if self._process is None:
                self._process = self._open()
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(question).encode() + b"\n")
                self._process.stdin.flush()
                line = self._line(self.seconds)
            except OSError:
                line = b""
            if not line:  # too slow, or killed by its own greed for memory
                self._end()
                return None
            return json.loads(line)

    def _open(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        start = f"import sys; sys.path.insert(0, {root!r}); from dsv3.evals import symbolic; symbolic.main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if self._line(_START) != b"ready\n":
            process, self._process = self._process, None
            process.kill()
            words = process.communicate()[1].decode("utf-8", "replace").strip()
            raise JudgeError(f"math-verify could not be started: {words[-300:]}. Install dsv3[eval]")
        return self._process

    def _line(self, seconds: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return self._process.stdout.readline() if selector.select(seconds) else b""

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@functools.lru_cache(maxsize=1)
def judge_of_process(pid: int) -> Judge:
    """One helper for all who bring none: starting it takes a second. `pid`: os.getpid(), so that a fork gets its own."""
    return Judge()


def shared_judge() -> Judge:
    return judge_of_process(os.getpid())


def main() -> None:
    """The helper: a question a line, true, false or null back."""
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing else may speak on the line
    only = [LatexExtractionConfig()]

    def read(expression: str) -> list[Any]:
        found = parse(f"${expression}$", extraction_config=only, parsing_timeout=0)
        return [value for value in found if not isinstance(value, str)]

    answers.write("ready\n")
    answers.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads what sympy warns of: a full pipe would stop it
    for line in sys.stdin:
        question = json.loads(line)
        told: bool | None = None
        try:
            if "parse" in question:
                told = bool(read(question["parse"]))
            elif "text" in question:
                gold = parse(question["gold"], parsing_timeout=0)
                told = bool(gold) and verify(gold, parse(question["text"], parsing_timeout=0), timeout_seconds=None)
            else:
                gold, answer = read(question["gold"]), read(question["answer"])
                told = bool(gold and answer) and verify(gold, answer, timeout_seconds=None)
        except (Exception, RecursionError, MemoryError):
            told = None
        answers.write(json.dumps(told) + "\n")
        answers.flush()
