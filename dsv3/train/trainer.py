"""The training loop: batch -> forward, backward (bfloat16 twin) -> float32 gradients -> clip -> AdamW -> router bias.

One optimizer step is `Trainer.step`, and pre-training, fine-tuning and reinforcement learning all take it, each with its
Objective (loss.py) and its loader. Everything else keeps it company: schedules, metrics, held-out loss, checkpoints, Ctrl-C.
A step is a pure function of the checkpointed state, so a run killed anywhere and resumed repeats it bit for bit.
A loss or gradient that is not finite never reaches the optimizer: pre-training goes back to its last checkpoint and leaves those
rows out (spikes.py), where there is none, and in other stages, the run stops.
Source: V3 report sections 3.3 (float32 masters and gradient accumulation) and 4.2.
Of several processes (parallel/workers.py) each reads the same batch and takes its rows; one writes.
Does not: build models or data (see pretrain.py).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.data.loader import Batch, count_bytes
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.census import training_flops_per_token
from dsv3.model.lora import LoraConfig, has_lora
from dsv3.model.transformer import DeepseekV3, Hidden
from dsv3.parallel.apply import PRECISIONS, compute_copy
from dsv3.parallel.fsdp import local
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline import Pipeline
from dsv3.parallel.workers import assemble
from dsv3.train.acceptance import Agreement
from dsv3.train.checkpoint import differences, latest_checkpoint, load_training, read_state
from dsv3.train.claim import claimed
from dsv3.train.health import HealthMonitor
from dsv3.train.loss import Losses, Objective, Portions, PretrainObjective, RowLoader, Rows, SplitObjective, Step
from dsv3.train.metrics import Console, MetricsLog, expert_load, measure_peak
from dsv3.train.optim import Schedule, build_optimizer, non_finite, update_router_bias
from dsv3.train.saver import Saver
from dsv3.train.spikes import Skipping, Spike, SpikeGuard
from dsv3.train.watchdog import Watchdog

_LOG = logging.getLogger(__name__)  # of processes but the first


class NonFiniteError(ValueError):
    """A loss or gradient became NaN or infinite; nothing was updated."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the model's sizes are ModelConfig's."""

    schedule: Schedule
    seq_len: int = 4096
    """Tokens a row."""
    micro_batch: int = 8
    """Rows of one forward and backward; a step accumulates as many as its batch needs."""
    alpha: float = 1e-4
    """Factor of the sequence-wise balance loss."""
    clip: float = 1.0
    weight_decay: float = 0.1
    precision: str = "bfloat16"
    """Of the products: bfloat16, float32, or fp8 (the report's recipe, emulated where there is no FP8 hardware). Masters and
    gradients are float32; so are Adam's moments, but bfloat16 with fp8."""
    mask_documents: bool = False
    """Keep attention inside a document. The report does not (section 4.1)."""
    recompute: bool = False
    """Keep only each layer's input for the backward pass, and compute the layer again there."""
    compile: bool = False
    """torch.compile every layer. Needs a C++ compiler (CPU) or Triton (GPU), and a batch without ramp: each shape compiles anew."""
    seed: int = 0
    save_every: int = 100
    keep_last: int = 2
    eval_every: int = 50
    log_counts_every: int = 10
    max_steps: int | None = field(default=None, metadata={"run": False})
    """Stop after this many steps of this sitting (the schedule is unchanged); None: to the end."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}: train in one of {', '.join(PRECISIONS)}")
        if self.compile and self.precision == "fp8":
            raise ValueError("compile=True with precision 'fp8' is not supported: drop one of the two")
        if self.compile and self.schedule.batch_ramp_from is not None:
            raise ValueError(
                f"compile=True with batch_ramp_from {self.schedule.batch_ramp_from} would compile every batch size anew: drop one"
            )
        for name in ("seq_len", "micro_batch", "save_every", "keep_last", "eval_every", "log_counts_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues."""
        full = dataclasses.asdict(self)
        for name in ("save_every", "keep_last", "eval_every", "log_counts_every", "max_steps"):
            full.pop(name)
        return full


