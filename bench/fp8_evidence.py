"""Does FP8 train as well as bfloat16? The same model, data and seed in both, and what each part of the recipe is there for.

    bfloat16, float32      the twin, and a control: how far apart two ways of rounding end up anyway
    fp8                    the recipe: tiles, promotion at every 128, e4m3 everywhere, bfloat16 moments
    per-tensor             one scale a tensor instead of tiles and blocks
    14-bit sums            no promotion: sums of 32 products are cut to 14 bits as they are added (report 3.3.2)
    e5m2 gradients         gradients of activations in e5m2, as recipes before V3 had it

The figure is the report's (appendix B.1): loss smoothed by a moving average of 0.9, relative distance to bfloat16's.
Every run is `ARM-SEED.json` in --work, continued by nothing and skipped when whole; `--plot` alone writes docs/evidence.
    python -m bench.fp8_evidence [--arms fp8 bfloat16 ...] [--seeds 0 1] [--threads 2] [--work runs/fp8] [--plot | --errors]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.common import machine, write_csv
from bench.train_step import MODEL as STEP_MODEL
from dsv3.data.corpus import standard_library
from dsv3.data.loader import Loader, LoaderConfig, byte_lengths, held_out_batches
from dsv3.data.tokenizer import Tokenizer
from dsv3.kernels.quant import E4M3_MAX, TILE, dequantize_tiles, tiles
from dsv3.model import fp8
from dsv3.model.transformer import DeepseekV3
from dsv3.recipes.corpus import build_shards, read_texts
from dsv3.train.metrics import write_atomic
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import HeldOut, TrainConfig, Trainer

MODEL = dataclasses.replace(STEP_MODEL, vocab_size=4352)  # 20.1M parameters
STEPS, ROWS, LENGTH, EVERY = 1000, 8, 256, 10
SMOOTHING = 0.9
DOCS = Path("docs/evidence")
E5M2_MAX = 57344.0


# -- ablations: what takes the place of a function of model.fp8 ----------------------------------------------------------


def one_scale(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """cast_tiles with one scale for the whole tensor."""
    scale = x.float().abs().amax().clamp_min(1e-30) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale.expand(*x.shape[:-1], tiles(x.shape[-1])).contiguous()


def one_scale_columns(x: Tensor, offsets: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    codes, scales = one_scale(x)
    return codes.t().contiguous(), scales[0, 0].expand(
        x.shape[1], x.shape[0] // TILE + offsets.numel() - 1
    ).contiguous()


def one_scale_retile(codes: Tensor, scales: Tensor, offsets: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    return one_scale_columns(dequantize_tiles(codes, scales, torch.float32), offsets)


def one_scale_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """cast_blocks with one scale a matrix."""
    scale = w.abs().amax((-2, -1), keepdim=True).clamp_min(1e-30) / E4M3_MAX
    grid = (*w.shape[:-2], tiles(w.shape[-2]), tiles(w.shape[-1]))
    return (w / scale).to(torch.float8_e4m3fn), scale.expand(grid).contiguous()


def e5m2_tiles(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """cast_tiles to e5m2."""
    parts = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % TILE)).unflatten(-1, (-1, TILE))
    scales = parts.abs().amax(-1).clamp_min(1e-30) / E5M2_MAX
    codes = (parts / scales.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]].to(torch.float8_e5m2)
    return codes.contiguous(), scales


def e5m2_columns(x: Tensor, offsets: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    rows, bounds = x.shape[0], offsets.tolist()
    codes = torch.empty(x.shape[1], rows, dtype=torch.float8_e5m2)
    scales = torch.zeros(x.shape[1], rows // TILE + len(bounds) - 1)
    for expert, start in enumerate(bounds[:-1]):
        if bounds[expert + 1] > start:
            part = e5m2_tiles(x[start : bounds[expert + 1]].t())
            codes[:, start : bounds[expert + 1]] = part[0]
            scales[:, start // TILE + expert :][:, : part[1].shape[1]] = part[1]
    return codes, scales


def e5m2_retile(codes: Tensor, scales: Tensor, offsets: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    return e5m2_columns(dequantize_tiles(codes, scales, torch.float32), offsets)


def _cut_sums() -> dict[str, Any]:
    names = ("fp8_mm", "fp8_wgrad", "fp8_grouped_mm", "fp8_grouped_wgrad")
    return {name: partial(getattr(fp8, name), sum_bits=14) for name in names}


ABLATIONS: dict[str, Any] = {
    "per-tensor": {
        "cast_tiles": one_scale, "cast_columns": one_scale_columns, "retile": one_scale_retile,
        "cast_blocks": one_scale_blocks, "cast_gradient": one_scale, "cast_gradient_columns": one_scale_columns,
        "retile_gradient": one_scale_retile,
    },
    "14-bit sums": _cut_sums(),
    "e5m2 gradients": {
        "cast_gradient": e5m2_tiles, "cast_gradient_columns": e5m2_columns, "retile_gradient": e5m2_retile,
    },
}  # fmt: skip
ARMS = ("bfloat16", "fp8", *ABLATIONS, "float32")


@contextlib.contextmanager
def ablated(arm: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, other in ABLATIONS.get(arm, {}).items():
            stack.enter_context(mock.patch.object(fp8, name, other))
        yield


# -- runs ----------------------------------------------------------------------------------------------------------------


def train(arm: str, seed: int, corpus: tuple[Any, Any, Tokenizer], path: Path) -> None:
    """One run; its curve is written every EVERY steps."""
    shards, held_out, tokenizer = corpus
    schedule = ScheduleConfig(
        steps=STEPS, peak_lr=2e-3, warmup_steps=50, constant_until=0.6, cosine_until=0.95, second_constant_from=0.97,
        batch_size=ROWS,
    )  # fmt: skip
    precision = arm if arm in ("bfloat16", "float32") else "fp8"
    config = TrainConfig(schedule=schedule, seq_len=LENGTH, micro_batch=ROWS, seed=seed, precision=precision)
    model = DeepseekV3(MODEL)
    model.init_weights(seed)
    loader = Loader(shards, LoaderConfig(seq_len=LENGTH, extra_tokens=0, seed=seed))
    batches = list(held_out_batches(held_out, seq_len=LENGTH, extra_tokens=0, rows=16, max_rows=96))
    evaluation = HeldOut(batches, byte_lengths(tokenizer))
    trainer = Trainer(model, loader, config, path.parent / "unused", tokenizer=tokenizer, held_out=evaluation)
    losses, started = list[float](), time.perf_counter()
    result: dict[str, Any] = {"arm": arm, "seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
    result |= {"machine": machine(), "model": dataclasses.asdict(MODEL), "losses": losses, "bpb": None}
    while trainer.step_index < STEPS:
        losses.append(trainer.step()["loss"])
        if trainer.step_index == STEPS:
            result["bpb"] = trainer.bits_per_byte()
        if trainer.step_index % EVERY == 0:
            result["seconds"] = time.perf_counter() - started
            write_atomic(path, json.dumps(result).encode())
            print(f"{arm}, seed {seed}: step {trainer.step_index}, loss {losses[-1]:.4f}", flush=True)


def build_corpus(work: Path) -> tuple[Any, Any, Tokenizer]:
    texts = read_texts(standard_library(), max_characters=16_000_000)
    folder = work / "tokenizer"
    if not folder.exists():
        Tokenizer.train((t for part in texts.train.values() for t in part), MODEL.vocab_size).save(folder)
    tokenizer = Tokenizer.from_file(folder)
    return (*build_shards(texts, tokenizer, work / "shards"), tokenizer)


def run(arms: list[str], seeds: list[int], work: Path) -> None:
    corpus = build_corpus(work)
    for seed in seeds:
        for arm in arms:
            path = work / f"{arm}-{seed}.json"
            if not path.exists() or len(json.loads(path.read_text())["losses"]) < STEPS:
                with ablated(arm):
                    train(arm, seed, corpus, path)


# -- what each arm loses in one product -----------------------------------------------------------------------------------


def errors(corpus: tuple[Any, Any, Tokenizer], steps: int = 100) -> list[dict[str, Any]]:
    """Relative error of fprop, dgrad and wgrad of every Linear of a model trained for some steps, on the next batch's values:
    the median and the worst Linear of each arm, against float64."""
    shards = corpus[0]
    schedule = ScheduleConfig(steps=STEPS, peak_lr=2e-3, warmup_steps=50, batch_size=ROWS)
    config = TrainConfig(schedule=schedule, seq_len=LENGTH, micro_batch=ROWS, precision="fp8")
    model = DeepseekV3(MODEL)
    model.init_weights(0)
    trainer = Trainer(model, Loader(shards, LoaderConfig(seq_len=LENGTH, extra_tokens=0)), config, Path("unused"))
    for _ in range(steps):
        trainer.step()
    seen: dict[str, list[Tensor]] = {}

    def look(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name not in seen:
                seen[name] = [inputs[0].detach().flatten(0, -2)]
                output.register_hook(lambda dy: seen[name].append(dy.detach().flatten(0, -2)))

        return hook

    linears = {n: m for n, m in trainer.twin.named_modules() if isinstance(m, fp8.Fp8Linear)}
    handles = [module.register_forward_hook(look(name)) for name, module in linears.items()]
    trainer._accumulate(trainer.loader.next_batch(ROWS), 0.0)
    for handle in handles:
        handle.remove()
    return [{"arm": arm, **_errors_of(arm, linears, seen)} for arm in ("fp8", *ABLATIONS)]


def _errors_of(arm: str, linears: dict[str, fp8.Fp8Linear], seen: dict[str, list[Tensor]]) -> dict[str, float]:
    found: dict[str, list[float]] = {"fprop": [], "dgrad": [], "wgrad": []}
    with ablated(arm):
        for name, (x, dy) in seen.items():
            weight = linears[name].weight
            module, wide = fp8.Fp8Linear(weight, fp8.AGAIN), weight.detach().double()
            with torch.no_grad():
                dx, dw = torch.ops.dsv3.fp8_linear_dgrad(dy, *module.cast), torch.ops.dsv3.fp8_linear_wgrad(dy, x)
                pairs = {
                    "fprop": (module(x), x.double() @ wide.t()),
                    "dgrad": (dx, dy.double() @ wide),
                    "wgrad": (dw, dy.double().t() @ x.double()),
                }
            for product, (got, wanted) in pairs.items():
                found[product].append(((got.double() - wanted).norm() / wanted.norm()).item())
    return {f"{p} {k}": f(v) for p, v in found.items() for k, f in (("median", statistics.median), ("worst", max))}


# -- tables and plots ----------------------------------------------------------------------------------------------------


def smooth(losses: list[float]) -> list[float]:
    """Moving average with the report's 0.9, started at the first value."""
    out = losses[:1]
    for loss in losses[1:]:
        out.append(SMOOTHING * out[-1] + (1 - SMOOTHING) * loss)
    return out


