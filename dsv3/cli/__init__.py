"""The command line: parses, builds, hands down. `python -m dsv3.cli VERB` is `dsv3 VERB`.

The only place that prints, reads the environment, and turns a user's mistake into one line and exit code 1.
A verb's module is imported when the verb is called, so that `dsv3 --help` needs nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

VERBS = {
    "plan": ("plan", "PlanVerb", "memory, time and money of a run before it is paid for; what a deployment serves"),
    "run": ("make", "Run", "a whole life of a small model on this machine: text to chat in minutes"),
    "tokenizer": ("make", "TokenizerVerb", "train a tokenizer with V3's splitting, or fetch the official one"),
    "data": ("data", "Data", "text to packed token shards; --config for a corpus at scale, on Slurm or Ray too"),
    "pretrain": ("make", "Pretrain", "pre-train from shards; --extend makes the context longer by YaRN"),
    "sft": ("post", "Sft", "fine-tune a checkpoint on conversations, whole or by LoRA"),
    "distill": ("post", "Distill", "answers of a teacher, verified and filtered, as a set for sft"),
    "rl": ("post", "Rl", "reinforcement learning by rule rewards (GRPO)"),
    "eval": ("evaluate", "Eval", "MMLU, GSM8K, MATH, HumanEval, needles, bits per byte; of a checkpoint or a server"),
    "chat": ("serving", "Chat", "talk to a checkpoint in the terminal"),
    "serve": ("serving", "Serve", "DeepSeek's and OpenAI's API, and a chat page"),
    "generate": ("checkpoints", "Generate", "complete a prompt"),
    "convert": ("checkpoints", "Convert", "FP8, bfloat16, GGUF, other shards: from any to any"),
    "inspect": ("checkpoints", "Inspect", "what a checkpoint or a config.json holds"),
    "doctor": ("doctor", "Doctor", "check the machines of a run: versions, network, disk, limits, clocks; what to set"),
}  # in the order of a model's life

TOGETHER = ("pretrain", "sft", "rl", "plan", "doctor")
"""Verbs that several processes of torchrun may run."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 0: done; 1: a mistake or a full disk, told in one line; 2: no such verb; 130: interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return
    if name not in VERBS:
        print(f"dsv3: there is no verb {name!r}\n\n{_overview()}", file=sys.stderr)
        sys.exit(2)
    home, kind, _ = VERBS[name]
    try:
        if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1 and name not in TOGETHER:
            raise ValueError(
                f"{name} runs in one process, and torchrun started {processes}: only {', '.join(TOGETHER)} run in several"
            )
        import tyro

        module = importlib.import_module(f"dsv3.cli.{home}")
        verb = tyro.cli(getattr(module, kind), prog=f"dsv3 {name}", args=arguments[1:])
        getattr(module, name if name != "eval" else "evaluate")(verb)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, the same command resumes", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"dsv3: {error}", file=sys.stderr)
        sys.exit(1)


def _overview() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, _, text) in VERBS.items()]
    return "\n".join(
        ["usage: dsv3 VERB ...        dsv3 VERB --help tells more", "", *lines, "", "Start with: dsv3 run tiny"]
    )
