"""A checkpoint's files: which tensors they hold in a given form, cut into shards and written with their checksums.

    form        dtype  None: each tensor as it comes; float32, bfloat16, float16; or "fp8": Linears as e4m3 codes with the
                       scales of their 128x128 blocks, as published (bfloat16 for the rest); router biases are float32 always
                fused  routed experts as transformers 5 holds them, one tensor a projection, instead of one an expert

The same pieces are written from a model in memory (weights.py) and from another checkpoint (convert.py): a function gives each
piece's value, a tensor or FP8 codes with scales. Codes and scales that are there already are written as they are.
Source: spec 2. Does not: rename folders into place (folder.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv3.kernels.quant import Fp8, cast_blocks
from dsv3.model import folder as disk
from dsv3.model.census import SCALE, Piece, is_fp8_weight, is_router_bias, layout, scale_of
from dsv3.model.config import ModelConfig
from dsv3.model.headers import INDEX_FILE, SINGLE_FILE
from dsv3.model.source import as_float

CHECKSUMS_FILE = "checksums.json"
DEFAULT_SHARD_BYTES = 5 * 2**30
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = torch.float8_e4m3fn

Value = Tensor | Fp8
Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Form(NamedTuple):
    """How tensors are written. See the header."""

    dtype: torch.dtype | None = None  # CODES: FP8
    fused: bool = False


class Unit(NamedTuple):
    """Pieces that become one weight of the file (and its scales)."""

    name: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int  # bytes, scales included


def units(config: ModelConfig, form: Form, held: Callable[[Piece], torch.dtype]) -> Iterator[Unit]:
    """What the files hold, in the published order; `held` tells the dtype in which a piece is given (CODES: FP8)."""
    for _, group in groupby(layout(config), key=lambda p: p.memory if _is_fused(p, form) else p.disk):
        pieces = tuple(group)
        first = pieces[0]
        if _is_fused(first, form):
            name, shape = first.memory, _fused_shape(pieces)
        else:
            name, shape = first.disk, first.shape
        dtype = _written(first, form, held(first))
        size = math.prod(shape) * dtype.itemsize
        if dtype == CODES:
            size += 4 * sum(math.prod(scale_of(piece).shape) for piece in pieces)
        yield Unit(name, pieces, shape, dtype, size)


def cut(every: Iterator[Unit], shard_bytes: int) -> list[list[Unit]]:
    """Shards of at most that many bytes; one larger unit gets its own.

    Raises:
        ValueError: shard_bytes is not positive.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}: give a positive number of bytes")
    shards, used = list[list[Unit]](), 0
    for unit in every:
        if not shards or used + unit.size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(unit)
        used += unit.size
    return shards


def file_names(count: int) -> list[str]:
    return [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shard(path: Path, shard: list[Unit], read: Callable[[Piece], Value]) -> tuple[str, dict[str, str]]:
    """Write one file, synced -> its sha256, and that of each tensor's bytes. Needs the file's size of memory.

    Raises:
        ValueError: a value to be cast to FP8 is not finite.
    """
    tensors = dict[str, Tensor]()
    for unit in shard:
        tensors |= _encode(unit, read)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private; a server may run as another user
    disk.sync(path)
    return disk.sha256(path), {name: digest(tensor) for name, tensor in tensors.items()}


def write_index(folder: Path, shards: list[list[Unit]], files: Mapping[str, Any], tensors: Mapping[str, str]) -> None:
    """The index, where there are several files, and checksums.json."""
    if len(shards) > 1:
        names = zip(file_names(len(shards)), shards)
        weight_map = {name: file for file, shard in names for unit in shard for name in written_names(unit)}
        total = sum(unit.size for shard in shards for unit in shard)
        disk.write_synced(
            folder / INDEX_FILE, disk.as_json({"metadata": {"total_size": total}, "weight_map": weight_map})
        )
    disk.write_synced(folder / CHECKSUMS_FILE, disk.as_json({"files": dict(files), "tensors": dict(tensors)}))


def written_names(unit: Unit) -> list[str]:
    return [unit.name, unit.name + SCALE] if unit.dtype == CODES else [unit.name]


def config_fields(config: ModelConfig, written: torch.dtype) -> dict[str, Any]:
    """config.json of files whose matrices are `written`: says FP8 exactly when they are."""
    name = str(torch.bfloat16 if written == CODES else written).removeprefix("torch.")
    content = config.to_hf(torch_dtype=name)
    content.pop("auto_map", None)  # no code is written beside the weights
    content.pop("quantization_config", None)
    if written == CODES:
        content["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        }  # fmt: skip
    return content


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _is_fused(piece: Piece, form: Form) -> bool:
    return form.fused and ".mlp.experts." in piece.memory


def _fused_shape(pieces: tuple[Piece, ...]) -> tuple[int, ...]:
    last = pieces[-1].index
    rows = last[1].stop if len(last) == 2 and isinstance(last[1], slice) else pieces[-1].shape[0]
    experts = last[0]
    assert isinstance(experts, int)
    return (experts + 1, rows, pieces[-1].shape[1])


def _written(piece: Piece, form: Form, held: torch.dtype) -> torch.dtype:
    if is_router_bias(piece.disk):
        return torch.float32
    if form.dtype is None:
        return held
    if form.dtype == CODES:
        return CODES if is_fp8_weight(piece.disk) else torch.bfloat16
    return form.dtype


def _encode(unit: Unit, read: Callable[[Piece], Value]) -> dict[str, Tensor]:
    """The tensors that a unit becomes in a file."""
    if len(unit.pieces) == 1 and unit.pieces[0].shape == unit.shape:
        value = _convert(unit.name, read(unit.pieces[0]), unit.dtype)
        if isinstance(value, Fp8):
            return {unit.name: value.codes, unit.name + SCALE: value.scales}
        # safetensors refuses two names for one memory; an MTP layer's duplicates are two names by design.
        return {unit.name: value.clone() if unit.pieces[0].duplicate else value}
    whole = torch.empty(unit.shape, dtype=unit.dtype)
    scales = torch.empty(_stacked_scales(unit)) if unit.dtype == CODES else None
    for piece in unit.pieces:
        value = _convert(piece.disk, read(piece), unit.dtype)
        if isinstance(value, Fp8):
            assert scales is not None
            whole[piece.index], scales[scale_of(piece).index] = value.codes, value.scales
        else:
            whole[piece.index] = value
    return {unit.name: whole} if scales is None else {unit.name: whole, unit.name + SCALE: scales}


def _stacked_scales(unit: Unit) -> tuple[int, ...]:
    last = scale_of(unit.pieces[-1])
    rows = last.index[1].stop if len(last.index) == 2 and isinstance(last.index[1], slice) else last.shape[0]
    return (unit.shape[0], rows, last.shape[1])


def _convert(name: str, value: Value, dtype: torch.dtype) -> Value:
    if dtype != CODES:
        return as_float(value, dtype).contiguous()
    if isinstance(value, Fp8):
        return Fp8(*(t.contiguous() for t in value))
    cast = Fp8(*cast_blocks(value if value.dtype == torch.float32 else value.bfloat16()))
    if not bool(cast.scales.isfinite().all()):
        raise ValueError(
            f"{name} holds values that are not finite: it cannot be written in FP8; look at that checkpoint"
        )
    return cast
