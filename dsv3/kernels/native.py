"""The kernels in C (kernels/cpu/*.c): compiled once a machine by its own C compiler, called with plain addresses.

They need a CPU with AVX-512 BF16 (AMD from Zen 4, Intel from Cooper Lake) on Linux, and a C compiler. Anything else runs
the torch path of the same operation, which is also the reference that the tests hold them to; there is no switch.
Generation's kernels (kernels/decode/*.c) are a library of their own, for any CPU (dsv3.kernels.decode).
A library is cached by the hash of its sources and the machine's model, and written whole or not at all. It shares the
OpenMP runtime that torch has loaded, so that both use one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

_FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wall")
SOURCES = Path(__file__).parent / "cpu"
NULL = ctypes.c_void_p(None)


class View(ctypes.Structure):
    """A (B, H, T, width) tensor of any strides whose last dimension is contiguous."""

    _fields_ = (
        ("at", ctypes.c_void_p),
        ("batch", ctypes.c_long),
        ("head", ctypes.c_long),
        ("row", ctypes.c_long),
    )

    @classmethod
    def of(cls, x: Tensor) -> View:
        assert x.stride(-1) == 1, x.stride()
        assert x.dtype == torch.bfloat16, x.dtype
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where this machine cannot run or build them (said once, if it could run them)."""
    if platform.system() != "Linux" or "avx512_bf16" not in _cpu():
        return None
    return load_folder(SOURCES, "training runs at about half the speed")


def load_folder(sources: Path, loss: str) -> ctypes.CDLL | None:
    """The C files of a folder as a library; None where they cannot be compiled, with a warning that says what is lost."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        warnings.warn(f"no C compiler found: without dsv3's own CPU kernels {loss}", stacklevel=3)
        return None
    try:
        return ctypes.CDLL(str(_build(compiler, sources)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip().splitlines()[:1] if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(f"dsv3's CPU kernels could not be built by {compiler} ({said}): {loss}", stacklevel=3)
        return None


def fits(*tensors: Tensor) -> bool:
    """Whether the C kernels take these: bfloat16 on the CPU, last dimensions multiples of 16, and a library to call."""
    for x in tensors:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.shape[-1] % 16 or x.numel() == 0:
            return False
    return library() is not None


def call(name: str, *arguments: object) -> None:
    """Run a C function: tensors pass as addresses, ints as long, floats as float; the number of threads goes last."""
    kernels = library()
    assert kernels is not None
    kernels[name](*(_convert(a) for a in arguments), ctypes.c_int(torch.get_num_threads()))


def address(x: Tensor) -> ctypes.c_void_p:
    """Of a tensor that is not contiguous, whose strides the caller passes along."""
    return ctypes.c_void_p(x.data_ptr())


def _convert(value: object) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_long(value) if isinstance(value, int) else value


@functools.cache
def _cpu() -> str:
    """Model and features of this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if line.startswith(("model name", "flags")))


def _build(compiler: str, sources: Path) -> Path:
    files = sorted(sources.glob("*.[ch]"))
    identity = hashlib.sha256("\0".join([*(f.read_text() for f in files), *_FLAGS, compiler, _cpu()]).encode())
    target = _cache_folder() / f"{sources.name}-{identity.hexdigest()[:16]}.so"
    if target.exists():
        return target
    # Linked without libgomp where torch's is already in the process: two runtimes would fight over the cores.
    shared = () if hasattr(ctypes.CDLL(None), "GOMP_parallel") else ("-fopenmp",)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder) / f"{f.stem}.o") for f in files if f.suffix == ".c"]
        for source, made in zip([f for f in files if f.suffix == ".c"], objects):
            subprocess.run(
                [compiler, *_FLAGS, "-c", str(source), "-o", made], check=True, capture_output=True, text=True
            )
        whole = Path(folder) / target.name
        link = [compiler, "-shared", *objects, *shared, "-lm", "-o", str(whole)]
        subprocess.run(link, check=True, capture_output=True, text=True)
        os.replace(whole, target)
    return target


def _cache_folder() -> Path:
    folder = Path.home() / ".cache" / "dsv3"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    # Not a name that another user could have prepared.
    return Path(tempfile.mkdtemp(prefix="dsv3-"))
