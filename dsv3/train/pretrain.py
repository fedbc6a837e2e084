"""Pre-training from shards to checkpoint, read top down: data -> model -> trainer.

Does not: tokenise (see recipes.corpus_to_shards) or choose sizes (see recipes).
"""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3.data.loader import Loader, LoaderConfig, byte_lengths, held_out_batches
from dsv3.data.shards import Shards
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.workers import Together
from dsv3.train.checkpoint import latest_checkpoint
from dsv3.train.trainer import HeldOut, TrainConfig, Trainer


def build_trainer(
    model_config: ModelConfig,
    train_config: TrainConfig,
    shards: Shards,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    held_out: Shards | None = None,
    held_out_rows: int = 32,
    device: str = "cpu",
    mesh: Mesh | None = None,
) -> Trainer:
    """A trainer over freshly initialised float32 masters; `run` resumes if the folder holds a checkpoint.

    Raises:
        ValueError: the tokenizer does not fit the shards or the model, the corpus is smaller than one batch, or the batch
            does not divide over the processes.
    """
    if shards.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the shards were made with tokenizer {shards.tokenizer_fingerprint[:12]}, this is {tokenizer.fingerprint[:12]}: "
            "make the shards again with `dsv3 data`, or give the tokenizer they were made with"
        )
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {model_config.vocab_size}: raise vocab_size"
        )
    if train_config.seq_len > model_config.max_position_embeddings:
        raise ValueError(
            f"seq_len {train_config.seq_len} exceeds max_position_embeddings {model_config.max_position_embeddings}: lower seq_len"
        )
    depth = model_config.num_nextn_predict_layers
    loader = Loader(shards, LoaderConfig(seq_len=train_config.seq_len, extra_tokens=depth, seed=train_config.seed))
    loader.check_batch(train_config.schedule.batch_size)
    evaluation = None
    if held_out is not None:
        longest = max(len(source.tokens) for source in held_out.sources)
        rows = held_out_batches(
            held_out,
            seq_len=min(train_config.seq_len, longest - 1),  # of a small corpus, what there is
            extra_tokens=0,
            rows=train_config.micro_batch,
            max_rows=held_out_rows,
        )
        evaluation = HeldOut(list(rows), byte_lengths(tokenizer))
    with torch.device("cpu" if mesh is None else "meta"):  # of several processes none ever holds the whole model
        model = DeepseekV3(model_config)
    if mesh is None:
        model.init_weights(train_config.seed)
        model = model.to(device)
    trainer = Trainer(model, loader, train_config, folder, tokenizer=tokenizer, held_out=evaluation, mesh=mesh)
    if isinstance(trainer.workers, Together):
        loader.keep(trainer.workers.rows)
    if isinstance(trainer.workers, Together) and latest_checkpoint(Path(folder)) is None:
        trainer.workers.init_weights(train_config.seed)
    return trainer