@dataclass(frozen=True)
class HeldOut:
    """Text the model never trains on, with the bytes behind its tokens."""

    batches: list[Batch]
    byte_lengths: Tensor  # (V,)


class Trainer:
    """Holds the masters, their bfloat16 twin, the optimizer and the loader. See `run`.

    Args:
        objective: what a step descends; None: pre-training's. The loader makes the batches that it reads.
        mesh: of this process among several; None: it is alone. The model is then sharded in place.
        lora: of the adapters that are on the model; what is not trained must be as wide as `precision` says, or FP8.
        identity: more that a resumed run must share with the one it continues.

    Raises:
        ValueError: the model has adapters and lora is None.
    """

    def __init__(
        self,
        model: DeepseekV3,
        loader: RowLoader,
        config: TrainConfig,
        folder: Path,
        *,
        tokenizer: Tokenizer | None = None,
        held_out: HeldOut | None = None,
        objective: Objective | None = None,
        lora: LoraConfig | None = None,
        identity: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.model, self.config, self.folder = model, config, Path(folder)
        if has_lora(model) and lora is None:
            raise ValueError("the model has adapters: give their LoraConfig, or merge them first")
        self.tokenizer, self.held_out, self.lora = tokenizer, held_out, lora
        self.objective = objective or PretrainObjective(mask_documents=config.mask_documents)
        # Elsewhere a loss is no level to compare with: conversations differ, rewards move it.
        guarded = isinstance(self.objective, PretrainObjective)
        self.guard = SpikeGuard(self.folder) if guarded else None
        self.loader = Skipping(loader, self.folder) if guarded else loader
        self.depth = model.config.num_nextn_predict_layers
        self.workers = assemble(
            model, mesh, precision=config.precision, recompute=config.recompute, compile_layers=config.compile
        )
        self.model, self.twin, self.device = self.workers.model, self.workers.twin, self.workers.device
        if self.workers.pipeline is not None and not isinstance(self.objective, SplitObjective):
            raise ValueError(
                f"{type(self.objective).__name__} does not run in a pipeline's stages: take pipeline 1, and expert or fsdp"
            )
        if self.workers.pipeline is not None:  # refused now rather than at that step
            for rows in sorted({config.schedule.rows(step) for step in range(config.schedule.steps)}):
                self.workers.part(rows, config.micro_batch)
        self.optimizer = build_optimizer(
            self.workers.masters,
            weight_decay=config.weight_decay,
            moments=torch.bfloat16 if config.precision == "fp8" else torch.float32,
        )
        self.saver = Saver(self.folder, self.workers, self.optimizer, tokenizer, keep_last=config.keep_last, lora=lora)
        self.step_index, self.tokens = 0, 0
        self._watched: Callable[[int], AbstractContextManager[None]] = _unwatched
        self.identity = {
            "model": model.config.to_hf(),
            "train": config.identity(),
            "tokenizer": tokenizer.fingerprint if tokenizer else None,
            **({"lora": dataclasses.asdict(lora)} if lora else {}),
            **(identity or {}),
        }
        self.monitor = HealthMonitor(*self.workers.forwards) if config.precision == "fp8" else None

    # -- one step -------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """One optimizer step; the record of it.

        Raises:
            NonFiniteError: names step, layer and batch; masters, moments and biases are as before the step.
        """
        start = time.perf_counter()
        batch = self.loader.next_batch(self.config.schedule.rows(self.step_index))
        with self._watched(self.step_index + 1):  # a round of rollouts is as long as it is
            return self._take(batch, start)

    def _take(self, batch: Rows, start: float) -> dict[str, Any]:
        index, schedule = self.step_index, self.config.schedule
        rows = self.objective.rows(batch)
        positions = rows * (batch.tokens.shape[1] - self.depth)
        logs = index % self.config.log_counts_every == 0 or index + 1 == schedule.steps
        with self.monitor.watching() if self.monitor and logs else nullcontext():
            losses, counts, extras = self._accumulate(batch, schedule.mtp_lambda(index))
        try:
            self.objective.settle(self.workers, batch)
        except BaseException:
            self.workers.abandon()
            raise
        if self.monitor and logs:
            self.monitor.join(self.workers.everyone(self.monitor.health))
        self.workers.collect()
        norm = self.workers.clip(self.config.clip)
        if not bool(norm.isfinite()):
            every = (named for part in self.workers.parts for named in part.named_parameters())
            named = [(name, local(p.grad)) for name, p in every if p.grad is not None]
            self.workers.abandon()
            raise NonFiniteError(
                f"gradient of {non_finite(named) or 'another rank'} is not finite {self._where(0, rows)}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.lr(index)
        self.optimizer.step()
        for part, load in self.workers.loads(counts):
            update_router_bias(part, load, schedule.bias_speed(index))
        self.workers.refresh()
        self.step_index += 1
        self.tokens += positions
        seconds = time.perf_counter() - start
        return {
            "step": self.step_index,
            "tokens": self.tokens,
            "loss": losses.main.item(),
            "mtp_loss": [loss.item() for loss in losses.mtp],
            "balance_loss": losses.balance.item() / max(1, counts.shape[0]),
            "grad_norm": norm.item(),
            "lr": schedule.lr(index),
            "gamma": schedule.bias_speed(index),
            "mtp_weight": schedule.mtp_lambda(index),
            "batch_size": rows,
            "seconds": seconds,
            "tokens_per_s": positions / seconds,
            **{name: extra.item() for name, extra in extras.items()},
            **({"load": expert_load(counts)} if counts.numel() else {}),
            **({"expert_counts": counts.tolist()} if logs else {}),
            **({"fp8": self.monitor.health} if self.monitor and logs else {}),
        }

    def _accumulate(self, batch: Rows, mtp_weight: float) -> Step:
        """Forward and backward over the micro-batches: gradients of the step's mean loss with the workers, and its parts."""
        rows, shares, whole = batch.tokens.shape[0], self.objective.shares(batch), None
        micros = self.workers.part(rows, self.config.micro_batch)
        self.objective.begin(self.workers, batch, micros)
        if self.workers.pipeline is not None:
            return self._sum_over_ranks(self._piped(self.workers.pipeline, batch, micros, mtp_weight), rows)
        for i, micro in enumerate(micros):
            # One without rows runs another rank's with no weight, so that its ranks meet in every collective.
            empty = micro.start == micro.stop
            share = 0.0 if empty else float(shares[micro].sum() / shares.sum())
            part = self.objective(
                self.twin,
                batch,
                slice(0, 1) if empty else micro,
                depth=self.depth,
                mtp_weight=mtp_weight,
                alpha=self.config.alpha,
                device=self.device,
            )
            if self.workers.mesh is None and not bool(part.losses.total.isfinite()):
                self.workers.abandon()
                blame = self._blame(batch.tokens[micro].to(self.device))
                raise NonFiniteError(
                    f"loss is {part.losses.total.item()} {blame}{self._where(micro.start, micro.stop)}"
                )
            self.workers.backward(part.losses.total * share, last=i + 1 == len(micros))
            whole = _add(whole, part._replace(counts=part.counts * 0) if empty else part, share)
        assert whole is not None
        return whole if self.workers.mesh is None else self._sum_over_ranks(whole, rows)

    def _piped(self, pipeline: Pipeline, batch: Rows, micros: list[slice], mtp_weight: float) -> Step:
        assert isinstance(self.objective, SplitObjective)
        alpha, whole = self.config.alpha, None
        feed = Portions(
            self.objective, batch, micros, depth=self.depth, mtp_weight=mtp_weight, alpha=alpha, device=self.device
        )
        records, counts = pipeline.step(feed, len(micros), balance=alpha > 0)
        for record, share in zip(records, feed.shares, strict=True):  # whose counts are the last stage's alone
            whole = _add(whole, record._replace(counts=torch.zeros(())), share)
        assert whole is not None
        return whole._replace(counts=counts)

    def _sum_over_ranks(self, mine: Step, rows: int) -> Step:
        """The step's parts of all data ranks together, each knowing the loss of all before any may raise.

        Raises:
            NonFiniteError: on every rank; names those whose rows it was.
        """
        losses, mesh = mine.losses, self.workers.mesh
        assert mesh is not None
        bad = torch.zeros(mesh.data_size, dtype=torch.float64, device=self.device)
        bad[mesh.data_rank] = not bool(losses.total.isfinite())
        if (bad := self.workers.total(bad)).any():
            self.workers.abandon()
            ranks = bad.nonzero().flatten().tolist()
            micros = [micro for rank in ranks for micro in self.workers.part(rows, self.config.micro_batch, rank)]
            raise NonFiniteError(
                f"loss is not finite on data ranks {ranks} {self._where(micros[0].start, micros[-1].stop)}"
            )
        names = sorted(mine.extras)
        parts = [losses.total, losses.main, losses.balance, *losses.mtp]
        values = torch.stack([p.double().to(bad.device) for p in (*parts, *(mine.extras[name] for name in names))])
        total, main, balance, *rest = self.workers.total(values).float()
        counts = self.workers.total(mine.counts.clone())
        mtp, extras = rest[: len(losses.mtp)], rest[len(losses.mtp) :]
        return Step(Losses(total, main, tuple(mtp), balance), counts, dict(zip(names, extras, strict=True)))

    def _where(self, first: int, last: int) -> str:
        return (
            f"at step {self.step_index + 1}, batch rows {first} to {last - 1} (loader row {self.loader.state_dict().get('rows')}): "
            "nothing was updated, the last checkpoint is good; lower peak_lr or look at that batch"
        )

    @torch.no_grad()
    def _blame(self, tokens: Tensor) -> str:
        """The first module whose output is not finite, by one more forward with every output looked at."""
        found: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(_module: object, _inputs: object, output: object) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if not found and isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
                    found.append(name)

            return hook

        plain = compute_copy(self.model, self.config.precision)
        handles = [m.register_forward_hook(look(name)) for name, m in plain.named_modules() if name]
        try:
            plain.hidden(tokens, depth=self.depth)
        finally:
            for handle in handles:
                handle.remove()
        return f"(first in {found[0]}) " if found else ""

    # -- the run --------------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool = True, on_eval: Iterable[Callable[[Trainer], dict[str, Any]]] = ()) -> None:
        """Train to the schedule's end, from the newest checkpoint of the folder when there is one.

        Ctrl-C finishes the step, saves, and raises KeyboardInterrupt.
        """
        with ExitStack() as stack:
            stack.enter_context(claimed(self.folder, self.workers))
            if resumed := self.newest() if resume else None:
                self.restore(resumed)
            self._recall()
            schedule, leads = self.config.schedule, self.workers.leads
            end = min(schedule.steps, self.step_index + (self.config.max_steps or schedule.steps))
            share = self._peak_share() if leads else lambda tokens_per_s: 0.0
            interrupted = stack.enter_context(_interruptible())
            stack.callback(self.saver.wait)
            log = stack.enter_context(MetricsLog(self.folder, resume_step=self.step_index)) if leads else None
            console = stack.enter_context(Console(schedule.steps, start_step=self.step_index)) if leads else None
            say = console.log if console is not None else _LOG.debug
            watch = stack.enter_context(Watchdog(self.folder, self.workers.forwards, say if leads else _LOG.warning))
            self._watched = watch.step
            stack.callback(setattr, self, "_watched", _unwatched)
            if resumed is not None:
                say(f"resumed from {resumed.name}")
            while self.step_index < end:
                record, spike = self._guarded_step()
                if spike is not None and self._went_back(spike, say):
                    if log is not None:
                        log.close()
                        log = stack.enter_context(MetricsLog(self.folder, resume_step=self.step_index))
                    continue
                record["peak_share"] = share(record["tokens_per_s"])
                if self.held_out is not None and (
                    self.step_index % self.config.eval_every == 0 or self.step_index == end
                ):
                    record |= {"heldout_bpb": self.bits_per_byte()}
                    record |= {"acceptance": self.acceptance()} if self.depth else {}
                for extra in on_eval:
                    record |= extra(self)
                if log is not None and console is not None:
                    log.write(record)
                    console.update(record)
                for alarm in self.monitor.alarms() if self.monitor and "fp8" in record else ():
                    say(f"warning, step {self.step_index}: {alarm}")
                stop = self._any(interrupted())
                if self.step_index == end or stop or self.step_index % self.config.save_every == 0:
                    self.save(wait=self.step_index == end or stop)
                if stop:
                    say(f"stopped at step {self.step_index}; the same command resumes")
                    raise KeyboardInterrupt

    def _guarded_step(self) -> tuple[dict[str, Any], Spike | None]:
        """The step's record, empty if it broke, and whether to go back."""
        if self.guard is None:
            return self.step(), None
        try:
            record = self.step()
        except NonFiniteError as error:
            return {}, self.guard.broken(self.step_index + 1, error)
        return record, self.guard.see(record)

    def _went_back(self, spike: Spike, say: Callable[[str], None]) -> bool:
        """Restore the checkpoint before the spike, if there is one, with the rows since left out.

        Raises:
            NonFiniteError, SpikeError: there is no way back, or it was gone too often.
        """
        assert self.guard is not None
        assert isinstance(self.loader, Skipping)
        self.saver.wait()
        back = self.guard.undo(spike, self.loader.rows, self.workers)
        if back is None:
            if len(spike.losses) == self.guard.config.patience:
                say(f"warning, step {spike.step}: {spike.why}; there is no checkpoint before it to go back to")
            return False
        self.loader.reload()
        self.loader.skips = self.workers.leading(self.loader.skips)  # a network's folder may show others an older file
        self.restore(back.checkpoint)
        say(str(back))
        return True

    def newest(self) -> Path | None:
        """The checkpoint that a run goes on from.

        Raises:
            ValueError: the processes do not see the same.
        """
        mine = latest_checkpoint(self.folder)
        seen = self.workers.everyone(mine.name if mine else None)
        if other := [rank for rank, name in enumerate(seen) if name != seen[0]]:
            raise ValueError(
                f"process 0 sees {seen[0] or 'no checkpoint'} as the newest in {self.folder}, process {other[0]} "
                f"{seen[other[0]] or 'none'}: give a folder that all machines share, or start again when they do"
            )
        return mine

    def _recall(self) -> None:
        """What the run's files say of the steps before, to every process as the first reads it."""
        if self.guard is not None:
            assert isinstance(self.loader, Skipping)
            self.guard.recall(self.step_index)
            self.guard.learn(self.workers.leading(self.guard.history))
            self.loader.skips = self.workers.leading(self.loader.skips)

    def _peak_share(self) -> Callable[[float], float]:
        """Tokens a second -> share of the machine's matmul rate, of all processes together."""
        flops = training_flops_per_token(self.model.config, self.config.seq_len, causal=True, mtp=self.depth > 0)
        peak = measure_peak(torch.float32 if self.config.precision == "float32" else torch.bfloat16, self.device)
        processes = 1 if self.workers.mesh is None else self.workers.mesh.world
        return lambda tokens_per_s: tokens_per_s * flops / (peak * processes)

    def _any(self, pressed: bool) -> bool:
        """Whether any process was interrupted: all stop behind the same step."""
        if self.workers.mesh is None:
            return pressed
        return bool(self.workers.gather(torch.tensor(int(pressed), device=self.device)))

    def save(self, *, wait: bool = True) -> Path:
        """Write a checkpoint of this step; see saver.py.

        Raises:
            OSError: it, or the one before it, could not be written.
        """
        state = {
            "step": self.step_index,
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "identity": self.identity,
        }
        return self.saver.save(state, whole=self.step_index >= self.config.schedule.steps, wait=wait)

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it was made with another tokenizer, model or training config; the message lists what differs.
        """
        state = read_state(checkpoint)
        changed = differences(state["identity"], _jsonable(self.identity))
        if changed:
            raise ValueError(
                f"{checkpoint} was started differently and cannot be resumed; change back, or train into a new folder: "
                + "; ".join(changed)
            )
        self.loader.load_state_dict(state["loader"])
        load_training(checkpoint, self.workers, self.optimizer)
        self.step_index, self.tokens = state["step"], state["tokens"]
        self.workers.refresh()

    @torch.no_grad()
    def bits_per_byte(self) -> float:
        """Held-out cross entropy in bits per UTF-8 byte of text: comparable across tokenizers."""
        assert self.held_out is not None
        nats, count = 0.0, 0
        for batch, hidden in self._held_out_states(0):
            head, length = self.workers.head, batch.tokens.shape[1]
            targets = batch.targets[:, :length]
            logits = head(hidden.main).float()
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten().to(self.device), reduction="sum"
            ).item()
            count += count_bytes(targets, self.held_out.byte_lengths)
        nats, count = self.workers.gather(torch.tensor([nats, count], dtype=torch.float64, device=self.device)).tolist()
        return nats / math.log(2) / count

    def acceptance(self) -> list[float]:
        """Of each MTP depth, the share of its drafts on held-out text that the main model's greedy choice equals."""
        agreement = Agreement(self.depth)
        for _, hidden in self._held_out_states(self.depth):
            agreement.add_states(self.workers.head, hidden)
        return agreement.shares(self.workers.gather(agreement.counts(self.device)))

    @torch.no_grad()
    def _held_out_states(self, depth: int) -> Iterator[tuple[Batch, Hidden]]:
        """Batches of this data rank, each with its states, in the ranks that have the head."""
        assert self.held_out is not None
        for index, counts in self.workers.turns(len(self.held_out.batches)):
            batch = self.held_out.batches[index]
            hidden = self.workers.hidden(batch.tokens.to(self.device), depth=depth)
            if hidden is not None and counts:
                yield batch, hidden


def _add(whole: Step | None, part: Step, share: float) -> Step:
    """The means so far and those of one more micro-batch."""
    losses, extras = _scaled(part.losses, share), {name: value * share for name, value in part.extras.items()}
    if whole is None:
        return Step(losses, part.counts, extras)
    mtp = tuple(a + b for a, b in zip(whole.losses.mtp, losses.mtp, strict=True))
    before = whole.losses
    losses = Losses(before.total + losses.total, before.main + losses.main, mtp, before.balance + losses.balance)
    return Step(losses, whole.counts + part.counts, {name: whole.extras[name] + extras[name] for name in extras})


def _scaled(losses: Losses, share: float) -> Losses:
    mtp = tuple(loss * share for loss in losses.mtp)
    return Losses(losses.total.detach() * share, losses.main * share, mtp, losses.balance * share)


def _unwatched(step: int) -> AbstractContextManager[None]:
    return nullcontext()


def _jsonable(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def _interruptible():
    """Turn the first Ctrl-C into a flag that is read between steps; the second interrupts at once."""
    import signal
    import threading

    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handler(signum: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
