"""dsv3: an independent, complete DeepSeek-V3. The names here are the stable API; all else is internal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "ChatFormat",
    "Engine",
    "ModelConfig",
    "SamplingParams",
    "Sandbox",
    "Tokenizer",
    "load",
    "math_equal",
    "save",
]

if TYPE_CHECKING:
    import torch

    from dsv3.data.chat import ChatFormat
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.evals.grade import math_equal
    from dsv3.evals.sandbox import Sandbox
    from dsv3.infer.engine import Engine
    from dsv3.infer.sampling import SamplingParams
    from dsv3.model.config import ModelConfig
    from dsv3.model.transformer import DeepseekV3

_HOMES = {
    "ChatFormat": "dsv3.data.chat",
    "Engine": "dsv3.infer.engine",
    "ModelConfig": "dsv3.model.config",
    "SamplingParams": "dsv3.infer.sampling",
    "Sandbox": "dsv3.evals.sandbox",
    "Tokenizer": "dsv3.data.tokenizer",
    "math_equal": "dsv3.evals.grade",
}


def load(
    path: str | Path,
    dtype: str | torch.dtype = "bfloat16",
    device: str = "cpu",
    *,
    mtp: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DeepseekV3, Tokenizer]:
    """Open any checkpoint of the architecture: (model, tokenizer). FP8 files are dequantised on the way, on any device, or kept.

    Warns if the model's predictions on a fixed prompt look like those of a broken conversion (or of an untrained model).

    Args:
        dtype: float32, bfloat16 or float16; or "fp8": weights stay in FP8 (or are cast to it), a byte each, bfloat16 the rest.
        mtp: load the MTP layers; False for files that lost them (a transformers re-save does).
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        ValueError: a tensor is missing, unexpected, truncated or tampered with, or the tokenizer does not round-trip.
    """
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.model.config import ModelConfig
    from dsv3.model.selftest import PROMPT, doubts
    from dsv3.model.weights import load_model

    ModelConfig.from_hf(Path(path) / "config.json")  # the small files first: they fail at once, weights take their time
    tokenizer = Tokenizer.from_file(Path(path))
    model = load_model(Path(path), dtype=dtype, device=device, mtp=mtp, progress=progress)
    doubt = doubts(model, tokenizer.encode(PROMPT))
    if doubt:
        warnings.warn(f"{path}: {doubt}", stacklevel=2)
    return model, tokenizer


def save(model: DeepseekV3, path: str | Path, *, tokenizer: Tokenizer | None = None) -> None:
    """Write model (and tokenizer) as a Hugging Face checkpoint, MTP layers and float32 router bias included.

    Raises:
        ValueError: the folder exists.
        OSError: the disk is full; nothing is left behind.
    """
    from dsv3.model.weights import save_model

    save_model(model, Path(path), tokenizer=tokenizer)


def __getattr__(name: str) -> Any:
    """The classes load on first use: `import dsv3` itself is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dsv3' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
