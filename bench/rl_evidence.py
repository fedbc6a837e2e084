"""Does reinforcement learning raise accuracy on questions it never saw, from a small fine-tuned model, on a CPU?

    python -m bench.rl_evidence --out docs/evidence        CSV and picture; seeds 0 1 2, one thread, a quarter of an hour
    python -m bench.rl_evidence --mismatch CHECKPOINT      what precisions do to routes, and what replay does about it

For each seed a model of half a million parameters is fine-tuned for a minute on answered questions of a reasoning-gym task, then
trained by GRPO on further questions of it. Questions whose hash says so are held out of both (dsv3/post/tasks.py). Float32: the
gate compares each rollout's log-probabilities and experts with the training pass, to the bit on a CPU, and would stop the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import machine
from dsv3.data.chat import ChatFormat, with_template
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import load_model
from dsv3.parallel.apply import compute_copy
from dsv3.post.exact import EnginePass
from dsv3.post.grpo import GrpoConfig, token_logprobs
from dsv3.post.replay import GateConfig
from dsv3.post.rl import RlConfig, build_rl, run_rl
from dsv3.post.rollout import Answer, make_batch
from dsv3.post.tasks import ReasoningGym, Split
from dsv3.train.loss import Objective, Step, join_losses
from dsv3.train.metrics import read_metrics
from dsv3.train.optim import CosineConfig
from dsv3.train.trainer import TrainConfig, Trainer

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),  # needs a longer fine-tuning
    "spell_backward": dict(min_word_len=3, max_word_len=5),
}
MAX_TOKENS = 8
FIELDS = ("step", "reward", "heldout_accuracy", "no_variance", "entropy", "kl", "length", "logprob_gap", "logprob_gap_p99",
          "logprob_gap_max", "route_mismatch", "layer_gap", "router_gap")  # fmt: skip


def model_config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=192, moe_intermediate_size=64, num_hidden_layers=3,
        num_nextn_predict_layers=1, num_attention_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, max_position_embeddings=256, rope_scaling=None, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        initializer_range=0.03,
    )  # fmt: skip


class Lessons:
    """Answered questions as rows, without end: question i of the training side."""

    def __init__(self, task: Split, tokenizer: Tokenizer) -> None:
        self.task, self.tokenizer, self.format, self.index = task, tokenizer, ChatFormat.of(tokenizer), 0

    def next_batch(self, rows: int) -> Any:
        answers = []
        for index in range(self.index, self.index + rows):
            problem = self.task.problem(index + 10**9)  # none that the rounds of RL begin with
            tokens = [*self.tokenizer.encode(problem.answer), *self.format.stop_ids]
            ids = self.format.render(problem.messages).ids
            answers.append(Answer(number=index, choice=0, problem=problem.id, question=problem.prompt, gold=problem.answer,
                                  prompt=ids, tokens=tokens, logprobs=[0.0] * len(tokens)))  # fmt: skip
        self.index += rows
        return make_batch(answers, depth=1, layers=0, top_k=0, fresh=False)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.index = state["rows"]


class AnswerLoss(Objective):
    """Cross entropy of the answers' tokens, main model and MTP."""

    def shares(self, batch: Any) -> Tensor:
        return batch.answer.sum(1).double()

    def __call__(
        self, model: DeepseekV3, batch: Any, rows: slice, *, depth: int, mtp_weight: float, alpha: float, device: Any
    ) -> Step:
        known, targets = batch.answer[rows], batch.targets[rows]
        length = known.shape[1]
        hidden = model.hidden(batch.tokens[rows], depth=depth, balance=alpha > 0)
        main, _ = token_logprobs(hidden.main[known], model.lm_head.weight, targets[:, :length][known])
        later = known.clone()
        later[:, :-1] &= known[:, 1:]
        mtp, _ = token_logprobs(hidden.mtp[0][later], model.lm_head.weight, targets[:, 1 : 1 + length][later])
        losses = join_losses(-main.mean(), (-mtp.mean(),), hidden.routing.balance, mtp_weight=mtp_weight, alpha=alpha)
        return Step(losses, hidden.routing.counts, {})


def fine_tune(task: Split, tokenizer: Tokenizer, folder: Path, *, seed: int, steps: int) -> DeepseekV3:
    """A new model, fine-tuned on so many batches of 64 answered questions."""
    model = DeepseekV3(model_config(tokenizer.vocab_size))
    model.init_weights(seed)
    schedule = CosineConfig(
        steps=steps, batch_size=64, first_lr=4e-3, last_lr=3e-4, warmup_steps=10, gamma=1e-3, mtp_weight=0.1
    )
    config = TrainConfig(
        schedule=schedule, seq_len=64, micro_batch=64, precision="bfloat16", seed=seed, save_every=10**6
    )
    trainer = Trainer(model, Lessons(task, tokenizer), config, folder, tokenizer=tokenizer, objective=AnswerLoss())
    while trainer.step_index < steps:
        trainer.step()
    return model


def tokenizer_of(task: Split) -> Tokenizer:
    """The words that all questions begin with are tokens; what they ask about is read a byte at a time."""
    return with_template(Tokenizer.train([task.problem(0).prompt.rsplit(":", 1)[0] + ":"] * 2, 400))


