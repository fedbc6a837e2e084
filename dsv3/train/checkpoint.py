"""Training checkpoints: a Hugging Face model folder with the training state beside it.

    RUN/checkpoints/step-00000100/   config.json, model.safetensors, tokenizer.json, ...   opens in transformers, vLLM, dsv3
                     training/       float32 masters, optimizer moments (torch.distributed.checkpoint)
                     training.json   step, tokens, loader position, and what the run was started with

Of a model with adapters (model/lora.py) a checkpoint holds these alone, in adapter/, and their masters in training/; only the
last of the run is a whole model, with the adapters merged into it.

A checkpoint is written under a temporary name, synced, and renamed: what bears a step's name is whole. Only then are older
ones removed. Does not: decide when to save.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from dsv3.data.tokenizer import Tokenizer
from dsv3.model.lora import LoraConfig, adapter_state, has_lora, merged_state, save_adapters
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import save_checkpoint, write_config
from dsv3.train.optim import AdamW

_NAME = re.compile(r"step-(\d{8})")


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)


def save_training(
    run: Path,
    model: DeepseekV3,
    optimizer: AdamW,
    tokenizer: Tokenizer | None,
    state: Mapping[str, Any],
    *,
    keep_last: int,
    lora: LoraConfig | None = None,
    whole: bool = True,
) -> Path:
    """Write checkpoint `state["step"]` and remove all but the newest `keep_last`. An existing one of that step stays.

    Args:
        lora: of a model with adapters. whole: merge them into a whole model beside; without adapters always so.

    Raises:
        OSError: the disk is full or unwritable; earlier checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step-{state['step']:08d}"
    if target.exists():
        return target
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _save_model(temporary, model, lora, whole)
        if tokenizer is not None:
            tokenizer.save(temporary)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks that no process group exists: there is one process
            dcp.save(_tensors(model, optimizer), checkpoint_id=temporary / "training", no_dist=True)
        (temporary / "training.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(run).free
        raise OSError(
            error.errno,
            f"checkpoint {target.name} could not be written ({error.strerror or error}; {free:,} bytes free): "
            "make room and resume; the checkpoints before it are whole",
        ) from error
    for old in checkpoints(run)[:-keep_last]:
        shutil.rmtree(old)
    return target


def read_state(checkpoint: Path) -> dict[str, Any]:
    """training.json of a checkpoint.

    Raises:
        ValueError: it holds no training state.
    """
    path = checkpoint / "training.json"
    if not path.exists():
        raise ValueError(
            f"{checkpoint} holds a model but no training state ({path.name} is missing): start from its weights instead"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def load_training(checkpoint: Path, model: DeepseekV3, optimizer: AdamW) -> None:
    """Fill the masters, router biases and optimizer moments in place, bit for bit."""
    optimizer.materialise()  # so that the load has tensors to fill
    tensors = _tensors(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=checkpoint / "training", no_dist=True)


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


def _save_model(folder: Path, model: DeepseekV3, lora: LoraConfig | None, whole: bool) -> None:
    if lora is None:
        save_checkpoint(model.state_dict(), model.config, folder, dtype=torch.bfloat16)
        return
    if whole:
        save_checkpoint(merged_state(model), model.config, folder, dtype=torch.bfloat16)
    else:
        folder.mkdir(parents=True)
        write_config(folder, model.config, torch.bfloat16)
    save_adapters(model, lora, folder / "adapter")


def _tensors(model: DeepseekV3, optimizer: AdamW) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}.{key}": value
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }
    held = adapter_state(model) if has_lora(model) else dict(model.state_dict())
    return {"model": held, "optimizer": moments}


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
