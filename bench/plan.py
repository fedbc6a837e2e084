"""The planner against this machine: step time and memory of real training steps on one core.

Each case is trained a few steps in a process of its own, on one thread; seconds are the process's CPU seconds (another program
may hold the cores), memory is the resident size's peak over what it was before the model was built. Rates of the core are fitted
to the cases marked `fit` (--fit), and stand in plan/hardware.py; the other cases are predicted with them. Two processes under a
pipeline show what waits on each rank under the schedules that divide the backward pass: memory alone, by rank.

python -m bench.plan [--steps 4] [--fit] [--only piped]       a line a case, and one JSON line
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from bench.common import RandomLoader, machine, peak_memory_mib
from bench.memory import LARGE, _resident
from bench.train_step import MODEL
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.fsdp import local
from dsv3.parallel.mesh import Mesh
from dsv3.plan.hardware import Hardware, known_hardware
from dsv3.plan.memory import memories, memory_of
from dsv3.plan.step import DSV3, Layout, step_time
from dsv3.recipes.tiny import MODEL as TINY
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer


class Case(NamedTuple):
    name: str
    model: ModelConfig
    rows: int
    length: int
    micro: int
    precision: str
    recompute: bool = False
    fit: bool = False


DEEP = dataclasses.replace(MODEL, num_hidden_layers=10, hidden_size=384, num_nextn_predict_layers=1)
DENSE = dataclasses.replace(MODEL, first_k_dense_replace=6, hidden_size=512, intermediate_size=1408, vocab_size=16384)
CASES = (
    Case("20M", MODEL, 8, 512, 8, "bfloat16", fit=True),
    Case("V3's proportions at a seventh", LARGE, 4, 512, 4, "bfloat16", fit=True),
    Case("20M, short rows", MODEL, 8, 128, 8, "bfloat16", fit=True),
    Case("20M, long rows", MODEL, 2, 2048, 2, "bfloat16", fit=True),
    Case("20M, float32", MODEL, 8, 512, 8, "float32", fit=True),
    Case("20M, FP8", MODEL, 8, 512, 8, "fp8", fit=True),
    Case("V3's proportions, FP8", LARGE, 4, 512, 4, "fp8", fit=True),
    Case("tiny", TINY, 16, 256, 16, "bfloat16", fit=True),
    Case("20M, four micro-batches", MODEL, 16, 512, 4, "bfloat16"),
    Case("20M, computed again", MODEL, 8, 512, 8, "bfloat16", recompute=True),
    Case("deeper and wider, with MTP", DEEP, 4, 512, 4, "bfloat16"),
    Case("dense, large vocabulary", DENSE, 4, 512, 4, "bfloat16"),
    Case("V3's proportions, long rows", LARGE, 1, 1536, 1, "bfloat16"),
    Case("tiny, float32", TINY, 16, 256, 16, "float32", fit=True),
    Case("deeper and wider, FP8", DEEP, 4, 512, 4, "fp8"),
)


class Piped(NamedTuple):
    """Two processes under a pipeline, or that share the experts; a step of `rows` rows in micro-batches of `micro`."""

    name: str
    schedule: str
    precision: str
    recompute: bool = False
    model: ModelConfig = DEEP
    rows: int = 8
    length: int = 512
    micro: int = 2
    expert: int = 1


PIPED = tuple(
    Piped(f"2 ranks, {schedule}, {precision}{', again' * recompute}", schedule, precision, recompute)
    for precision, recompute, schedules in (
        ("bfloat16", False, ("1f1b", "zero-bubble", "dualpipev")),
        ("bfloat16", True, ("1f1b", "zero-bubble")),
        ("fp8", False, ("1f1b", "zero-bubble")),
    )
    for schedule in schedules
) + tuple(Piped(f"2 ranks, expert 2, {precision}", "1f1b", precision, expert=2) for precision in ("bfloat16", "fp8"))


def measure(case: Case, steps: int) -> dict[str, float]:
    """CPU seconds of a step (the median) and peak bytes."""
    torch.set_num_threads(1)
    schedule = ScheduleConfig(steps=10**6, peak_lr=1e-3, warmup_steps=10, batch_size=case.rows)
    train = TrainConfig(
        schedule=schedule, seq_len=case.length, micro_batch=case.micro, precision=case.precision, recompute=case.recompute,
        log_counts_every=10**6,
    )  # fmt: skip
    _warm_up(case)
    before = _resident()
    model = DeepseekV3(case.model)
    model.init_weights()
    loader = RandomLoader(case.model.vocab_size, case.length, case.model.num_nextn_predict_layers)
    trainer = Trainer(model, loader, train, "unused")  # type: ignore[arg-type]
    seconds = []
    for _ in range(steps + 1):
        start = time.process_time()
        trainer.step()
        seconds.append(time.process_time() - start)
    peak = peak_memory_mib() * 2**20 - before
    return {"seconds": sorted(seconds[1:])[(steps - 1) // 2], "bytes": peak}


def measure_piped(case: Piped, rank: int, folder: str) -> float:
    """Peak bytes of a rank of two: the tensors that live between steps, and what the allocator gives out on top during one. (The
    resident size's peak is up to 400 MiB higher, now on one rank and now on the other: freed memory that threads keep.)"""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    degrees = ParallelConfig(pipeline=2 // case.expert, expert=case.expert, schedule=case.schedule)  # type: ignore[arg-type]
    mesh = Mesh(degrees, case.model)
    model = DeepseekV3(case.model)
    model.init_weights()
    schedule = ScheduleConfig(steps=10**6, peak_lr=1e-3, warmup_steps=10, batch_size=case.rows)
    train = TrainConfig(
        schedule=schedule, seq_len=case.length, micro_batch=case.micro, precision=case.precision, recompute=case.recompute,
        log_counts_every=10**6,
    )  # fmt: skip
    loader = RandomLoader(case.model.vocab_size, case.length, case.model.num_nextn_predict_layers)
    trainer = Trainer(model, loader, train, Path(folder) / "unused", mesh=mesh)
    del model
    trainer.step()
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter, DTensor)]
    storages = {local(tensor).untyped_storage().data_ptr(): local(tensor).untyped_storage() for tensor in tensors}
    lasting = sum(storage.nbytes() for storage in storages.values())
    trace = Path(folder) / f"{rank}.json"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        trainer.step()
    watched.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    return lasting + max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def _run_piped(queue: Any, case: Piped, rank: int, folder: str) -> None:
    queue.put((rank, measure_piped(case, rank, folder)))


