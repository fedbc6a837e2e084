"""What a process gives up for good: system calls (seccomp), files (Landlock), capabilities, resources. Linux, through ctypes.

A seccomp filter is a classic BPF program over {nr, arch, args[6]} of each call: `Filter` assembles lines that compare a number,
or words of an argument, and answer EPERM. clone3, whose flags lie in memory where a filter cannot look, answers ENOSYS, and
libc falls back to clone. A call of another architecture's table kills. Numbers are written out for x86-64 and arm64.

    base     no way to more rights: namespaces, mounts, ptrace, bpf, io_uring, keys, modules; sockets of the Unix family only
             (a network namespace does not hold back AF_VSOCK)
    alone    besides, for a process with no namespaces round it: no new process, no signal to others, no socket, no change of
             a file's mode, owner, times or length by path. Landlock then bounds which files it can open at all.

Source: seccomp(2), landlock(7), capabilities(7). Standard library only: dsv3.evals.jail runs without site-packages.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable

# name: (x86-64, arm64); None where the table has no such call.
CALLS: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "socket": (41, 198),
    "socketpair": (53, 199), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "fcntl": (72, 25),
    "prlimit64": (302, 261), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89), "quotactl": (179, 60), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "fsopen": (430, 430), "fsmount": (432, 432), "move_mount": (429, 429),
    "open_tree": (428, 428), "mount_setattr": (442, 442), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "setsid": (112, 157),
    "setpgid": (109, 154), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "truncate": (76, 45),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "mknod": (133, None),
    "mknodat": (259, 33), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}  # fmt: skip

_CONDITIONAL = frozenset({"clone", "clone3", "socket", "socketpair", "kill", "tgkill", "fcntl", "prlimit64"})
_ALONE = frozenset(
    [
        "fork", "vfork", "tkill", "pidfd_open", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo",
        "setsid", "setpgid", "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat",
        "truncate", "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
        "setxattrat", "removexattrat", "utime", "utimes", "futimesat", "utimensat", "mknod", "mknodat", "shmget",
        "msgget", "semget", "mq_open", "setpriority", "sched_setscheduler", "sched_setparam", "sched_setattr",
        "sched_setaffinity", "ioprio_set", "migrate_pages", "move_pages",
    ]
)  # fmt: skip
_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _DENY = 0x7FFF0000, 0x80000000, 0x00050000
_CLONE_NAMESPACES = 0x7E020080  # NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_CLONE_THREAD = 0x10000
_AF_UNIX, _F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 1, 8, 10, 15
_NO_NEW_PRIVS, _CAPBSET_DROP, _SET_SECCOMP, _SET_SECUREBITS = 38, 24, 22, 28

# Landlock's rights by version (landlock(7)): what a version does not know must not be asked of it.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def checked(name: str, *args: object) -> int:
    """A libc function that answers -1 with errno, raised as OSError."""
    result = getattr(libc(), name)(*args)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


class Filter:
    """A seccomp program under construction: lines are (code, jump if true, jump if false, constant)."""

    def __init__(self) -> None:
        machine = platform.machine()
        if machine not in _ARCH:
            raise OSError(errno.ENOSYS, f"seccomp: no table of system calls for {machine}")
        self._column, arch = _ARCH[machine]
        self._lines = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, arch), (_RET, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
        if machine == "x86_64":  # the x32 table shares the architecture's number
            self._lines += [(_JGE, 0, 1, 0x40000000), (_RET, 0, 0, _DENY | errno.EPERM)]

    def deny(self, name: str, code: int = errno.EPERM) -> None:
        number = CALLS[name][self._column]
        if number is not None:
            self._lines += [(_JEQ, 0, 1, number), (_RET, 0, 0, _DENY | code)]

    def deny_where(self, name: str, argument: int, tests: Iterable[tuple[int, int]], *, matches: bool = True) -> None:
        """EPERM where any test (code, constant) of the argument's low word is true, or else where none is."""
        number = CALLS[name][self._column]
        if number is None:
            return
        tests = list(tests)
        body = [(_LOAD, 0, 0, 16 + 8 * argument)]
        for i, (code, constant) in enumerate(tests):
            rest = len(tests) - 1 - i  # tests between this one and the denial
            last = rest == 0 and matches
            body.append((code, rest + (not matches), int(last), constant))
        body += [(_RET, 0, 0, _DENY | errno.EPERM), (_LOAD, 0, 0, 0)]
        self._lines += [(_JEQ, 0, len(body), number), *body]

    def install(self) -> None:
        """For this process and all its children, for good."""
        lines = [*self._lines, (_RET, 0, 0, _ALLOW)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
        head = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(lines), ctypes.addressof(program)))
        checked("prctl", _SET_SECCOMP, 2, head, 0, 0)


