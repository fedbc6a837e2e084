"""Whether a checkpoint's files, or a state dict, are what a config describes: told before anything is read or changed.

    headers    every name that the config makes is there in its shape and a known dtype, and no other (the first ten are told)
    MTP        its layers are there as config.json says; their copies of embedding and head equal the originals
    FP8        every weight has scales of its blocks
    sums       files have the sha256 of checksums.json, where there is one

Does not: read weights (weights.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dsv3.model import folder as disk
from dsv3.model.census import BLOCK, SCALE, Piece, is_fp8_weight, layer_of, layout, memory_shapes, scale_of, scale_shape
from dsv3.model.config import ModelConfig
from dsv3.model.headers import ITEM_BYTES, Stored, read_headers
from dsv3.model.shards import CHECKSUMS_FILE, CODES
from dsv3.model.source import DTYPES, Source, place

_MOST_TOLD = 10  # of the tensors that do not fit


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
            f"{folder} does not fit its config.json of {len(wanted)} weights: {first_of(wrong)}; fetch weights and config from "
            "one place"
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


def check_duplicate(piece: Piece, source: Source) -> int:
    """An MTP layer's own embedding and head must equal the main model's bit for bit, or it was trained to differ."""
    if source.digest(piece.disk) != source.digest(piece.memory):
        raise ValueError(
            f"{piece.disk} differs from {piece.memory}, of which it must be a copy: MTP layers share embedding "
            "and head; pass mtp=False to leave the MTP layers aside"
        )
    return piece_bytes(source.headers, piece)


def check_state(where: str, state: Mapping[str, Tensor], config: ModelConfig) -> None:
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
        raise ValueError(f"{where} belongs to another config: {first_of(wrong)}")
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


def piece_bytes(headers: Mapping[str, Stored], piece: Piece) -> int:
    """Of the files, scales included."""
    stored = headers[place(headers, piece)[0]]
    scales = 4 * math.prod(scale_of(piece).shape) if stored.dtype == "F8_E4M3" else 0
    return math.prod(piece.shape) * ITEM_BYTES[stored.dtype] + scales


def first_of(said: list[str]) -> str:
    more = f"; and {len(said) - _MOST_TOLD} more" if len(said) > _MOST_TOLD else ""
    return "; ".join(said[:_MOST_TOLD]) + more


def read_checksums(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / CHECKSUMS_FILE
    if not path.exists():
        return {}
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        return found if "files" in found else {"files": found}  # of files alone, as dsv3 0.1 first wrote it
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to load without verifying") from None


def _verify_files(folder: Path, headers: Mapping[str, Stored]) -> None:
    expected = read_checksums(folder).get("files", {})
    for file in sorted({stored.file for stored in headers.values()}):
        if file in expected and (actual := disk.sha256(folder / file)) != expected[file]:
            raise ValueError(
                f"{folder / file} has sha256 {actual}, {CHECKSUMS_FILE} says {expected[file]}: it is damaged, copy it "
                f"again (if another program rewrote it on purpose, delete {CHECKSUMS_FILE})"
            )
