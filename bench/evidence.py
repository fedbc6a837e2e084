"""Does each of V3's ideas do what its report says, on models small enough for a laptop? Real text, three seeds, CSV and plots.

    balance   bias (at three speeds) against auxiliary loss alone against none: loss and MaxVio
    mtp       with against without: main loss, samples, acceptance over training
    moe       against a dense model of equal active parameters
    mla       against multi-head attention with the same heads: loss and bytes of cache

Every run is `ARM-SEED.json` in --work and is skipped when there, so that the command continues where it was stopped; seeds are
the outer loop. `--plot` alone writes docs/evidence from what there is.
    python -m bench.evidence [--seeds 3] [--threads 1] [--work runs/evidence] [--plot]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import write_csv
from dsv3.data.corpus import standard_library
from dsv3.data.loader import Loader, LoaderConfig, byte_lengths, held_out_batches
from dsv3.data.shards import Shards
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.infer.sampling import SamplingParams
from dsv3.kernels.attention import attend_full
from dsv3.model.config import ModelConfig
from dsv3.model.rope import apply_rope
from dsv3.model.transformer import Context, DeepseekV3, RMSNorm
from dsv3.recipes.corpus import Texts, build_shards, read_texts
from dsv3.train.metrics import write_atomic
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import HeldOut, TrainConfig, Trainer

MODEL = ModelConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=320, moe_intermediate_size=64, num_hidden_layers=4,
    num_nextn_predict_layers=1, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
    first_k_dense_replace=1, max_position_embeddings=512, rope_scaling=None,
)  # fmt: skip
PLAIN = dataclasses.replace(MODEL, num_nextn_predict_layers=0)
DENSE = dataclasses.replace(
    PLAIN, first_k_dense_replace=PLAIN.num_hidden_layers
)  # width 320 = (4 routed + 1 shared)·64
STEPS, ROWS, LENGTH, EVERY = 400, 8, 256, 10
DOCS = Path("docs/evidence")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train: the model, the speed of the router bias, the factor of the balance loss."""

    model: ModelConfig
    gamma: float = 1e-3
    alpha: float = 1e-4
    multi_head: bool = False


ARMS = {
    "bias 1e-3": Arm(MODEL),
    "auxiliary loss": Arm(MODEL, gamma=0.0, alpha=1e-2),
    "no balance": Arm(MODEL, gamma=0.0, alpha=0.0),
    "no MTP": Arm(PLAIN),
    "dense": Arm(DENSE),
    "multi-head": Arm(PLAIN, multi_head=True),
    "bias 5e-3": Arm(MODEL, gamma=5e-3),
    "bias 1e-2": Arm(MODEL, gamma=1e-2),
}


class MultiHeadAttention(nn.Module):
    """What MLA replaces: every head has keys and values of its own, with the same sizes and the same partial RoPE.

    Queries and keys are normalised a head, as MLA normalises its latents: it learns a little faster so (docs/LOG.md).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, heads, dim = config, config.num_attention_heads, config.hidden_size
        self.q_proj = nn.Linear(dim, heads * config.qk_head_dim, bias=False)
        self.k_proj = nn.Linear(dim, heads * config.qk_head_dim, bias=False)
        self.v_proj = nn.Linear(dim, heads * config.v_head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, dim, bias=False)
        self.q_norm = RMSNorm(config.qk_head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.qk_head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        config = self.config

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (config.num_attention_heads, -1))

        def rotated(projected: Tensor, norm: nn.Module) -> Tensor:
            plain, pe = norm(heads(projected)).split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
            pe = apply_rope(pe, context.cos.unsqueeze(-2), context.sin.unsqueeze(-2))
            return torch.cat((plain, pe), dim=-1).transpose(1, 2)

        q, k = rotated(self.q_proj(x), self.q_norm), rotated(self.k_proj(x), self.k_norm)
        v = heads(self.v_proj(x)).transpose(1, 2)
        return self.o_proj(attend_full(q, k, v, scale=config.softmax_scale).transpose(1, 2).flatten(-2))


def build(arm: Arm, seed: int) -> DeepseekV3:
    model = DeepseekV3(arm.model)
    if arm.multi_head:
        for layer in model.model.layers:
            layer.self_attn = MultiHeadAttention(arm.model)
    model.init_weights(seed)
    return model


def cache_values(arm: Arm) -> int:
    """Values a token and layer that generation must keep."""
    c = arm.model
    return (
        c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
        if arm.multi_head
        else c.kv_lora_rank + c.qk_rope_head_dim
    )


def active_parameters(arm: Arm, model: DeepseekV3) -> int:
    """Parameters of the main model that a token passes, embedding and head included."""
    idle = 1 - arm.model.num_experts_per_tok / arm.model.n_routed_experts
    main = [(n, p) for n, p in model.named_parameters() if f"layers.{arm.model.num_hidden_layers}." not in n]
    return round(sum(p.numel() * (1 - idle * (".experts." in n)) for n, p in main))


@torch.no_grad()
def agreement(model: DeepseekV3, rows: Iterable[Tensor]) -> float:
    """Share of greedy MTP drafts that equal the main model's own greedy choice, on held-out text (rows (B, T))."""
    hits = total = 0
    for tokens in rows:
        hidden = model.hidden(tokens, depth=1)
        drafts = model.lm_head(hidden.mtp[0]).argmax(-1)[:, :-1]  # at i: predicts token i + 2
        chosen = model.lm_head(hidden.main).argmax(-1)[:, 1:]  # at i + 1: predicts token i + 2
        hits, total = hits + int((drafts == chosen).sum()), total + drafts.numel()
    return hits / total


