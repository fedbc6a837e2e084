"""Checkpoints in and out: a folder of safetensors in the published Hugging Face layout.

    save    state dict -> split experts, MTP layers with copies of embedding and head -> shards -> renamed into place
    load    headers checked -> each tensor read, dequantised if FP8, put where `census.layout` says

A dsv3 checkpoint is config.json, generation_config.json, model.safetensors or shards with their index, and
checksums.json (the sha256 of every weight file). Loading also takes the official FP8 files and what transformers 5
saves. It is strict: every tensor of the files is used, every tensor of the model is filled. FP8 weights become

    w[i, j] = bfloat16( float32(w_fp8[i, j]) · scale_inv[i // 128, j // 128] )

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
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
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
from dsv3.model.transformer import DeepseekV3

CHECKSUMS_FILE = "checksums.json"
DEFAULT_SHARD_BYTES = 5 * 2**30

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_GENERATION_FILE = "generation_config.json"

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class _Savable(Protocol):
    def save(self, folder: Path) -> object: ...


# -- save --------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    tokenizer: _Savable | None = None,
) -> None:
    """Write a model's state dict as a Hugging Face checkpoint; the folder appears whole or not at all.

    Args:
        state: `model.state_dict()`: stacked experts, no MTP duplicates; any device. Needs about a shard of memory more.
        dtype: store as float32, bfloat16 or float16; None keeps each tensor's. Router biases are always float32.
        shard_bytes: most bytes a file holds (one larger tensor gets its own file); a single file when all fit.
        overwrite: replace the checkpoint that is there, with everything in its folder. An empty folder needs no leave.
        tokenizer: anything with `.save(folder)`; its files are part of what appears at once.

    Raises:
        ValueError: state does not fit config, the folder exists (and overwrite is off, or it is no checkpoint), a dtype
            that is not written.
        OSError: the disk is full (ENOSPC); says bytes needed and free. Nothing is left behind, the old one is intact.
    """
    target = Path(folder).resolve()
    shards = _plan_shards(state, config, dtype, shard_bytes)
    _restore_interrupted(target)
    _check_target(target, overwrite)
    temp, old = _siblings(target)
    for leftover in (temp, old):
        shutil.rmtree(leftover, ignore_errors=True)
    needed = sum(size for shard in shards for _, size in shard)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if needed > shutil.disk_usage(target.parent).free:
            raise OSError(errno.ENOSPC, "too little space")
        temp.mkdir()
        _write_weights(state, shards, temp, dtype)
        for name, content in _config_files(state, config, dtype).items():
            _write_synced(temp / name, content)
        if tokenizer is not None:
            tokenizer.save(temp)
            for path in temp.iterdir():
                _sync(path)
        _sync(temp)
        _swap(temp, target, old)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if _is_disk_full(error):
            _raise_disk_full(target, needed)
        raise


def save_model(
    model: DeepseekV3, folder: str | Path, tokenizer: _Savable | None = None, overwrite: bool = False
) -> None:
    """`save_checkpoint` of a model in its own dtypes, with its tokenizer's files; same errors."""
    save_checkpoint(model.state_dict(), model.config, folder, tokenizer=tokenizer, overwrite=overwrite)


