"""Programs that mean harm. Each bomb is bounded: were the isolation broken, the test fails and the machine stays."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv3.evals.sandbox import Limits, Program, Sandbox, SandboxError, run_python

LIMITS = Limits(seconds=5, memory_mb=192, disk_mb=4, processes=8, output_kb=16)
QUICK = Limits(seconds=0.5, memory_mb=192, disk_mb=4, processes=8, output_kb=16)


@pytest.fixture(scope="module", params=["namespaces", "seccomp"])
def box(request):
    try:
        made = Sandbox(LIMITS, isolation=request.param)
    except SandboxError as error:
        pytest.skip(f"this kernel or container has no {request.param}: {error}")
    with made:
        yield made


def outside(pattern: str) -> list[str]:
    """Command lines of this machine's processes that hold the pattern."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue
            if pattern in line:
                found.append(line)
    return found


def test_a_program_runs_reads_its_input_and_is_judged_by_its_tests(box):
    run = box.run("print(input()[::-1])", stdin="abc\n")
    assert (run.ok, run.exit, run.stdout, run.killed, run.isolation) == (True, 0, "cba\n", None, box.isolation)
    right, wrong = (box.run(f"def add(a, b): return a {sign} b", tests="assert add(1, 2) == 3") for sign in "+-")
    assert right.ok
    assert (wrong.ok, wrong.exit) == (False, 1)
    assert "AssertionError" in wrong.stderr
    assert not box.run("def broken(:").ok
    assert box.run("import math, json, re, collections, itertools, heapq, random, threading").ok
    assert box.run("open('a', 'w').write('x'); import tempfile; tempfile.NamedTemporaryFile()").ok


@pytest.mark.parametrize(
    "trick",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "exit()",
        "import os; f = lambda: os._exit(0)",
        "import sys\ndef f(): sys.exit(0)",
        "import atexit, os; atexit.register(lambda: os._exit(0))\ndef f(): raise ValueError",
        "import sys; sys.excepthook = lambda *a: None\ndef f(): return 2",
        "import os, threading; threading.Timer(0.05, lambda: os._exit(0)).start()\ndef f():\n while 1: pass",
        "import builtins, os; builtins.exec = builtins.compile = lambda *a: None; os._exit = os.write = print\ndef f(): return 2",
        "print('ok', 'passed', 'True')\ndef f(): return 2",
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'1' * 32)\n except OSError: pass\ndef f(): return 2",
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'x')\n except OSError: pass\ndef f(): return 2\nos._exit(0)",
        "import os; os.execv('/bin/true', ['true'])",
        "def check(*a): pass\ndef f(): return 2",
        "while True: pass",
        "",
    ],
)
def test_tricks_of_leaving_early_are_no_success(box, trick):
    run = box.run(trick, tests="def check(f):\n    assert f() == 1\ncheck(f)", limits=QUICK)
    assert not run.ok


def test_endless_programs_are_killed_whatever_signals_they_ignore(box):
    ignore = "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\n"
    for body in ("while True: pass", "import time\nwhile True: time.sleep(9)", "import signal; signal.pause()"):
        run = box.run(ignore + body, limits=QUICK)
        assert (run.ok, run.killed, run.exit) == (False, "time", None)
        assert run.timed_out


def test_signals_reach_nobody_else(box):
    """kill(-1), the parent, the group, process 1: the keeper and a bystander live, and the next program runs."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = f"""
import os, signal
for pid in (-1, os.getppid(), 1, 0, {bystander.pid}, {os.getpid()}):
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            if pid != 0 or number != signal.SIGKILL: os.kill(pid, number)
        except OSError: pass
"""
    try:
        box.run("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + code)
        assert bystander.poll() is None
        assert box.run("print(1)").ok
    finally:
        bystander.kill()
        bystander.wait()
    own = box.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tests="")
    assert (own.ok, own.exit) == (False, -9)


def test_a_fork_bomb_is_bounded_and_leaves_nothing(box):
    mark = "bomb-7f3a9"
    code = f"""
import os, time, sys
count = 0
for i in range(60):
    try:
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)  # {mark}'])
        count += 1
    except OSError: pass
print(count)
"""
    run = box.run(code)
    assert int(run.stdout) <= (LIMITS.processes if box.isolation == "namespaces" else 0)
    assert outside(mark) == []
    threads = "import threading, time\nfor i in range(200): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    assert not box.run(threads, limits=QUICK).ok


def test_daemons_die_with_their_program(box):
    mark = "daemon-51c2e"
    code = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)  # {mark}'])
    os._exit(0)
os.wait()
"""
    assert box.run(code).ok is (box.isolation == "namespaces")
    assert outside(mark) == []


