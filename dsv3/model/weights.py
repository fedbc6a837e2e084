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
    Piece,
    scale_of,
)
from dsv3.model.config import ModelConfig
from dsv3.model.fit import check_duplicate, check_state, first_of, piece_bytes, plan_load, read_checksums
from dsv3.model.headers import read_headers
from dsv3.model.shards import (
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
from dsv3.model.source import Source, as_float, in_parallel, stored_bytes
from dsv3.model.stored import keep_fp8
from dsv3.model.transformer import DeepseekV3

_GENERATION_FILE = "generation_config.json"


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
    check_state("the state dict", state, config)
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
    check_state("the model's state", model_state, config)
    headers, pieces = plan_load(folder, config, verify)
    total = sum(map(stored_bytes, headers.values()))
    with Source(folder, headers) as source:
        checks = [partial(check_duplicate, piece, source) for piece in pieces if piece.duplicate]
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
        checks = [partial(check_duplicate, piece, source) for piece in pieces if piece.duplicate]
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
    headers, expected = read_headers(folder), read_checksums(folder).get("tensors", {})
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
            f"{folder}: {first_of(sorted(wrong))} of {len(headers)} tensors are damaged: copy those files again"
        )
    return len(headers)
