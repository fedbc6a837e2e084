"""Verb `doctor`: is this cluster fit for a run?"""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3.cli.console import table

if TYPE_CHECKING:
    from dsv3.parallel.doctor import Report


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check the machines of a run before anything is loaded: ranks, versions, interfaces, bandwidth, disk, limits, clocks.
    Says what to set; exit status 1 when something is wrong. Alone: dsv3 doctor. On every machine of a cluster:
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m dsv3.cli doctor --folder /shared"""

    folder: Path = Path(".")
    """Where checkpoints are to be written."""
    needs_gb: float = 0.0
    """Free gigabytes (10^9 bytes) that the run needs there. A whole training checkpoint of V3 takes about 7,000."""
    message_mb: float = 64.0
    """Megabytes a rank in each collective."""
    disk_mb: float = 256.0
    """Megabytes that each rank writes and reads."""
    timeout_s: float = 60.0
    """How long to wait for the other ranks."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    json: bool = False
    """All that was measured, as JSON."""


def doctor(verb: Doctor) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from dsv3.parallel.doctor import Examination, examine, meet

    if verb.device not in ("auto", "cpu", "cuda") or verb.timeout_s <= 0:
        raise ValueError(f"--device is {verb.device!r} (auto, cpu, cuda), --timeout-s {verb.timeout_s} (above 0)")
    kind = verb.device if verb.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda, and torch {torch.__version__} finds none: look whether it is built for CUDA and whether nvidia-smi "
            "lists a device, or take --device cpu"
        )
    asked = Examination(
        folder=verb.folder,
        needs_bytes=round(verb.needs_gb * 1e9),
        message_bytes=round(verb.message_mb * 1e6),
        disk_bytes=round(verb.disk_mb * 1e6),
    )
    meet(os.environ, kind, timedelta(seconds=verb.timeout_s))
    try:
        device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        report = examine(asked, os.environ, device)
        leads = not dist.is_initialized() or dist.get_rank() == 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not leads:
        return
    if verb.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _show(report)
    if not report.healthy:
        sys.exit(1)


def _show(report: Report) -> None:
    from rich.console import Console

    console, hosts = Console(), {}
    for facts in report.ranks:
        hosts.setdefault(facts["host"], []).append(facts)
    machines = table(
        f"ranks: {len(report.ranks)}, machines: {len(hosts)}",
        ("machine", "ranks", "device", "interfaces", "TFLOP/s a rank", "disk free", "write a rank", "read a rank"),
    )
    for host, there in list(hosts.items())[:64]:
        first, written = there[0], [r["disk"] for r in there if "error" not in r["disk"]]
        rates = [f"{statistics.median(d[key] for d in written) / 1e6:,.0f} MB/s" if written else "-" for key in
                 ("write_rate", "read_rate")]  # fmt: skip
        machines.add_row(
            host, str(len(there)), first["gpu"]["name"] if first["gpu"] else f"{first['cpus']} CPUs",
            ", ".join(i["name"] for i in first["interfaces"] if i["up"] and not i["loopback"]) or "-",
            f"{min(r['compute'] for r in there) / 1e12:.2f}",
            f"{written[0]['free_bytes'] / 1e9:,.0f} GB" if written else "-", *rates,
        )  # fmt: skip
    console.print(machines)
    first = report.ranks[0]["versions"]
    print(" ".join(f"{name} {value}" for name, value in first.items() if value))
    if report.network:
        net, slowest = report.network, min(report.network["links"], key=lambda link: link[2])
        skew = max(abs(s) for s, _ in net["clocks"])
        print(
            f"all-reduce {net['all_reduce'] / 1e9:.2f} GB/s on the bus, all-to-all {net['all_to_all'] / 1e9:.2f} GB/s, "
            f"latency {net['latency_s'] * 1e6:.0f} us; slowest of {len(net['links'])} links {slowest[0]} -> {slowest[1]} "
            f"{slowest[2] / 1e9:.2f} GB/s; clocks within {skew * 1e3:.1f} ms"
        )
    for finding in report.findings:
        console.print(f"{finding.level}: {finding.what}\n    -> {finding.cure}", markup=False, highlight=False)
    print("fit for a run" if report.healthy else "not fit for a run")
