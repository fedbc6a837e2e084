"""Run programs that a model wrote: in processes of their own, without network, in an empty folder, under limits.

    namespaces   (Linux with user namespaces) a root of read-only Python and the empty /work, no other process in sight
    seccomp      (Linux with Landlock) a single process that can open Python and its folder only; it cannot start others
    none         rlimits and a process group: a program may still read, delete and connect. Only by isolation="best-effort"

    box = Sandbox(workers=2)
    box.run("def add(a, b):\\n    return a + b", tests="assert add(1, 2) == 3").ok

`ok` with tests means that the last line after them was reached: no exit code, no output and no exception of the program's can
pretend it. What remains possible is in dsv3.evals.jail's header, which does the work; this file is its caller's side.
"""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ISOLATIONS = ("auto", "namespaces", "seccomp", "best-effort", "none")
_GRACE = 30.0  # seconds beyond a job's own that the keeper may take to answer


class SandboxError(RuntimeError):
    """The keeper failed, or there is none: the program was not judged."""


class IsolationError(SandboxError):
    """No isolation is to be had here."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one program and all it starts.

    Attributes:
        seconds: by the clock, and of CPU in each process.
        memory_mb, disk_mb: MB (2^20 bytes) of memory, and of files in its folder.
        processes: at once, threads counted; isolation "seccomp" allows threads only.
        output_kb: kB (2^10 bytes) that it may print on both streams.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    disk_mb: int = 16
    processes: int = 16
    open_files: int = 64
    output_kb: int = 64

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.1), ("memory_mb", 64), ("disk_mb", 1), ("processes", 1), ("open_files", 16)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")
        if self.output_kb < 1:
            raise ValueError(f"output_kb is {self.output_kb}: give at least 1")


@dataclass(frozen=True)
class Result:
    """What came of a program.

    Attributes:
        ok: it ended well: with tests, they ran to their last line; without, exit code 0.
        exit: its exit code, minus the signal's number if one ended it, None if it was killed here.
        killed: why: "time", "memory", "output" or "files"; None if it ended by itself.
        stdout, stderr: what it printed, cut at the limit.
    """

    ok: bool
    exit: int | None
    killed: str | None
    stdout: str
    stderr: str
    seconds: float
    isolation: str

    @property
    def timed_out(self) -> bool:
        return self.killed == "time"


@dataclass(frozen=True, kw_only=True)
class Program:
    """Code to run as __main__, tests to run after it in the same names, and what it reads on stdin."""

    code: str
    tests: str | None = None
    stdin: str = ""


class Sandbox:
    """Keepers, each with one program at a time; may be used from several threads.

    Args:
        isolation: "auto": the strongest there is, and a refusal if there is none; "namespaces" or "seccomp": that one;
            "best-effort": the strongest there is, or else none; "none": only rlimits.
        packages: let programs import this environment's packages (numpy and such), not only the standard library.
        workers: programs at once.

    Raises:
        ValueError: no such isolation.
        IsolationError: there is none here.
    """

    def __init__(
        self, limits: Limits = Limits(), *, isolation: str = "auto", packages: bool = False, workers: int = 1
    ) -> None:
        if isolation not in ISOLATIONS:
            raise ValueError(f"isolation is {isolation!r}: give one of {', '.join(ISOLATIONS)}")
        if workers < 1:
            raise ValueError(f"workers is {workers}: give at least 1")
        self.limits, self.packages, self._wanted = limits, packages, isolation
        self._keepers: queue.LifoQueue[_Keeper | None] = queue.LifoQueue()
        first = _Keeper(isolation)
        self.isolation, self.workers = first.level, workers
        for keeper in (*[None] * (workers - 1), first):
            self._keepers.put(keeper)

    def run(self, code: str, *, tests: str | None = None, stdin: str = "", limits: Limits | None = None) -> Result:
        """Run one program to its end; waits for a free keeper.

        Args:
            tests: code to run after the program, in its names. limits: other than the sandbox's.

        Raises:
            SandboxError: the keeper died or could not start the program. The next run has a new one.
        """
        keeper = self._keepers.get()
        try:
            keeper = keeper or _Keeper(self._wanted)
            told = keeper.ask(_job(Program(code=code, tests=tests, stdin=stdin), limits or self.limits, self.packages))
        except BaseException:
            if keeper is not None:
                keeper.close()
            keeper = None
            raise
        finally:
            self._keepers.put(keeper)
        if "error" in told:
            raise SandboxError(f"the program could not be started: {told['error']}")
        fields = {name: told[name] for name in ("ok", "exit", "killed", "stdout", "stderr", "seconds")}
        return Result(**fields, isolation=keeper.level)

    def run_all(self, programs: Iterable[Program], limits: Limits | None = None) -> list[Result]:
        """Each of them, `workers` at once; results in their order."""
        with ThreadPoolExecutor(self.workers) as pool:
            work = [pool.submit(self.run, p.code, tests=p.tests, stdin=p.stdin, limits=limits) for p in programs]
            return [future.result() for future in work]

    def close(self) -> None:
        for _ in range(self.workers):
            keeper = self._keepers.get()
            if keeper is not None:
                keeper.close()
            self._keepers.put(None)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Keeper:
    """The process at the other end (dsv3.evals.jail), and the isolation that it found."""

    def __init__(self, isolation: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="dsv3-sandbox-")
        root = str(Path(__file__).resolve().parents[2])
        start = f"import sys; sys.path.insert(0, {root!r}); from dsv3.evals import jail; jail.main()"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        try:
            found = self.ask({"isolation": isolation, "folder": self._folder}, 60.0)
            if found["level"] is None:
                raise IsolationError(
                    f"no isolation for programs here ({'; '.join(found['faults'])}): run where user namespaces or Landlock are "
                    'allowed, or accept that a program may do what you may do: isolation="best-effort"'
                )
        except BaseException:
            self.close()
            raise
        self.level: str = found["level"]

    def ask(self, message: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """One line there, one line back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        wait = message.get("seconds", 0) + _GRACE if seconds is None else seconds
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            line = _line_within(self._process.stdout, wait)
        except OSError as error:
            raise SandboxError(f"the sandbox's keeper is gone: {error}") from error
        if not line:
            self._process.kill()
            words = self._process.stderr.read().decode("utf-8", "replace") if self._process.stderr else ""
            raise SandboxError(f"the sandbox's keeper ended: {words.strip()[-500:] or 'no answer'}")
        return json.loads(line)

    def close(self) -> None:
        """It ends when nobody writes to it any more, and what it runs ends with it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # bytes for a keeper that is gone
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def _line_within(stream: Any, seconds: float) -> bytes:
    """A line of the stream, or nothing if it ends or is silent that long."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(seconds) else b""


def _job(program: Program, limits: Limits, packages: bool) -> dict[str, Any]:
    sizes = asdict(limits)
    memory, disk, output = sizes.pop("memory_mb") << 20, sizes.pop("disk_mb") << 20, sizes.pop("output_kb") << 10
    return {**asdict(program), **sizes, "memory": memory, "disk": disk, "output": output, "packages": packages}


def run_python(
    code: str, *, tests: str | None = None, stdin: str = "", limits: Limits = Limits(), isolation: str = "auto"
) -> Result:
    """One program in a sandbox of its own. For many, keep a `Sandbox`: starting it costs more than running a program."""
    with Sandbox(limits, isolation=isolation) as box:
        return box.run(code, tests=tests, stdin=stdin)
