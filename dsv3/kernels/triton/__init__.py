"""Triton kernels for CUDA, a file per op file. Imported only where `use_triton` says so; nothing here is needed on a CPU."""

from __future__ import annotations

import importlib.util

from torch import Tensor


def use_triton(*tensors: Tensor) -> bool:
    """Whether these are on a CUDA device and Triton is installed."""
    return all(x.is_cuda for x in tensors) and importlib.util.find_spec("triton") is not None
