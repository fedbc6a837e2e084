"""Context extension: a model pre-trained on short rows learns long ones, in the report's two phases.

    before   plain RoPE, rows of `original` tokens (4,096), softmax scale 1/sqrt(head)
    switch   YaRN by `factor` (40): slow pairs turn factor times slower, on the decoupled key and its query alone; softmax scale
             times (0.1 ln factor + 1)^2; max_position_embeddings = factor · original. The same in every phase
    phases   1,000 steps on rows of 32,768 tokens, then 1,000 on rows of 131,072; equally many tokens a step (1,920 and 480
             rows), learning rate constant at pre-training's last, 7.3e-6

A phase starts from the float32 masters and Adam's moments of the checkpoint before it (the first from `checkpoint`, the next
from the phase's before), bit for bit, and has a run's folder of its own: FOLDER/phase-1, FOLDER/phase-2. The same call goes on
where it was stopped. MTP layers train on. Memory is bounded by one row: rows go through one at a time, layers are computed again
in the backward pass, logits exist by blocks. Of several processes each reads its part of a start and keeps its shard, and a phase
may go on, or the next begin, in another layout.
Source: V3 report section 4.3, YaRN arXiv 2309.00071. The report does not say what became of the router bias's speed and of
lambda: they stay as pre-training ended (0 and 0.1). Does not: choose the data (long documents help), or evaluate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.data.loader import Loader, LoaderConfig
from dsv3.data.shards import Shards
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.config import ModelConfig, YarnConfig
from dsv3.model.fingerprint import Fingerprint
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import read_tensors
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.workers import Together
from dsv3.train.checkpoint import load_training, read_state, stamp
from dsv3.train.loss import Objective, RowLoader
from dsv3.train.trainer import TrainConfig, Trainer


@dataclass(frozen=True, kw_only=True)
class ConstantConfig:
    """Schedule of a phase: nothing changes over it."""

    steps: int
    batch_size: int
    rate: float
    gamma: float
    mtp_weight: float

    @property
    def batch_ramp_from(self) -> None:
        """The batch is constant."""

    def lr(self, step: int) -> float:
        return self.rate

    def rows(self, step: int) -> int:
        return self.batch_size

    def bias_speed(self, step: int) -> float:
        return self.gamma

    def mtp_lambda(self, step: int) -> float:
        return self.mtp_weight


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """How to extend; the defaults are the report's, for V3. Smaller models want other lengths and a larger rate."""

    lengths: tuple[int, ...] = (32768, 131072)
    """Tokens a row, phase by phase."""
    steps: int = 1000
    """Optimizer steps of each phase."""
    step_tokens: int = 1920 * 32768
    """Tokens of a step, in every phase: a phase's batch is this over its length."""
    lr: float = 7.3e-6
    """Constant. Pre-training's last rate; small models want more (about a tenth of their peak)."""
    factor: float = 40.0
    """How many times longer the context becomes."""
    original: int | None = None
    """Context length of pre-training; None: what the checkpoint says (its run's seq_len, else max_position_embeddings)."""
    gamma: float = 0.0
    """Speed of the router bias; pre-training ended with 0."""
    mtp_weight: float = 0.1
    """Lambda; pre-training ended with 0.1."""
    alpha: float = 1e-4
    clip: float = 1.0
    weight_decay: float = 0.1
    precision: str = "bfloat16"
    micro_batch: int = 1
    """Rows of one forward and backward."""
    recompute: bool = True
    """Keep only each layer's input for the backward pass."""
    seed: int = 0
    save_every: int = 100
    keep_last: int = 2
    max_steps: int | None = None
    """Stop after so many steps of this sitting, over all phases; None: to the end."""

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ValueError(f"lengths is {self.lengths}: give at least one, rising from phase to phase")
        for length in self.lengths:
            if self.step_tokens < length or self.step_tokens % length:
                raise ValueError(
                    f"step_tokens {self.step_tokens} is not a whole number of rows of {length} tokens: "
                    f"give a multiple of every length, such as {self.lengths[-1]}"
                )
        if self.steps < 1 or (self.max_steps is not None and self.max_steps < 1):
            raise ValueError(f"steps {self.steps} and max_steps {self.max_steps} must be at least 1")
        if self.lr < 0:
            raise ValueError(f"lr is {self.lr}: it must not be negative")

    def train_config(self, phase: int) -> TrainConfig:
        """Of the 0-based phase."""
        length = self.lengths[phase]
        schedule = ConstantConfig(
            steps=self.steps,
            batch_size=self.step_tokens // length,
            rate=self.lr,
            gamma=self.gamma,
            mtp_weight=self.mtp_weight,
        )
        same = {f.name for f in dataclasses.fields(TrainConfig)} & {f.name for f in dataclasses.fields(self)}
        shared = {name: getattr(self, name) for name in same - {"max_steps"}}
        return TrainConfig(schedule=schedule, seq_len=length, **shared)


def extended(config: ModelConfig, *, factor: float, original: int) -> ModelConfig:
    """The model with YaRN: V3's from its 4K pre-training is `extended(config, factor=40, original=4096)`.

    A model that has just this YaRN already is returned as it is.

    Raises:
        ValueError: it has another.
    """
    yarn = YarnConfig(factor=factor, original_max_position_embeddings=original, mscale=1.0, mscale_all_dim=1.0)
    if config.rope_scaling not in (None, yarn):
        raise ValueError(
            f"the model is extended already, by {config.rope_scaling}, and not by factor {factor} of {original}: "
            "start from a checkpoint of its pre-training, or give the same factor and original"
        )
    return dataclasses.replace(config, rope_scaling=yarn, max_position_embeddings=int(factor * original))