def _plan_shards(
    state: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype | None, shard_bytes: int
) -> list[list[tuple[Piece, int]]]:
    """The pieces of each file with their bytes, after checking that state is the model that config describes."""
    _check_state("the state dict", state, config)
    for name, tensor in state.items():
        if _stored_dtype(name, tensor, dtype) not in _DTYPES.values():
            raise ValueError(
                f"{name} would be stored as {dtype or tensor.dtype}: give dtype as one of {list(_DTYPES.values())}"
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
    # What is written in Rust (safetensors, tokenizers) raises its own exceptions, with the number in the text.
    return isinstance(error, Exception) and f"os error {errno.ENOSPC}" in str(error)


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


def config_of(folder: str | Path, mtp: bool = True) -> ModelConfig:
    """The config of a checkpoint folder; with mtp False, as of the model without its MTP layers.

    Raises:
        ValueError: no config.json there, or one outside the architecture.
    """
    folder = Path(folder).resolve()
    _restore_interrupted(folder)
    config = ModelConfig.from_hf(folder)
    return config if mtp else dataclasses.replace(config, num_nextn_predict_layers=0)


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    mtp: bool = True,
    verify: bool = True,
    progress: Progress | None = None,
) -> DeepseekV3:
    """Any DeepseekV3 checkpoint as a model, FP8 or not, in evaluation mode; no second copy of the weights is ever held.

    Args:
        dtype: of the parameters: float32, bfloat16 or float16, or its name. Router biases are float32 regardless.
        mtp: False builds and loads the main model alone.
        verify, progress: as of `load_into`.

    Raises:
        ValueError: dtype is none of these, or what `load_into` finds.
    """
    kinds = {str(kind).removeprefix("torch."): kind for kind in _DTYPES.values()}
    kind = kinds.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise ValueError(f"dtype is {dtype}: give one of {', '.join(kinds)}")
    config = config_of(folder, mtp=mtp)
    with torch.device("meta"):
        model = DeepseekV3(config).to(kind)
    model = model.to_empty(device=device)
    load_into(model.state_dict(), config, folder, verify=verify, progress=progress)
    return model.eval()


def load_into(
    model_state: Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> None:
    """Fill the tensors of a state dict in place, each in its own dtype and on its device; one tensor of a file is held.

    Strict both ways: every tensor of the files is used, every tensor of model_state is filled. One exception: where
    config.json declares MTP layers and config has none (`config_of(folder, mtp=False)`), the files' are left aside.
    Nothing is written before headers, names, shapes and checksums are right.

    Args:
        model_state: `model.state_dict()`: stacked experts, no MTP duplicates.
        config: of that model. Shapes must agree, not all fields: another context extension may take the weights.
        verify: compare the weight files that checksums.json lists, if there is one, with their sha256.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        ValueError: damaged or missing files; tensors missing, unexpected or of another shape than config says; FP8
            weights without scale; MTP layers lacking or undeclared; MTP duplicates that differ from the original; a
            model_state on the meta device or of another config.
    """
    folder = Path(folder).resolve()
    _restore_interrupted(folder)
    _check_state("the model's state", model_state, config)
    headers, pieces = _plan_load(folder, config, verify)
    sizes = {piece.disk: math.prod(piece.shape) * ITEM_BYTES[headers[piece.disk].dtype] for piece in pieces}
    done, total = 0, sum(sizes.values())
    with _Source(folder, headers) as source, torch.no_grad():
        for piece in pieces:
            target = model_state[piece.memory]
            if piece.duplicate:
                _check_duplicate(piece, source)
            else:
                target[piece.index].copy_(source.read(piece.disk, target.dtype))
            done += sizes[piece.disk]
            if progress is not None:
                progress(done, total)


def dequantize(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """weight (R, C) float8_e4m3fn, scale_inv (ceil R/128, ceil C/128) float32 -> (R, C) bfloat16, ragged blocks too."""
    rows, columns = weight.shape
    grid = scale_inv.repeat_interleave(BLOCK, dim=0)[:rows].repeat_interleave(BLOCK, dim=1)[:, :columns]
    return weight.float().mul_(grid).bfloat16()


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
            return dequantize(self.raw(name), self.raw(name + "_scale_inv")).to(dtype)
        return self.raw(name).to(dtype)

    def __enter__(self) -> _Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, trace)


def _plan_load(folder: Path, config: ModelConfig, verify: bool) -> tuple[dict[str, Stored], list[Piece]]:
    """Headers and the pieces to read, once all that can be known without the data is known to be right."""
    headers = read_headers(folder) if folder.is_dir() else {}
    if not headers:
        raise ValueError(f"{folder} holds no safetensors weights: give a checkpoint folder")
    if verify:
        _verify_checksums(folder, headers)
    if not config.num_nextn_predict_layers and ModelConfig.from_hf(folder).num_nextn_predict_layers:
        headers = {name: stored for name, stored in headers.items() if (layer_of(name) or 0) < config.num_hidden_layers}
    _check_mtp(folder, headers, config)
    _check_scales(folder, headers, config)
    pieces = list(layout(config))
    weights = {piece.disk for piece in pieces}
    scaled = {name + "_scale_inv": name for name in weights if name in headers and headers[name].dtype == "F8_E4M3"}
    _check_names(
        str(folder),
        set(headers),
        weights | set(scaled),
        "the files belong to another config; fetch both from one place",
    )
    for piece in pieces:
        stored = headers[piece.disk]
        _check_shape(folder, piece.disk, stored, piece.shape)
        if stored.dtype != "F8_E4M3" and stored.dtype not in _DTYPES:
            raise ValueError(
                f"{folder / stored.file}: {piece.disk} has dtype {stored.dtype}: known are {[*_DTYPES, 'F8_E4M3']}"
            )
    return headers, pieces


def _check_scales(folder: Path, headers: Mapping[str, Stored], config: ModelConfig) -> None:
    fp8 = [name for name, stored in headers.items() if stored.dtype == "F8_E4M3"]
    block = (config.extra.get("quantization_config") or {}).get("weight_block_size", [BLOCK, BLOCK])
    if fp8 and block != [BLOCK, BLOCK]:
        raise ValueError(
            f"weight_block_size is {block}, dsv3 reads [{BLOCK}, {BLOCK}]: convert the checkpoint to bfloat16 first"
        )
    for name in fp8:
        scale = headers.get(name + "_scale_inv")
        if scale is None:
            raise ValueError(
                f"{folder / headers[name].file}: {name} is F8_E4M3 but {name}_scale_inv is in no file: "
                "without its scale it means nothing; fetch the checkpoint again"
            )
        _check_shape(folder, name + "_scale_inv", scale, scale_shape(headers[name].shape))
        if scale.dtype != "F32":
            raise ValueError(
                f"{folder / scale.file}: {name}_scale_inv has dtype {scale.dtype}, not F32: another FP8 recipe; "
                "convert the checkpoint to bfloat16 first"
            )


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
            f"num_nextn_predict_layers={said}: set it to {found} there, "
            "then mtp=True uses them and mtp=False leaves them aside"
        )


