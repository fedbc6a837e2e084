"""What crosses the network when tokens go to experts in one hop and in two, and what the second hop costs where nothing is far.

    volume   rows and bytes a token and layer, forward and backward, that leave a node: counted on tokens drawn for a router of
             V3's shape (256 experts in 8 groups, the best 8 of the best 4 groups, D 7,168) over 64 ranks on 8 nodes, by the
             bookkeeping of dsv3/parallel/dispatch.py; rows in FP8 to the experts and bfloat16 back, as in training
    time     of training steps on 4 gloo processes of one machine as 2 nodes of 2, both ways in turns: the cost, without the gain

The drawn router's scores are independent: `even` has experts equally liked, `skewed` adds to each a constant of its own (so that
the busiest has several times the mean load), `ungrouped` is `even` without the limit to four groups.
    python -m bench.dispatch [--tokens 16384] [--rounds 7] [--precision bfloat16] [--volume-only]      tables, and one JSON line
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.common import machine
from bench.scaling import STEPS, trainer
from dsv3.kernels.moe import route
from dsv3.kernels.quant import cast_tiles
from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.dispatch import nodes_of, pick_experts, pick_nodes
from dsv3.parallel.mesh import Mesh
from dsv3.recipes.tiny import MODEL

RANKS, NODES = 64, 8
WAYS = {"one hop": 4, "two hops": 2}  # ranks a node of four


def routings(tokens: int) -> dict[str, torch.Tensor]:
    """Experts (N, K) of each kind of router."""
    config, draw = ModelConfig(), torch.Generator().manual_seed(0)
    noise = torch.randn(tokens, config.n_routed_experts, generator=draw)
    liked = 0.5 * torch.randn(config.n_routed_experts, generator=draw)
    best = {"even": (noise, config.n_group), "skewed": (noise + liked, config.n_group), "ungrouped": (noise, 1)}
    return {
        name: route(
            logits.sigmoid(), torch.zeros(config.n_routed_experts), top_k=config.num_experts_per_tok, n_group=groups,
            topk_group=min(groups, config.topk_group), normalise=True, scale=1.0,
        )[0]
        for name, (logits, groups) in best.items()
    }  # fmt: skip


def volume(indices: torch.Tensor) -> dict[str, float]:
    """Of a token in a layer, the mean over tokens and over the node that it starts on."""
    config = ModelConfig()
    tokens, top_k = indices.shape
    experts = config.n_routed_experts // NODES
    needs = nodes_of(indices, NODES, experts)
    loads = torch.bincount(indices.flatten(), minlength=config.n_routed_experts)
    away = (NODES - 1) / NODES  # of the nodes and experts alike, a token's own is as likely as any
    rows = {"one": away * top_k, "two": away * len(pick_nodes(needs, int(needs.sum()))[0]) / tokens}
    inside = pairs = 0
    for node in range(NODES):
        here = needs[:, node]
        local = indices[here] - node * experts
        wanted = int(((local >= 0) & (local < experts)).sum())
        picked, _, _, slots = pick_experts(local, experts, wanted)
        ranks = local.flatten()[slots] // (experts // (RANKS // NODES))
        inside += wanted
        pairs += len(torch.unique(picked * RANKS + ranks))
    row = torch.zeros(1, config.hidden_size, dtype=torch.bfloat16)
    there, back = sum(part.nbytes for part in cast_tiles(row, pow2=True)), row.nbytes
    beside = {"one": (4, 4), "two": (8 * top_k, 4 * top_k)}  # weights (and names) of a row; gradients of the weights
    found: dict[str, float] = {"busiest expert, of the mean": float(loads.max() / loads.float().mean())}
    for way, crossing in rows.items():
        found[f"rows, {way}"] = crossing
        found[f"KiB, {way}"] = crossing * (2 * there + 2 * back + sum(beside[way])) / 1024
    found["rows on the fast links"] = inside / tokens
    found["the same, once a rank"] = pairs / tokens
    found["bytes, two of one"] = found["KiB, two"] / found["KiB, one"]
    return found


def work(rank: int, folder: str, precision: str, rounds: int) -> None:
    """One of four processes: steps of either way in turns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 4), rank=rank, world_size=4)
    runs, times = {}, {}
    for name, node in WAYS.items():
        os.environ["LOCAL_RANK"] = str(rank % node)  # as a launcher on so many machines has it
        mesh = Mesh(ParallelConfig(expert=4), MODEL)
        runs[name], times[name] = trainer(mesh, Path(folder) / name, precision, "cpu"), []
        runs[name].step()
    for _ in range(rounds):
        for name, run in runs.items():
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(STEPS):
                run.step()
            times[name].append((time.perf_counter() - begun) / STEPS)
    torch.save(times, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def steps(precision: str, rounds: int) -> dict[str, float]:
    """Median seconds of a step either way, and the median of the rounds' ratios; of the slowest process."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, precision, rounds), nprocs=4)
        told: list[dict[str, list[float]]] = [torch.load(f"{folder}/{rank}.pt") for rank in range(4)]
    one, two = ([max(times) for times in zip(*(t[name] for t in told))] for name in WAYS)
    return {
        "one hop, s": statistics.median(one),
        "two hops, s": statistics.median(two),
        "two of one": statistics.median(b / a for a, b in zip(one, two)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32", "fp8"])
    parser.add_argument("--volume-only", action="store_true")
    options = parser.parse_args()
    told: dict[str, Any] = {"machine": machine()}
    told["volume"] = {name: volume(indices) for name, indices in routings(options.tokens).items()}
    for name, row in told["volume"].items():
        print(f"{name:<12}" + "".join(f"{key} {value:<8.3f}" for key, value in row.items()))
    if not options.volume_only:
        told["steps"] = {"precision": options.precision, **steps(options.precision, options.rounds)}
        print("".join(f"{key} {value:<9.4g}" for key, value in told["steps"].items() if key != "precision"))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
