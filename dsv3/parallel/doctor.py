"""What is wrong with a cluster, before a checkpoint of 700 GB is loaded on it.

    meet      the processes that the launcher started; says who is missing instead of waiting in silence
    examine   every rank measures (probes.py), all is gathered, rank 0 judges
    judge     facts -> findings: wrong (a run would fail or lose data) or warning (it would be slow or surprise), with what to set

Every measure has a bound that holds anywhere (versions equal, free bytes asked for), or is held against the median of the
ranks: what is slow is what is slower than its like. Absolute bandwidths are told, not judged: hardware differs.

Works in one process too, where nothing is asked of a network.
Does not: print; change any setting; look at the network beyond torch's own collectives.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from dsv3.parallel import probes
from dsv3.parallel.probes import Facts

SLOW = 0.5  # of the median of its like: a rank, a link or a disk below this is told
SKEW_WRONG, SKEW_WARNING = 1.0, 0.1  # seconds between clocks
LEAST_SHARED = 1 << 30  # bytes of /dev/shm; containers are given 64 MiB
_SAME_ANYWAY = ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE", "TORCH_NCCL_DEBUG_INFO")  # may differ


@dataclass(frozen=True, kw_only=True)
class Examination:
    """How much to measure."""

    folder: Path = Path(".")
    """Where checkpoints are to be written."""
    needs_bytes: int = 0
    """Free bytes that the run needs in `folder`."""
    message_bytes: int = 64 << 20
    """A rank's, in each collective."""
    disk_bytes: int = 256 << 20
    """Written and read by each rank."""

    def __post_init__(self) -> None:
        if min(self.message_bytes, self.disk_bytes) < 1 or self.needs_bytes < 0:
            raise ValueError(
                f"message_bytes {self.message_bytes} and disk_bytes {self.disk_bytes} must be at least 1, "
                f"needs_bytes {self.needs_bytes} at least 0"
            )
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no folder: give the one that the run will write to, or make it first")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at and is not right."""

    level: Literal["wrong", "warning"]
    what: str
    cure: str


@dataclass(frozen=True)
class Report:
    """What was measured and found; findings are rank 0's."""

    ranks: list[Facts]
    """A rank each: probes.facts, with `rank`, `compute` (FLOP/s), `disk` and `shared` (it sees rank 0's folder)."""
    network: Facts
    """all_reduce and all_to_all (bytes/s on the bus), latency_s, false (rank -> names), links, clocks; empty for one process."""
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return not any(finding.level == "wrong" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"healthy": self.healthy, **asdict(self)}


