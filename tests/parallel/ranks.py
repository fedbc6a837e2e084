"""Several gloo processes for a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """What each rank's `work(group, *args)` returned, tensors included. `work` is a function of a module, not a closure."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_main, (ranks, str(folder), work, args), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _main(rank: int, ranks: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    try:
        torch.save(work(dist.group.WORLD, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
