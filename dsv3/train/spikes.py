"""Loss spikes: seen, undone, and the batches behind them skipped, all on record and reversible.

A step's loss is high when it is more than FACTOR robust deviations above the median of the window of good losses before it:

    loss > median + max(FACTOR · 1.4826 · median |l - median|, FLOOR · |median|)

High losses do not enter the window. After PATIENCE of them in a row (one that is not finite needs no patience) the run goes back
to the newest checkpoint from before the first, less MARGIN steps, and the rows read since then are skipped:

    RUN/skipped.json    [{"from": row, "to": row, "step": seen at, "to_step": went back to, "why": ..., "losses": [...]}]
    RUN/checkpoints     those from after it are set aside as spiked-step-N, and removed when the run is KEEP steps past N

All is a function of checkpoint, metrics.jsonl and skipped.json, so a run killed at any of this goes the same way when resumed.
To undo a skip, delete its entry and the checkpoints after `to_step`, and resume. Rows are the loader's count; a range is skipped
from the first batch that begins in it. Rows that are skipped are read and dropped.
Source: PaLM (arXiv 2204.02311, section 5.1) restarts 100 steps earlier and skips 200 to 500 batches; V3 had none (report, 1).
Does not: prevent spikes; keep more checkpoints (two must be further apart than PATIENCE + MARGIN steps); tell a bad batch from a
bad learning rate: after MOST skips from one checkpoint it stops the run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv3.parallel.workers import Workers
from dsv3.train.checkpoint import checkpoints, read_state
from dsv3.train.loss import RowLoader
from dsv3.train.metrics import read_metrics, write_atomic

SKIPPED = "skipped.json"


class SpikeError(ValueError):
    """The loss spikes again and again from the same checkpoint."""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What is a spike, and how far to go back."""

    window: int = 64
    """Good losses that the median is of."""
    least: int = 16
    """Good losses before any is judged."""
    factor: float = 10.0
    """Robust standard deviations above the median."""
    floor: float = 0.05
    """Of the median: no rise below it is a spike, however quiet the losses were."""
    patience: int = 3
    """High losses in a row."""
    margin: int = 2
    """Steps before the first high loss that are not trusted either."""
    most: int = 3
    """Skips from one checkpoint."""
    keep: int = 1000
    """Steps past a checkpoint that was set aside until it is removed."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep {self.keep} must be at least 1 step")
        if not (1 <= self.least <= self.window and self.patience >= 1 and self.most >= 1 and self.margin >= 0):
            raise ValueError(
                f"least {self.least} must be from 1 to window {self.window}, patience {self.patience} and most {self.most} at "
                f"least 1, margin {self.margin} at least 0"
            )
        if self.factor <= 0 or self.floor < 0:
            raise ValueError(f"factor {self.factor} must be above 0, floor {self.floor} at least 0")


@dataclass(frozen=True)
class Skip:
    """An entry of skipped.json: rows `begin` to `end - 1` are not trained on."""

    begin: int
    end: int
    step: int = 0
    to_step: int = 0
    why: str = ""
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rollback:
    """What is to be restored, and what will be skipped."""

    checkpoint: Path
    skip: Skip

    def __str__(self) -> str:
        s = self.skip
        return (
            f"{s.why} at step {s.step}: back to step {s.to_step}, rows {s.begin} to {s.end - 1} are skipped ({SKIPPED})"
        )


def read_skips(folder: Path) -> list[Skip]:
    """Of a run's folder, in the order of their making.

    Raises:
        ValueError: the file is not what this module writes, edited or not.
    """
    path = folder / SKIPPED
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        skips = [
            Skip(
                e["from"], e["to"], e.get("step", 0), e.get("to_step", 0), e.get("why", ""), tuple(e.get("losses", ()))
            )
            for e in entries
        ]
        assert isinstance(entries, list)
        assert all(0 <= s.begin < s.end for s in skips)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(
            f'{path} is no list of {{"from": row, "to": later row}} ({error!r}): mend it, or remove it to skip nothing'
        ) from None
    return skips


def _write_skips(folder: Path, skips: Iterable[Skip]) -> None:
    entries = []
    for skip in skips:
        entry = asdict(skip)
        entries.append({"from": entry.pop("begin"), "to": entry.pop("end"), **entry})
    write_atomic(folder / SKIPPED, (json.dumps(entries, indent=1) + "\n").encode())


class Skipping:
    """A RowLoader that leaves out the rows a run's skipped.json names. Its state is the loader's own, and the skips behind it.

    Raises:
        ValueError: skipped.json is damaged, or names rows and the loader does not count them.
    """

    def __init__(self, loader: RowLoader, folder: Path) -> None:
        self.loader, self.folder = loader, Path(folder)
        self.reload()

    def reload(self) -> None:
        """Read skipped.json again."""
        self.skips = read_skips(self.folder)
        if self.skips and "rows" not in self.loader.state_dict():
            raise ValueError(
                f"{self.folder / SKIPPED} names rows, and {type(self.loader).__name__} counts none: remove it"
            )

    @property
    def rows(self) -> int:
        """Rows read so far, skipped ones included."""
        return self.loader.state_dict()["rows"]

    def next_batch(self, rows: int) -> Any:
        while self.skips and (end := self._end(position := self.rows)) is not None:
            self.loader.next_batch(min(rows, end - position))
            assert self.rows > position
        return self.loader.next_batch(rows)

    def _end(self, position: int) -> int | None:
        return next((skip.end for skip in self.skips if skip.begin <= position < skip.end), None)

    def state_dict(self) -> dict[str, Any]:
        state = self.loader.state_dict()
        behind = [[skip.begin, skip.end] for skip in self.skips if skip.begin < state["rows"]] if self.skips else []
        return state | ({"skipped": behind} if behind else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Skips behind it are history, whatever skipped.json says of them by now."""
        self.loader.load_state_dict({key: value for key, value in state.items() if key != "skipped"})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


