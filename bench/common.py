"""What every benchmark shares: a stand-in for the loader, the machine's name, peak memory, and rounds that interleave."""

from __future__ import annotations

import csv
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dsv3.data.loader import Batch


class RandomLoader:
    """Rows of ids with the skew of text (Zipf), the same for every side."""

    def __init__(self, vocab: int, seq_len: int, depth: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = 1.0 / (torch.arange(vocab) + 10.0)
        self.length, self.rows = seq_len + depth + 1, 0

    def next_batch(self, rows: int) -> Batch:
        flat = torch.multinomial(self.weights, rows * self.length, replacement=True, generator=self.generator)
        row = flat.view(rows, self.length)
        self.rows += rows
        positions = torch.arange(self.length - 1).expand(rows, -1)
        return Batch(tokens=row[:, :-1], targets=row[:, 1:], positions=positions, doc_ids=torch.zeros_like(positions))

    def state_dict(self) -> dict:
        return {"rows": self.rows}


def interleave(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, one call each a round, so that a slow minute of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        print(f"round {round_ + 1} of {rounds}", file=sys.stderr)
    return {name: statistics.median(values) for name, values in times.items()}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return text.split("model name")[1].split(":")[1].split("\n")[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
    }


def write_csv(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def peak_memory_mib() -> float:
    """The process's largest resident size so far."""
    try:  # ru_maxrss of a child starts at its parent's size
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
