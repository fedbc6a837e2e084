"""What a process can find out about its machine, and a group of them about each other. The doctor (doctor.py) judges it.

    facts        of this rank: host, versions, hash of the package, interfaces, limits, shared memory, GPU
    compute      rate of one matrix product: a rank that is slow alone is slow in every step
    disk         free bytes, write and read rate of a folder, and whether all ranks see the same folder
    clocks       wall clock of each rank less rank 0's, from the fastest of several round trips: half of that trip is the doubt
    collectives  all-reduce and all-to-all: seconds and bus bandwidth, and whether the numbers that arrived are right
    links        every rank sends to the rank 1, 2, 4, ... further: one bad cable is one slow pair

Bus bandwidth of S bytes a rank in t seconds over n ranks (as NCCL's tests count it, comparable with the link's data sheet):
all-reduce 2 (n - 1) / n · S / t, all-to-all (n - 1) / n · S / t. Rates are the best of a few tries, and the slowest rank's.
Does not: judge, print, or read the environment: what the launcher set comes as an argument.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import socket
import struct
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KEPT = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_", "MASTER_", "LOCAL_", "RDMAV_", "UCX_", "TP_SOCKET")
"""Beginnings of the environment variables that matter to ranks."""
_TRIES = 4

Facts = dict[str, Any]  # JSON-able


def _version() -> str:
    try:
        return version("dsv3")
    except PackageNotFoundError:
        return "from a source folder"


def facts(environment: Mapping[str, str]) -> Facts:
    """Of this rank's machine and process."""
    host = socket.gethostname()
    return {
        "host": host,
        "pid": os.getpid(),
        "versions": {
            "dsv3": _version(),
            "sources": source_hash(Path(__file__).parents[1]),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        },
        "environment": {name: value for name, value in sorted(environment.items()) if name.startswith(KEPT)},
        "resolves_to": _resolve(host),
        "route": _route(environment.get("MASTER_ADDR")),
        "interfaces": interfaces(),
        "infiniband": _infiniband(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],  # -1: without limit
        "shared_memory_bytes": _size("/dev/shm"),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "gpu": _gpu(),
    }


def source_hash(package: Path) -> str:
    """Of the package's sources: two ranks with one hash run the same code, whatever their version says."""
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".c", ".h")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def interfaces() -> list[Facts]:
    """Network interfaces with an IPv4 address: name, address, whether it is up and a loopback, Mbit/s where the driver says."""
    if sys.platform != "linux":
        return []
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode()[:15])
            try:
                address = socket.inet_ntoa(fcntl.ioctl(opened, 0x8915, asked)[20:24])  # SIOCGIFADDR
                flags = struct.unpack_from("H", fcntl.ioctl(opened, 0x8913, asked), 16)[0]  # SIOCGIFFLAGS
            except OSError:
                continue  # it has no IPv4 address, so nothing binds to it
            found.append({
                "name": name, "address": address, "up": bool(flags & 1), "loopback": bool(flags & 8), "mbit": _speed(name),
            })  # fmt: skip
    return found


def _speed(name: str) -> int | None:
    try:
        speed = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return None  # virtual ones have none
    return speed if speed > 0 else None


