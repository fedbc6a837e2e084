"""Placement of experts in serving, on recorded loads: heaviest GPU / mean, with and without redundant experts.

    python -m bench.placement                          # trains a small model of 256 experts, records the loads of its held-out text
    python -m bench.placement --metrics RUN/metrics.jsonl --unit GPUS NODES SLOTS --groups G      # the loads of any run

A model with the router of V3 (256 experts in 8 groups, 8 a token from 4 groups; three MoE layers and an MTP layer) is trained
on the standard library. Then traffic of one kind (code, or the English beside it) and of both passes it, and its loads are
recorded in two halves: placements are made from the first half and judged on it and on the second, which they have not seen.
Units are the report's: prefill on 32 GPUs in 4 nodes with 32 redundant experts, decoding on 144 (DeepSeek's day of figures) and
on 320. Small experts specialise less than large ones do, and held-out text is short: it is the methods that are compared.
Writes docs/evidence/placement.csv and placement.png. Does not: measure time; a layer waits for its heaviest GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import machine, write_csv
from bench.evidence import DOCS, corpus
from dsv3.data.loader import Loader, LoaderConfig
from dsv3.data.shards import Shards
from dsv3.infer.redundancy import Cluster, Method, place
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3
from dsv3.train.metrics import read_metrics, write_atomic
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer

MODEL = ModelConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=320, moe_intermediate_size=16, num_hidden_layers=4,
    num_nextn_predict_layers=1, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4,
    first_k_dense_replace=1, max_position_embeddings=512, rope_scaling=None,
)  # fmt: skip
ROWS, LENGTH = 4, 256
UNITS = {
    "prefill, no redundancy": Cluster(gpus=32, nodes=4, slots=256, groups=8),
    "prefill, 32 redundant": Cluster(gpus=32, nodes=4, slots=288, groups=8),
    "prefill, 64 redundant": Cluster(gpus=32, nodes=4, slots=320, groups=8),
    "decode on 144, 32 redundant": Cluster(gpus=144, nodes=18, slots=288, groups=8),
    "decode on 320, 64 redundant": Cluster(gpus=320, nodes=40, slots=320, groups=8),
}
METHODS: tuple[Method, ...] = ("none", "greedy", "eplb", "plan")
Loads = dict[str, list[np.ndarray]]  # traffic -> two halves of (L, E)


def trained(work: Path, shards: Shards, steps: int) -> DeepseekV3:
    """The model after so many steps, from `work` if it is there."""
    model, path = DeepseekV3(MODEL), work / f"model-{steps}.pt"
    model.init_weights(0)
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    schedule = ScheduleConfig(
        steps=steps, peak_lr=4e-3, warmup_steps=25, constant_until=0.4, cosine_until=0.9, second_constant_from=0.95,
        batch_size=ROWS, gamma=1e-3,
    )  # fmt: skip
    loader = Loader(shards, LoaderConfig(seq_len=LENGTH, extra_tokens=1))
    trainer = Trainer(model, loader, TrainConfig(schedule=schedule, seq_len=LENGTH, micro_batch=ROWS), Path("unused"))
    for _ in range(steps):
        record = trainer.step()
    print(f"trained {steps} steps: loss {record['loss']:.3f}, MaxVio {max(record['load']['max_vio']):.2f}", flush=True)
    torch.save(model.state_dict(), path)
    return model


@torch.no_grad()
def record_loads(model: DeepseekV3, held_out: Shards) -> Loads:
    """Tokens that each expert of each layer gets of each source's held-out text, and of all together."""
    found: Loads = {}
    for source in held_out.sources:
        rows = len(source.tokens) // LENGTH
        tokens = torch.from_numpy(np.asarray(source.tokens[: rows * LENGTH], dtype=np.int64)).view(rows, LENGTH)
        halves = [
            sum(model.hidden(part, depth=1).routing.counts for part in half.split(ROWS)).numpy()
            for half in (tokens[: rows // 2], tokens[rows // 2 :])
        ]
        print(f"{source.name}: {rows * LENGTH:,} held-out tokens", flush=True)
        found[source.name] = halves
    found["both"] = [sum(halves[i] for halves in found.values()) for i in (0, 1)]
    return found


def loads_of_run(path: Path) -> Loads:
    """Of the records of a run: the first half of them and the second."""
    counts = [np.array(r["expert_counts"]) for r in read_metrics(path) if "expert_counts" in r]
    if len(counts) < 2:
        raise SystemExit(f"{path} holds {len(counts)} records with expert_counts: two are needed")
    middle = len(counts) // 2
    return {"training": [sum(counts[:middle]), sum(counts[middle:])]}


def compare(loads: Loads, units: dict[str, Cluster]) -> list[dict[str, Any]]:
    """A row a unit, traffic and method: imbalance a layer, on the half that was planned from and on the one that was not."""
    rows = []
    for unit, cluster in units.items():
        for traffic, (first, second) in loads.items():
            for method in METHODS:
                if method == "none" and cluster.slots != first.shape[1]:
                    continue
                placed = place(first, cluster, method)
                for half, judged in (("planned from", first), ("next", second)):
                    layers = placed.imbalance(judged)
                    rows.append({"unit": unit, "traffic": traffic, "method": method, "half": half, "layers": layers})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'heaviest GPU / mean, mean of layers (worst)':62}{'planned from':>16}{'next half':>16}")
    for seen, unseen in zip(rows[::2], rows[1::2], strict=True):
        cells = [f"{r['layers'].mean():.3f} ({r['layers'].max():.2f})" for r in (seen, unseen)]
        print(f"{seen['unit']:30}{seen['traffic']:16}{seen['method']:16}{cells[0]:>16}{cells[1]:>16}")


def plot(loads: Loads, path: Path) -> None:
    """Heat maps: load of each expert, and of each GPU of the prefill unit under each method, on the half not planned from."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    units = [UNITS["prefill, no redundancy"], *[UNITS["prefill, 32 redundant"]] * 3]
    maps = [
        (
            "experts: load / mean",
            np.concatenate([second / second.mean(1, keepdims=True) for _, second in loads.values()]),
        )
    ]
    for method, unit in zip(METHODS, units):
        rows = [place(first, unit, method).gpu_loads(second) for first, second in loads.values()]
        rows = np.concatenate([row / row.mean(1, keepdims=True) for row in rows])
        title = f"{method}: load of 32 GPUs / mean, {unit.slots - 256} redundant; heaviest {rows.max(1).mean():.2f}"
        maps.append((title, rows))
    labels = [f"{traffic} {i}" for traffic, (first, _) in loads.items() for i in range(len(first))]
    figure, axes = plt.subplots(len(maps), 1, figsize=(10, 12))
    for axis, (title, values) in zip(axes, maps):
        drawn = axis.imshow(values, aspect="auto", cmap="magma", vmin=0, vmax=2 if values.shape[1] == 32 else 4)
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(labels)), labels, fontsize=6)
        figure.colorbar(drawn, ax=axis, pad=0.01)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/placement"))
    parser.add_argument("--steps", type=int, default=300, help="of training, 1,024 tokens each")
    parser.add_argument("--metrics", type=Path, help="a run's metrics.jsonl; prints its table and writes no evidence")
    parser.add_argument("--unit", type=int, nargs=3, action="append", metavar=("GPUS", "NODES", "SLOTS"))
    parser.add_argument("--groups", type=int, default=8, help="n_group of the run's model")
    options = parser.parse_args()
    if options.metrics:
        loads, experts = loads_of_run(options.metrics), len(read_metrics(options.metrics)[0]["expert_counts"][0])
        sizes = options.unit or [(options.groups, 1, experts), (options.groups, 1, experts + options.groups)]
        units = {
            f"{g} GPUs, {n} nodes, {s} slots": Cluster(gpus=g, nodes=n, slots=s, groups=options.groups)
            for g, n, s in sizes
        }
        show(compare(loads, units))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / f"loads-{options.steps}.json"
    if not path.exists():
        _, shards, held_out, _ = corpus(options.work)
        loads = record_loads(trained(options.work, shards, options.steps), held_out)
        write_atomic(
            path, json.dumps({name: [half.tolist() for half in halves] for name, halves in loads.items()}).encode()
        )
    loads = {name: [np.array(half) for half in halves] for name, halves in json.loads(path.read_text()).items()}
    rows = compare(loads, UNITS)
    show(rows)
    DOCS.mkdir(parents=True, exist_ok=True)
    write_csv(DOCS / "placement.csv", ["unit", "traffic", "method", "judged_on", "layer", "heaviest_over_mean"], (
        [r["unit"], r["traffic"], r["method"], r["half"], layer, round(float(value), 4)]
        for r in rows for layer, value in enumerate(r["layers"])
    ))  # fmt: skip
    plot(loads, DOCS / "placement.png")
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
