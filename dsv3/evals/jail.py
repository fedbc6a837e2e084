"""The keeper of programs that nobody trusts: a small process that takes jobs, a JSON line each, and tells what came of them.

    dsv3.evals.sandbox --(stdin, stdout)--> keeper --> a job's processes

    namespaces  keeper -> door -> init -> program. The door enters new user, mount, process, network, IPC and host name
                namespaces; init is process 1 in there: it makes a root of read-only Python and an empty folder, watches memory, and
                takes everything down with it when it ends, whatever the program left behind.
    seccomp     keeper -> program, alone: it cannot fork nor signal, and Landlock lets it open Python and its folder only.
    none        keeper -> program under rlimits and nothing more: for those who said so.

All three: rlimits, an empty environment, a wall clock, a bound on what it prints and writes. The program's end is told apart
from an early exit by a secret that is read only after its tests (`_BOOT`). Code that runs in the tests' own process can still
please them without a right answer: by an object that calls itself equal to all (unittest.mock.ANY is one), or by this very
protocol. Nothing inside one process can prevent that: where programs are rewarded, look at those that are paid.
Started with -I -S, so: the standard library, dsv3.evals.confine, no threads. Does not: run on Windows.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dsv3.evals import confine
from dsv3.evals.root import DEVICES, make_root, readable_paths

# Runs in the program's interpreter. Everything it needs later is bound before the program's code can replace it.
_BOOT = """
def boot():
    import os, sys, json
    read, write, leave, loads, run, make = os.read, os.write, os._exit, json.loads, exec, compile
    def part():
        size, text = int(read(3, 12)), b""
        while len(text) < size:
            text += read(3, size - len(text))
        return text.decode("utf-8", "surrogatepass")
    job, space, flushes = loads(part()), {"__name__": "__main__"}, (sys.stdout.flush, sys.stderr.flush)
    sys.path[:] = [p for p in sys.path if p] + job["path"]
    sys.argv = ["program"]
    run(make(job["code"], "<program>", "exec"), space)
    tests = part()
    if tests:
        run(make(tests, "<tests>", "exec"), space)
    for flush in flushes:
        flush()
    write(4, part().encode())
    leave(0)