def _infiniband() -> list[Facts]:
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    return [
        {"device": p.parts[-3], "port": p.name, **{key: _text(p / key) for key in ("state", "rate", "link_layer")}}
        for p in ports
    ]


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _resolve(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _route(master: str | None) -> str | None:
    """This machine's address on the way to the master: nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            opened.connect((master or "192.0.2.1", 9))
            return opened.getsockname()[0]
    except OSError:
        return None


def _size(path: str) -> int | None:
    return shutil.disk_usage(path).total if Path(path).is_dir() else None


def _gpu() -> Facts | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    return {"name": found.name, "uuid": str(found.uuid), "free_bytes": free, "total_bytes": total}


# -- rates of one rank ---------------------------------------------------------------------------------------------------


def compute(device: torch.device) -> float:
    """FLOP/s of a matrix product: float32 on a CPU, bfloat16 on a GPU. A fraction of a second."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(_timed(lambda: torch.mm(a, a), device) for _ in range(1 + _TRIES))


def disk(folder: Path, size: int, rank: int) -> Facts:
    """Write `size` bytes to a file of the folder, to the disk itself, and read them back, not from memory where the system allows.

    Returns:
        free_bytes, and write_rate and read_rate in bytes/s; or `error`.
    """
    path = folder / f".doctor-{os.getpid()}-{rank}"
    block = os.urandom(1 << 20)  # what compresses or is all zeros flatters some disks
    try:
        free, begun = shutil.disk_usage(folder).free, time.perf_counter()
        with path.open("wb") as file:
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        between = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass
        rates = {"write_rate": size / (written - begun), "read_rate": size / (time.perf_counter() - between)}
        return {"free_bytes": free, **rates}
    except OSError as error:
        return {"error": f"{error.strerror or error}"}
    finally:
        path.unlink(missing_ok=True)


# -- what ranks find together: every rank calls each of these ----------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sees_leader(folder: Path) -> bool:
    """Whether a file that rank 0 writes in the folder is there for this rank."""
    token = gather(os.urandom(8).hex())[0]
    path, leads = folder / f".doctor-{token}", not dist.is_initialized() or dist.get_rank() == 0
    try:
        if leads:
            path.write_text(token)
    except OSError:
        pass  # `disk` tells it
    gather(None)
    seen = path.is_file()
    gather(None)
    if leads:
        path.unlink(missing_ok=True)
    return seen


def clocks() -> list[tuple[float, float]]:
    """(skew, doubt) in seconds of each rank's wall clock against rank 0's, known on rank 0 (elsewhere zeros)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    told = torch.zeros(1, dtype=torch.float64)
    result = [(0.0, 0.0)] * world
    for other in range(1, world):
        trips = []
        for _ in range(2 * _TRIES):
            if rank == 0:
                begun = time.time()
                dist.send(told, other)
                dist.recv(told, other)
                ended = time.time()
                trips.append((ended - begun, told.item() - (begun + ended) / 2))
            elif rank == other:
                dist.recv(told, 0)
                told[0] = time.time()
                dist.send(told, 0)
        if trips:
            shortest, skew = min(trips)
            result[other] = (skew, shortest / 2)
    return result


def collectives(device: torch.device, size: int) -> Facts:
    """All-reduce and all-to-all of `size` bytes a rank, and an all-reduce of 8 bytes for its latency.

    Returns:
        all_reduce, all_to_all: bus bandwidth in bytes/s; latency_s; and `false`: names of those whose result was wrong here.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    count = max(world, size // 4 // world * world)
    pattern, false = torch.arange(count, device=device).remainder(7).float(), []
    values = pattern * (rank + 1)
    dist.all_reduce(values)  # exact in float32 up to 2,000 ranks
    if not torch.equal(values, pattern * (world * (world + 1) // 2)):
        false.append("all-reduce")
    mine, others = torch.full_like(values, rank), torch.empty_like(values)
    dist.all_to_all_single(others, mine)
    if not torch.equal(others.view(world, -1)[:, 0], torch.arange(world, device=device).float()) or not torch.equal(
        others.view(world, -1), others.view(world, -1)[:, :1].expand(world, count // world)
    ):
        false.append("all-to-all")
    little = torch.zeros(2, device=device)
    return {
        "all_reduce": 2 * (world - 1) / world * count * 4 / _together(lambda: dist.all_reduce(mine.zero_()), device),
        "all_to_all": (world - 1) / world * count * 4 / _together(lambda: dist.all_to_all_single(others, mine), device),
        "latency_s": _together(lambda: dist.all_reduce(little), device),
        "false": false,
    }


def links(device: torch.device, size: int) -> list[tuple[int, int, float]]:
    """(sender, this rank, bytes/s) for senders 1, 2, 4, ... ranks before this one, all ranks sending at once."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sent, got = (torch.zeros(max(1, size // 4), device=device) for _ in range(2))
    found, shift = [], 1
    while shift < world:
        to, source = (rank + shift) % world, (rank - shift) % world

        def exchange(to: int = to, source: int = source) -> None:
            ops = [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, got, source)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        times = []
        for _ in range(_TRIES):
            dist.barrier()
            times.append(_timed(exchange, device))
        found.append((source, rank, sent.numel() * 4 / min(times)))
        shift *= 2
    return found


def _together(work: Any, device: torch.device) -> float:
    """Seconds of a collective: of each try the slowest rank's, of these the best."""
    times = torch.zeros(_TRIES, dtype=torch.float64)
    for i in range(_TRIES):
        dist.barrier()
        times[i] = _timed(work, device)
    everywhere: Tensor = times.to(device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    return float(everywhere.min())


def _timed(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
