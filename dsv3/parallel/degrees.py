"""Degrees of parallelism: what a user says of a run on several processes, and whether it fits a model and a world.

    world = pipeline x replica x expert            data ranks: replica x expert

Everything else follows (mesh.py). Source: V3 report section 3.2 (16-way pipeline, 64-way expert, ZeRO-1). Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from dsv3.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many processes share what; they are torchrun's. See the file's head."""

    pipeline: int = 1
    """Stages: ranks that hold different layers."""
    expert: int = 1
    """Ranks that share a layer's routed experts."""
    sharding: Literal["zero1", "fsdp"] = "zero1"
    """Of masters and moments over the data ranks. zero1 gathers the weights once a step, fsdp once a layer and pass."""
    schedule: Literal["1f1b", "zero-bubble", "dualpipev"] = "1f1b"
    """Of the pipeline. The other two hold two stages a rank."""
    dispatch: Literal["precision", "fp8"] = "precision"
    """How tokens travel to experts on other ranks: as they are multiplied there, or as FP8 codes in any precision, which is
    half the bytes of bfloat16 and rounds them. With precision fp8 they are codes in any case."""

    def check(self, model: ModelConfig, world: int) -> None:
        """Refuse degrees that do not fit, and those that would change nothing.

        Raises:
            ValueError: with the sizes that would.
        """
        for name, value in (("sharding", self.sharding), ("schedule", self.schedule), ("dispatch", self.dispatch)):
            known = get_args(get_type_hints(ParallelConfig)[name])
            if value not in known:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}")
        if self.pipeline < 1 or self.expert < 1:
            raise ValueError(f"pipeline {self.pipeline} and expert {self.expert} must be at least 1")
        if self.dispatch == "fp8" and self.expert == 1:
            raise ValueError("dispatch 'fp8' with expert 1: no token travels; give expert ranks, or leave dispatch out")
        if self.pipeline == 1 and self.schedule != "1f1b":
            raise ValueError(
                f"schedule {self.schedule!r} is the order of a pipeline, and pipeline is 1: give a pipeline of at least 2 ranks, "
                "or leave the schedule out"
            )
        if self.schedule != "1f1b" and self.sharding == "fsdp":
            raise ValueError(
                f"schedule {self.schedule!r} takes the backward pass in two halves, and sharding 'fsdp' lets the weights go "
                "between them: take sharding 'zero1', or schedule '1f1b'"
            )
        if self.sharding == "fsdp" and world == self.pipeline:
            raise ValueError(
                f"sharding 'fsdp' divides the weights of a stage over its data ranks, and {_counted(world)} one for each of "
                f"pipeline {self.pipeline}: start {2 * self.pipeline} or more, or leave sharding out"
            )
        if world % (self.pipeline * self.expert):
            fits = [e for e in _divisors(model.n_routed_experts) if world % (self.pipeline * e) == 0]
            raise ValueError(
                f"{_counted(world)} no multiple of pipeline {self.pipeline} x expert {self.expert}: start "
                f"{self.pipeline * self.expert} or a multiple (torchrun --standalone --nproc-per-node N -m dsv3.cli ...)"
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


def _counted(processes: int) -> str:
    return "1 process is" if processes == 1 else f"{processes} processes are"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _spreads(model: ModelConfig, ranks: int) -> bool:
    """Whether every rank gets as many experts, and whole groups or an even part of one: a token that may go to few groups
    then goes to few ranks and nodes (report 2.1.2: at most 4 nodes)."""
    groups = model.n_group
    return model.n_routed_experts % ranks == 0 and (ranks % groups == 0 or groups % ranks == 0)
