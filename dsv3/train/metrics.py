"""What a run says while it trains: expert load, metrics.jsonl and TensorBoard, the console, the machine's matmul rate.

metrics.jsonl holds one JSON object a line, steps rising; `step` is the number of optimizer steps done, so a checkpoint
of step S goes with the records up to S. A resumed run first drops what is later than its checkpoint, by a rewritten
file and a rename: the file then equals that of a run never interrupted, but for the fields of TIMING_FIELDS. A line
torn by a kill or a full disk can only be the last, and is dropped; damage elsewhere is an error.

    MaxVio_l  = (max_i c_i - mean c) / mean c                              (arXiv 2408.15664; 0 is perfect balance)
    entropy_l = -sum_i p_i ln p_i / ln E,  p_i = c_i / sum c               (1 is perfect balance, 0 one expert)
    share of peak = tokens/s · FLOPs a token / `measure_peak`

Legend: L MoE layers (MTP layers last), E experts. Does not: compute losses, decide when to log, or gather over ranks.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    import rich.console

TIMING_FIELDS = frozenset({"seconds", "tokens_per_s", "peak_share"})
"""Fields of a record that depend on the machine's speed; all others repeat to the last bit."""


def expert_load(counts: Tensor) -> dict[str, list[float] | list[int]]:
    """Balance of each layer's experts, from integer counts (L, E) of assignments.

    Returns:
        `max_vio` and `entropy` (floats, see the header) and `dead_experts` (how many got no token), each of length L.

    Raises:
        ValueError: the counts are not integers (a bfloat16 count is rounded above 256), or a layer has none.
    """
    if counts.is_floating_point() or counts.dim() != 2:
        raise ValueError(
            f"expert counts are {counts.dtype} of shape {tuple(counts.shape)}: give integers of shape (layers, experts)"
        )
    rows = counts.tolist()
    for layer, row in enumerate(rows):
        if min(row) < 0 or sum(row) == 0:
            raise ValueError(
                f"expert counts of layer row {layer} are {row}: give non-negative counts of at least one token"
            )
    return {
        # One division of exact integers, so that equal loads give exactly 0.
        "max_vio": [(max(row) * len(row) - sum(row)) / sum(row) for row in rows],
        "entropy": [_entropy(row) for row in rows],
        "dead_experts": [row.count(0) for row in rows],
    }


def _entropy(row: list[int]) -> float:
    if len(row) == 1 or min(row) == max(row):
        return 1.0
    total = sum(row)
    nats = math.log(total) - math.fsum(c * math.log(c) for c in row if c) / total
    return min(1.0, max(0.0, nats / math.log(len(row))))


# -- the file ---------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, or leave it as it was."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a report is to be shown
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, in order; a torn last line is left out.

    Raises:
        ValueError: no such file, or a line before the last is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no metrics at {path}: give the metrics.jsonl of a run that has trained at least one step")
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Raw bytes of each whole line, newline included, and its record."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                return
            raise ValueError(
                f"{path} line {number} of {len(lines)} is not a record ({error}): the file was damaged, not torn; "
                "restore it, or remove that line"
            ) from None
        assert isinstance(step, int), record
        yield line.rstrip(b"\n") + b"\n", record


