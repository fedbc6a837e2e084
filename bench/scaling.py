"""Every layout of several processes against one: the same losses and gradients, tokens a second, and what a checkpoint costs.

    loss       largest relative difference of the loss over STEPS steps, float32
    gradient   |g - g1| / |g1| over all masters, of the first step, float32
    tokens/s   of steps in --precision
    efficiency of N processes, against N that take the same steps at the same time and each alone: what the machine has to give
    stall      seconds that a save keeps training waiting: written beside it, and waited for
    recovery   seconds from the death of a rank to the next finished step, under torchrun

All sides take turns within one start of the processes: a round of steps of each, several rounds, medians. On GPUs where several are
at hand (--device cuda), on a CPU with one thread a process.

python -m bench.scaling [--ranks 2] [--rounds 5] [--recovery] [--csv FILE]       a table, and one JSON line
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from bench.common import RandomLoader, machine, write_csv
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.mesh import Mesh
from dsv3.recipes.tiny import MODEL
from dsv3.train.metrics import read_metrics
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer

STEPS, LENGTH, ROWS, MICRO = 4, 256, 16, 2
APART = "each process alone"
LAYOUTS: dict[str, dict[str, Any]] = {
    "data, zero1": {},
    "data, fsdp": {"sharding": "fsdp"},
    "expert 2": {"expert": 2},
    "expert 2, fsdp": {"expert": 2, "sharding": "fsdp"},
    "expert 4": {"expert": 4},
    "pipeline 2, 1f1b": {"pipeline": 2},
    "pipeline 2, zero-bubble": {"pipeline": 2, "schedule": "zero-bubble"},
    "pipeline 2, dualpipev": {"pipeline": 2, "schedule": "dualpipev"},
    "pipeline 2, expert 2": {"pipeline": 2, "expert": 2},
    "pipeline 2, fsdp": {"pipeline": 2, "sharding": "fsdp"},
}


def fitting(config: ModelConfig, ranks: int) -> dict[str, dict[str, Any]]:
    """Layouts that so many processes can take and that differ from each other."""
    found = {}
    for name, degrees in LAYOUTS.items():
        try:
            ParallelConfig(**degrees).check(config, ranks)
        except ValueError:
            continue
        if degrees.get("sharding") != "fsdp" or ranks > degrees.get("pipeline", 1):
            found[name] = degrees
    return found


def trainer(mesh: Mesh | None, folder: Path, precision: str, device: str) -> Trainer:
    model = DeepseekV3(MODEL)
    model.init_weights(0)
    schedule = ScheduleConfig(steps=10**4, peak_lr=1e-3, warmup_steps=10, batch_size=ROWS)
    config = TrainConfig(schedule=schedule, seq_len=LENGTH, micro_batch=MICRO, precision=precision)
    loader = RandomLoader(MODEL.vocab_size, LENGTH, MODEL.num_nextn_predict_layers)
    return Trainer(model if mesh else model.to(device), loader, config, folder, mesh=mesh)  # type: ignore[arg-type]


def whole_gradients(run: Trainer) -> dict[str, torch.Tensor]:
    """Of the next step."""
    found: dict[str, torch.Tensor] = {}
    clip = run.workers.clip

    def look(limit: float) -> torch.Tensor:
        run.workers.settle()
        for part in run.workers.parts:
            for name, parameter in part.named_parameters():
                assert parameter.grad is not None
                view = run.workers.view(name, parameter.grad)
                found[name] = (view.full_tensor() if isinstance(view, DTensor) else view).cpu().clone()
        return clip(limit)

    run.workers.clip = look  # type: ignore[method-assign]
    run.step()
    run.workers.clip = clip  # type: ignore[method-assign]
    return found


def exactness(run: Trainer) -> dict[str, Any]:
    gradients = whole_gradients(run)
    return {"gradients": gradients, "losses": [run.step()["loss"] for _ in range(STEPS)]}


def work(rank: int, ranks: int, folder: str, device: str, precision: str, rounds: int) -> None:
    """One process: alone (ranks 1), or every layout of so many."""
    torch.set_num_threads(1)
    if ranks > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        if device == "cuda":
            torch.cuda.set_device(rank)
        store = dist.FileStore(f"{folder}/store-{ranks}", ranks)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    layouts = fitting(MODEL, ranks) if ranks > 1 else {"one process": None}
    found: dict[str, Any] = {}
    runs: dict[str, Trainer] = {}
    for name, degrees in layouts.items():
        meshes = [None if degrees is None else Mesh(ParallelConfig(**degrees), MODEL, device) for _ in range(2)]
        found[name] = exactness(trainer(meshes[0], Path(folder) / "none", "float32", device))
        runs[name] = trainer(meshes[1], Path(folder) / f"run-{ranks}-{name}", precision, device)
        runs[name].step()
    if ranks > 1:
        runs[APART] = trainer(None, Path(folder) / "none", precision, device)
        runs[APART].step()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if ranks > 1:
                dist.barrier()
            begun = time.perf_counter()
            for _ in range(STEPS):
                run.step()
            times[name].append((time.perf_counter() - begun) / STEPS)
    apart = statistics.median(times[APART if ranks > 1 else name])
    for name, run in runs.items():
        if name == APART:
            continue
        found[name] |= {"seconds": statistics.median(times[name]), "apart": apart}
        for kind, wait in (("stall_waiting", True), ("stall_beside", False)):
            run.step()
            run.save(wait=wait)
            found[name][kind] = run.saver.stalled
        run.saver.wait()
    torch.save(found, f"{folder}/{ranks}-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def together(folder: str, ranks: int) -> dict[str, Any]:
    """What the ranks found of each layout, a pipeline's gradients put together; the slowest rank's seconds."""
    told = [torch.load(f"{folder}/{ranks}-{rank}.pt", weights_only=False) for rank in range(ranks)]
    merged = {}
    for name in told[0]:
        merged[name] = {
            key: max(t[name][key] for t in told) for key in ("seconds", "apart", "stall_waiting", "stall_beside")
        }
        merged[name]["losses"] = told[0][name]["losses"]
        merged[name]["gradients"] = {key: g for t in reversed(told) for key, g in t[name]["gradients"].items()}
    return merged


def compare(one: dict[str, Any], other: dict[str, Any], ranks: int) -> dict[str, float]:
    """A row of the table."""
    losses = zip(one["losses"], other["losses"], strict=True)
    off = sum(float((g - other["gradients"][n]).double().square().sum()) for n, g in one["gradients"].items())
    size = sum(float(g.double().square().sum()) for g in one["gradients"].values())
    return {
        "loss": max(abs(a - b) / a for a, b in losses),
        "gradient": (off / size) ** 0.5,
        "tokens_per_s": ROWS * LENGTH / other["seconds"],
        "efficiency": other["apart"] / other["seconds"] / ranks,
        "stall_waiting": other["stall_waiting"],
        "stall_beside": other["stall_beside"],
    }


def recovery(folder: Path) -> float:
    """Seconds from a rank's death to the next step behind what was lost, with a checkpoint every ten steps."""
    from dsv3.cli import main

    draw = torch.Generator().manual_seed(0)
    words = ["".join(chr(97 + int(c)) for c in torch.randint(26, (5,), generator=draw)) for _ in range(500)]
    text = " ".join(words[int(i)] for i in torch.randint(500, (60000,), generator=draw))
    (folder / "text.txt").write_text("\n\n".join(text[i : i + 2000] for i in range(0, len(text), 2000)))
    main(["tokenizer", "--data", str(folder / "text.txt"), "--vocab-size", "512", "--out", str(folder / "tok")])
    main([
        "data", "--data", str(folder / "text.txt"), "--tokenizer", str(folder / "tok"), "--out", str(folder / "shards"),
    ])  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "--monitor-interval", "0.1", "-m", "dsv3.cli", "pretrain", "--shards", str(folder / "shards"), "--tokenizer",
        str(folder / "tok"), "--steps", "200", "--warmup-steps", "2", "--batch-size", "8", "--micro-batch", "4",
        "--save-every", "10", "--parallel.expert", "2", "--out", str(folder / "run"),
    ]  # fmt: skip
    metrics = folder / "run" / "metrics.jsonl"

    def steps() -> int:
        return len(read_metrics(metrics)) if metrics.exists() else 0

    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        while steps() < 15:
            time.sleep(0.05)
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        before, killed = steps(), time.monotonic()
        os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
        while (count := steps()) >= before:  # what was written behind the checkpoint goes first
            before, _ = max(before, count), time.sleep(0.02)
        while steps() <= before:
            time.sleep(0.02)
        return time.monotonic() - killed
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32", "fp8"])
    parser.add_argument("--recovery", action="store_true", help="kill a rank under torchrun as well")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    options = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in [1, *options.ranks]:
            mp.spawn(work, (ranks, folder, options.device, options.precision, options.rounds), nprocs=ranks)
        one = together(folder, 1)["one process"]
        table["1: one process"] = compare(one, one, 1)
        for ranks in options.ranks:
            for name, found in together(folder, ranks).items():
                table[f"{ranks}: {name}"] = compare(one, found, ranks)
    for name, row in table.items():
        print(f"{name:<30}" + "".join(f"{key} {value:<11.4g}" for key, value in row.items()))
    told: dict[str, Any] = {"machine": machine(), "model": dataclasses.asdict(MODEL), "layouts": table}
    if options.recovery:
        with tempfile.TemporaryDirectory() as folder:
            told["recovery_s"] = recovery(Path(folder))
            print(f"recovery from a killed rank: {told['recovery_s']:.1f} s")
    if options.csv:
        rows = [[name, *row.values()] for name, row in table.items()]
        write_csv(options.csv, ["layout", *next(iter(table.values()))], rows)
    del told["model"]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
