"""One mesh from degrees: which rank does what.

    world = pipeline x replica x expert            rank = (p · replicas + r) · experts + e

    pipeline   ranks of one pipeline hold different layers                          (report: 16)
    expert     neighbours hold different experts of the same layers                 (64, over 8 nodes)
    replica    copies of an expert group                                            (2)
    data       replica x expert: every rank of it reads its own rows                (128)

Everything but the routed experts is sharded over `data`; an expert's weights over `replica` alone, for they are spread over
`expert` already. The degrees are all that a user says; `data` follows from the world's size.
Source: V3 report section 3.2. Does not: move tensors (expert.py, fsdp.py, pipeline.py).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dsv3.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; all 1 in one process."""

    pipeline: int = 1
    """Stages: ranks that hold different layers."""
    expert: int = 1
    """Ranks that share a layer's routed experts."""
    sharding: Literal["zero1", "fsdp"] = "zero1"
    """Of masters and moments over the data ranks. zero1 gathers the weights once a step, fsdp once a layer and pass."""
    schedule: Literal["1f1b", "zero-bubble", "dualpipev"] = "1f1b"
    """Of the pipeline. The other two hold two stages a rank."""

    def check(self, model: ModelConfig, world: int) -> None:
        """Refuse degrees that do not fit.

        Raises:
            ValueError: with the sizes that would.
        """
        if self.pipeline < 1 or self.expert < 1:
            raise ValueError(f"pipeline {self.pipeline} and expert {self.expert} must be at least 1")
        if self.pipeline > 1 and self.schedule != "1f1b" and self.sharding == "fsdp":
            raise ValueError(
                f"schedule {self.schedule!r} takes the backward pass in two halves, and sharding 'fsdp' lets the weights go "
                "between them: take sharding 'zero1', or schedule '1f1b'"
            )
        if world % (self.pipeline * self.expert):
            fits = [e for e in _divisors(model.n_routed_experts) if world % (self.pipeline * e) == 0]
            raise ValueError(
                f"{world} processes are no multiple of pipeline {self.pipeline} x expert {self.expert}: start "
                f"{self.pipeline * self.expert} or a multiple"
                + (f", or take expert from {fits}" if fits else f", or take pipeline from {_divisors(world)}")
            )
        fits = [e for e in _divisors(world // self.pipeline) if _spreads(model, e)]
        if not _spreads(model, self.expert):
            raise ValueError(
                f"{model.n_routed_experts} experts in {model.n_group} groups do not spread evenly over expert {self.expert}: "
                f"take it from {fits}"
            )
        replicas, widths = world // (self.pipeline * self.expert), (2 * model.moe_intermediate_size, model.hidden_size)
        if self.expert > 1 and any(width % replicas for width in widths):
            fits = [d for d in _divisors(math.gcd(*widths)) if d <= replicas]
            raise ValueError(
                f"experts of {widths[0]} x {widths[1]} do not divide over {replicas} replicas of {self.expert} expert ranks: start "
                f"{self.pipeline * self.expert * fits[-1]} processes, or take expert 1"
            )


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

    @property
    def data_rank(self) -> int:
        return self.data.get_local_rank()

    @property
    def data_size(self) -> int:
        return self.data.size()

    @property
    def stage(self) -> int:
        return self.pipeline.get_local_rank()

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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=timeout)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _spreads(model: ModelConfig, ranks: int) -> bool:
    """Whether every rank gets as many experts, and whole groups or an even part of one: a token that may go to few groups
    then goes to few ranks and nodes (report 2.1.2: at most 4 nodes)."""
    groups = model.n_group
    return model.n_routed_experts % ranks == 0 and (ranks % groups == 0 or groups % ranks == 0)
