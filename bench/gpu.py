"""What a CUDA device is asked for in one command (`make bench-gpu`, under 9 minutes on an H100): tests marked gpu, every kernel,
a training step of a 1.3B-parameter V3 in bfloat16 and in FP8, interleaved, and its decode step with and without CUDA graphs.
Writes gpu.json and gpu.md.

    python -m bench.gpu [--out runs/gpu] [--small]        --small: a tiny model and shapes, runs on a CPU too
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench import kernels
from bench.common import RandomLoader, interleave, machine
from bench.train_step import MODEL
from dsv3.infer.graphs import GraphRunner, run_again
from dsv3.infer.runner import Runner, Segment
from dsv3.model.transformer import DeepseekV3
from dsv3.train.metrics import write_atomic
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer

# V3's proportions: 128-value heads, eight of 64 experts a token, one dense layer; 1.3B parameters.
LARGE = dataclasses.replace(
    MODEL, vocab_size=32768, hidden_size=2048, intermediate_size=5632, moe_intermediate_size=512, num_hidden_layers=6,
    num_attention_heads=16, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4, max_position_embeddings=4096,
)  # fmt: skip


def trainer(precision: str, device: str, small: bool) -> Trainer:
    config, rows, length = (MODEL, 2, 64) if small else (LARGE, 4, 4096)
    torch.manual_seed(0)
    with torch.device(device):
        model = DeepseekV3(config)
    model.init_weights()
    schedule = ScheduleConfig(steps=10**6, peak_lr=1e-4, warmup_steps=10, batch_size=rows)
    train = TrainConfig(
        schedule=schedule, seq_len=length, micro_batch=rows, precision=precision, log_counts_every=10**6
    )
    return Trainer(model, RandomLoader(config.vocab_size, length, 0), train, Path("unused"))  # type: ignore[arg-type]


def training_step(device: str, small: bool) -> dict[str, float]:
    """Seconds of a step in either precision, and peak device memory in GiB."""
    sides, found = {p: trainer(p, device, small) for p in ("bfloat16", "fp8")}, dict[str, float]()
    for precision, side in sides.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            side.step()
        if device == "cuda":
            found[f"{precision} peak GiB (both models resident)"] = torch.cuda.max_memory_allocated() / 2**30
    seconds = interleave({p: lambda side=side: side.step() and None for p, side in sides.items()}, 5)
    parameters = sum(p.numel() for p in sides["fp8"].model.parameters())
    return {
        "parameters": parameters,
        **{f"{p} seconds": s for p, s in seconds.items()},
        "fp8 to bfloat16": seconds["bfloat16"] / seconds["fp8"],
        **found,
    }


@torch.inference_mode()
def decode_step(device: str, small: bool) -> dict[str, float]:
    """Milliseconds of a decode step, logits on the host included, of several sequences: the model's own forward over gathered
    pages; rows over pages (dsv3.infer.graphs), started one by one; and recorded as a CUDA graph."""
    config, context, batches = (MODEL, 64, (1, 2)) if small else (LARGE, 1024, (1, 8, 64))
    torch.manual_seed(0)
    with torch.device(device):
        model = DeepseekV3(config)
    model.init_weights()
    model.bfloat16()
    each = context // 64 + 1
    sides: dict[str, Runner] = {"forward": Runner(model, batches[-1] * each + 1, mtp=False)}
    sides["rows"] = GraphRunner(model, batches[-1] * each + 1, mtp=False, capture=run_again)
    if device == "cuda":
        sides["graph"] = GraphRunner(model, batches[-1] * each + 1, mtp=False)
    found: dict[str, float] = {}
    for rows in batches:
        segments = [Segment(list(range(i * each + 1, (i + 1) * each + 1)), context, [i]) for i in range(rows)]
        calls = {name: functools.partial(run_step, runner, segments) for name, runner in sides.items()}
        for name, runner in sides.items():
            runner.store.latents[:, 1:].normal_()
            calls[name]()  # compiles and records
        for name, seconds in interleave(calls, 3 if small else 20).items():
            found[f"decode {rows} x {context}, {name}: ms"] = 1e3 * seconds
    return found


def run_step(runner: Runner, segments: list[Segment]) -> None:
    runner.logits(runner.forward(segments))  # on the host: it has waited for the device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        raise SystemExit("no CUDA device: give --small to try the code on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-v"], capture_output=True, text=True)
    print(tests.stdout[-2000:])
    results = kernels.run(torch.device(device), options.small)
    step = training_step(device, options.small)
    decode = decode_step(device, options.small)
    content = {
        **machine(), "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "tests": tests.returncode,
        "kernels": [dataclasses.asdict(r) for r in results], "training step": step,
        "decode step": decode,
    }  # fmt: skip
    write_atomic(options.out / "gpu.json", json.dumps(content, indent=1).encode())
    lines = [f"| {name} | {value:,.4g} |" for name, value in (step | decode).items()]
    table = "| step | |\n|---|---|\n" + "\n".join(lines) + "\n\n" + kernels.markdown(results)
    write_atomic(options.out / "gpu.md", table.encode())
    print(table)


if __name__ == "__main__":
    main()
