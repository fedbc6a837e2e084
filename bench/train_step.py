"""Training step of dsv3 against transformers' DeepseekV3ForCausalLM: forward, backward, fused AdamW; one JSON line.

Ours runs as training does by default: eager, bfloat16 products, float32 masters; compiled layers are timed beside it.
Peers are every expert implementation of transformers in float32 and bfloat16 (pure bfloat16, moments too: less work than
our float32 masters), eager and compiled; the best of each kind counts. Sides take turns within one process.
    python -m bench.train_step [--quick]      --quick: the fastest peers known only, fewer rounds
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.common import RandomLoader, interleave, machine, peak_memory_mib
from dsv3.model.census import training_flops_per_token
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3
from dsv3.train.metrics import measure_peak
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer

MODEL = ModelConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=704, moe_intermediate_size=128, num_hidden_layers=6,
    num_nextn_predict_layers=0, num_attention_heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2,
    first_k_dense_replace=1, max_position_embeddings=1024, rope_scaling=None,
)  # fmt: skip
ROWS, LENGTH = 8, 512


def ours(compile_layers: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model = DeepseekV3(MODEL)
    model.init_weights()
    config = TrainConfig(
        schedule=ScheduleConfig(steps=10**6, peak_lr=1e-3, warmup_steps=10, batch_size=ROWS),
        seq_len=LENGTH,
        micro_batch=ROWS,
        compile=compile_layers,
        log_counts_every=10**6,
    )
    trainer = Trainer(model, RandomLoader(MODEL.vocab_size, LENGTH, 0), config, Path("unused"))  # type: ignore[arg-type]
    return lambda: trainer.step() and None


def theirs(implementation: str, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(**MODEL.to_hf(torch_dtype="float32", use_cache=False), attn_implementation="sdpa")
    model = DeepseekV3ForCausalLM(config).to(dtype).train()
    model.set_experts_implementation(implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loader = RandomLoader(MODEL.vocab_size, LENGTH, 0)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        batch = loader.next_batch(ROWS)
        logits = forward(input_ids=batch.tokens, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert bool(loss.isfinite())

    return step


def warm(
    sides: dict[str, Callable[[], Callable[[], None]]], steps: int
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Build and run each side a few times; what cannot run is named with its reason."""
    ready, failed = {}, {}
    for name, build in sides.items():
        try:
            call = build()
            for _ in range(steps):
                call()
            ready[name] = call
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        print(f"{name}: {'failed: ' + failed[name] if name in failed else 'ready'}", file=sys.stderr)
    return ready, failed


def _memory(kind: str, arguments: tuple, queue) -> None:
    """Peak resident memory of one side, in a process of its own."""
    step = {"ours": ours, "theirs": theirs}[kind](*arguments)
    before = peak_memory_mib()
    for _ in range(3):
        step()
    queue.put((before, peak_memory_mib()))


def memory(kind: str, *arguments: object) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_memory, args=(kind, arguments, queue))
    process.start()
    _, peak = queue.get()
    process.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    kinds = [("grouped_mm", torch.bfloat16), ("eager", torch.bfloat16)]
    if not options.quick:
        kinds += [("batched_mm", torch.bfloat16), ("eager", torch.float32), ("grouped_mm", torch.float32)]
    names = {f"transformers {i} {str(d)[6:]}{' compiled' * c}": (i, d, c) for c in (False, True) for i, d in kinds}
    sides: dict[str, Callable[[], Callable[[], None]]] = {
        "dsv3": lambda: ours(False),
        "dsv3 compiled": lambda: ours(True),
    }
    sides |= {name: (lambda arguments=arguments: theirs(*arguments)) for name, arguments in names.items()}
    ready, failed = warm(sides, 2)
    seconds = interleave(ready, options.rounds)
    speed = {name: ROWS * LENGTH / value for name, value in seconds.items()}
    best = {
        kind: max(
            (n for n in speed if n.startswith("transformers") and n.endswith("compiled") == compiled),
            key=speed.__getitem__,
            default=None,
        )
        for kind, compiled in (("eager", False), ("compiled", True))
    }
    flops = training_flops_per_token(MODEL, LENGTH, causal=True)
    result = {
        "bench": "train_step",
        "ratio_to_best_eager": round(speed["dsv3"] / speed[best["eager"]], 3) if best["eager"] else None,
        "ratio_to_best_compiled": round(speed["dsv3"] / speed[best["compiled"]], 3) if best["compiled"] else None,
        "best_eager": best["eager"],
        "best_compiled": best["compiled"],
        "share_of_matmul_rate": round(speed["dsv3"] * flops / measure_peak(torch.bfloat16), 3),
        "tokens_per_s": {name: round(value) for name, value in speed.items()},
        "peak_mib": {"dsv3": round(memory("ours", False))}
        | {name: round(memory("theirs", *names[name])) for name in best.values() if name},
        "failed": failed,
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
