"""What a training step holds in memory, by precision: state by kind, activations between forward and backward, peak.

masters, gradients   float32 in both
copies               what the products read: bfloat16 matrices, or FP8 codes with their scales
moments              of AdamW, after a step
activations          bytes that autograd and the kept blocks hold at the end of a forward, weights not counted
peak                 the process's resident size, each side in a process of its own

python -m bench.memory [--rows 8] [--length 512] [--large]        one JSON line
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch

from bench.common import RandomLoader, machine, peak_memory_mib
from bench.train_step import MODEL
from dsv3.model.fp8 import fp8_modules
from dsv3.model.transformer import DeepseekV3
from dsv3.train.loss import training_losses
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer

# V3's proportions at a seventh of its width: 128-value heads, a wide latent for queries, eight experts a token.
LARGE = dataclasses.replace(
    MODEL, hidden_size=1024, intermediate_size=2560, moe_intermediate_size=256, num_hidden_layers=3, num_attention_heads=16,
    q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_experts_per_tok=8,
)  # fmt: skip


def measure(precision: str, rows: int, length: int, large: bool) -> dict[str, Any]:
    config = LARGE if large else MODEL
    torch.manual_seed(0)
    model = DeepseekV3(config)
    model.init_weights()
    schedule = ScheduleConfig(steps=10**6, peak_lr=1e-3, warmup_steps=10, batch_size=rows)
    train = TrainConfig(
        schedule=schedule, seq_len=length, micro_batch=rows, precision=precision, log_counts_every=10**6
    )
    trainer = Trainer(model, RandomLoader(config.vocab_size, length, 0), train, "unused")  # type: ignore[arg-type]
    for _ in range(2):
        trainer.step()
    masters = {id(p) for p in model.parameters()}
    codes = [t for m in fp8_modules(trainer.twin) for cast in m.casts() for t in cast]
    copies = [p for p in trainer.twin.parameters() if id(p) not in masters] + codes
    moments = [t for state in trainer.optimizer.state.values() for t in state.values()]
    found = {
        "masters": _bytes(list(model.parameters())), "gradients": _bytes(trainer.workers.grads), "copies": _bytes(copies),
        "moments": _bytes(moments), "activations": _activations(trainer, rows, length),
    }  # fmt: skip
    return {**{k: round(v / 2**20, 1) for k, v in found.items()}, "peak": round(peak_memory_mib())}


def _activations(trainer: Trainer, rows: int, length: int) -> int:
    batch = trainer.loader.next_batch(rows)
    before = _resident()
    hidden = trainer.twin.hidden(batch.tokens[:, :length], balance=True)
    held = _resident() - before
    losses = training_losses(
        hidden.main, hidden.mtp, hidden.routing.balance, trainer.twin.lm_head.weight, batch.targets, mtp_weight=0.0, alpha=0.0
    )  # fmt: skip
    losses.total.backward()
    return held


def _resident() -> int:
    """Resident bytes once freed memory has gone back to the system; tensors that C++ alone holds are seen too."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _run(queue: Any, *arguments: Any) -> None:
    queue.put(measure(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--large", action="store_true", help="V3's proportions at a seventh of its width")
    options = parser.parse_args()
    context, sides = multiprocessing.get_context("spawn"), {}
    for precision in ("bfloat16", "fp8"):
        queue = context.Queue()
        process = context.Process(target=_run, args=(queue, precision, options.rows, options.length, options.large))
        process.start()
        sides[precision] = queue.get()
        process.join()
    tokens = options.rows * options.length
    print(json.dumps({"bench": "memory", "tokens": tokens, "large": options.large, "MiB": sides, **machine()}))


if __name__ == "__main__":
    main()