def piped() -> list[dict[str, Any]]:
    context, rows = multiprocessing.get_context("spawn"), []
    for case in PIPED:
        queue = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            processes = [context.Process(target=_run_piped, args=(queue, case, rank, folder)) for rank in range(2)]
            for process in processes:
                process.start()
            found = [each for _, each in sorted(queue.get(timeout=300) for _ in processes)]
            for process in processes:
                process.join()
        layout = Layout(
            gpus=2, pipeline=2 // case.expert, expert=case.expert, schedule=case.schedule, micro_batch=case.micro,
            recompute=case.recompute,
        )  # fmt: skip
        plans = memories(case.model, layout, seq_len=case.length, precision=case.precision) * case.expert
        errors = [plan.total / measured - 1 for plan, measured in zip(plans, found)]
        shown = ", ".join(
            f"rank {rank} {measured / 2**20:5.0f} MiB, planned {plan.total / 2**20:5.0f} ({error:+.0%})"
            for rank, (measured, plan, error) in enumerate(zip(found, plans, errors))
        )
        print(f"{case.name:38}{shown}", flush=True)
        rows.append({"case": case.name, "bytes": found, "planned": [plan.kinds() for plan in plans], "errors": errors})
    return rows


def _warm_up(case: Case) -> None:
    """Libraries, kernels and allocators as they are after a first small step, so that the peak is the model's."""
    small = dataclasses.replace(TINY, num_hidden_layers=2, vocab_size=512)
    schedule = ScheduleConfig(steps=10**6, peak_lr=1e-3, warmup_steps=10, batch_size=2)
    train = TrainConfig(schedule=schedule, seq_len=64, micro_batch=2, precision=case.precision, log_counts_every=10**6)
    model = DeepseekV3(small)
    model.init_weights()
    Trainer(model, RandomLoader(512, 64, 1), train, "unused").step()  # type: ignore[arg-type]
    gc.collect()


