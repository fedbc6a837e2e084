"""A step that hangs: every rank's stacks on disk, and one sentence that names rank, layer and collective.

A thread in each rank looks at the clock. A step is late when it takes FACTOR times the median of those before it; whoever is late
first rings an alarm in the process group's store (a key; collectives would hang as well). Every rank that hears it

    writes   RUN/hang-rankN.txt: where it is, and the Python stacks of all its threads
    posts    step, layer and pass, innermost module, collectives under way with their number in their group

and after a grace the lowest that answered says who is not there, which is also RUN/hang.txt. The layer is a mark that hooks on the
decoder layers leave, forward and backward; the innermost module is read from the stack; the collectives from torch's flight
recorder, which counts them a group at a time: a rank whose count in a group is behind the one that others wait in is not there.

A rank that does not answer is gone, stopped, or in C code that keeps the interpreter. A process alone has a watchdog too.
Does not: end the run (the process group's timeout does, and torchrun starts it again from the last checkpoint); see C stacks;
mark layers that torch.compile has compiled (the stack still names the module).
"""

from __future__ import annotations

import json
import linecache
import os
import re
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.utils.hooks import RemovableHandle

from dsv3.train.metrics import write_atomic

Place = dict[str, Any]  # JSON-able: what a rank posts


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a step is late. The defaults suit steps of a millisecond to some minutes."""

    factor: float = 10.0
    """Of the median of earlier steps."""
    least_s: float = 60.0
    """Never sooner than this."""
    most_s: float = 480.0
    """Nor later, but for twice the median: the process group gives up after 600 s (parallel/mesh.py), and with it the evidence.
    Also for the first steps, which compile and allocate."""
    poll_s: float = 1.0
    """Between looks at the clock and the store."""

    def __post_init__(self) -> None:
        if not (self.factor > 1 and 0 < self.least_s <= self.most_s and self.poll_s > 0):
            raise ValueError(
                f"factor {self.factor} must be above 1, and 0 < least_s {self.least_s} <= most_s {self.most_s}, "
                f"poll_s {self.poll_s} above 0"
            )

    def deadline(self, earlier: Iterable[float]) -> float:
        """Seconds after which a step is late, from the seconds of earlier ones."""
        times = list(earlier)
        if len(times) < 3:
            return self.most_s
        usual = statistics.median(times)
        return max(self.least_s, 2 * usual, min(self.factor * usual, self.most_s))


class Watchdog:
    """Watches the steps of one process, or of a rank with all others. Every rank makes one; a context, whose end stops its thread.

    Args:
        folder: of the run.
        parts: the model's parts that are here, for the names of layers and modules.
        say: is told, on one rank, what hangs, and when it went on; from the watchdog's thread.
    """

    def __init__(
        self, folder: Path, parts: Iterable[nn.Module], say: Callable[[str], None], config: WatchConfig | None = None
    ) -> None:
        self.folder, self.config, self._say = Path(folder), config or WatchConfig(), say
        self.rank, self.world = 0, 1
        self._store: dist.Store | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            # A connection of its own: the main thread may be waiting in the other one.
            own = distributed_c10d._get_default_store().clone()  # type: ignore[missing-attribute]  # it has
            # Every rank counts its own, so that all agree which one this is: an earlier one's alarm is not this one's.
            which = own.add(f"watchdog/{self.folder.name}/made-by-{self.rank}", 1)
            self._store = dist.PrefixStore(f"watchdog/{self.folder.name}/{which}", own)
            self._store.set(f"who/{self.rank}", _who())
        self._names: dict[int, str] = {}
        self._handles: list[RemovableHandle] = []
        for part in parts:
            for name, module in part.named_modules():
                self._names.setdefault(id(module), name)
                if re.search(r"(^|\.)layers\.\d+$", name) and getattr(module, "_compiled_call_impl", None) is None:
                    self._mark(name, module)
        self._mark_now: tuple[str, str] | None = None
        self._times: deque[float] = deque(maxlen=64)
        self._step, self._count = 0, 0
        self._begun: float | None = None
        self._thread_id = threading.get_ident()
        self._answered, self._spoke = 0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching, and take the marks off the model."""
        self._stop.set()
        self._thread.join()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._store = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch what is inside: step `number`, which every rank takes at once."""
        self._thread_id, self._step = threading.get_ident(), number
        self._count += 1
        begun = self._begun = time.monotonic()
        try:
            yield
            self._times.append(time.monotonic() - begun)
        finally:
            self._begun, self._mark_now = None, None
        if self._spoke:
            self._spoke = False
            self._say(f"step {number} went on after {time.monotonic() - begun:.0f} s")

    def _mark(self, name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, _inputs: Any) -> None:
            self._mark_now = (name, "forward")

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(back)

        def back(_grad: Tensor) -> None:
            self._mark_now = (name, "backward")

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(self.config.poll_s):
            try:
                self._look()
            except RuntimeError as error:  # the store's host is gone; torchrun ends this process soon
                if self._store is not None and not self._stop.is_set():
                    self._say(
                        f"watchdog of rank {self.rank}: the ranks' store is lost ({str(error)[:200]}), watching alone"
                    )
                self._store = None

    def _look(self) -> None:
        begun, count, late = self._begun, self._count, self.config.deadline(self._times)
        overdue = begun is not None and time.monotonic() - begun > late and count > self._answered
        if self._store is None:
            if overdue:
                self._answered = count
                self._tell(self._step, {self.rank: self._write()}, {})
            return
        if overdue:
            self._store.set("alarm", str(count))
        if self._store.check(["alarm"]) and (heard := int(self._store.get("alarm"))) > self._answered:
            self._answered = heard
            self._answer(heard, self._store)

    def _answer(self, alarm: int, store: dist.Store) -> None:
        """Write and post where this rank is; the lowest that did speaks for all."""
        store.set(f"{alarm}/{self.rank}", json.dumps(self._write()))
        self._stop.wait(5 * self.config.poll_s)  # the others look as seldom
        if any(store.check([f"{alarm}/{rank}"]) for rank in range(self.rank)):
            return
        there = [rank for rank in range(self.world) if store.check([f"{alarm}/{rank}"])]
        places = {rank: json.loads(store.get(f"{alarm}/{rank}")) for rank in there}
        if store.add(f"{alarm}/told", 1) > 1:
            return  # this rank was stopped itself, and hears of it late
        silent = [rank for rank in range(self.world) if rank not in places and store.check([f"who/{rank}"])]
        who = {rank: store.get(f"who/{rank}").decode() for rank in silent}
        self._tell(max(place["step"] for place in places.values()), places, who)

    def _tell(self, step: int, places: Mapping[int, Place], who: Mapping[int, str]) -> None:
        usual = f"usually {statistics.median(self._times):.1f} s" if self._times else "no earlier one to compare with"
        took = max(place["seconds"] for place in places.values())
        text = f"step {step} hangs, {took:.0f} s by now ({usual}): {verdict(places, self.world, who)}"
        write_atomic(self.folder / "hang.txt", (text + "\n").encode())
        self._spoke = True
        self._say(f"{text}; stacks in {self.folder}/hang-rank*.txt")

    def _write(self) -> Place:
        """hang-rankN.txt, and where this rank is."""
        frames, names = sys._current_frames(), {t.ident: t.name for t in threading.enumerate()}
        place = self._place(frames.get(self._thread_id))
        order = sorted(frames, key=lambda ident: ident != self._thread_id)
        stacks = [
            f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frames[ident]))}"
            for ident in order
            if ident != threading.get_ident()
        ]
        head = f"rank {self.rank} of {self.world}, {_where(place)}\n{json.dumps(place, indent=1)}\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"hang-rank{self.rank}.txt", "\n".join([head, *stacks]).encode())
        return place

    def _place(self, frame: FrameType | None) -> Place:
        begun, mark = self._begun, self._mark_now
        pending, counts = _collectives()
        return {
            "who": _who(),
            "step": self._step,
            "inside": begun is not None,
            "seconds": 0.0 if begun is None else time.monotonic() - begun,
            "layer": mark[0] if mark else None,
            "pass": mark[1] if mark else None,
            **self._stack(frame),
            "pending": pending,
            "counts": counts,
            "cuda": torch.cuda.is_initialized(),
        }

    def _stack(self, frame: FrameType | None) -> Place:
        """Innermost module, line of this side of torch's, and whether the thread is in torch.distributed."""
        found: Place = {"module": None, "at": None, "in_collective": None}
        inner = True
        while frame is not None:
            path, name = frame.f_code.co_filename, frame.f_code.co_name
            collective = "torch/distributed/" in path
            if inner and (collective or ".wait(" in linecache.getline(path, frame.f_lineno)):
                found["in_collective"] = name if collective else "wait"
            inner = inner and collective
            if found["at"] is None and f"{os.sep}torch{os.sep}" not in path:
                found["at"] = f"{Path(path).name}:{frame.f_lineno} in {name}"
            if found["module"] is None:
                found["module"] = self._names.get(id(frame.f_locals.get("self"))) or None
            frame = frame.f_back
        return found


