"""Checkpoints in and out: a folder of safetensors in the published Hugging Face layout.

    save    state dict -> split experts, MTP layers with copies of embedding and head -> shards -> renamed into place
    load    headers checked -> each tensor read, dequantised if FP8, put where `census.layout` says

A dsv3 checkpoint is config.json, generation_config.json, model.safetensors or shards with their index, and
checksums.json (the sha256 of every weight file). Loading also takes the official FP8 files and what transformers 5
saves. It is strict: every tensor of the files is used, every tensor of the model is filled. FP8 weights become

    w[i, j] = round( float32(w_fp8[i, j]) · scale_inv[i // 128, j // 128] )          one rounding, to the asked dtype

On disk nothing is ever half there. A save writes `.NAME.saving` beside the target, syncs every file, then renames.
Replacing a checkpoint (overwrite) renames the old one to `.NAME.old`, the new one into place, and deletes the old. A
crash between the two renames leaves `.NAME.old`; the next load or save of the folder renames it back. Leftovers are
otherwise ignored, and removed by the next save. Two processes must not save to one folder at once.

Source: spec 2 (published index; README_WEIGHTS.md of the release).
Does not: hold optimizer state, write FP8, or run a second program's code (`auto_map` of a config is not written on).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.model.census import (
    BLOCK,
    INDEX_FILE,
    ITEM_BYTES,
    SINGLE_FILE,
    Piece,
    Stored,
    is_router_bias,
    layer_of,
    layout,
    memory_shapes,
    read_headers,
    scale_shape,
)
from dsv3.model.config import ModelConfig

CHECKSUMS_FILE = "checksums.json"
DEFAULT_SHARD_BYTES = 5 * 2**30
VERIFY_BELOW_BYTES = 2 * 2**30  # smaller checkpoints are hashed by default when loaded: it takes seconds

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_GENERATION_FILE = "generation_config.json"
_OWN_FILES = {"config.json", _GENERATION_FILE, CHECKSUMS_FILE, INDEX_FILE, SINGLE_FILE}

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class _Model(Protocol):
    config: ModelConfig

    def state_dict(self) -> dict[str, Any]: ...


# -- save --------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model's state dict as a Hugging Face checkpoint; the folder appears whole or not at all.

    Args:
        state: `model.state_dict()`: stacked experts, no MTP duplicates; any device. Needs about a shard of memory more.
        dtype: store as float32, bfloat16 or float16; None keeps each tensor's. Router biases are always float32.
        shard_bytes: most bytes a file holds (one larger tensor gets its own file); a single file when all fit.
        extra_files: further files of the folder by name, such as tokenizer.json.
        overwrite: replace the checkpoint that is there, with everything in its folder.

    Raises:
        ValueError: state does not fit config, the folder exists (and overwrite is off, or it is no checkpoint), a dtype
            that is not written.
        OSError: the disk is full (ENOSPC); says bytes needed and free. Nothing is left behind, the old one is intact.
    """
    target = Path(folder).resolve()
    extra_files = dict(extra_files or {})
    _check_extra_files(extra_files)
    shards = _plan_shards(state, config, dtype, shard_bytes)
    _restore_interrupted(target)
    _check_target(target, overwrite)
    temp, old = _siblings(target)
    for leftover in (temp, old):
        shutil.rmtree(leftover, ignore_errors=True)
    needed = sum(map(len, extra_files.values())) + sum(size for shard in shards for _, size in shard)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if needed > shutil.disk_usage(target.parent).free:
            raise OSError(errno.ENOSPC, "too little space")
        temp.mkdir()
        _write_weights(state, shards, temp, dtype)
        for name, content in {**_config_files(state, config, dtype), **extra_files}.items():
            _write_synced(temp / name, content)
        _sync(temp)
        _swap(temp, target, old)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if _is_disk_full(error):
            _raise_disk_full(target, needed)
        raise


def _plan_shards(
    state: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype | None, shard_bytes: int
) -> list[list[tuple[Piece, int]]]:
    """The pieces of each file with their bytes, after checking that state is the model that config describes."""
    expected = dict(memory_shapes(config))
    _check_names("the state dict", set(state), set(expected), "it belongs to another config")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{name} is {list(state[name].shape)}, the config says {list(shape)}: it belongs to another config"
            )
        if _stored_dtype(name, state[name], dtype) not in _DTYPES.values():
            raise ValueError(
                f"{name} would be stored as {dtype or state[name].dtype}: give dtype as one of {list(_DTYPES.values())}"
            )
        if state[name].is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values: load or initialise the model before saving it"
            )
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}: give a positive number of bytes")
    shards: list[list[tuple[Piece, int]]] = []
    used = 0
    for piece in layout(config):
        size = math.prod(piece.shape) * _stored_dtype(piece.memory, state[piece.memory], dtype).itemsize
        if not shards or used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((piece, size))
        used += size
    return shards


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if is_router_bias(name) else dtype or tensor.dtype


