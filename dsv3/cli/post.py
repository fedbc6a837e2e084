"""Verbs after pre-training: `sft`, `distill`, `rl`."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from dsv3.cli.console import checkpoint_of, print_table, together
from dsv3.model.lora import LoraConfig
from dsv3.parallel.degrees import ParallelConfig
from dsv3.post.distill import DistillConfig
from dsv3.post.rl import RlConfig
from dsv3.train.sft import SftConfig

if TYPE_CHECKING:
    from dsv3.evals.sandbox import Sandbox

_KEY_VARIABLE = "DSV3_TEACHER_KEY"


@dataclass(frozen=True, kw_only=True)
class Sft(SftConfig):
    """Fine-tune a checkpoint on conversations: JSON lines of {"messages": [...]} in OpenAI's form, with tools, tool results
    and reasoning_content, or of {"prompt", "response"}. Only what the assistant says is learnt; a coloured preview shows it.
    Examples: dsv3 sft runs/tiny --data chats.jsonl --out runs/sft --first-lr 1e-3
    dsv3 sft DeepSeek-V3-0324/ --data chats.jsonl --out runs/lora --lora-rank 16 --base-fp8"""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run folder."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]]
    """PATH, or NAME=WEIGHT:PATH[,PATH] for a mixture by weight; repeat for more."""
    lora: tyro.conf.Suppress[LoraConfig | None] = None
    lora_rank: int | None = None
    """Train adapters of this rank instead of the weights; 16 is usual."""
    lora_roles: tuple[str, ...] = ("attn", "shared", "routed")
    """What gets adapters: of attn, shared, routed and dense."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """On several processes: torchrun --standalone --nproc-per-node 2 -m dsv3.cli sft ... --parallel.expert 2"""


@dataclass(frozen=True, kw_only=True)
class Distill(DistillConfig):
    """Answers of a teacher (a checkpoint, or any server with OpenAI's protocol) to problems: verified where they can be, rejected
    if wrong, too long, of mixed language or repetitive, compared with evaluation sets; a set for `dsv3 sft`. Killed and called
    again it asks nothing twice. A server's key is read from DSV3_TEACHER_KEY.
    Example: dsv3 distill --prompts problems.jsonl --url https://api.deepseek.com --model deepseek-reasoner --out distilled/"""

    api_key: tyro.conf.Suppress[str | None] = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Rl:
    """Reinforcement learning by rule rewards, GRPO as in the report: groups of answers by the engine in this process, judged by
    rule, no copy of the weights, MTP kept in training. Rollouts are kept, and shown in rollouts.html. Example: dsv3 rl
    runs/sft --task arithmetic --out runs/rl --steps 100 --prompts 32 --group 8 --minibatches 1 --max-tokens 64 --lr 1e-4"""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run folder."""
    out: Path
    """Folder of the run; the same command resumes an interrupted one."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]]
    """NAME[:KEY=VALUE,...][@WEIGHT]: arithmetic, a task of reasoning-gym such as chain_sum, or a .jsonl file of {"prompt",
    "answer"} or {"prompt", "tests"}; repeat for a mixture."""
    config: tyro.conf.OmitArgPrefixes[RlConfig]
    isolation: Literal["auto", "namespaces", "seccomp", "best-effort", "none"] = "auto"
    """Of the sandbox for questions that are code: best-effort runs without one where there is none."""
    device: str = "cpu"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """On several processes, each of which holds a whole copy and answers its share of the questions: torchrun --standalone
    --nproc-per-node 2 -m dsv3.cli rl ... --parallel.pipeline 2"""


def sft(verb: Sft) -> None:
    from dsv3.model.weights import config_of
    from dsv3.train.sft import run_sft

    fields = {f.name: getattr(verb, f.name) for f in dataclasses.fields(SftConfig)}
    fields["checkpoint"] = checkpoint_of(verb.checkpoint)
    if verb.lora_rank is not None:
        fields["lora"] = LoraConfig(rank=verb.lora_rank, roles=verb.lora_roles)
    with together(verb.parallel, config_of(fields["checkpoint"]), verb.device) as mesh:
        leads = mesh is None or mesh.leads
        told = run_sft(SftConfig(**fields), say=print if leads else lambda text: None, mesh=mesh)
    if leads:
        print(f"{told['checkpoint']}: try it with `dsv3 chat {verb.out}`")


def distill(verb: Distill) -> None:
    from dsv3.evals.sandbox import IsolationError
    from dsv3.post.distill import run_distill

    fields = {f.name: getattr(verb, f.name) for f in dataclasses.fields(DistillConfig)}
    if verb.checkpoint is not None:
        fields["checkpoint"] = checkpoint_of(verb.checkpoint)
    fields["api_key"] = os.environ.get(_KEY_VARIABLE)
    try:
        told = run_distill(DistillConfig(**fields), say=lambda text: print(text, file=sys.stderr))
    except IsolationError as error:
        raise ValueError(f"some problems are code: {error}") from error
    print(told["out"])


def rl(verb: Rl) -> None:
    from dsv3.data.chat import with_template
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.model.weights import config_of, load_model
    from dsv3.post.rl import run_rl
    from dsv3.post.tasks import FileTask, parse_tasks

    checkpoint = checkpoint_of(verb.checkpoint)
    tasks = parse_tasks(verb.task, seed=verb.config.seed)
    tokenizer = Tokenizer.from_file(checkpoint)
    if "chat_template" not in tokenizer.config:
        tokenizer = with_template(tokenizer)
    code = any(p.kind == "code" for task in tasks if isinstance(task, FileTask) for p in task.problems)
    sandbox = _sandbox(verb.isolation) if code else None
    try:
        with together(verb.parallel, config_of(checkpoint), verb.device) as mesh:
            leads = mesh is None or mesh.leads
            model = load_model(checkpoint, dtype="float32", device="cpu" if mesh else verb.device)
            told = run_rl(
                model, tokenizer, tasks, verb.config, verb.out, sandbox=sandbox, mesh=mesh,
                say=print if leads else lambda text: None,
            )  # fmt: skip
    finally:
        if sandbox is not None:
            sandbox.close()
    if not leads:
        return
    before, after = told["before"], told["after"]
    rows = [(name, f"{_shown(before[name])} -> {_shown(after[name])}") for name in before if name in after]
    print_table(f"rl in {verb.out}", [*rows, ("rollouts", told["view"]), ("checkpoint", told["checkpoint"])])


def _sandbox(isolation: str) -> Sandbox:
    from dsv3.evals.sandbox import IsolationError, Sandbox

    try:
        return Sandbox(isolation=isolation, workers=2)
    except IsolationError as error:
        raise ValueError(f"the questions are code: {error}") from error


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return " ".join(map(_shown, value)) if isinstance(value, list) else str(value)