def distance(mine: list[float], twin: list[float]) -> list[float]:
    """(mine - twin) / twin of the smoothed losses, a step each."""
    return [(a - b) / b for a, b in zip(smooth(mine), smooth(twin))]


def report(work: Path) -> None:
    """docs/evidence/fp8.csv (losses every EVERY steps), fp8.png, and a table on the console."""
    found = {(r["arm"], r["seed"]): r for r in (json.loads(p.read_text()) for p in sorted(work.glob("*-?.json")))}
    DOCS.mkdir(parents=True, exist_ok=True)
    rows, gaps = [], dict[tuple[str, int], list[float]]()
    for (arm, seed), result in found.items():
        twin = found.get(("bfloat16", seed))
        gaps[arm, seed] = distance(result["losses"], twin["losses"]) if twin else []
        for step in range(EVERY, len(result["losses"]) + 1, EVERY):
            gap = gaps[arm, seed][step - 1] if step <= len(gaps[arm, seed]) else None
            rows.append([arm, seed, step, round(smooth(result["losses"])[step - 1], 5), gap and round(gap, 6)])
    write_csv(DOCS / "fp8.csv", ["arm", "seed", "step", "smoothed_loss", "relative_to_bfloat16"], rows)
    for (arm, seed), result in found.items():
        gap, last = gaps[arm, seed][100:], statistics.fmean(result["losses"][-50:])
        said = f"mean {statistics.fmean(gap):+.3%}, largest {max(map(abs, gap)):.3%}" if gap else ""
        print(f"{arm:15} seed {seed}: {len(result['losses'])} steps, last 50 {last:.4f}, bpb {result['bpb']}, {said}")
    _plot(found, gaps)


def _plot(found: dict[tuple[str, int], dict[str, Any]], gaps: dict[tuple[str, int], list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for (arm, seed), result in sorted(found.items()):
        style = {"color": f"C{ARMS.index(arm)}", "ls": ("-", "--", ":")[seed], "lw": 1, "label": f"{arm}, seed {seed}"}
        left.plot(smooth(result["losses"]), **style)
        if arm != "bfloat16":
            right.plot([100 * g for g in gaps[arm, seed]], **style)
    right.axhspan(-0.25, 0.25, color="0.9", zorder=0)
    left.set(title="main loss, smoothed", xlabel="step", ylim=(None, 5))
    right.set(title="distance to bfloat16, %; grey: the report's 0.25%", xlabel="step", ylim=(-1.5, 3), xlim=(50, None))
    right.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(DOCS / "fp8.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--plot", action="store_true", help="no training: write docs/evidence from the runs in --work")
    parser.add_argument("--errors", action="store_true", help="no runs: what each arm loses in one product")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.errors:
        for row in errors(build_corpus(options.work)):
            print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        return
    if not options.plot:
        run(options.arms, options.seeds, options.work)
    report(options.work)


if __name__ == "__main__":
    main()