def _collectives() -> tuple[list[dict[str, Any]], dict[str, int]]:
    """From torch's flight recorder: those under way (name, group, number), and how many each group has begun."""
    recorder = torch._C._distributed_c10d
    pending, counts = [], {}
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if (dump := getattr(recorder, name, None)) is None:
            continue
        for entry in json.loads(dump(True, False)).get("entries", []):
            group, number = str(entry["process_group"][0]), entry["collective_seq_id"]
            if not entry["is_p2p"]:
                counts[group] = max(number, counts.get(group, 0))
            if not entry["retired"] and entry["state"] != "completed":
                pending.append({
                    "name": entry["profiling_name"], "group": group, "p2p": entry["is_p2p"],
                    "number": entry["p2p_seq_id"] if entry["is_p2p"] else number,
                })  # fmt: skip
    return pending[:8], counts


def _who() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


# -- judgement -------------------------------------------------------------------------------------------------------------


def waits(place: Place) -> bool:
    """Whether the rank is in a collective: its thread is, or on a GPU, where the thread runs ahead, one has not ended."""
    return bool(place["in_collective"]) or (place["cuda"] and any(not c["p2p"] for c in place["pending"]))


def absent(places: Mapping[int, Place], world: int) -> list[int]:
    """Ranks that the others wait for: those that gave no sign, those that wait for no one; or, if all wait, those behind."""
    away = [rank for rank in range(world) if rank not in places or not waits(places[rank])]
    if away:
        return away
    awaited = {(c["group"], c["number"]) for place in places.values() for c in place["pending"] if not c["p2p"]}
    return [
        rank
        for rank, place in places.items()
        if any(group in place["counts"] and place["counts"][group] < number for group, number in awaited)
    ]