boot()
"""
_NAMESPACES = 0x10000000 | 0x20000000 | 0x00020000 | 0x40000000 | 0x08000000 | 0x04000000  # user pid mount net ipc uts
_INNER = 1000  # the program's user inside
_WORD = 120  # where a program that cannot start says why; an exec closes it
_POLL = 0.02  # seconds between looks at memory and folder


@dataclass
class Job:
    """What one program runs with. Sizes in bytes."""

    code: str
    tests: str | None
    stdin: str
    seconds: float
    memory: int
    processes: int
    disk: int
    open_files: int
    output: int
    packages: bool
    others: int = 0  # threads that RLIMIT_NPROC counts besides the program's
    python: str = field(default_factory=lambda: os.path.realpath(sys.executable))
    secret: str = field(default_factory=lambda: secrets.token_hex(16))


# -- the program ---------------------------------------------------------------------------------------------------------


def become_program(job: Job, fds: tuple[int, ...], folder: str, *, level: str, may_fork: bool) -> NoReturn:
    """Turn this forked process into the program: stdin, stdout, stderr, its parts and the verdict as 0 to 4, nothing else open."""
    os.setsid()
    high = [os.dup2(fd, 100 + i, inheritable=False) for i, fd in enumerate(fds)]
    for i, fd in enumerate(high):
        os.dup2(fd, i, inheritable=True)
    os.closerange(len(fds), _WORD)
    os.closerange(_WORD + 1, 4096)
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.chdir(folder)
    paths = sysconfig.get_paths()
    confine.limit_resources(
        seconds=job.seconds,
        memory=job.memory,
        file_size=job.disk,
        open_files=job.open_files,
        processes=job.processes + job.others,
    )
    if level != "none":
        confine.drop_bounding_set()
        if level == "namespaces" and os.getuid() == 0:
            os.setgroups([])
            os.setresgid(_INNER, _INNER, _INNER)
            os.setresuid(_INNER, _INNER, _INNER)
        if level == "seccomp":
            confine.no_new_privileges()
            confine.landlock(
                [*readable_paths(job.packages), *filter(os.path.exists, DEVICES[1:])], [folder, "/dev/null"]
            )
        confine.drop_capabilities()
        confine.no_new_privileges()
        confine.filter_for(alone=level == "seccomp", may_fork=may_fork).install()
    env = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    boot = _BOOT
    if job.packages:
        boot = f"import sys; sys.path += {[paths['purelib'], paths['platlib']]!r}\n{_BOOT}"
    os.execve(job.python, [job.python, "-I", "-S", "-B", "-X", "utf8", "-c", boot], env)


def _kernel() -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, n)) or 0) for n in os.uname().release.split(".")[:2])


def _tasks_of_user() -> int:
    """Threads that this user runs already: RLIMIT_NPROC counts them too."""
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


# -- inside the namespaces -----------------------------------------------------------------------------------------------


def be_init(job: Job, fds: tuple[int, ...], status: int, root: str, may_fork: bool) -> NoReturn:
    """Process 1: start the program, reap, watch memory, tell, and end, which ends all."""
    told: dict[str, Any] = {}
    try:
        confine.checked("prctl", 1, signal.SIGKILL, 0, 0, 0)  # dies with the door
        confine.libc().prctl(4, 0, 0, 0, 0)  # not dumpable: no reading of its memory
        make_root(root, packages=job.packages, size=job.disk, user=_INNER)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        program = os.fork()
        if not program:
            _run_or_tell(job, fds, status, "/work", "namespaces", may_fork)
        for fd in fds:
            os.close(fd)
        page = os.sysconf("SC_PAGE_SIZE")
        while "exit" not in told and "killed" not in told:
            signal.sigtimedwait({signal.SIGCHLD}, _POLL)
            for pid, state, usage in _reap():
                if pid == program:
                    told = {"exit": os.waitstatus_to_exitcode(state), "cpu": usage.ru_utime + usage.ru_stime}
            if (
                sum(_resident(name) for name in os.listdir("/proc") if name.isdigit() and name != "1") * page
                > job.memory
            ):
                told["killed"] = "memory"
    except BaseException as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    _tell(status, told)
    os._exit(0)


def _reap() -> list[tuple[int, int, Any]]:
    ended = []
    while True:
        try:
            pid, state, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended.append((pid, state, usage))


def _resident(pid: str) -> int:
    """Pages in memory, those it shares with others (libraries, a parent's before they are written) not counted."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            words = file.read().split()
        return int(words[1]) - int(words[2])
    except (OSError, IndexError, ValueError):  # it ended meanwhile
        return 0


def _tell(status: int, told: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        os.write(status, json.dumps(told).encode() + b"\n")


def _run_or_tell(job: Job, fds: tuple[int, ...], status: int, folder: str, level: str, may_fork: bool) -> NoReturn:
    """The program, or word of why it could not start."""
    try:
        os.dup2(status, _WORD, inheritable=False)
        become_program(job, fds, folder, level=level, may_fork=may_fork)
    except BaseException as error:
        _tell(_WORD, {"error": f"{type(error).__name__}: {error}"})
    os._exit(127)


def open_door(job: Job, fds: tuple[int, ...], status: int, root: str, go: tuple[int, ...]) -> NoReturn:
    """Enter the namespaces, wait for the keeper to say who is who in there, start init, and end with it."""
    ready, answer, *others = go
    try:
        confine.checked("unshare", _NAMESPACES)
        confine.checked("prctl", 1, signal.SIGKILL, 0, 0, 0)  # dies with the keeper; unshare would clear it
        for fd in others:  # the keeper's ends
            os.close(fd)
        os.write(ready, b"u")
        mapped = os.read(answer, 1)
        os.close(ready)
        os.close(answer)
        if not mapped:
            raise OSError(1, "the user map was refused")
        init = os.fork()
        if not init:
            be_init(job, fds, status, root, may_fork=mapped != b"0")
        for fd in (*fds, status):
            os.close(fd)
        os.waitpid(init, 0)
    except BaseException as error:
        _tell(status, {"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


# -- the keeper ----------------------------------------------------------------------------------------------------------


def _map_users(door: int) -> bytes:
    """Write the door's user and group maps. b"2": root inside, and a user of no one's for the program; b"1": the program is
    this user inside; b"0": the same, but this user is root, whose processes no rlimit counts; b"": refused."""
    user, group, free = os.geteuid(), os.getegid(), 1_800_000_000 + os.getpid()
    tries = [(f"0 0 1\n{_INNER} {i} 1\n", f"0 0 1\n{_INNER} {i} 1\n", b"2") for i in (free, 65534) if user == 0]
    tries.append((f"{_INNER} {user} 1\n", f"{_INNER} {group} 1\n", b"1" if user else b"0"))
    for users, groups, answer in tries:
        try:
            with open(f"/proc/{door}/uid_map", "w") as file:
                file.write(users)
        except OSError:
            continue
        try:
            if answer != b"2":
                with open(f"/proc/{door}/setgroups", "w") as file:
                    file.write("deny")
            with open(f"/proc/{door}/gid_map", "w") as file:
                file.write(groups)
        except OSError:
            return b""
        return answer
    return b""


def _start(job: Job, level: str, fds: tuple[int, ...], status: int, folder: str) -> int:
    """Fork what leads to the program; the process id to wait for."""
    if level != "namespaces":
        child = os.fork()
        if not child:
            _run_or_tell(job, fds, status, folder, level, may_fork=level == "none")
        return child
    (ready, said), (answer, tell) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        open_door(job, fds, status, folder, (said, answer, tell, ready))
    os.close(said)
    os.close(answer)
    if os.read(ready, 1):
        with contextlib.suppress(BrokenPipeError):
            os.write(tell, _map_users(child))
    os.close(ready)
    os.close(tell)
    return child


def run_job(job: Job, level: str, folder: str) -> dict[str, Any]:
    """Run one program to its end; what came of it, as JSON."""
    began = time.monotonic()
    counted = level != "namespaces" or _kernel() < (5, 14)  # else each user namespace has a count of its own
    within = 2 if level == "namespaces" and os.geteuid() else 0  # the door and init: for root they are another user's
    job.others = within + (_tasks_of_user() if counted and (level != "namespaces" or os.geteuid()) else 0)
    work = tempfile.mkdtemp(dir=folder)
    parts = [json.dumps({"code": job.code, "path": []}), job.tests or "", job.secret]
    words = [part.encode("utf-8", "surrogatepass") for part in parts]
    script = _file(work, b"".join(b"%012d" % len(word) + word for word in words))
    stdin = _file(work, job.stdin.encode("utf-8", "surrogatepass"))
    pipes = [os.pipe() for _ in range(4)]
    (out, out_in), (err, err_in), (verdict, verdict_in), (status, status_in) = pipes
    inner = (stdin, out_in, err_in, script, verdict_in)
    child = _start(job, level, inner, status_in, work)
    for fd in (*inner, status_in):
        os.close(fd)
    watch = Watch(job, level, child, work, {out: "out", err: "err", verdict: "verdict", status: "status"}, began)
    try:
        told = watch.until_end()
    finally:
        watch.kill()
        for fd in (out, err, verdict, status):
            os.close(fd)
        shutil.rmtree(work, ignore_errors=True)
    return told | {"seconds": time.monotonic() - began}


def _file(folder: str, content: bytes) -> int:
    """A nameless file, open for reading."""
    handle, path = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    reader = os.open(path, os.O_RDONLY)
    os.unlink(path)
    return reader


class Watch:
    """Reads what a job writes, and ends it when it goes beyond its bounds."""

    def __init__(self, job: Job, level: str, child: int, folder: str, names: dict[int, str], began: float) -> None:
        self.job, self.level, self.child, self.folder, self.names = job, level, child, folder, names
        self.until = began + job.seconds
        self.got = dict.fromkeys(names.values(), b"")
        self.ended: tuple[int, Any] | None = None

    def until_end(self) -> dict[str, Any]:
        killed, looks = None, 0
        poller = select.poll()
        for fd in (0, *self.names):
            poller.register(fd, select.POLLIN if fd else 0)  # of stdin only that the other end is gone
        opened = set(self.names)
        while opened and killed is None and self.ended is None:
            left = self.until - time.monotonic()
            for fd, event in poller.poll(max(0, min(left, _POLL if self.level != "namespaces" else left)) * 1000 + 1):
                if not fd and event & (select.POLLHUP | select.POLLERR):
                    self.kill()
                    raise EOFError("nobody waits for the answer")
                if fd and not self._read(fd):
                    poller.unregister(fd)
                    opened.discard(fd)
            looks += 1
            if len(self.got["out"]) + len(self.got["err"]) > self.job.output:
                killed = "output"
            elif time.monotonic() >= self.until:
                killed = "time"
            elif self.level == "seccomp" and looks % 5 == 0 and _size(self.folder) > self.job.disk:
                killed = "files"
            self._wait()
        self.kill()
        self._drain(opened)
        return self._verdict(killed)

    def _read(self, fd: int) -> bytes:
        piece = os.read(fd, 65536)
        self.got[self.names[fd]] += piece
        return piece

    def _wait(self) -> None:
        if self.ended is None:
            pid, state, usage = os.wait4(self.child, os.WNOHANG)
            self.ended = (state, usage) if pid else None

    def kill(self) -> None:
        """All of it: the door takes init with it, and init its namespace; a lone program has nobody; else the group."""
        if self.level == "none":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child, signal.SIGKILL)
        if self.ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGKILL)
            _, state, usage = os.wait4(self.child, 0)
            self.ended = (state, usage)

    def _drain(self, opened: set[int]) -> None:
        """What is still in the pipes; they close when the last process of the job is gone."""
        until = time.monotonic() + 5
        while opened and time.monotonic() < until:
            for fd in select.select(list(opened), [], [], 0.05)[0]:
                room = len(self.got[self.names[fd]]) <= self.job.output + 65536
                if not (self._read(fd) if room else os.read(fd, 65536)):
                    opened.discard(fd)
            if self.level == "none":
                break

    def _verdict(self, killed: str | None) -> dict[str, Any]:
        lines: list[dict[str, Any]] = [json.loads(line) for line in self.got["status"].splitlines()]
        job, told = self.job, (lines or [{}])[0]  # the first word is the nearest to the fault
        assert self.ended is not None
        if self.level != "namespaces" and "error" not in told:
            usage = self.ended[1]
            told = told | {"exit": os.waitstatus_to_exitcode(self.ended[0]), "cpu": usage.ru_utime + usage.ru_stime}
        killed = killed or told.get("killed", None)
        code = told.get("exit")
        if killed is None and (code == -signal.SIGXCPU or (code == -signal.SIGKILL and told["cpu"] >= job.seconds)):
            killed = "time"
        reached = self.got["verdict"] == job.secret.encode()
        clean = killed is None and code == 0
        return {
            "ok": clean and (reached or job.tests is None),
            "exit": code if killed is None else None,
            "killed": killed,
            "stdout": self.got["out"][: job.output].decode("utf-8", "replace"),
            "stderr": self.got["err"][: job.output].decode("utf-8", "replace"),
        } | ({"error": told["error"]} if "error" in told else {})


def _size(folder: str) -> int:
    """Bytes under a folder, each entry counted as a block at least."""
    total = 0
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):
                total += max(4096, os.lstat(os.path.join(here, name)).st_blocks * 512)
    return total


def _levels(wanted: str) -> list[str]:
    names = ["namespaces", "seccomp", "none"]
    return {"auto": names[:2], "best-effort": names}.get(wanted, [wanted])


def _probe(wanted: str, folder: str) -> dict[str, Any]:
    """The strongest level that works here, or why none does."""
    faults = []
    for level in _levels(wanted):
        job = Job("print(1)", "", "", 20.0, 1 << 30, 4, 1 << 20, 32, 1000, False)
        told = run_job(job, level, folder)
        if told["ok"] and told["stdout"] == "1\n":
            return {"level": level, "faults": faults}
        faults.append(f"{level}: {told.get('error') or told['stderr'].strip()[-200:] or told}")
    return {"level": None, "faults": faults}


def main() -> None:
    """Speak JSON lines: first the wanted isolation and a folder for what is needed meanwhile, then a job a line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's Ctrl-C is the caller's to answer: it closes stdin
    reader, answer = sys.stdin.buffer, os.fdopen(os.dup(1), "w")
    folder, level = "", None
    try:
        for line in iter(reader.readline, b""):
            message = json.loads(line)
            if "isolation" in message:
                folder = message["folder"]
                told = _probe(message["isolation"], folder)
                level = told["level"]
            else:
                assert level is not None
                told = run_job(Job(**message), level, folder)
            answer.write(json.dumps(told) + "\n")
            answer.flush()
    except (EOFError, BrokenPipeError):
        pass
    finally:
        if folder:  # the caller removes it too: whichever of the two lives longer
            shutil.rmtree(folder, ignore_errors=True)
