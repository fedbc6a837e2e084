"""Initial weights, each matrix drawn by a seed of its own: the run's, the parameter's name and, of stacked experts, the number.

So whoever holds a part of the model - a pipeline's stage, some experts, a shard - draws no more than that and has the very bits of
one process, in any layout, on any device: numbers are drawn on the CPU in float32 and rounded where the parameter is narrower.
A generator's numbers come in one order: drawn from one stream, V3's 671 billion would take every rank an hour.
Source: V3 report section 4.2: Normal(0, 0.006) for what is learned; norms are ones. Does not: know meshes (parallel/workers.py).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

EXPERTS = ".mlp.experts."


@torch.no_grad()
def fill_initial(tensor: Tensor, name: str, *, seed: int, std: float, first: int = 0) -> None:
    """Fill a parameter of the whole model, or rows `first` and following of a layer's stacked experts (E, ., .), in place.

    Raises:
        ValueError: a vector that is no norm's weight has no initial value.
    """
    if tensor.dim() == 1:
        if "norm" not in name:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is neither a matrix nor a norm's weight: it has no initial value"
            )
        tensor.fill_(1.0)
    elif EXPERTS in name:
        for expert, matrix in enumerate(tensor, start=first):
            matrix.copy_(_drawn(matrix.shape, f"{seed}/{name}/{expert}", std))
    else:
        tensor.copy_(_drawn(tensor.shape, f"{seed}/{name}", std))


def _drawn(shape: torch.Size, key: str, std: float) -> Tensor:
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(number))
