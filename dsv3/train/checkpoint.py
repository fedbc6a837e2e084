"""Training checkpoints: a Hugging Face model folder with the training state beside it.

    RUN/checkpoints/step-00000100/   config.json, model.safetensors, tokenizer.json, ...   opens in transformers, vLLM, dsv3
                     training/       float32 masters, optimizer moments (torch.distributed.checkpoint), checksums.json
                     training.json   step, tokens, loader position, and what the run was started with

Masters and moments bear the names of the whole model, whatever processes held them, so any number of processes in any layout
reads them again: every rank what it holds. Of several processes only the last checkpoint of a run has the model's own files, of
a model with adapters (model/lora.py) too: `consolidate` makes them of any, a tensor in memory at a time.

A checkpoint is written under a temporary name, synced, and renamed: what bears a step's name is whole (saver.py).
Does not: decide when to save.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dsv3.model import folder as disk
from dsv3.model.census import Piece
from dsv3.model.config import ModelConfig
from dsv3.model.initial import EXPERTS
from dsv3.model.lora import adapter_state, has_lora
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import write_checkpoint
from dsv3.parallel.fsdp import local
from dsv3.parallel.mesh import Mesh
from dsv3.train.optim import AdamW

STATE = "training.json"
TENSORS = "training"
CHECKSUMS = "checksums.json"
_NAME = re.compile(r"step-(\d{8})")


class Holder(Protocol):
    """Who holds masters: parallel.workers.Workers."""

    @property
    def mesh(self) -> Mesh | None: ...
    @property
    def parts(self) -> list[DeepseekV3]: ...
    def view(self, name: str, tensor: Tensor) -> Tensor: ...
    def settle(self) -> None: ...


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)


def in_shards_alone(checkpoint: Path) -> bool:
    """Whether several processes wrote it, and its model is in no files of its own: see `consolidate`."""
    return (checkpoint / TENSORS).is_dir() and not any(checkpoint.glob("*.safetensors"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """training.json of a checkpoint.

    Raises:
        ValueError: it holds no training state.
    """
    path = checkpoint / STATE
    if not path.exists():
        raise ValueError(
            f"{checkpoint} holds a model but no training state ({path.name} is missing): start from its weights instead"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {_instead(checkpoint)}") from None


def stamp(checkpoint: Path) -> str:
    """A name for a training checkpoint as it lies on disk, without reading its tensors: SHA-256 of its state and checksums."""
    digest = hashlib.sha256()
    for path in (checkpoint / STATE, checkpoint / TENSORS / CHECKSUMS):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def training_tensors(holder: Holder, optimizer: AdamW) -> list[tuple[str, Tensor]]:
    """Masters, router biases and moments under their stored names, each in the very storage that training uses; where this
    rank holds a tensor twice (a pipeline's embedding), twice."""
    optimizer.materialise()
    holder.settle()
    found, names = [], dict[int, str]()
    for part in holder.parts:
        names |= {id(parameter): name for name, parameter in part.named_parameters()}
        held = adapter_state(part) if has_lora(part) else part.state_dict()
        found += [(f"model.{name}", holder.view(name, tensor)) for name, tensor in held.items()]
    for parameter, entry in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in entry.items():
            found.append((f"optimizer.{name}.{key}", holder.view(name, value) if value.dim() else value))
    return found


@torch.no_grad()
def load_training(checkpoint: Path, holder: Holder, optimizer: AdamW) -> None:
    """Fill the masters, router biases and optimizer moments in place, bit for bit. With several processes all call it.

    Raises:
        ValueError: a file of it is not what was written, or it lacks a tensor; on every process.
    """
    _verify(checkpoint, holder.mesh is not None)
    named = training_tensors(holder, optimizer)
    tensors = dict(reversed(named))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks that no process group exists, where there is one process
        try:
            dcp.load(tensors, checkpoint_id=checkpoint / TENSORS, no_dist=holder.mesh is None)
        except CheckpointException as error:
            raise ValueError(f"{checkpoint} is not readable as this run's: {cause(error)}") from None
    for name, tensor in named:
        if tensor is not tensors[name]:
            local(tensor).copy_(local(tensors[name]))


def cause(error: CheckpointException) -> Exception:
    """What went wrong, of the library's report of all processes (which is no Exception): the disk's doing first, an OSError."""
    faults = [(rank, fault) for rank, (fault, _) in sorted(error.failures.items(), key=lambda found: found[0])]
    for rank, fault in faults:
        if isinstance(fault, OSError):
            return OSError(fault.errno, f"{fault.strerror or fault}, process {rank}")
    rank, fault = faults[0]
    return RuntimeError(f"process {rank}: {type(fault).__name__}: {fault}")


def _verify(checkpoint: Path, together: bool) -> None:
    """Compare the files with their sha256, each process some of them. Checkpoints of earlier versions have none."""
    folder = checkpoint / TENSORS
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    try:
        expected = sorted(json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items())
        paths = {name: checkpoint / name if name == STATE else folder / name for name, _ in expected}
        damaged = [
            name for name, digest in expected[rank::world]
            if not paths[name].exists() or disk.sha256(paths[name]) != digest
        ]  # fmt: skip
    except (FileNotFoundError, ValueError):
        damaged = [CHECKSUMS] if "checksums" in read_state(checkpoint) or (folder / CHECKSUMS).exists() else []
    if together:
        told: list[list[str]] = [[] for _ in range(world)]
        dist.all_gather_object(told, damaged)
        damaged = sorted({name for names in told for name in names})
    if damaged:
        raise ValueError(f"{folder}: {', '.join(damaged)} is not what was written (sha256): {_instead(checkpoint)}")


def _instead(checkpoint: Path) -> str:
    others = ", ".join(path.name for path in checkpoints(checkpoint.parent.parent) if path != checkpoint)
    return f"remove {checkpoint.name}, the run goes on from the checkpoint before it ({others or 'there is none'})"


def consolidate(
    checkpoint: Path,
    target: Path,
    *,
    dtype: torch.dtype | str | None = torch.bfloat16,
    source: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> None:
    """Write the model of a checkpoint as a Hugging Face folder, from the masters. Holds one tensor at a time, of a layer's experts
    as many as one rank of an expert group had (of one process, which held them all: all).

    Args:
        dtype, options: as of `save_checkpoint`. source: the folder of the tensors, if it is not in the checkpoint.

    Raises:
        ValueError: the checkpoint holds no training state, or that of adapters alone.
    """
    if (checkpoint / STATE).exists():  # not of one that is being written
        _verify(checkpoint, together=False)
    reader = FileSystemReader(checkpoint / TENSORS if source is None else source)
    stored = reader.read_metadata().state_dict_metadata
    config = ModelConfig.from_hf(checkpoint)
    last: dict[tuple[str, int], Tensor] = {}

    def described(name: str) -> TensorStorageMetadata:
        found = stored.get(f"model.{name}")
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"{checkpoint} has no {name} among its training tensors: its model is in its own files")
        return found

    def value(piece: Piece) -> Tensor:
        about = described(piece.memory)
        first, rows, index = 0, about.size[:1], piece.index
        if EXPERTS in piece.memory and isinstance(expert := index[0], int):
            first, stop = _stored_rows(about, expert)
            rows, index = torch.Size([stop - first]), (expert - first, *index[1:])
        if (piece.memory, first) not in last:
            last.clear()
            tensor = torch.empty((*rows, *about.size[1:]), dtype=about.properties.dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    dcp.load(
                        {f"model.{piece.memory}": tensor}, storage_reader=reader, planner=_Rows(first), no_dist=True
                    )
                except CheckpointException as error:
                    raise ValueError(f"{checkpoint} is damaged at {piece.memory}: {cause(error)}") from None
            last[piece.memory, first] = tensor
        return last[piece.memory, first][index]

    write_checkpoint(
        config, target, held=lambda piece: described(piece.memory).properties.dtype, value=value, dtype=dtype,
        progress=progress, **options,
    )  # fmt: skip


def _stored_rows(about: TensorStorageMetadata, row: int) -> tuple[int, int]:
    """Rows [first, stop) of the stored piece that has a row."""
    extents = {(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in about.chunks}
    return next((first, stop) for first, stop in sorted(extents) if first <= row < stop)


class _Rows(DefaultLoadPlanner):
    """Reads one tensor's rows from `first` on, as many as the tensor that is given has."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        ((name, tensor),) = self.state_dict.items()
        about = self.metadata.state_dict_metadata[name]
        assert isinstance(about, TensorStorageMetadata)
        offsets = torch.Size((self.first, *[0] * (tensor.dim() - 1)) if tensor.dim() else ())
        wanted = ChunkStorageMetadata(offsets=offsets, sizes=tensor.shape)
        return LoadPlan(create_read_items_for_chunk_list(name, about, [wanted]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Human lines `name: a there, b now` for every leaf that differs."""
    lines = []
    for key in sorted({*saved, *now}):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} there, {b!r} now")
    return lines