def test_memory_is_bounded(box):
    run = box.run("a = bytearray(1 << 30)")
    assert "MemoryError" in run.stderr
    assert not run.ok
    many = """
import os, time
for i in range(6):
    if os.fork() == 0:
        a = bytearray(60 << 20)
        for j in range(0, len(a), 4096): a[j] = 1
        time.sleep(4)
        os._exit(0)
time.sleep(4)
"""
    run = box.run(many)
    assert run.killed == "memory" if box.isolation == "namespaces" else "PermissionError" in run.stderr


def test_output_is_bounded(box):
    for stream in ("stdout", "stderr"):
        run = box.run(f"import sys\nfor i in range(10**6): sys.{stream}.write('x' * 100)")
        assert (run.ok, run.killed) == (False, "output")
        assert len(getattr(run, stream)) == LIMITS.output_kb << 10
    assert not box.run("import os\nfor i in range(10**5): os.write(4, b'x' * 4096)", limits=QUICK).ok


def test_files_are_bounded_and_gone_afterwards(box):
    run = box.run("f = open('big', 'wb')\nfor i in range(64): f.write(bytes(1 << 20))")
    assert not run.ok
    many = "import time\nfor n in range(40):\n with open(str(n), 'wb') as f: f.write(bytes(1 << 20))\n time.sleep(.02)"
    assert not box.run(many).ok
    names = "import time\nfor n in range(5000): open(str(n), 'w').close()\ntime.sleep(1)"
    assert not box.run(names).ok
    assert not box.run("fs = [open('a', 'w') for i in range(200)]").ok
    assert box.run("import os; print(os.listdir('.'))").stdout == "[]\n"