class MetricsLog:
    """Appends records to FOLDER/metrics.jsonl and scalars to FOLDER/tensorboard.

    Args:
        folder: the run's folder; made if missing.
        resume_step: None for a new run. A number: continue after that many optimizer steps; later records are dropped
            (0 drops all).

    Raises:
        ValueError: `resume_step` is None and the folder already holds records: they are another run's.
    """

    def __init__(self, folder: str | Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.last_step = self._prepare(resume_step)
        self._file = self.path.open("ab")
        purge = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def _prepare(self, resume_step: int | None) -> int:
        """Cut the file back to `resume_step`; returns the last step that stays (-1: none)."""
        if not self.path.exists():
            return -1
        old = list(_lines(self.path))
        if resume_step is None and old:
            raise ValueError(f"{self.path} already holds {len(old)} records: resume that run, or give a new folder")
        kept = [(line, record) for line, record in old if resume_step is not None and record["step"] <= resume_step]
        content = b"".join(line for line, _ in kept)
        if content != self.path.read_bytes():
            write_atomic(self.path, content)
        return kept[-1][1]["step"] if kept else -1

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and hand it to the operating system: a kill right after loses nothing.

        Every number in it, lists and mappings included, becomes a TensorBoard scalar (`load/max_vio/0`), except
        `expert_counts`.

        Raises:
            ValueError: a value is not finite; metrics.jsonl holds none such.
        """
        step = record["step"]
        assert step > self.last_step, f"step {step} after step {self.last_step}"
        scalars = dict(_scalars({k: v for k, v in record.items() if k not in ("step", "expert_counts")}))
        bad = {name: value for name, value in scalars.items() if not math.isfinite(value)}
        if bad:
            raise ValueError(
                f"metrics of step {step} are not finite: {bad}; stop before the optimizer step and look at this batch"
            )
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self.last_step = step
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        """Sync to disk and close both files."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _scalars(inner, f"{name}/{key}" if name else str(key))


# -- the console ------------------------------------------------------------------------------------------------------


class Console:
    """Progress of a run: a live bar on a terminal, elsewhere (a file, CI) one plain line every `every_s` seconds.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before this process, when resumed.
        console: where to write; standard error when None.
        every_s: seconds between plain lines; the first and the last step always get one.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        console: rich.console.Console | None = None,
        every_s: float = 10.0,
    ) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        self._rich = console or RichConsole(stderr=True)
        self._total, self._every_s = total_steps, every_s
        self._last_line = -math.inf
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), start_step)], maxlen=64)
        self._live = self._rich.is_interactive  # a terminal that can move its cursor
        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}", markup=False),
            console=self._rich,
            refresh_per_second=4,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, line="starting")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a record of metrics.jsonl; absent fields are left out."""
        now, step = time.monotonic(), record["step"]
        self._marks.append((now, step))
        line = self._line(record)
        self._bar.update(self._task, completed=step, line=line)
        if not self._live and (now - self._last_line >= self._every_s or step >= self._total):
            self._last_line = now
            self.log(f"step {line}")

    def log(self, text: str) -> None:
        """Print a line as it is, above the bar; text is never taken for markup."""
        self._rich.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _line(self, record: Mapping[str, Any]) -> str:
        step = record["step"]
        parts = [f"{step:,}/{self._total:,}", f"{100 * step // self._total}%", f"ETA {self._eta()}"]
        if "loss" in record:
            parts.append(f"loss {record['loss']:.3f}")
        if record.get("mtp_loss"):
            parts.append("mtp " + " ".join(f"{loss:.3f}" for loss in record["mtp_loss"]))
        if "tokens_per_s" in record:
            parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
        if "peak_share" in record:
            parts.append(f"{record['peak_share']:.0%} of peak")
        return "  ".join(parts)

    def _eta(self) -> str:
        """Time left at the pace of the last 63 records: a batch-size ramp makes the run's mean pace a poor guide."""
        (t0, s0), (t1, s1) = self._marks[0], self._marks[-1]
        if s1 <= s0:
            return "-:--"
        minutes, seconds = divmod(round((t1 - t0) / (s1 - s0) * max(self._total - s1, 0)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# -- the machine ------------------------------------------------------------------------------------------------------


def measure_peak(dtype: torch.dtype, device: str | torch.device = "cpu", *, seconds: float = 1.0) -> float:
    """Matmul rate of this machine in FLOP/s: the best of several square products in about `seconds`.

    Uses the threads torch is set to. A measured rate, not the data sheet's: what a training step could reach if it were
    one large matmul. The global random state is not touched.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    best, spent, size = 0.0, 0.0, 256
    largest = 8192 if device.type == "cuda" else 2048
    while True:
        a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        out = torch.mm(a, b)  # warms up: the first product picks a kernel and touches the memory
        _wait(device)
        for _ in range(6):  # the best of them: another program may hold the machine for a moment
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            _wait(device)
            took = time.perf_counter() - start
            best, spent = max(best, 2 * size**3 / took), spent + took
        # The next size does eight times the work, seven products of it: go on only if that fits.
        if size == largest or spent + 7 * 8 * 2 * size**3 / best > seconds:
            return best
        size *= 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