def meet(environment: Mapping[str, str], device_type: str, timeout: timedelta) -> None:
    """Join the processes that the launcher started, if it did.

    Args:
        environment: with torchrun's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        ValueError: the master is out of reach, ranks are missing, or they cannot connect to each other; with what to set.
    """
    if dist.is_initialized() or int(environment.get("WORLD_SIZE", "1")) == 1:
        return
    from torch.distributed.rendezvous import rendezvous

    master = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"rank {environment.get('RANK')} does not meet the others at {master} ({_first_line(error)}): start all ranks, give "
            "torchrun the address of a machine that all others reach (--rdzv-endpoint HOST:PORT), and open that port"
        ) from error
    missing = roll_call(dist.PrefixStore("doctor", store), rank, world, timeout)
    if missing:
        raise ValueError(
            f"rank {rank} waited {timeout.total_seconds():.0f} s for {world} processes, and ranks {_few(missing)} did not come: "
            "look whether they started, and whether their machines reach " + master
        )
    try:
        if device_type == "cuda":
            torch.cuda.set_device(int(environment.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        dist.barrier()
    except RuntimeError as error:
        named = _interface(probes.facts(environment))
        raise ValueError(
            f"rank {rank} meets the master but cannot connect to the other ranks ({_first_line(error)}): set "
            f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the machines, here {named or 'none was found'}, "
            "and open all ports between them"
        ) from error


def roll_call(store: dist.Store, rank: int, world: int, timeout: timedelta) -> list[int]:
    """Ranks that did not sign in the store in that time; this one does."""
    store.set(str(rank), "here")
    try:
        store.wait([str(other) for other in range(world)], timeout)
    except RuntimeError:
        return [other for other in range(world) if not store.check([str(other)])]
    return []


def examine(asked: Examination, environment: Mapping[str, str], device: torch.device) -> Report:
    """Measure on every rank and judge; every rank of the group calls it, and gets the same report but for rank 0's clocks."""
    alone = not dist.is_initialized()
    rank = 0 if alone else dist.get_rank()
    mine = {"rank": rank, **probes.facts(environment), "compute": probes.compute(device)}
    mine["shared"] = probes.sees_leader(asked.folder)
    mine["disk"] = probes.disk(asked.folder, asked.disk_bytes, rank)
    ranks, network = probes.gather(mine), {}
    if not alone and len(ranks) > 1:
        found = probes.collectives(device, asked.message_bytes)
        false = {str(r): names for r, names in enumerate(probes.gather(found.pop("false"))) if names}
        pairs = [link for part in probes.gather(probes.links(device, asked.message_bytes // 4)) for link in part]
        network = {**found, "false": false, "links": pairs, "clocks": probes.gather(probes.clocks())[0]}
    return Report(ranks, network, judge(ranks, network, asked))


# -- judgement -----------------------------------------------------------------------------------------------------------


def judge(ranks: Sequence[Facts], network: Facts, asked: Examination) -> list[Finding]:
    """What the facts of all ranks say; what is wrong first."""
    found = [*_versions(ranks), *_environments(ranks), *_limits(ranks), *_gpus(ranks), *_folders(ranks, asked)]
    found += _speeds(ranks)
    if len(ranks) > 1:
        found += [*_interfaces(ranks), *_network(network, ranks)]
    return sorted(found, key=lambda finding: finding.level == "warning")


def _versions(ranks: Sequence[Facts]) -> list[Finding]:
    found = []
    for name in ranks[0]["versions"]:
        differing = _minority(ranks, lambda r, name=name: r["versions"][name])
        if differing:
            what = "the sources of dsv3" if name == "sources" else name
            found.append(
                Finding(
                    "wrong", f"{what}: {differing}", "install the same on every machine: one image, or one shared .venv"
                )
            )
    return found


def _environments(ranks: Sequence[Facts]) -> list[Finding]:
    found, names = [], {name for r in ranks for name in r["environment"] if not name.startswith(_SAME_ANYWAY)}
    for name in sorted(names):
        # Interfaces are named differently on different machines; within one they must agree.
        differing = _minority(ranks, lambda r, name=name: r["environment"].get(name))
        if differing and not name.startswith(("MASTER_", "LOCAL_")):
            level = "warning" if name.endswith("_IFNAME") or name.startswith("OMP_") else "wrong"
            found.append(Finding(level, f"{name}: {differing}", "set it alike on every rank (unset counts as a value)"))
    return found


def _limits(ranks: Sequence[Facts]) -> list[Finding]:
    found, world = [], len(ranks)
    files = 1024 + 4 * world  # a connection to each rank in a few groups, and a checkpoint's shards
    for host, there in _by_host(ranks).items():
        first = there[0]
        if 0 <= first["open_files"] < files:
            found.append(
                Finding("wrong", f"{host}: {first['open_files']} open files allowed, {files} wanted", "ulimit -n 65536")
            )
        shared = first["shared_memory_bytes"]
        if shared is not None and shared < LEAST_SHARED and len(there) > 1:
            found.append(
                Finding(
                    "wrong" if first["gpu"] else "warning",
                    f"{host}: /dev/shm holds {_size(shared)}, {_size(LEAST_SHARED)} wanted for {len(there)} ranks",
                    "docker run --ipc=host or --shm-size=16g, or mount -o remount,size=16G /dev/shm",
                )
            )
        if first["infiniband"] and first["locked_memory"] != -1:
            found.append(
                Finding(
                    "wrong",
                    f"{host}: locked memory is limited to {_size(first['locked_memory'])}, and InfiniBand pins its buffers",
                    "ulimit -l unlimited (docker run --ulimit memlock=-1)",
                )
            )
        threads = sum(r["threads"] for r in there)
        if threads > first["cpus"] and len(there) > 1:
            fits = max(1, first["cpus"] // len(there))
            found.append(
                Finding("warning", f"{host}: {threads} threads on {first['cpus']} CPUs", f"set OMP_NUM_THREADS={fits}")
            )
    return found


def _gpus(ranks: Sequence[Facts]) -> list[Finding]:
    if not any(r["gpu"] for r in ranks):
        return []
    found = [
        Finding("wrong", f"{_who(r)} has no GPU, others have", "look at nvidia-smi there, and at CUDA_VISIBLE_DEVICES")
        for r in ranks
        if not r["gpu"]
    ]
    held = Counter(r["gpu"]["uuid"] for r in ranks if r["gpu"])
    for uuid, count in held.items():
        if count > 1:
            sharing = [r["rank"] for r in ranks if r["gpu"] and r["gpu"]["uuid"] == uuid]
            found.append(
                Finding(
                    "wrong", f"ranks {_few(sharing)} hold the same GPU {uuid}", "start as many processes as it has GPUs"
                )
            )
    for r in ranks:
        if r["gpu"] and r["gpu"]["free_bytes"] < 0.9 * r["gpu"]["total_bytes"]:
            found.append(
                Finding(
                    "warning",
                    f"{_who(r)}: {_size(r['gpu']['free_bytes'])} of {_size(r['gpu']['total_bytes'])} GPU memory free",
                    "end what else runs on it (nvidia-smi names it)",
                )
            )
    differing = _minority([r for r in ranks if r["gpu"]], lambda r: r["gpu"]["name"])
    if differing:
        found.append(Finding("warning", f"GPUs: {differing}", "the slowest sets the pace of all: use one kind"))
    return found


def _folders(ranks: Sequence[Facts], asked: Examination) -> list[Finding]:
    found = []
    for r in ranks:
        if "error" in r["disk"]:
            found.append(
                Finding(
                    "wrong", f"{_who(r)} cannot write to {asked.folder}: {r['disk']['error']}", "give another --folder"
                )
            )
        elif r["disk"]["free_bytes"] < asked.needs_bytes:
            free = f"{_size(r['disk']['free_bytes'])} free in {asked.folder}, {_size(asked.needs_bytes)} needed"
            found.append(Finding("wrong", f"{_who(r)}: {free}", "make room, or give another --folder"))
    blind = [r["rank"] for r in ranks if not r["shared"]]
    if blind:
        found.append(
            Finding(
                "wrong",
                f"ranks {_few(blind)} do not see in {asked.folder} what rank 0 writes there",
                "checkpoints need a folder that all machines share: mount it everywhere under that path",
            )
        )
    return found


def _speeds(ranks: Sequence[Facts]) -> list[Finding]:
    kinds = {
        "matrix products": [(r, r["compute"]) for r in ranks],
        "writing to disk": [(r, r["disk"]["write_rate"]) for r in ranks if "error" not in r["disk"]],
        "reading from disk": [(r, r["disk"]["read_rate"]) for r in ranks if "error" not in r["disk"]],
    }
    found = []
    for kind, rates in kinds.items():
        median = statistics.median(rate for _, rate in rates) if rates else 0.0
        for r, rate in rates:
            if rate < SLOW * median:
                cure = (
                    "every step waits for it: look at clocks, heat and what else runs there, or leave that machine out"
                )
                found.append(Finding("warning", f"{_who(r)}: {kind} at {rate / median:.0%} of the median", cure))
    return found


def _interfaces(ranks: Sequence[Facts]) -> list[Finding]:
    found, hosts = [], _by_host(ranks)
    for host, there in hosts.items():
        first, named = there[0], _interface(there[0])
        known = {i["name"] for i in first["interfaces"]}
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            value = first["environment"].get(name)
            wanted = [] if not value else [v.lstrip("=") for v in value.split(",") if not v.startswith("^")]
            lost = [w for w in wanted if known and not any(k == w or k.startswith(w) for k in known)]
            if lost:
                cure = f"set {name}={named}" if named else f"unset {name}"
                found.append(Finding("wrong", f"{host}: {name} is {value}, of its interfaces {sorted(known)}", cure))
            elif not value and len(hosts) > 1 and name.startswith("GLOO") and _loops(first["resolves_to"]):
                found.append(
                    Finding(
                        "wrong",
                        f"{host} resolves its own name to {first['resolves_to']}, an address that other machines do not reach",
                        f"set GLOO_SOCKET_IFNAME={named or 'NAME'} (and NCCL_SOCKET_IFNAME), or correct /etc/hosts",
                    )
                )
        for port in first["infiniband"]:
            if port["state"] and "ACTIVE" not in port["state"]:
                where = f"{host}: InfiniBand {port['device']} port {port['port']} is {port['state']}"
                found.append(Finding("warning", where, "mend the cable or switch, or leave it out by NCCL_IB_HCA"))
    return found


def _network(network: Facts, ranks: Sequence[Facts]) -> list[Finding]:
    found = [
        Finding("wrong", f"{_who(ranks[int(r)])}: {' and '.join(names)} gave false numbers", "leave that machine out")
        for r, names in network["false"].items()
    ]
    by_kind = defaultdict(list)  # within a machine and between machines are different things
    for source, rank, rate in network["links"]:
        by_kind[ranks[source]["host"] == ranks[rank]["host"]].append((source, rank, rate))
    for links in by_kind.values():
        median = statistics.median(rate for *_, rate in links)
        for source, rank, rate in sorted(links, key=lambda link: link[2]):
            if rate < SLOW * median:
                pair = f"{_who(ranks[source])} to {_who(ranks[rank])}"
                cure = (
                    "look at cable, port and switch of the two, and which interface they take (NCCL_DEBUG=INFO tells)"
                )
                found.append(Finding("warning", f"{pair}: {_size(rate)}/s, {rate / median:.0%} of the median", cure))
    for rank, (skew, doubt) in enumerate(network["clocks"]):
        certain = abs(skew) - doubt
        if certain > SKEW_WARNING:
            level = "wrong" if certain > SKEW_WRONG else "warning"
            cure = "start chronyd or ntpd there: logs of ranks are read side by side, and keys and leases expire"
            found.append(Finding(level, f"{_who(ranks[rank])}: its clock is {skew:+.2f} s off rank 0's", cure))
    return found


# -- words ---------------------------------------------------------------------------------------------------------------


def _by_host(ranks: Sequence[Facts]) -> dict[str, list[Facts]]:
    hosts = defaultdict(list)
    for r in ranks:
        hosts[r["host"]].append(r)
    return hosts


def _minority(ranks: Sequence[Facts], value: Callable[[Facts], Any]) -> str | None:
    """Who has what, when not all have the same; the largest camp first."""
    camps = defaultdict(list)
    for r in ranks:
        camps[value(r)].append(r["rank"])
    if len(camps) == 1:
        return None
    order = sorted(camps.items(), key=lambda camp: -len(camp[1]))
    return "; ".join(f"{'none' if v is None else v} on ranks {_few(who)}" for v, who in order)


def _interface(facts: Facts) -> str | None:
    """The one on the way to the master, or else the fastest that is up."""
    usable = [i for i in facts["interfaces"] if i["up"] and not i["loopback"]]
    routed = [i for i in usable if i["address"] == facts["route"]]
    best = routed or sorted(usable, key=lambda i: -(i["mbit"] or 0))
    return best[0]["name"] if best else None


def _loops(address: str | None) -> bool:
    return address is None or address.startswith("127.")


def _who(facts: Facts) -> str:
    return f"rank {facts['rank']} ({facts['host']})"


def _few(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"


def _size(size: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
