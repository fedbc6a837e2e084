"""Checkpoints in and out: a folder of safetensors in the published Hugging Face layout.

    save    state dict -> split experts, MTP layers with copies of embedding and head -> shards -> renamed into place
    load    headers checked -> each piece read, by several threads, into its place in the model

A dsv3 checkpoint is config.json, generation_config.json, model.safetensors or shards with their index, and checksums.json (the
sha256 of every file and of every tensor). Loading also takes the official FP8 files and what transformers 5 saves, its fused
experts included. It is strict: every tensor of the files is used, every tensor of the model is filled. FP8 weights become

    w[i, j] = bfloat16( float32(w_fp8[i, j]) · scale_inv[i // 128, j // 128] )

or stay as they are in a model kept in FP8 (`load_model(dtype="fp8")`, see model/stored.py), and are then saved bit for bit.

Source: spec 2 (published index; README_WEIGHTS.md of the release).
Does not: hold optimizer state, or run a second program's code (`auto_map` of a config is not written on).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dsv3.kernels.quant import Fp8, cast_blocks
from dsv3.model import folder as disk
from dsv3.model.census import (
    BLOCK,
    SCALE,
    Piece,
    is_fp8_weight,
    layer_of,
    layout,
    memory_shapes,
    scale_of,
    scale_shape,
)
from dsv3.model.config import ModelConfig
from dsv3.model.headers import ITEM_BYTES, Stored, read_headers
from dsv3.model.shards import (
    CHECKSUMS_FILE,
    CODES,
    DEFAULT_SHARD_BYTES,
    FLOATS,
    Form,
    Progress,
    Value,
    config_fields,
    cut,
    file_names,
    units,
    write_index,
    write_shard,
)
from dsv3.model.source import DTYPES, Source, as_float, in_parallel, place, stored_bytes
from dsv3.model.stored import keep_fp8
from dsv3.model.transformer import DeepseekV3

_GENERATION_FILE = "generation_config.json"
_MOST_TOLD = 10  # of the tensors that do not fit


class _Savable(Protocol):
    def save(self, folder: Path) -> object: ...


# -- save --------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    tokenizer: _Savable | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model's state dict as a Hugging Face checkpoint; the folder appears whole or not at all.

    Args:
        state: `model.state_dict()`: stacked experts, no MTP duplicates; any device. Needs about a shard of memory more.
        dtype: store as float32, bfloat16, float16, or "fp8" (Linears as e4m3 in 128x128 blocks, as published); None keeps
            each tensor's, FP8 codes and scales bit for bit. Router biases are always float32.
        shard_bytes: most bytes a file holds (one larger tensor gets its own file); a single file when all fit.
        overwrite: replace the checkpoint that is there, with everything in its folder. An empty folder needs no leave.
        tokenizer: anything with `.save(folder)`; its files are part of what appears at once.
        progress: called with (bytes done, bytes in all) after each file.

    Raises:
        ValueError: state does not fit config, the folder exists (and overwrite is off, or it is no checkpoint), a dtype
            that is not written.
        OSError: the disk is full (ENOSPC); says bytes needed and free. Nothing is left behind, the old one is intact.
    """
    _check_state("the state dict", state, config)
    write_checkpoint(
        config, folder, held=partial(_held, state), value=partial(_from_state, state), dtype=dtype, shard_bytes=shard_bytes,
        overwrite=overwrite, tokenizer=tokenizer, progress=progress,
    )  # fmt: skip


def write_checkpoint(
    config: ModelConfig,
    folder: str | Path,
    *,
    held: Callable[[Piece], torch.dtype],
    value: Callable[[Piece], Value],
    dtype: torch.dtype | str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    tokenizer: _Savable | None = None,
    progress: Progress | None = None,
) -> None:
    """`save_checkpoint` of pieces wherever they are: `held` tells a piece's dtype, `value` gets it, in the published order."""
    target = Path(folder).resolve()
    form = Form(None if dtype is None else dtype_named(dtype))
    shards = cut(units(config, form, held), shard_bytes)
    disk.restore_interrupted(target)
    disk.check_target(target, overwrite)
    temp, _ = disk.siblings(target)
    shutil.rmtree(temp, ignore_errors=True)
    needed, done = sum(unit.size for shard in shards for unit in shard), 0
    files, tensors = dict[str, str](), dict[str, str]()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        disk.check_space(target, needed)
        temp.mkdir()
        for name, shard in zip(file_names(len(shards)), shards):
            files[name], digests = write_shard(temp / name, shard, value)
            tensors |= digests
            done += sum(unit.size for unit in shard)
            if progress is not None:
                progress(done, needed)
        write_index(temp, shards, files, tensors)
        write_config(temp, config, max((unit.dtype for shard in shards for unit in shard), key=rank_of))
        if tokenizer is not None:
            tokenizer.save(temp)
            for path in temp.iterdir():
                disk.sync(path)
        disk.sync(temp)
        disk.swap(temp, target)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if disk.is_disk_full(error):
            disk.raise_disk_full(target, needed)
        raise