@dataclass(frozen=True)
class Spike:
    """What a guard saw, and did nothing about yet."""

    step: int
    onset: int
    """First step whose loss was high."""
    why: str
    losses: tuple[float, ...] = ()
    error: Exception | None = None
    """Of a step that raised; to be raised again where there is no way back."""


class SpikeGuard:
    """Sees the losses of a run; every rank has one, sees the same, and calls the same. Its memory is metrics.jsonl."""

    def __init__(self, folder: Path, config: SpikeConfig | None = None) -> None:
        self.folder, self.config = Path(folder), config or SpikeConfig()
        self._aside = _set_aside(self.folder)
        self.learn([])

    def recall(self, step: int) -> None:
        """Be where a guard is that saw this run up to `step`: when it is resumed."""
        self._aside = _set_aside(self.folder)
        path = self.folder / "metrics.jsonl"
        records = read_metrics(path) if path.exists() else []
        self.learn([(r["step"], r["loss"]) for r in records if r["step"] <= step])

    def see(self, record: Mapping[str, Any]) -> Spike | None:
        """Take in a step's record; a spike when it has lasted."""
        step, loss = record["step"], record["loss"]
        self._clear(step)
        self._take(step, loss)
        if len(self._high) < self.config.patience and all(math.isfinite(loss) for _, loss in self._high):
            return None
        losses = tuple(loss for _, loss in self._high)
        usual = statistics.median(self._good) if self._good else math.nan
        why = f"loss {loss:.3f}, {len(losses)} steps above its usual {usual:.3f}"
        return Spike(step, self._high[0][0], why, losses)

    def broken(self, step: int, error: Exception) -> Spike:
        """Of a step that raised because its loss or a gradient was not finite, and updated nothing."""
        return Spike(step, step, f"not finite ({error})", error=error)

    def undo(self, spike: Spike, rows: int, workers: Workers) -> Rollback | None:
        """Set checkpoints from after the spike's begin aside, then write the skip down; the caller restores the checkpoint, and
        its loader reloads. No checkpoint may be under way. Killed in between, the run meets the same spike again.

        Args:
            rows: the loader's count now.
            workers: whose ranks meet here, and one of which writes.

        Returns:
            None: no checkpoint is old enough, and the run goes on as it is.

        Raises:
            Exception: the spike's own error, if no checkpoint is old enough.
            SpikeError: there were `most` skips from that checkpoint.
        """
        workers.barrier()
        found = workers.leading(self._way_back(spike, rows))
        workers.barrier()  # every rank has looked
        if found is None:
            if spike.error is not None:
                raise spike.error
            return None
        if workers.leads:
            for later in checkpoints(self.folder):
                if _step_of(later) > found.skip.to_step:
                    aside = later.with_name(f"spiked-{later.name}")
                    shutil.rmtree(aside, ignore_errors=True)  # of an earlier skip
                    os.replace(later, aside)
            _write_skips(self.folder, [*read_skips(self.folder), found.skip])
        workers.barrier()
        self._aside = _set_aside(self.folder)
        self.learn([(step, loss) for step, loss in self.history if step <= found.skip.to_step])
        return found

    def _clear(self, step: int) -> None:
        """Remove what was set aside long ago. Every rank tries, and the one whose rename comes first does it, beside training;
        what a kill leaves of it has no checkpoint's name, and goes the next time."""
        due = [path for number, path in self._aside if step >= number + self.config.keep]
        for path in due:
            gone = path if path.name.startswith("gone-") else path.with_name(f"gone-{path.name}")
            try:
                os.replace(path, gone)
            except OSError:
                continue
            threading.Thread(target=shutil.rmtree, args=(gone, True), name=f"removes {gone.name}", daemon=True).start()
        self._aside = [(number, path) for number, path in self._aside if path not in due]

    def learn(self, history: list[tuple[int, float]]) -> None:
        """Be where a guard is that saw these (step, loss)."""
        self.history: list[tuple[int, float]] = []
        self._good: deque[float] = deque(maxlen=self.config.window)
        self._high: list[tuple[int, float]] = []  # the high losses in a row, up to now
        for step, loss in history:
            self._take(step, loss)

    def _take(self, step: int, loss: float) -> None:
        self.history.append((step, loss))
        if not math.isfinite(loss) or (len(self._good) >= self.config.least and loss > self._limit()):
            self._high.append((step, loss))
        else:
            self._high.clear()
            self._good.append(loss)

    def _limit(self) -> float:
        median = statistics.median(self._good)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._good)  # of a normal one, its sigma
        return median + max(self.config.factor * deviation, self.config.floor * abs(median))

    def _way_back(self, spike: Spike, rows: int) -> Rollback | None:
        last = spike.onset - 1 - (0 if spike.error else self.config.margin)
        old = [path for path in checkpoints(self.folder) if _step_of(path) <= last]
        if not old:
            return None
        state = read_state(old[-1])
        tried = [skip for skip in read_skips(self.folder) if skip.to_step == state["step"]]
        if len(tried) >= self.config.most:
            raise SpikeError(
                f"{spike.why} at step {spike.step}, after {len(tried)} skips from step {state['step']}: it is not the data; lower "
                f"peak_lr or go on from an earlier checkpoint, with {self.folder / SKIPPED} removed"
            )
        skip = Skip(state["loader"]["rows"], rows, spike.step, state["step"], spike.why, spike.losses)
        return Rollback(old[-1], skip)


def _set_aside(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints of before a skip that are still there, with their steps."""
    found = (folder / "checkpoints").glob("*spiked-step-*")
    return sorted((int(path.name.rpartition("-")[2]), path) for path in found if path.name[-1].isdigit())


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
