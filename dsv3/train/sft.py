"""Supervised fine-tuning, read top down: checkpoint + conversations -> packed rows -> the trainer -> checkpoint.

    loss      mean over the assistant's tokens of the whole step, each turn's end token included; nothing else is learnt
    MTP       depth k's mean over the same targets k positions on, within the sample; kept in training (report: unpublished)
    schedule  two epochs, cosine from 5e-6 to 1e-6 (V3 report section 5.1; spec 8.3)
    router    its bias is updated as in pre-training, padding not counted, or frozen bit for bit

With LoRA (model/lora.py) the base stays as it is, in bfloat16 or kept in FP8, and the last checkpoint holds the merged model.
Samples in a row do not see each other: a boolean mask of T x T a row, 16 MiB at T = 4096 (longer rows want few of them).
Does not: make data (post/distill.py), or weigh padding out of the balance loss, whose factor is 1e-4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dsv3.data.chat import ChatFormat, preview, with_template
from dsv3.data.conversations import (
    ReadingReport,
    Samples,
    parse_conversation_sources,
    read_conversations,
    render_conversations,
)
from dsv3.data.packing import PADDING, PackedBatch, PackedLoader, PackingConfig, held_out_batches
from dsv3.data.tokenizer import Tokenizer
from dsv3.kernels.cross_entropy import head_cross_entropy
from dsv3.model.fingerprint import Fingerprint, fingerprint
from dsv3.model.lora import LoraConfig, add_lora
from dsv3.model.transformer import DeepseekV3, Hidden, Routing
from dsv3.model.weights import config_of, load_model, read_tensors
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.workers import Together, Workers
from dsv3.train.acceptance import Agreement
from dsv3.train.checkpoint import latest_checkpoint
from dsv3.train.loss import SplitObjective, Step, document_mask, join_losses, places
from dsv3.train.optim import CosineConfig
from dsv3.train.trainer import TrainConfig, Trainer

Say = Callable[[str], None]
_PREVIEWED = 400  # tokens of the first row that are shown with their mask


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Fine-tune a checkpoint on conversations."""

    checkpoint: Path
    """Any DeepseekV3 checkpoint, FP8 or not: a Hugging Face folder, or one of a run's checkpoints/step-N."""
    data: tuple[str, ...]
    """PATH, or NAME=WEIGHT:PATH[,PATH] for a mixture by weight: JSON lines of messages, or of prompt and response."""
    out: Path
    """Folder of the run; the same command resumes an interrupted one."""
    epochs: int = 2
    """An epoch is as many samples as there are, shared out by the weights."""
    batch_size: int = 16
    """Rows of a step."""
    micro_batch: int = 4
    """Rows of one forward; the rest is accumulated."""
    seq_len: int | None = None
    """Tokens of a row, several samples each; longer samples are left out and counted. None: 4096, or what the model takes."""
    first_lr: float | None = None
    """None: 5e-6, with LoRA 1e-4; a small model wants more (about 1e-3 at 2M parameters)."""
    last_lr: float | None = None
    """Of the cosine's end. None: a fifth of the first."""
    warmup_steps: int = 0
    weight_decay: float = 0.1
    lora: LoraConfig | None = None
    """Train adapters instead of the weights."""
    base_fp8: bool = False
    """With LoRA: hold the frozen weights in FP8, a byte each."""
    precision: Literal["bfloat16", "float32", "fp8"] = "bfloat16"
    """Of the products; fp8 is the report's training recipe."""
    update_router_bias: bool = True
    """False: the router biases keep every bit."""
    gamma: float = 1e-3
    """Speed of the router bias."""
    mtp_weight: float = 0.1
    """Lambda of the MTP loss; pre-training ended with 0.1."""
    alpha: float = 1e-4
    """Factor of the sequence-wise balance loss."""
    reasoning: bool = False
    """The finished model opens <think> by itself, as R1 does (its chat_template says so)."""
    held_out: float = 0.02
    """Share of the samples to measure on and not to train on."""
    held_out_rows: int = 32
    recompute: bool = False
    seed: int = 0
    save_every: int = 100
    keep_last: int = 2
    eval_every: int = 25
    max_steps: int | None = None
    """Stop after this many steps of this sitting."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty: give at least one file of conversations")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}: give a share from 0 to below 1")
        if self.base_fp8 and self.lora is None:
            raise ValueError(
                "base_fp8 keeps frozen weights in FP8, and without LoRA none are frozen: add lora, or drop it"
            )
        if self.lora is not None and self.precision == "fp8":
            raise ValueError(
                "precision 'fp8' trains the weights themselves: with LoRA use base_fp8, precision 'bfloat16'"
            )
        if self.base_fp8 and self.precision != "bfloat16":
            raise ValueError(f"base_fp8 multiplies bfloat16 rows, precision is {self.precision!r}: use 'bfloat16'")

    @property
    def rates(self) -> tuple[float, float]:
        """First and last learning rate."""
        first = self.first_lr if self.first_lr is not None else 5e-6 if self.lora is None else 1e-4
        return first, self.last_lr if self.last_lr is not None else first / 5


# -- the objective -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SftObjective(SplitObjective):
    """Cross entropy of what is to be learnt in packed rows (data.packing.PackedBatch)."""

    def shares(self, batch: PackedBatch) -> Tensor:
        """A row counts by its learnt targets, so that every target of the step counts alike."""
        return batch.learn.sum(1).double()

    def inputs(self, batch: PackedBatch, rows: slice, *, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
        mask = document_mask(batch.doc_ids[rows, : batch.tokens.shape[1] - depth].to(device))
        return batch.tokens[rows].to(device), mask

    def losses(
        self,
        hidden: Hidden,
        head: Tensor,
        batch: PackedBatch,
        rows: slice,
        steer: Any,
        *,
        mtp_weight: float,
        alpha: float,
    ) -> Step:
        device, length = hidden.main.device, hidden.main.shape[1]
        share = batch.learn[rows].sum() / batch.learn.sum()
        means = []
        for k, state in enumerate((hidden.main, *hidden.mtp)):
            valid = batch.valid(k, length)
            mean = _mean(state, head, batch.targets[rows, k : k + length], valid[rows], device)
            # Of all targets of this depth in the step these rows hold another share than of the main model's.
            means.append(mean * float(valid[rows].sum() / valid.sum().clamp_min(1) / share))
        # Its mean is over rows, and the trainer multiplies by the share of the targets.
        balance = hidden.routing.balance * float(batch.tokens[rows].shape[0] / batch.tokens.shape[0] / share)
        losses = join_losses(means[0], tuple(means[1:]), balance, mtp_weight=mtp_weight, alpha=alpha)
        return Step(losses, hidden.routing.counts, {})

    def routed(self, routing: Routing, batch: PackedBatch, rows: slice, steer: Any, *, alpha: float) -> Routing:
        """Padding goes to the same few experts and is no load to balance."""
        if not len(routing.counts):
            return routing
        positions = routing.experts.shape[1] // batch.tokens[rows].shape[0]
        real = places(batch.doc_ids[rows, :positions] != PADDING).to(routing.counts.device)
        chosen = routing.experts.index_select(1, real).flatten(1)
        return routing._replace(counts=torch.zeros_like(routing.counts).scatter_add(1, chosen, torch.ones_like(chosen)))


def _mean(state: Tensor, head: Tensor, targets: Tensor, valid: Tensor, device: torch.device) -> Tensor:
    """Mean loss of the valid positions; 0 without one. The head multiplies only these."""
    at = places(valid)
    if not len(at):
        return state.sum() * 0.0
    targets = targets.flatten().index_select(0, at)
    return head_cross_entropy(state.flatten(0, 1).index_select(0, at.to(device)), head, targets.to(device))


# -- held-out samples --------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(workers: Workers, batches: list[PackedBatch]) -> dict[str, Any]:
    """`heldout_loss` (nats a learnt token), `heldout_greedy` (share of them that the greedy choice equals) and `acceptance`
    (of each MTP depth, the share of its drafts that the main model's greedy choice equals) of held-out rows."""
    device, depth = workers.device, workers.model.config.num_nextn_predict_layers
    agreement, nats, right, count = Agreement(depth), 0.0, 0, 0
    for index, counts in workers.turns(len(batches)):
        batch = batches[index]
        rows, length = slice(None), batch.tokens.shape[1] - depth
        tokens, mask = SftObjective().inputs(batch, rows, depth=depth, device=device)
        hidden = workers.hidden(tokens, depth=depth, mask=mask)
        if hidden is None or not counts:
            continue
        valid = batch.valid(0, length).to(device)
        states, targets = hidden.main[valid], batch.targets[:, :length].to(device)[valid]
        for part, wanted in zip(states.split(2048), targets.split(2048)):
            logits = workers.head(part).float()
            nats += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            right += int((logits.argmax(-1) == wanted).sum())
            count += len(wanted)
        agreement.add_hidden(workers.head, hidden, [batch.valid(k, length - k).to(device) for k in range(1, depth + 1)])
    sums = workers.gather(torch.tensor([nats, right, count], dtype=torch.float64, device=device)).tolist()
    found = {"heldout_loss": sums[0] / max(1, sums[2]), "heldout_greedy": sums[1] / max(1, sums[2])}
    return {**found, "acceptance": agreement.shares(workers.gather(agreement.counts(device)))} if depth else found


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SftRun:
    """What `build_sft` makes: a trainer to run, the tokenizer with its chat template, and rows to measure on."""

    trainer: Trainer
    tokenizer: Tokenizer
    held_out: list[PackedBatch]
    every: int

    def measure_now_and_then(self, trainer: Trainer) -> dict[str, Any]:
        """For Trainer.run's on_eval."""
        due = trainer.step_index % self.every == 0 or trainer.step_index == trainer.config.schedule.steps
        return measure(trainer.workers, self.held_out) if due and self.held_out else {}


def run_sft(config: SftConfig, say: Say = lambda text: None, mesh: Mesh | None = None) -> dict[str, Any]:
    """Fine-tune from the start or from the run's last checkpoint. Returns held-out numbers before and after, and its checkpoint.

    Args:
        mesh: of this process among several.

    Raises:
        ValueError: no readable conversation, a checkpoint or tokenizer that does not fit, a run started differently.
        KeyboardInterrupt: after Ctrl-C, once the step is done and saved.
    """
    run = build_sft(config, say, mesh)
    before = measure(run.trainer.workers, run.held_out) if run.held_out else {}
    run.trainer.run(on_eval=[run.measure_now_and_then] if run.held_out else [])
    after = measure(run.trainer.workers, run.held_out) if run.held_out else {}
    checkpoint = latest_checkpoint(config.out)
    assert checkpoint is not None
    for name in before:
        say(f"{name}: {_shown(before[name])} before, {_shown(after[name])} after")
    return {"before": before, "after": after, "checkpoint": str(checkpoint), "steps": run.trainer.step_index}


def build_sft(config: SftConfig, say: Say = lambda text: None, mesh: Mesh | None = None) -> SftRun:
    """Everything before the first step. Reads the conversations first: they fail in seconds, weights load in minutes."""
    if mesh is not None and config.lora is not None:
        raise ValueError("adapters are trained by one process: leave lora out, or start without torchrun")
    sources = parse_conversation_sources(config.data)
    sizes = config_of(config.checkpoint)
    tokenizer = Tokenizer.from_file(config.checkpoint)
    if "chat_template" not in tokenizer.config or config.reasoning:
        tokenizer = with_template(tokenizer, reasoning=config.reasoning)
    chat, depth = ChatFormat.of(tokenizer), sizes.num_nextn_predict_layers
    if tokenizer.vocab_size > sizes.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {sizes.vocab_size}")
    most = sizes.max_position_embeddings
    seq_len = min(4096, most) if config.seq_len is None else config.seq_len
    if seq_len > most:
        raise ValueError(f"seq_len {seq_len} exceeds max_position_embeddings {most}: lower seq_len")
    report, parts = ReadingReport(), list[tuple[Samples, Samples]]()
    for source in sources:
        conversations = read_conversations(source, report)
        parts.append(
            render_conversations(
                conversations, chat, name=source.name, weight=source.weight, seq_len=seq_len, held_out=config.held_out,
                seed=config.seed, report=report,
            )
        )  # fmt: skip
    packing = PackingConfig(
        seq_len=seq_len, extra_tokens=depth, epochs=config.epochs, seed=config.seed, pad_id=tokenizer.pad_id or 0
    )
    loader = PackedLoader([train for train, _ in parts], packing)
    held_out = held_out_batches(
        [held for _, held in parts], packing, rows=config.micro_batch, max_rows=config.held_out_rows
    )
    for line in (*report.lines(), *loader.summary()):
        say(line)
    say(preview(*loader.first_row(_PREVIEWED), tokenizer))
    trainer = _trainer(config, loader, tokenizer, say, mesh)
    return SftRun(trainer, tokenizer, held_out, config.eval_every)


def _trainer(config: SftConfig, loader: PackedLoader, tokenizer: Tokenizer, say: Say, mesh: Mesh | None) -> Trainer:
    first, last = config.rates
    steps, rest = divmod(loader.total_rows, config.batch_size)
    if rest and mesh is not None and mesh.config.pipeline > 1:
        if not steps:
            raise ValueError(
                f"{rest} rows do not fill a batch of {config.batch_size}, and a pipeline's batches are whole: lower batch_size, "
                "give more epochs or data, or take pipeline 1"
            )
        say(f"the last {rest} rows are left out: a pipeline's batches are whole")
    elif rest:
        steps += 1
    schedule = CosineConfig(
        steps=steps,
        batch_size=config.batch_size,
        first_lr=first,
        last_lr=last,
        warmup_steps=config.warmup_steps,
        gamma=config.gamma if config.update_router_bias else 0.0,
        mtp_weight=config.mtp_weight,
    )
    names = (
        "micro_batch",
        "alpha",
        "weight_decay",
        "precision",
        "recompute",
        "seed",
        "save_every",
        "keep_last",
        "eval_every",
    )
    train = TrainConfig(
        schedule=schedule,
        seq_len=loader.config.seq_len,
        max_steps=config.max_steps,
        **{name: getattr(config, name) for name in names},
    )
    say(f"{schedule.steps:,} steps of {config.batch_size} rows, learning rate {first:g} to {last:g}")
    options = {"tokenizer": tokenizer, "objective": SftObjective(), "lora": config.lora, "mesh": mesh}
    if mesh is not None:
        return _cut_trainer(config, loader, train, options)
    frozen = "fp8" if config.base_fp8 else config.precision
    model = load_model(config.checkpoint, dtype="float32" if config.lora is None else frozen, device=config.device)
    identity = {"base": fingerprint(model)}
    if config.lora is not None:
        counts = add_lora(model, config.lora, seed=config.seed)
        parts = ", ".join(f"{role} {count:,}" for role, count in counts.items())
        say(f"LoRA: {sum(counts.values()):,} parameters are trained ({parts}), of rank {config.lora.rank}")
    return Trainer(model.train(), loader, train, config.out, identity=identity, **options)


def _cut_trainer(config: SftConfig, loader: PackedLoader, train: TrainConfig, options: Mapping[str, Any]) -> Trainer:
    """Of several processes each reads the checkpoint a tensor at a time and keeps its part."""
    sizes = config_of(config.checkpoint)
    with torch.device("meta"):
        model = DeepseekV3(sizes)
    trainer, base = Trainer(model.train(), loader, train, config.out, **options), Fingerprint(sizes)
    assert isinstance(trainer.workers, Together)

    def passing() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read_tensors(config.checkpoint, sizes):
            base.add(name, tensor)
            yield name, tensor

    trainer.workers.place(passing())
    trainer.identity["base"] = str(base)
    return trainer


def _shown(value: float | list[float]) -> str:
    return " ".join(f"{part:.4f}" for part in (value if isinstance(value, list) else [value]))


def resolved(config: SftConfig) -> dict[str, Any]:
    """The config for a report: JSON-able."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()
    }