def test_files_outside_can_be_neither_deleted_nor_written_nor_read(box, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept.txt").write_text("a word of ours")
    (victim / "kept.txt").chmod(0o666)
    victim.chmod(0o777)
    code = f"""
import os, shutil
victim = {str(victim)!r}
for act in (lambda: shutil.rmtree(victim), lambda: os.unlink(victim + '/kept.txt'), lambda: os.rename(victim, victim + '2'),
            lambda: open(victim + '/kept.txt', 'w').write('x'), lambda: os.truncate(victim + '/kept.txt', 0),
            lambda: os.chmod(victim, 0), lambda: open(victim + '/new', 'w'), lambda: os.symlink(victim, 'link'),
            lambda: open('link/kept.txt', 'a').write('x'), lambda: os.utime(victim, (0, 0)), lambda: os.mkdir(victim + '/d'),
            lambda: print(open(victim + '/kept.txt').read()), lambda: os.link(victim + '/kept.txt', 'hard')):
    try: act()
    except OSError: pass
for path in (os.path.dirname(os.__file__) + '/x', '/usr/x', '/etc/x', '/x'):
    try: open(path, 'w')
    except OSError: pass
    else: print('written', path)
"""
    before = victim.stat()
    run = box.run(code)
    assert run.ok
    assert run.stdout == ""
    assert [p.name for p in victim.iterdir()] == ["kept.txt"]
    assert (victim / "kept.txt").read_text() == "a word of ours"
    assert victim.stat().st_mtime == before.st_mtime
    assert victim.stat().st_mode == before.st_mode


def test_home_environment_and_other_processes_are_out_of_sight(box, monkeypatch):
    monkeypatch.setenv("A_SECRET_OF_OURS", "4711-hush")
    code = f"""
import os, glob
for path in ({str(Path.home())!r}, {str(Path.cwd())!r}, '/etc/shadow', '/proc/{os.getpid()}/environ', '/var', '/home'):
    try: print(path, os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read()[:50])
    except OSError: pass
for path in glob.glob('/proc/[0-9]*/environ') + [f'/proc/{{os.getppid()}}/environ', '/proc/1/environ', '/proc/1/mem']:
    try: print(path, b'4711-hush' in open(path, 'rb').read(100000))
    except OSError: pass
print(os.environ)
"""
    run = Sandbox(LIMITS, isolation=box.isolation).run(code)  # a keeper that starts after the variable was set
    assert "4711" not in run.stdout
    assert "True" not in run.stdout
    for word in ("/etc/shadow", f"/proc/{os.getpid()}/", "bashrc", "pyproject.toml"):
        assert word not in run.stdout


def test_there_is_no_network(box):
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    port = server.getsockname()[1]
    code = f"""
import socket
for family, address in ((socket.AF_INET, ('127.0.0.1', {port})), (socket.AF_INET6, ('::1', {port}))):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            s = socket.socket(family, kind); s.settimeout(1); s.connect(address); s.send(b'hello'); print('connected')
        except OSError: pass
for family in (40, 16, 17, 38):  # vsock, netlink, packet, alg
    try: socket.socket(family, socket.SOCK_RAW if family != 40 else socket.SOCK_STREAM); print('socket', family)
    except OSError: pass
"""
    run = box.run(code)
    assert run.ok
    assert run.stdout == ""
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


def test_ways_back_to_more_rights_are_shut(box):
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
said = []
for flags in (0x10000000, 0x20000000, 0x00020000, 0x40000000):
    if libc.unshare(flags) == 0: said.append('unshare')
if libc.mount(b'none', b'/', None, 32 | 4096, None) == 0: said.append('mount')
if libc.ptrace(0, 0, 0, 0) == 0: said.append('ptrace')
if libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0: said.append('io_uring')
libc.setuid(0)
try: open('/etc/shadow'); said.append('setuid')
except OSError: pass
import resource
try: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); said.append('rlimit')
except (ValueError, OSError): pass
print(said)
"""
    assert box.run(code).stdout == "[]\n"


def test_many_run_at_once_and_from_any_thread():
    with Sandbox(LIMITS, workers=2) as box:
        programs = [Program(code=f"x = {i}", tests="assert x % 3, x\nprint(x)") for i in range(8)]
        results = box.run_all(programs)
        assert [r.ok for r in results] == [i % 3 != 0 for i in range(8)]
        said = []
        threads = [threading.Thread(target=lambda: said.append(box.run("print(7)").stdout)) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert said == ["7\n"] * 3


def test_a_keeper_that_dies_is_said_and_replaced():
    with Sandbox(LIMITS) as box:
        keeper = box._keepers.get()
        keeper._process.kill()
        keeper._process.wait()
        box._keepers.put(keeper)
        with pytest.raises(SandboxError, match="keeper"):
            box.run("pass")
        assert not Path(keeper._folder).exists()
        assert box.run("pass").ok
        folder = Path(box._keepers.queue[0]._folder)
        assert folder.is_dir()
    assert not folder.exists()


def test_a_caller_that_dies_takes_its_programs_along():
    code = "from dsv3.evals.sandbox import *\nSandbox(Limits(seconds=40)).run('import time; time.sleep(40)')"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    family: set[int] = set()
    for _ in range(100):
        family = below(caller.pid)
        if len(family) >= 2:
            break
        time.sleep(0.1)
    time.sleep(0.3)
    family |= below(caller.pid)
    caller.kill()
    caller.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in family):
            break
        time.sleep(0.1)
    assert len(family) >= 2
    assert [pid for pid in family if Path(f"/proc/{pid}").exists()] == []


def below(pid: int) -> set[int]:
    """Process ids of all that descend from pid."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def test_without_isolation_it_refuses_unless_told(monkeypatch):
    import dsv3.evals.sandbox as module

    real = module._Keeper.ask

    def none_here(self, message, seconds=None):
        if message.get("isolation") in ("auto", "namespaces", "seccomp"):
            return {"level": None, "faults": ["namespaces: EPERM", "seccomp: ENOSYS"]}
        return real(self, {**message, "isolation": "none"} if "isolation" in message else message, seconds)

    monkeypatch.setattr(module._Keeper, "ask", none_here)
    with pytest.raises(SandboxError, match=r"namespaces: EPERM; seccomp: ENOSYS.*best-effort"):
        Sandbox()
    with Sandbox(LIMITS, isolation="best-effort") as box:
        assert box.isolation == "none"
        run = box.run("print(6)", tests="assert True")
        assert (run.ok, run.isolation, run.stdout) == (True, "none", "6\n")
        assert box.run("while True: pass", limits=QUICK).killed == "time"
        assert not box.run("import os; os._exit(0)", tests="").ok
    with pytest.raises(ValueError, match="isolation is 'strong'"):
        Sandbox(isolation="strong")
    with pytest.raises(ValueError, match="seconds is 0"):
        Limits(seconds=0)


def test_one_program_alone():
    assert run_python("print(1)", limits=LIMITS).stdout == "1\n"