def _write_weights(
    state: Mapping[str, Tensor], shards: list[list[tuple[Piece, int]]], temp: Path, dtype: torch.dtype | None
) -> None:
    count, weight_map, checksums = len(shards), dict[str, str](), dict[str, str]()
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {}
        for piece, _ in shard:
            source = state[piece.memory].detach()
            tensor = source[piece.index].to("cpu", _stored_dtype(piece.memory, source, dtype)).contiguous()
            # safetensors refuses two names for one memory; the duplicates are two names by design.
            tensors[piece.disk] = tensor.clone() if piece.duplicate else tensor
            weight_map[piece.disk] = file
        save_file(tensors, temp / file, metadata={"format": "pt"})
        _sync(temp / file)
        checksums[file] = _sha256(temp / file)
    if count > 1:
        total = sum(size for shard in shards for _, size in shard)
        _write_synced(temp / INDEX_FILE, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    _write_synced(temp / CHECKSUMS_FILE, _json(checksums))


def _config_files(state: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype | None) -> dict[str, bytes]:
    name = str(dtype or state["lm_head.weight"].dtype).removeprefix("torch.")
    content = config.to_hf(torch_dtype=name)
    for stale in ("quantization_config", "auto_map"):  # the weights are not FP8, and no code is written beside them
        content.pop(stale, None)
    tokens = {
        key: content[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if content.get(key) is not None
    }
    return {"config.json": _json(content), _GENERATION_FILE: _json(tokens)}


def _check_extra_files(extra_files: Mapping[str, bytes]) -> None:
    for name in extra_files:
        if name in _OWN_FILES or name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(
                f"extra file {name!r} is a path or a name that the checkpoint itself uses: choose a plain other name"
            )


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} exists: choose another folder, or pass overwrite=True to replace it")
    if not (target / "config.json").is_file():
        raise ValueError(
            f"{target} holds no config.json, so it is no checkpoint and is not overwritten: choose another folder"
        )


# -- the folder on disk ------------------------------------------------------------------------------------------------


def _siblings(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.saving"), target.with_name(f".{target.name}.old")


def _restore_interrupted(target: Path) -> None:
    """Undo a swap that a crash cut between its two renames."""
    _, old = _siblings(target)
    if old.exists() and not target.exists():
        os.replace(old, target)


def _swap(temp: Path, target: Path, old: Path) -> None:
    if target.exists() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        os.replace(target, old)
        try:
            os.replace(temp, target)
        except BaseException:
            os.replace(old, target)
            raise
    else:
        os.replace(temp, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and ("os error 28" in str(error) or "No space left" in str(error))


def _raise_disk_full(target: Path, needed: int) -> NoReturn:
    free = shutil.disk_usage(target.parent).free
    raise OSError(
        errno.ENOSPC,
        f"disk full: saving {target} needs {needed} bytes, {free} are free; make room or choose another disk. "
        "Nothing was left behind",
    ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


# -- load --------------------------------------------------------------------------------------------------------------


def read_config(folder: str | Path, *, mtp: bool = True) -> ModelConfig:
    """The config of a checkpoint folder; with mtp False, as of a model without the MTP layers."""
    folder = Path(folder).resolve()
    _restore_interrupted(folder)
    config = ModelConfig.from_hf(folder)
    return config if mtp else dataclasses.replace(config, num_nextn_predict_layers=0)


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mtp: bool = True,
    verify: bool | None = None,
    progress: Progress | None = None,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the whole state dict of a checkpoint. Arguments and errors are those of `read_state`."""
    config = read_config(folder, mtp=mtp)
    options = {"dtype": dtype, "device": device, "mtp": mtp, "verify": verify, "progress": progress}
    return config, dict(read_state(folder, config, **options))


def read_state(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mtp: bool = True,
    verify: bool | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Stream (name in memory, tensor) of a checkpoint, experts stacked, one tensor in memory at a time.

    Args:
        config: of the model to fill; usually `read_config(folder, mtp=mtp)`.
        dtype: of the tensors; None keeps the stored one, bfloat16 for FP8. Router biases are always float32.
        mtp: False leaves the file's MTP layers aside; config must then have none.
        verify: compare every weight file with checksums.json; None does so if that file is there and the weights are
            below 2 GiB. Sizes and headers are always checked.
        progress: called with (bytes done, bytes in all) after each tensor of the files.

    Raises:
        ValueError: damaged or missing files; tensors missing, unexpected or of another shape than config says; FP8
            weights without scale; MTP layers lacking or present against config; duplicates that differ.
    """
    folder = Path(folder).resolve()
    headers, pieces = _plan_load(folder, config, mtp, verify)
    shapes = dict(memory_shapes(config))
    tick = _Ticker(pieces, headers, progress)
    with _Source(folder, headers) as source:
        for name, group in itertools.groupby(_check_duplicates(pieces, source), key=lambda piece: piece.memory):
            parts = list(group)
            kind = torch.float32 if is_router_bias(name) else dtype or _common_dtype(parts, headers)
            if parts[0].index == ():
                # A copy: what safetensors hands out is the file itself, mapped.
                tensor = source.read(parts[0].disk, kind).to(device, copy=True)
                tick(parts[0])
            else:
                tensor = torch.empty(shapes[name], dtype=kind, device=device)
                for part in parts:
                    tensor[part.index] = source.read(part.disk, kind).to(device)
                    tick(part)
            yield name, tensor


def load_into(
    model: _Model, folder: str | Path, *, mtp: bool = True, verify: bool | None = None, progress: Progress | None = None
) -> None:
    """Fill a model, in its own dtypes and on its device, from a checkpoint; one tensor of the file is held beside it.

    The shapes must agree, not the whole configs: a model with another context extension may take the weights. Other
    arguments are those of `read_state`.

    Raises:
        ValueError: as `read_state`, and if the model is on the meta device. What was filled by then stays filled.
    """
    folder = Path(folder).resolve()
    _restore_interrupted(folder)
    headers, pieces = _plan_load(folder, model.config, mtp, verify)
    state = model.state_dict()
    _check_names("the model", set(state), {piece.memory for piece in pieces}, "it was changed after it was built")
    tick = _Ticker(pieces, headers, progress)
    with _Source(folder, headers) as source, torch.no_grad():
        for piece in _check_duplicates(pieces, source):
            target = state[piece.memory]
            if target.is_meta:
                raise ValueError(
                    f"{piece.memory} is on the meta device: call model.to_empty(device=...) before loading"
                )
            target[piece.index].copy_(source.read(piece.disk, target.dtype))
            tick(piece)


def dequantize(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (R, C) float8_e4m3fn, scale_inv (ceil R/128, ceil C/128) float32 -> (R, C), rounded once."""
    rows, columns = weight.shape
    grid = scale_inv.repeat_interleave(BLOCK, dim=0)[:rows].repeat_interleave(BLOCK, dim=1)[:, :columns]
    return weight.float().mul_(grid).to(dtype)


class _Source:
    """The open files of a checkpoint; tensors by name, dequantised."""

    def __init__(self, folder: Path, headers: Mapping[str, Stored]) -> None:
        self._folder, self._headers = folder, headers
        self._files: dict[str, Any] = {}

    def raw(self, name: str) -> Tensor:
        file = self._headers[name].file
        try:
            if file not in self._files:
                self._files[file] = safe_open(self._folder / file, framework="pt").__enter__()
            return self._files[file].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._folder / file}: {name} cannot be read ({error}): fetch that file again") from None

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        if self._headers[name].dtype == "F8_E4M3":
            return dequantize(self.raw(name), self.raw(name + "_scale_inv"), dtype)
        return self.raw(name).to(dtype)

    def __enter__(self) -> _Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, trace)


class _Ticker:
    """Adds up the bytes of the file that are done, for the caller's progress bar."""

    def __init__(self, pieces: Iterable[Piece], headers: Mapping[str, Stored], progress: Progress | None) -> None:
        self._headers, self._progress, self._done = headers, progress, 0
        self._total = sum(self._bytes(piece) for piece in pieces if not piece.duplicate)

    def _bytes(self, piece: Piece) -> int:
        return math.prod(piece.shape) * ITEM_BYTES[self._headers[piece.disk].dtype]

    def __call__(self, piece: Piece) -> None:
        self._done += self._bytes(piece)
        if self._progress is not None:
            self._progress(self._done, self._total)


def _plan_load(
    folder: Path, config: ModelConfig, mtp: bool, verify: bool | None
) -> tuple[dict[str, Stored], list[Piece]]:
    """Headers and the pieces to read, once all that can be known without the data is known to be right."""
    if not mtp and config.num_nextn_predict_layers:
        raise ValueError(
            f"mtp=False, but the config has num_nextn_predict_layers={config.num_nextn_predict_layers}: "
            "build the model from read_config(folder, mtp=False)"
        )
    headers = read_headers(folder) if folder.is_dir() else {}
    if not headers:
        raise ValueError(f"{folder} holds no safetensors weights: give a checkpoint folder")
    _verify_checksums(folder, headers, verify)
    if not mtp:
        headers = {name: stored for name, stored in headers.items() if (layer_of(name) or 0) < config.num_hidden_layers}
    _check_mtp(folder, headers, config)
    pieces = list(layout(config))
    weights = {piece.disk for piece in pieces}
    scaled = {name + "_scale_inv": name for name in weights if name in headers and headers[name].dtype == "F8_E4M3"}
    _check_names(
        str(folder), set(headers), weights | set(scaled), "the files do not fit config.json, or an FP8 scale is lost"
    )
    for piece in pieces:
        stored = headers[piece.disk]
        _check_shape(folder, piece.disk, stored, piece.shape)
        if stored.dtype != "F8_E4M3" and stored.dtype not in _DTYPES:
            raise ValueError(
                f"{folder / stored.file}: {piece.disk} has dtype {stored.dtype}: known are {[*_DTYPES, 'F8_E4M3']}"
            )
    for scale, weight in scaled.items():
        _check_shape(folder, scale, headers[scale], scale_shape(headers[weight].shape))
        if headers[scale].dtype != "F32":
            raise ValueError(
                f"{folder / headers[scale].file}: {scale} has dtype {headers[scale].dtype}, not F32: another recipe"
            )
    block = (config.extra.get("quantization_config") or {}).get("weight_block_size", [BLOCK, BLOCK])
    if scaled and block != [BLOCK, BLOCK]:
        raise ValueError(
            f"weight_block_size is {block}, dsv3 reads [{BLOCK}, {BLOCK}]: convert the checkpoint to bfloat16 first"
        )
    return headers, pieces


def _check_mtp(folder: Path, headers: Mapping[str, Stored], config: ModelConfig) -> None:
    main, said = config.num_hidden_layers, config.num_nextn_predict_layers
    found = len({layer for layer in map(layer_of, headers) if layer is not None and layer >= main})
    if said and not found:
        raise ValueError(
            f"{folder} lacks MTP layers: config.json says num_nextn_predict_layers={said}, no tensor of "
            f"model.layers.{main} is there (transformers drops them); pass mtp=False to load the main model alone"
        )
    if found > said:
        raise ValueError(
            f"{folder} holds {found} layers behind the {main} main ones, config.json says "
            f"num_nextn_predict_layers={said}: set it to {found} to use them, or pass mtp=False to leave them aside"
        )


def _check_duplicates(pieces: Iterable[Piece], source: _Source) -> Iterator[Piece]:
    """Pass on the weights proper; an MTP layer's own embedding and head must equal the main model's bit for bit."""
    for piece in pieces:
        if not piece.duplicate:
            yield piece
            continue
        copy, main = source.raw(piece.disk), source.raw(piece.memory)
        if copy.dtype != main.dtype or not torch.equal(copy.view(torch.uint8), main.view(torch.uint8)):
            raise ValueError(
                f"{piece.disk} differs from {piece.memory}, of which it must be a copy: MTP layers share embedding and "
                "head; pass mtp=False to leave the MTP layers aside"
            )


def _check_names(where: str, found: set[str], expected: set[str], cause: str) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    said = [
        f"{kind} {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("lacks", missing), ("has unexpected", unexpected))
        if names
    ]
    if said:
        raise ValueError(f"{where} {' and '.join(said)} of {len(expected)} tensors: {cause}")


def _check_shape(folder: Path, name: str, stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ValueError(
            f"{folder / stored.file}: {name} is {list(stored.shape)}, config.json makes it {list(shape)}: "
            "they belong to different models"
        )


def _verify_checksums(folder: Path, headers: Mapping[str, Stored], verify: bool | None) -> None:
    path, files = folder / CHECKSUMS_FILE, sorted({stored.file for stored in headers.values()})
    if verify is None:
        verify = path.exists() and sum((folder / file).stat().st_size for file in files) < VERIFY_BELOW_BYTES
    if not verify:
        return
    if not path.exists():
        raise ValueError(f"{folder} has no {CHECKSUMS_FILE} to verify against: pass verify=False")
    try:
        expected = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to load without verifying") from None
    for file in files:
        if (actual := _sha256(folder / file)) != expected.get(file):
            raise ValueError(
                f"{folder / file} has sha256 {actual}, {CHECKSUMS_FILE} says {expected.get(file)}: it is damaged, "
                f"copy it again; or if another program rewrote it on purpose, delete {CHECKSUMS_FILE}"
            )


def _common_dtype(parts: Iterable[Piece], headers: Mapping[str, Stored]) -> torch.dtype:
    kinds = [_DTYPES.get(headers[part.disk].dtype, torch.bfloat16) for part in parts]
    result = kinds[0]
    for kind in kinds[1:]:
        result = torch.promote_types(result, kind)
    return result
