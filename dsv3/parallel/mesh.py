"""One mesh from degrees: which rank does what.

    world = pipeline x replica x expert            rank = (p · replicas + r) · experts + e

    pipeline   ranks of one pipeline hold different layers                          (report: 16)
    expert     neighbours hold different experts of the same layers                 (64, over 8 nodes)
    replica    copies of an expert group                                            (2)
    data       replica x expert: every rank of it reads its own rows                (128)

Everything but the routed experts is sharded over `data`; an expert's weights over `replica` alone, for they are spread over
`expert` already. The degrees are all that a user says; `data` follows from the world's size, and how tokens travel to experts from
the machines that the launcher started an expert group on: two hops where it lies on several, as many ranks on each (dispatch.py).
Source: V3 report section 3.2. Does not: move tensors (dispatch.py, fsdp.py, pipeline.py).
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.dispatch import ranks_a_node, way_of

_PATIENCE = timedelta(hours=24)


class Mesh:
    """This process's place among all, and the groups it talks in. Made by every process at once.

    Args:
        device_type: "cpu" (gloo) or "cuda" (nccl).

    Raises:
        ValueError: the degrees do not fit the model or the world.
    """

    def __init__(self, config: ParallelConfig, model: ModelConfig, device_type: str = "cpu") -> None:
        world = dist.get_world_size()
        config.check(model, world)
        self.config, self.world, self.rank = config, world, dist.get_rank()
        shape = (config.pipeline, world // (config.pipeline * config.expert), config.expert)
        names = ("pipeline", "replica", "expert")
        whole = DeviceMesh(device_type, torch.arange(world).view(shape), mesh_dim_names=names)
        self.pipeline, self.replica, self.expert = (whole[name] for name in names)
        self.experts = whole["replica", "expert"]
        self.data = self.experts._flatten("data")
        self.device = (
            torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
        )
        group = self.expert.get_group()
        self.way = way_of(group, ranks_a_node(self._machines(group)) if self.expert.size() > 1 else None)

    def _machines(self, group: dist.ProcessGroup) -> list[int]:
        """Of each rank of a group the first rank of its machine; all are on one where the launcher does not tell."""
        first = self.rank - int(os.environ.get("LOCAL_RANK", self.rank))
        mine = torch.tensor([first], device=self.device)
        told = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(told, mine, group=group)
        return torch.cat(told).tolist()

    @property
    def data_rank(self) -> int:
        return self.data.get_local_rank()

    @property
    def data_size(self) -> int:
        return self.data.size()

    @property
    def stage(self) -> int:
        return self.pipeline.get_local_rank()

    def patient_group(self) -> dist.ProcessGroup:
        """A group of all processes, on their CPUs, for shares of work that end hours apart; made by all at once."""
        return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))

    @property
    def neighbours(self) -> int:
        """Processes of this machine, this one among them; all, where the launcher does not tell."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0


def launched() -> int:
    """Processes that torchrun started, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device_type: str = "cpu", timeout: timedelta = timedelta(minutes=10)) -> None:
    """Meet the other processes that torchrun started. On CUDA each takes the device of its local rank."""
    if dist.is_initialized():
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    # Started again by torchrun, processes must not find each other's addresses of the life before (torch 2.13 keeps the store).
    store = dist.PrefixStore(f"life-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def part() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(
            0.2
        )  # gloo's thread lets go of the last tensors a moment later, and must not meet the interpreter's end