def planned(case: Case, hardware: Hardware) -> dict[str, float]:
    layout = Layout(gpus=1, micro_batch=case.micro, recompute=case.recompute)
    seconds = step_time(
        case.model, layout, hardware, DSV3, rows=case.rows, seq_len=case.length, precision=case.precision
    ).seconds
    return {
        "seconds": seconds,
        "bytes": memory_of(case.model, layout, seq_len=case.length, precision=case.precision).total,
    }


def fitted(cases: list[Case], found: list[dict[str, float]], start: Hardware) -> Hardware:
    """The core's rates that make the sum of squared logarithms of planned over measured seconds least, by coordinate search."""
    precisions = ("bfloat16", "float32", "fp8")

    def built(values: dict[str, float]) -> Hardware:
        return dataclasses.replace(
            start, products={name: values[name] for name in precisions},
            half={name: values[f"half {name}"] for name in precisions}, attention=(values["attention"],) * 2,
            bandwidth=values["bandwidth"], launch=values["launch"],
        )  # fmt: skip

    def loss(values: dict[str, float]) -> float:
        hardware = built(values)
        return sum(math.log(planned(c, hardware)["seconds"] / f["seconds"]) ** 2 for c, f in zip(cases, found))

    values = {**start.products, **{f"half {name}": max(10.0, start.half[name]) for name in precisions}}
    values |= {"attention": start.attention[0], "bandwidth": start.bandwidth, "launch": start.launch}
    factor = 1.5
    while factor > 1.005:
        moved = False
        for name in values:
            for step in (factor, 1 / factor):
                tried = {**values, name: values[name] * step}
                if loss(tried) < loss(values):
                    values, moved = tried, True
        factor = factor if moved else factor**0.5
    return built(values)


def _run(queue: Any, case: Case, steps: int) -> None:
    queue.put(measure(case, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--fit", action="store_true", help="fit the core's rates anew to the cases that are for that")
    parser.add_argument("--only", choices=("piped",), help="leave the other cases out")
    options = parser.parse_args()
    if options.only:
        print(json.dumps({"bench": "plan", "piped": piped(), **machine()}))
        return
    context, found = multiprocessing.get_context("spawn"), []
    for case in CASES:
        queue = context.Queue()
        process = context.Process(target=_run, args=(queue, case, options.steps))
        process.start()
        found.append(queue.get(timeout=300))
        process.join()
        print(f"{case.name}: {found[-1]}", file=sys.stderr, flush=True)
    hardware = known_hardware()["cpu"]
    if options.fit:
        pairs = [(case, each) for case, each in zip(CASES, found) if case.fit]
        hardware = fitted([case for case, _ in pairs], [each for _, each in pairs], hardware)
        print(hardware)
    rows = []
    for case, each in zip(CASES, found):
        ours = planned(case, hardware)
        row = {"case": case.name, "fit": case.fit, **each, **{f"planned_{key}": value for key, value in ours.items()}}
        row |= {f"{key}_error": ours[key] / each[key] - 1 for key in each}
        rows.append(row)
        seconds = f"{each['seconds']:8.3f} s, planned {ours['seconds']:8.3f} ({row['seconds_error']:+.0%})"
        size = f"{each['bytes'] / 2**20:7.0f} MiB, planned {ours['bytes'] / 2**20:7.0f} ({row['bytes_error']:+.0%})"
        print(f"{case.name:32}{'fit' * case.fit:4}{seconds}{size}")
    print(json.dumps({"bench": "plan", "cases": rows, "piped": piped(), **machine()}))


if __name__ == "__main__":
    main()