def samples(model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]], words: set[str]) -> dict[str, Any]:
    """Continuations at temperature 0.8: share of distinct 4-grams, share of words that the training text knows."""
    engine, out = Engine(model, tokenizer, drafts=0), []
    for i, ids in enumerate(prompts):
        params = SamplingParams(max_tokens=64, temperature=0.8, seed=i, ignore_eos=True)
        out.extend(engine.complete([ids], params))
    grams = [tuple(s.token_ids[i : i + 4]) for s in out for i in range(len(s.token_ids) - 3)]
    found = [word for s in out for word in re.findall(r"[A-Za-z]{3,}", s.text)]
    return {
        "distinct_4grams": len(set(grams)) / len(grams),
        "known_words": sum(word in words for word in found) / max(1, len(found)),
        "samples": [{"prompt": tokenizer.decode(ids), "text": s.text} for ids, s in zip(prompts, out)],
    }


def train(
    arm: Arm, seed: int, shards: Shards, held_out: Shards, tokenizer: Tokenizer, words: set[str]
) -> dict[str, Any]:
    """One run: a record every EVERY steps, and what is measured at the end."""
    depth = arm.model.num_nextn_predict_layers
    loader = Loader(shards, LoaderConfig(seq_len=LENGTH, extra_tokens=depth, seed=seed))
    batches = list(held_out_batches(held_out, seq_len=LENGTH, extra_tokens=0, rows=16, max_rows=96))
    schedule = ScheduleConfig(
        steps=STEPS, peak_lr=4e-3, warmup_steps=25, constant_until=0.4, cosine_until=0.9, second_constant_from=0.95,
        batch_size=ROWS, gamma=arm.gamma,
    )  # fmt: skip
    config = TrainConfig(schedule=schedule, seq_len=LENGTH, micro_batch=ROWS, alpha=arm.alpha, seed=seed)
    model = build(arm, seed)
    evaluation = HeldOut(batches, byte_lengths(tokenizer))
    trainer = Trainer(model, loader, config, Path("unused"), tokenizer=tokenizer, held_out=evaluation)
    rows, curve, window = [batch.tokens for batch in batches[:2]], [], []
    started = time.perf_counter()
    while trainer.step_index < STEPS:
        window.append(trainer.step())
        step = trainer.step_index
        if step % EVERY:
            continue
        record = {"step": step, "loss": statistics.fmean(r["loss"] for r in window)}
        record["max_vio"] = (
            statistics.fmean(v for r in window for v in r["load"]["max_vio"]) if "load" in window[0] else None
        )
        record["mtp_loss"] = statistics.fmean(r["mtp_loss"][0] for r in window) if depth else None
        record["bpb"] = trainer.bits_per_byte() if step % 50 == 0 else None
        record["accepted"] = agreement(trainer.twin, rows) if depth and step % 30 == 0 else None
        curve.append(record)
        window = []
    starts = [batch.tokens[i, :32].tolist() for batch in batches[:2] for i in range(0, 16, 2)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active": active_parameters(arm, model),
        "cache_values": cache_values(arm),
        "seconds": time.perf_counter() - started,
        "curve": curve,
        **({} if arm.multi_head else samples(trainer.twin, tokenizer, starts, words)),
    }


def corpus(work: Path) -> tuple[Texts, Shards, Shards, Tokenizer]:
    texts = read_texts(standard_library(), max_characters=8_000_000)
    folder = work / "tokenizer"
    if not folder.exists():
        Tokenizer.train((t for part in texts.train.values() for t in part), MODEL.vocab_size).save(folder)
    tokenizer = Tokenizer.from_file(folder)
    shards, held_out = build_shards(texts, tokenizer, work / "shards")
    assert held_out is not None
    return texts, shards, held_out, tokenizer


def run(seeds: int, work: Path) -> None:
    texts, shards, held_out, tokenizer = corpus(work)
    words = {word for part in texts.train.values() for text in part for word in re.findall(r"[A-Za-z]{3,}", text)}
    for seed in range(seeds):
        for name, arm in ARMS.items():
            path = work / f"{name}-{seed}.json"
            if path.exists():
                continue
            result = train(arm, seed, shards, held_out, tokenizer, words)
            write_atomic(path, json.dumps({"arm": name, "seed": seed, **result}, indent=1).encode())
            last = result["curve"][-1]
            print(f"{name}, seed {seed}: {last['bpb']:.4f} bits per byte in {result['seconds']:.0f} s", flush=True)