def verdict(places: Mapping[int, Place], world: int, who: Mapping[int, str]) -> str:
    """One sentence: who is not there and where it is instead, and where the others wait.

    Args:
        places: rank -> what it posted. who: machine and process of ranks that posted nothing, as far as known.
    """
    missing, said = absent(places, world), []
    for rank in missing[:8]:
        if rank not in places:
            said.append(
                f"rank {rank} ({who.get(rank, 'unknown')}) gives no sign: gone, stopped, or in C code (py-spy dump tells)"
            )
            continue
        place = places[rank]
        verb = "is not there" if world > 1 else "is stuck"
        said.append(f"rank {rank} ({place['who']}) {verb}: it is {_where(place)}")
    if len(missing) > 8:
        said.append(f"and {len(missing) - 8} more ranks are not there")
    waiting = defaultdict(list)
    for rank in sorted(set(places) - set(missing)):
        waiting[_where(places[rank], line=False)].append(rank)
    for where, ranks in list(waiting.items())[:8]:
        named = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        said.append(
            f"{'rank' if len(ranks) == 1 else 'ranks'} {named} {'waits' if len(ranks) == 1 else 'wait'} {where}"
        )
    if not missing:
        said.append("all are there, so it is the network or a GPU")
    return "; ".join(said)


def _where(place: Place, *, line: bool = True) -> str:
    """in model.layers.2.mlp (forward), in gloo:all_to_all number 7 of group 3, at dispatch.py:300 in exchange"""
    parts = []
    if not place["inside"]:
        parts.append(f"between steps, after step {place['step']}")
    module, layer = place["module"], place["layer"]
    if layer and not (module or "").startswith(layer):
        module = layer  # in backward the stack holds no module
    if module:
        parts.append(f"in {module}" + (f" ({place['pass']})" if place["pass"] else ""))
    if waits(place):
        first = next((c for c in place["pending"]), None)
        parts.append(
            f"in {first['name']} number {first['number']} of group {first['group']}" if first else
            f"in {place['in_collective']}"
        )  # fmt: skip
    if line and place["at"]:
        parts.append(f"at {place['at']}")
    return ", ".join(parts) or "in no layer"