def life(name: str, seed: int, folder: Path, *, sft_steps: int, config: RlConfig) -> dict[str, Any]:
    """One seed: fine-tuning, reinforcement learning, what came of it."""
    gym = ReasoningGym(name, seed=seed, **TASKS[name])
    task = Split(gym, "train", seed=seed)
    tokenizer = tokenizer_of(task)
    started = time.perf_counter()
    model = fine_tune(task, tokenizer, folder / "sft", seed=seed, steps=sft_steps)
    tuned = time.perf_counter()
    result = run_rl(model, tokenizer, gym, config, folder / "rl", say=print)
    return {
        **result,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sft_seconds": tuned - started,
        "rl_seconds": time.perf_counter() - tuned,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--runs", type=Path, default=Path("runs/rl_evidence"))
    parser.add_argument("--task", default="spell_backward", choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sft-steps", type=int, default=320)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--mismatch", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.mismatch is not None:
        mismatch(options.mismatch, options.task, options.seeds[0], options.runs / "mismatch")
        return
    rows, results = [], []
    for seed in options.seeds:
        config = RlConfig(
            steps=options.steps, prompts=32, group=8, minibatches=1, max_tokens=MAX_TOKENS, lr=options.lr, warmup_steps=5,
            grpo=GrpoConfig(), precision="float32", micro_batch=128, eval_every=10, eval_problems=400, save_every=50,
            seed=seed, cache_gb=0.2, max_running=256,
        )  # fmt: skip
        folder = options.runs / f"{options.task}-{seed}"
        result = life(options.task, seed, folder, sft_steps=options.sft_steps, config=config)
        print(json.dumps({"seed": seed, **result}, default=str), flush=True)
        results.append(result)
        rows.append({"seed": seed, "step": 0, "heldout_accuracy": result["before"]["heldout_accuracy"]})
        for record in read_metrics(folder / "rl" / "metrics.jsonl"):
            acceptance = record.get("heldout_acceptance") or [None]
            rows.append({"seed": seed, **{n: record.get(n) for n in FIELDS}, "mtp_acceptance": acceptance[0]})
        options.out.mkdir(parents=True, exist_ok=True)  # after each seed: what is there already can be read
        with (options.out / "rl.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["seed", *FIELDS, "mtp_acceptance"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, options.out / "rl.png", options.task)
    print(json.dumps({"machine": machine(), "results": results}, default=str))


def mismatch(checkpoint: Path, task: str, seed: int, folder: Path) -> None:
    """One rollout of 512 answers and its training pass, with the rollout's experts replayed and without, a line a precision; and,
    where rollout and training have one precision, with the engine's own numbers (dsv3/post/exact.py).

    Told of the tokens that went to other experts in any layer: their share, and their mean difference of log-probability.
    """
    tokenizer = Tokenizer.from_file(checkpoint)
    for rollout, training in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        model = load_model(checkpoint, dtype="float32")
        config = RlConfig(
            steps=1, prompts=64, group=8, minibatches=1, max_tokens=MAX_TOKENS, precision=training, micro_batch=512, dynamic=False,
            replay=True, gate=GateConfig(action="off"), grpo=GrpoConfig(kl=0), cache_gb=0.2, max_running=512, seed=seed,
        )  # fmt: skip
        trainer, rounds = build_rl(model, tokenizer, ReasoningGym(task, seed=seed, **TASKS[task]), config, folder)
        rounds.engine = Engine(compute_copy(model, rollout), tokenizer, cache_gb=0.2, max_running=512)
        batch, gate = rounds.next_batch(512), rounds.objective.gate
        _look(trainer, batch)
        replayed, free = gate.seen[0], gate.free[0]
        other = free.routes.any(1)
        line = f"rollout {rollout}, training {training}: {int(other.sum())} of {len(other)} tokens to other experts"
        for name, found in (("without replay", free), ("with", replayed)):
            of_these = f", of these {found.gaps[other].abs().mean():.2e}" if other.any() else ""
            gaps = found.gaps.abs()
            line += f"; {name}: difference {gaps.mean():.2e} in the mean, {gaps.max():.2e} at most{of_these}"
        if rollout == training:
            rounds.objective.engine = EnginePass(trainer.twin)
            _look(trainer, batch)
            exact = gate.seen[-1]
            line += f"; the engine's numbers: {exact.gaps.abs().max():.2e} at most, {int(exact.routes.any(1).sum())} tokens to "
            line += f"other experts, torch's layers {exact.layer_gap:.2e} of a row's length from them"
        print(line)


def _look(trainer: Trainer, batch: Any) -> None:
    """A step's forward, for the gate to see."""
    trainer.objective.begin(trainer.workers, batch, [slice(0, 512)])
    options = dict(depth=1, mtp_weight=0.1, alpha=0.0, device=trainer.device)
    trainer.objective(trainer.twin, batch, slice(0, 512), **options)
    trainer.objective.settle(trainer.workers, batch)


def draw(rows: list[dict[str, Any]], path: Path, task: str) -> None:
    """Reward and held-out accuracy over steps, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True, constrained_layout=True)
    for axis, name, title in zip(
        axes, ("reward", "heldout_accuracy"), ("mean reward of a round", "held-out accuracy, greedy")
    ):
        for colour, seed in enumerate(sorted({row["seed"] for row in rows})):
            points = [(r["step"], r[name]) for r in rows if r["seed"] == seed and r.get(name) is not None]
            axis.plot(*zip(*points), color=f"C{colour}", label=f"seed {seed}", linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("GRPO steps")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, frameon=False)
    figure.suptitle(f"GRPO on reasoning-gym {task}", fontsize=11)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