def _check_duplicate(piece: Piece, source: _Source) -> None:
    """An MTP layer's own embedding and head must equal the main model's bit for bit, or it was trained to differ."""
    copy, main = source.raw(piece.disk), source.raw(piece.memory)
    if copy.dtype != main.dtype or not torch.equal(copy.view(torch.uint8), main.view(torch.uint8)):
        raise ValueError(
            f"{piece.disk} differs from {piece.memory}, of which it must be a copy: MTP layers share embedding "
            "and head; pass mtp=False to leave the MTP layers aside"
        )


def _check_state(where: str, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """State is that of the model which config describes, and holds values."""
    expected = dict(memory_shapes(config))
    _check_names(where, set(state), set(expected), "it belongs to another config")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{where}: {name} is {list(state[name].shape)}, the config says {list(shape)}: "
                "it belongs to another config"
            )
        if state[name].is_meta:
            raise ValueError(
                f"{where}: {name} is on the meta device and has no values: call to_empty(device=...) first"
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


def _verify_checksums(folder: Path, headers: Mapping[str, Stored]) -> None:
    path, files = folder / CHECKSUMS_FILE, sorted({stored.file for stored in headers.values()})
    if not path.exists():
        return
    try:
        expected = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to load without verifying") from None
    for file in files:
        if file in expected and (actual := _sha256(folder / file)) != expected[file]:
            raise ValueError(
                f"{folder / file} has sha256 {actual}, {CHECKSUMS_FILE} says {expected[file]}: it is damaged, copy it "
                f"again (if another program rewrote it on purpose, delete {CHECKSUMS_FILE})"
            )