# -- tables and plots ----------------------------------------------------------------------------------------------------


def report(work: Path) -> None:
    """docs/evidence: curves.csv, final.csv, samples.csv and a plot each of the four questions; a table on the console."""
    results = [json.loads(path.read_text()) for name in ARMS for path in sorted(work.glob(f"{name}-?.json"))]
    if not results:
        raise SystemExit(f"{work} holds no run: start without --plot")
    DOCS.mkdir(parents=True, exist_ok=True)
    fields = ["step", "loss", "mtp_loss", "max_vio", "bpb", "accepted"]
    write_csv(DOCS / "curves.csv", ["arm", "seed", *fields], (
        [r["arm"], r["seed"], *(_short(point[f]) for f in fields)] for r in results for point in r["curve"]
    ))  # fmt: skip
    finals = [_final(r) for r in results]
    write_csv(DOCS / "final.csv", list(finals[0]), ([_short(v) for v in f.values()] for f in finals))
    write_csv(DOCS / "samples.csv", ["arm", "seed", "prompt", "text"], (
        [r["arm"], r["seed"], s["prompt"], s["text"]] for r in results if r["arm"] in ("bias 1e-3", "no MTP") and r["seed"] == 0
        for s in r["samples"]
    ))  # fmt: skip
    _plot(results)
    for name in ARMS:
        mine = [f for f in finals if f["arm"] == name]
        if mine:
            print(name, f"({len(mine)} seeds)", {k: _spread(mine, k) for k in list(mine[0])[5:]})


def _final(result: dict[str, Any]) -> dict[str, Any]:
    """The end of a run: losses and MaxVio over the last 30 steps, which damp a single batch's luck."""
    tail = result["curve"][-3:]
    mean = {
        k: statistics.fmean(p[k] for p in tail) if tail[-1][k] is not None else None
        for k in ("loss", "mtp_loss", "max_vio")
    }
    whole = [p["max_vio"] for p in result["curve"] if p["max_vio"] is not None]
    return {
        **{k: result[k] for k in ("arm", "seed", "parameters", "active", "cache_values")},
        "bits_per_byte": result["curve"][-1]["bpb"], **mean,
        "max_vio_whole_run": statistics.fmean(whole) if whole else None,
        "accepted": next((p["accepted"] for p in reversed(result["curve"]) if p["accepted"] is not None), None),
        "distinct_4grams": result.get("distinct_4grams"), "known_words": result.get("known_words"),
    }  # fmt: skip


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{statistics.fmean(values):.4f} ±{(max(values) - min(values)) / 2:.4f}" if values else "-"


def _short(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def _plot(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    questions: dict[str, tuple[list[str], list[tuple[str, str]]]] = {
        "balance": (["bias 1e-3", "bias 5e-3", "bias 1e-2", "auxiliary loss", "no balance"],
                    [("loss", "main loss, nats"), ("max_vio", "MaxVio, mean of layers")]),
        "mtp": (["bias 1e-3", "no MTP"], [("loss", "main loss, nats"), ("accepted", "share of drafts accepted")]),
        "moe": (["no MTP", "dense"], [("loss", "main loss, nats"), ("bpb", "held-out bits per byte")]),
        "mla": (["no MTP", "multi-head"], [("loss", "main loss, nats"), ("bpb", "held-out bits per byte")]),
    }  # fmt: skip
    labels = {("mtp", "bias 1e-3"): "MTP", ("moe", "no MTP"): "MoE", ("mla", "no MTP"): "MLA"}
    for question, (arms, panels) in questions.items():
        figure, axes = plt.subplots(1, len(panels), figsize=(10, 3.6))
        for axis, (key, title) in zip(axes, panels):
            for colour, arm in enumerate(arms):
                for i, result in enumerate(r for r in results if r["arm"] == arm):
                    points = [(p["step"], p[key]) for p in result["curve"] if p[key] is not None]
                    if points:
                        axis.plot(
                            *zip(*points),
                            color=f"C{colour}",
                            alpha=0.8,
                            lw=1,
                            label=labels.get((question, arm), arm) if i == 0 else None,
                        )
            axis.set(title=title, xlabel="step")
            if key != "accepted" and axis.lines:
                low = min(min(line.get_ydata()) for line in axis.lines)
                axis.set_ylim(low * 0.97, {"loss": 5.0, "bpb": low * 1.35}.get(key))
        axes[0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(DOCS / f"{question}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument(
        "--plot", action="store_true", help="no training: write docs/evidence from the runs that are there"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.plot:
        run(options.seeds, options.work)
    report(options.work)


if __name__ == "__main__":
    main()
