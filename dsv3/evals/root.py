"""A program's own root: what it can see of the file system, made of mounts. Linux, inside a new mount namespace.

    Python and the system's libraries   as they are, read-only
    /dev                                five devices
    /proc                               of the process namespace it is mounted in
    /work (and /tmp, a link to it)      empty, of bounded size and number of files, gone with the namespace

Source: mount(2), pivot_root(2), mount_setattr(2). Standard library only, as dsv3.evals.jail.
"""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig

from dsv3.evals import confine

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_LOCKED = (
    _NOEXEC | 1024 | 2048 | 1 << 21
)  # flags that a user namespace may not take off a mount: with NOATIME and its kin


def readable_paths(packages: bool) -> list[str]:
    """What Python needs to run: its own folders, the system's libraries, and with `packages` this environment's."""
    wanted = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/nix/store"]
    paths = sysconfig.get_paths()
    wanted += [sys.base_prefix, sys.base_exec_prefix, paths["stdlib"], paths["platstdlib"]]
    wanted.append(os.path.dirname(os.path.realpath(sys.executable)))
    wanted += [paths["purelib"], paths["platlib"]] if packages else []
    kept: list[str] = []
    for path in sorted({os.path.abspath(p) for p in wanted if os.path.exists(p)}, key=len):
        if path != "/" and not any(path == k or path.startswith(k + "/") for k in kept):
            kept.append(path)
    return kept


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    try:
        confine.checked("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode())
    except OSError as error:
        raise OSError(error.errno, f"mount {kind or source} on {target}: {os.strerror(error.errno or 0)}") from None


def _bind(source: str, target: str) -> None:
    """The same file or folder at target; read-only, with everything mounted below it, unless it is a device."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "x"):
            pass
    _mount(source, target, "", _BIND | _REC)
    if source.startswith("/dev/"):
        return
    words = bytearray(32)  # struct mount_attr: set, clear, propagation, user namespace
    words[0:8] = (1 | 2 | 4).to_bytes(8, sys.byteorder)  # RDONLY, NOSUID, NODEV
    attributes = ctypes.create_string_buffer(bytes(words), 32)
    number = confine.CALLS["mount_setattr"][0]
    recursive = ctypes.c_uint32(0x8000)
    try:
        confine.checked("syscall", number, -100, target.encode(), recursive, attributes, ctypes.c_size_t(32))
    except OSError:  # a kernel before 5.12: this mount alone, with the flags that it is locked to
        locked = os.statvfs(target).f_flag & _LOCKED
        _mount("", target, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | locked)


def make_root(root: str, *, packages: bool, size: int, user: int) -> None:
    """A root of its own: Python read-only, five devices, /proc of this namespace, and /work, empty and of bounded size."""
    _mount("", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in readable_paths(packages):
        if os.path.islink(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        else:
            _bind(path, root + path)
    for path in DEVICES:
        _bind(path, root + path)
    os.mkdir(root + "/proc")
    _mount("proc", root + "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    os.mkdir(root + "/work")
    inodes = max(16, size // 4096)
    _mount("tmpfs", root + "/work", "tmpfs", _NOSUID | _NODEV, f"size={size},nr_inodes={inodes},mode=700")
    os.chown(root + "/work", user, user)
    os.symlink("work", root + "/tmp")
    os.chdir(root)
    confine.checked("syscall", confine.CALLS["pivot_root"][0 if os.uname().machine == "x86_64" else 1], b".", b".")
    confine.checked("umount2", b".", 2)
    os.chdir("/")
    _mount("", "/", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