def original_length(checkpoint: Path, config: ModelConfig) -> int:
    """The context that the checkpoint's model was pre-trained with."""
    if config.rope_scaling is not None:
        return config.rope_scaling.original_max_position_embeddings
    if (checkpoint / "training.json").exists():
        return int(read_state(checkpoint)["identity"]["train"]["seq_len"])
    return config.max_position_embeddings


def extend(
    checkpoint: Path,
    config: ExtendConfig,
    rows: Callable[[LoaderConfig], RowLoader],
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    objective: Objective | None = None,
    device: str = "cpu",
    mesh: Mesh | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Both phases, or what is left of them -> the newest checkpoint, whose config.json is the extended one.

    Args:
        checkpoint: of pre-training (its masters and moments are continued), or any DeepseekV3 checkpoint (from its weights).
        rows: makes a phase's loader, such as `functools.partial(Loader, shards)`.
        objective: None: pre-training's.
        mesh: of this process among several; None: it is alone, on `device`.

    Raises:
        ValueError: the lengths exceed the extension, the model is extended otherwise already, the folder holds phases of
            another start or config, or a batch does not divide over the processes.
    """
    left = config.max_steps
    base = ModelConfig.from_hf(checkpoint)
    model_config = longer(checkpoint, config)
    for phase, length in enumerate(config.lengths):
        train = dataclasses.replace(config.train_config(phase), max_steps=left)
        loader = rows(
            LoaderConfig(seq_len=length, extra_tokens=base.num_nextn_predict_layers, seed=config.seed + phase)
        )
        options = {"tokenizer": tokenizer, "objective": objective, "mesh": mesh}
        trainer = _phase(checkpoint, model_config, train, loader, folder / f"phase-{phase + 1}", device, options)
        done = trainer.newest()
        before = 0 if done is None else read_state(done)["step"]
        say(
            f"phase {phase + 1} of {len(config.lengths)}: rows of {length} tokens, {before} of {config.steps} steps done"
        )
        trainer.run()
        newest = trainer.newest()
        assert newest is not None
        checkpoint = newest
        if left is not None:
            left -= trainer.step_index - before
            if left == 0:
                break
        del trainer, loader  # before the next phase's model is in memory
    return checkpoint


def longer(checkpoint: Path, config: ExtendConfig) -> ModelConfig:
    """The sizes of what `extend` makes of a checkpoint.

    Raises:
        ValueError: see there.
    """
    base = ModelConfig.from_hf(checkpoint)
    original = config.original or original_length(checkpoint, base)
    model_config = extended(base, factor=config.factor, original=original)
    if config.lengths[-1] > model_config.max_position_embeddings:
        raise ValueError(
            f"rows of {config.lengths[-1]} tokens exceed the {model_config.max_position_embeddings} that YaRN by factor "
            f"{config.factor:g} makes of {original}: raise factor, or shorten lengths"
        )
    return model_config


def extend_from_shards(
    checkpoint: Path,
    config: ExtendConfig,
    shards: Shards,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    device: str = "cpu",
    mesh: Mesh | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """`extend` on what `dsv3 data` wrote; documents are packed end to end as in pre-training.

    Raises:
        ValueError: as `extend`; the tokenizer is not that of the shards, or the corpus is smaller than one batch.
    """
    if shards.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the shards were made with tokenizer {shards.tokenizer_fingerprint[:12]}, this is {tokenizer.fingerprint[:12]}: "
            "make the shards again with `dsv3 data`, or give the tokenizer they were made with"
        )
    depth = ModelConfig.from_hf(checkpoint).num_nextn_predict_layers
    for length in config.lengths:  # before the first phase's days, not after
        loader = Loader(shards, LoaderConfig(seq_len=length, extra_tokens=depth))
        loader.check_batch(config.step_tokens // length)
    rows = partial(Loader, shards)
    return extend(checkpoint, config, rows, folder, tokenizer=tokenizer, device=device, mesh=mesh, say=say)


def _phase(
    start: Path,
    model_config: ModelConfig,
    config: TrainConfig,
    loader: RowLoader,
    folder: Path,
    device: str,
    options: Mapping[str, Any],
) -> Trainer:
    """A trainer that stands where `start` ended; a run of the folder resumes only if it had the same start."""
    with torch.device("meta"):
        model = DeepseekV3(model_config)
    if options["mesh"] is None:
        model = model.to_empty(device=device)
    trainer = Trainer(model, loader, config, folder, **options)
    if isinstance(loader, Loader) and isinstance(trainer.workers, Together):
        loader.keep(trainer.workers.rows)
    if (start / "training.json").exists():
        load_training(start, trainer.workers, trainer.optimizer)
        trainer.identity["start"] = stamp(start)
    else:
        print_of = Fingerprint(model_config)

        def passing() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in read_tensors(start, model_config):
                print_of.add(name, tensor)
                yield name, tensor

        trainer.workers.place(passing())
        trainer.identity["start"] = str(print_of)
    trainer.workers.refresh()
    return trainer