def filter_for(*, alone: bool, may_fork: bool) -> Filter:
    """The filter of a program; `alone`: with no namespaces round it. Call it in the process that will run the program."""
    filter = Filter()
    for name in sorted(set(CALLS) - _CONDITIONAL - _ALONE):
        filter.deny(name)
    filter.deny("clone3", errno.ENOSYS)
    filter.deny_where("clone", 0, [(_JSET, _CLONE_NAMESPACES)])
    if not may_fork:
        filter.deny("fork")
        filter.deny("vfork")
        filter.deny_where("clone", 0, [(_JSET, _CLONE_THREAD)], matches=False)
    if not alone:
        filter.deny_where("socket", 0, [(_JEQ, _AF_UNIX)], matches=False)
        return filter
    for name in sorted(_ALONE):
        filter.deny(name)
    filter.deny("socket")
    filter.deny_where("kill", 0, [(_JEQ, os.getpid())], matches=False)
    filter.deny_where("tgkill", 0, [(_JEQ, os.getpid())], matches=False)
    filter.deny_where("prlimit64", 0, [(_JEQ, 0), (_JEQ, os.getpid())], matches=False)
    # A descriptor's owner gets SIGIO: a signal to anyone.
    filter.deny_where("fcntl", 1, [(_JEQ, _F_SETOWN), (_JEQ, _F_SETOWN_EX), (_JEQ, _F_SETSIG)])
    return filter


def landlock_version() -> int:
    """The kernel's Landlock, 0 if it has none."""
    return max(int(libc().syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))), 0)


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Only these files and folders can be opened from now on: read and executed, or written too.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = landlock_version()
    if not version:
        raise OSError(errno.ENOSYS, "landlock: the kernel has none")
    rights = max(value for since, value in _FS_RIGHTS.items() if since <= version)
    net = 3 if version >= 4 else 0  # bind and connect of TCP
    scoped = 3 if version >= 6 else 0  # abstract Unix sockets, signals
    size = 8 if version < 4 else 16 if version < 6 else 24
    head = ctypes.create_string_buffer(struct.pack("=QQQ", rights, net, scoped))
    ruleset = checked("syscall", 444, head, ctypes.c_size_t(size), ctypes.c_uint32(0))
    for path, wanted in [*((p, _EXECUTE | _READ_FILE | _READ_DIR) for p in readable), *((p, rights) for p in writable)]:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            wanted &= _EXECUTE | _WRITE_FILE | _READ_FILE | (rights & (1 << 14))
        rule = ctypes.create_string_buffer(struct.pack("=Qi", wanted, handle))
        checked("syscall", 445, ruleset, ctypes.c_uint32(1), rule, ctypes.c_uint32(0))
        os.close(handle)
    checked("syscall", 446, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def no_new_privileges() -> None:
    checked("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_bounding_set() -> None:
    """No exec gives a capability any more, not even to user 0; those held now stay until `drop_capabilities`."""
    for capability in range(64):
        if libc().prctl(_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            break  # EINVAL: the kernel's last one was before; EPERM: there is none to drop
    libc().prctl(_SET_SECUREBITS, 0x2F, 0, 0, 0)  # NOROOT, NO_SETUID_FIXUP and their locks; NO_CAP_AMBIENT_RAISE


def drop_capabilities() -> None:
    head = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    checked("capset", head, ctypes.create_string_buffer(24))


def limit_resources(*, seconds: float, memory: int, file_size: int, open_files: int, processes: int) -> None:
    """rlimits, hard and soft. seconds: of CPU, a process; memory, file_size: bytes. SIGXCPU comes first, SIGKILL a second later."""
    cpu = max(1, int(seconds + 0.999))
    for name, soft, hard in (
        ("RLIMIT_CPU", cpu, cpu + 1),
        ("RLIMIT_AS", memory, memory),
        ("RLIMIT_FSIZE", file_size, file_size),
        ("RLIMIT_NOFILE", open_files, open_files),
        ("RLIMIT_CORE", 0, 0),
        ("RLIMIT_MEMLOCK", 0, 0),
        ("RLIMIT_MSGQUEUE", 0, 0),
        ("RLIMIT_NPROC", processes, processes),
    ):
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        top = resource.getrlimit(kind)[1]
        if top != resource.RLIM_INFINITY:
            soft, hard = min(soft, top), min(hard, top)
        try:
            resource.setrlimit(kind, (soft, hard))
        except ValueError:  # macOS refuses some (RLIMIT_AS)
            if platform.system() == "Linux":
                raise