def save_model(
    model: DeepseekV3, folder: str | Path, tokenizer: _Savable | None = None, overwrite: bool = False
) -> None:
    """`save_checkpoint` of a model in its own dtypes, with its tokenizer's files; same errors."""
    save_checkpoint(model.state_dict(), model.config, folder, tokenizer=tokenizer, overwrite=overwrite)


def dtype_named(dtype: torch.dtype | str) -> torch.dtype:
    """float32, bfloat16, float16, or "fp8" for float8_e4m3fn.

    Raises:
        ValueError: it is none of these.
    """
    name = str(dtype).removeprefix("torch.")
    known = {**FLOATS, "fp8": CODES, "float8_e4m3fn": CODES}
    if name not in known:
        raise ValueError(f"dtype is {dtype}: give one of {', '.join([*FLOATS, 'fp8'])}")
    return known[name]


def write_config(folder: Path, config: ModelConfig, written: torch.dtype) -> None:
    """config.json and generation_config.json of files whose matrices are `written`."""
    content = config_fields(config, written)
    tokens = {
        key: content[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if content.get(key) is not None
    }
    for name, fields in (("config.json", content), (_GENERATION_FILE, tokens)):
        disk.write_synced(folder / name, disk.as_json(fields))


def rank_of(dtype: torch.dtype) -> int:
    """The dtype that names a whole checkpoint: FP8 if anything is; router biases, float32 always, count last."""
    return [torch.float32, torch.float16, torch.bfloat16, CODES].index(dtype)


def _held(state: Mapping[str, Tensor], piece: Piece) -> torch.dtype:
    dtype = state[piece.memory].dtype
    if dtype != CODES and dtype not in FLOATS.values():
        raise ValueError(f"{piece.memory} would be stored as {dtype}: give dtype as one of {[*FLOATS, 'fp8']}")
    return dtype


def _from_state(state: Mapping[str, Tensor], piece: Piece) -> Value:
    values = state[piece.memory].detach()[piece.index].cpu()
    if values.dtype != CODES:
        return values
    scale = scale_of(piece)
    return Fp8(values, state[scale.memory].detach()[scale.index].cpu())


# -- load --------------------------------------------------------------------------------------------------------------


def config_of(folder: str | Path, mtp: bool = True) -> ModelConfig:
    """The config of a checkpoint folder; with mtp False, as of the model without its MTP layers.

    Raises:
        ValueError: no config.json there, or one outside the architecture.
    """
    folder = Path(folder).resolve()
    disk.restore_interrupted(folder)
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
        dtype: of the parameters: float32, bfloat16 or float16, or its name; or "fp8": Linears and experts stay (or are cast
            to) e4m3 codes with their scales, a byte a weight, and are multiplied so. Router biases are float32 regardless.
        mtp: False builds and loads the main model alone.
        verify, progress: as of `load_into`.

    Raises:
        ValueError: dtype is none of these, or what `load_into` finds.
    """
    kind = dtype_named(dtype)
    config = config_of(folder, mtp=mtp)
    with torch.device("meta"):
        model = DeepseekV3(config).to(torch.bfloat16 if kind == CODES else kind)
        if kind == CODES:
            keep_fp8(model)
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
    """Fill the tensors of a state dict in place, each in its own dtype and on its device, by several threads.

    Strict both ways: every tensor of the files is used, every tensor of model_state is filled. One exception: where
    config.json declares MTP layers and config has none (`config_of(folder, mtp=False)`), the files' are left aside.
    Nothing is written before headers, names, shapes, checksums and duplicates are right.

    Args:
        model_state: `model.state_dict()`: stacked experts, no MTP duplicates; FP8 codes with their scales where the model
            is kept in FP8.
        config: of that model. Shapes must agree, not all fields: another context extension may take the weights.
        verify: compare the weight files that checksums.json lists, if there is one, with their sha256.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        ValueError: damaged or missing files; tensors missing, unexpected or of another shape than config says (the first ten
            are named, with both shapes); FP8 weights without scale; MTP layers lacking or undeclared; MTP duplicates that
            differ from the original; a model_state on the meta device or of another config.
    """
    folder = Path(folder).resolve()
    disk.restore_interrupted(folder)
    _check_state("the model's state", model_state, config)
    headers, pieces = plan_load(folder, config, verify)
    total = sum(map(stored_bytes, headers.values()))
    with Source(folder, headers) as source:
        checks = [partial(_check_duplicate, piece, source) for piece in pieces if piece.duplicate]
        done = in_parallel(checks, progress, total)
        fills = [partial(_fill, source, piece, model_state) for piece in pieces if not piece.duplicate]
        in_parallel(fills, progress, total, done)


def read_tensors(
    folder: str | Path, config: ModelConfig, *, verify: bool = True, progress: Progress | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model in float32, by the names and in the order of its state dict, one in memory at a time.

    Args, Raises: as of `load_into`; before the first tensor.
    """
    folder = Path(folder).resolve()
    headers, pieces = plan_load(folder, config, verify)
    parts: dict[str, list[Piece]] = {}
    for piece in pieces:
        if not piece.duplicate:
            parts.setdefault(piece.memory, []).append(piece)
    with torch.device("meta"):
        order = DeepseekV3(config).state_dict()
    total = sum(map(stored_bytes, headers.values()))
    with Source(folder, headers) as source:
        checks = [partial(_check_duplicate, piece, source) for piece in pieces if piece.duplicate]
        done = in_parallel(checks, progress, total)
        for name, like in order.items():
            tensor = torch.empty(like.shape, dtype=torch.float32)
            fills = [partial(_fill, source, piece, {name: tensor}) for piece in parts[name]]
            done = in_parallel(fills, progress, total, done)
            yield name, tensor


@torch.no_grad()
def _fill(source: Source, piece: Piece, state: Mapping[str, Tensor]) -> int:
    """One piece into its place -> its bytes on disk."""
    target = state[piece.memory][piece.index]
    if target.dtype == CODES:
        value, scale = source.read(piece), scale_of(piece)
        codes, scales = value if isinstance(value, Fp8) else cast_blocks(value.to(torch.float32))
        target.copy_(codes)
        state[scale.memory][scale.index].copy_(scales)
    elif not source.read_into(piece, target):
        target.copy_(as_float(source.read(piece), target.dtype))
    return piece_bytes(source.headers, piece)


def verify_checkpoint(folder: str | Path, progress: Progress | None = None) -> int:
    """Compare every tensor with its sha256 in checksums.json -> how many there are.

    Raises:
        ValueError: one differs or is not listed (all are named, up to ten), or there is no checksums.json with tensors.
    """
    folder = Path(folder).resolve()
    headers, expected = read_headers(folder), _checksums(folder).get("tensors", {})
    if not expected:
        raise ValueError(f"{folder} has no checksums of its tensors: only what dsv3 wrote can be verified")
    wrong: list[str] = []

    def check(name: str) -> int:
        if source.digest(name) != expected.get(name):
            wrong.append(f"{name} in {headers[name].file}")
        return stored_bytes(headers[name])

    with Source(folder, headers) as source:
        jobs = [partial(check, name) for name in headers]
        in_parallel(jobs, progress, sum(map(stored_bytes, headers.values())))
    if wrong:
        raise ValueError(
            f"{folder}: {_first(sorted(wrong))} of {len(headers)} tensors are damaged: copy those files again"
        )
    return len(headers)


def plan_load(folder: Path, config: ModelConfig, verify: bool) -> tuple[dict[str, Stored], list[Piece]]:
    """Headers and the pieces to read, once all that can be known without the data is known to be right."""
    headers = read_headers(folder) if folder.is_dir() else {}
    if not headers:
        cure = "give a checkpoint folder"
        if (folder / "training").is_dir():  # of several processes; see train/checkpoint.py
            cure = f"several processes trained it and left it in shards, make it whole: dsv3 convert {folder} whole/"
        raise ValueError(f"{folder} holds no safetensors weights: {cure}")
    if verify:
        _verify_files(folder, headers)
    if not config.num_nextn_predict_layers and ModelConfig.from_hf(folder).num_nextn_predict_layers:
        headers = {name: stored for name, stored in headers.items() if (layer_of(name) or 0) < config.num_hidden_layers}
    _check_mtp(folder, headers, config)
    _check_scales(folder, headers, config)
    pieces = list(layout(config))
    _check_fit(folder, headers, pieces, config)
    return headers, pieces


def _check_fit(folder: Path, headers: Mapping[str, Stored], pieces: list[Piece], config: ModelConfig) -> None:
    """One error for all tensors that are missing, unexpected, misshaped or of a dtype not known."""
    memory = dict(memory_shapes(config))
    wanted: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        name, index = place(headers, piece)
        wanted[name] = memory[name] if index else piece.shape
    scales = {name + SCALE for name in wanted if name in headers and headers[name].dtype == "F8_E4M3"}
    wrong = [f"{name} {list(shape)} is missing" for name, shape in wanted.items() if name not in headers]
    wrong += [
        f"{name} {list(headers[name].shape)} is unexpected"
        for name in sorted(set(headers) - set(wanted) - scales)
    ]  # fmt: skip
    for name, shape in wanted.items():
        stored = headers.get(name)
        if stored and stored.shape != shape:
            wrong.append(f"{name} is {list(stored.shape)} in {stored.file}, config.json makes it {list(shape)}")
        elif stored and stored.dtype not in DTYPES:
            wrong.append(f"{name} in {stored.file} has dtype {stored.dtype}: known are {[*DTYPES]}")
    if wrong:
        raise ValueError(
            f"{folder} does not fit its config.json of {len(wanted)} weights: {_first(wrong)}; fetch weights and config from "
            "one place"
        )


def _first(said: list[str]) -> str:
    more = f"; and {len(said) - _MOST_TOLD} more" if len(said) > _MOST_TOLD else ""
    return "; ".join(said[:_MOST_TOLD]) + more


def piece_bytes(headers: Mapping[str, Stored], piece: Piece) -> int:
    """Of the files, scales included."""
    stored = headers[place(headers, piece)[0]]
    scales = 4 * math.prod(scale_of(piece).shape) if stored.dtype == "F8_E4M3" else 0
    return math.prod(piece.shape) * ITEM_BYTES[stored.dtype] + scales


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
        _check_scale_shape(folder, name, headers[name], scale)
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


def _check_duplicate(piece: Piece, source: Source) -> int:
    """An MTP layer's own embedding and head must equal the main model's bit for bit, or it was trained to differ."""
    if source.digest(piece.disk) != source.digest(piece.memory):
        raise ValueError(
            f"{piece.disk} differs from {piece.memory}, of which it must be a copy: MTP layers share embedding "
            "and head; pass mtp=False to leave the MTP layers aside"
        )
    return piece_bytes(source.headers, piece)


def _check_scale_shape(folder: Path, name: str, stored: Stored, scale: Stored) -> None:
    wanted = (*stored.shape[:-2], *scale_shape(stored.shape[-2:]))
    if len(wanted) == 3 and stored.shape[1] % (2 * BLOCK):  # gate's blocks, then up's
        wanted = (
            wanted[0],
            2 * -(-stored.shape[1] // 2 // BLOCK) if name.endswith("gate_up_proj") else wanted[1],
            wanted[2],
        )
    if scale.shape != wanted:
        raise ValueError(
            f"{folder / scale.file}: {name}{SCALE} is {list(scale.shape)}, its weight makes it {list(wanted)}: "
            "they belong to different models"
        )


def _check_state(where: str, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """State is that of the model which config describes, and holds values."""
    wanted = dict(memory_shapes(config))
    for piece in layout(config):
        if is_fp8_weight(piece.disk) and piece.memory in state and state[piece.memory].dtype == CODES:
            scale = scale_of(piece)
            wanted[scale.memory] = stacked_scale_shape(piece, config)
    wrong = [f"{name} {list(shape)} is missing" for name, shape in wanted.items() if name not in state]
    wrong += [f"{name} {list(state[name].shape)} is unexpected" for name in sorted(set(state) - set(wanted))]
    wrong += [
        f"{name} is {list(state[name].shape)}, the config says {list(shape)}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        raise ValueError(f"{where} belongs to another config: {_first(wrong)}")
    for name in wanted:
        if state[name].is_meta:
            raise ValueError(
                f"{where}: {name} is on the meta device and has no values: call to_empty(device=...) first"
            )


def stacked_scale_shape(piece: Piece, config: ModelConfig) -> tuple[int, ...]:
    """Shape in memory of the scales that hold this piece's."""
    scale = scale_of(piece)
    if not piece.index:
        return scale.shape
    halves = 2 if len(piece.index) == 2 else 1
    return (config.n_routed_experts, halves * scale.shape[0], scale.shape[1])


def _checksums(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / CHECKSUMS_FILE
    if not path.exists():
        return {}
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        return found if "files" in found else {"files": found}  # of files alone, as dsv3 0.1 first wrote it
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to load without verifying") from None


def _verify_files(folder: Path, headers: Mapping[str, Stored]) -> None:
    expected = _checksums(folder).get("files", {})
    for file in sorted({stored.file for stored in headers.values()}):
        if file in expected and (actual := disk.sha256(folder / file)) != expected[file]:
            raise ValueError(
                f"{folder / file} has sha256 {actual}, {CHECKSUMS_FILE} says {expected[file]}: it is damaged, copy it "
                f"again (if another program rewrote it on purpose, delete {CHECKSUMS_FILE})"
            )
