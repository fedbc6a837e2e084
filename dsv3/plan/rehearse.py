"""A dry run: this package's own sharding, of the whole model on all its ranks, on tensors that hold no memory.

One process pretends to be a rank among as many as the layout has (torch's fake process group, whose collectives return at once),
builds that rank's stages from fake tensors, and does to them what training does: FP8 swap, experts spread, FSDP2. What the
rank then holds is counted, gathered once as for a step, and compared with what memory.py computes from shapes alone.

    shards, gathered weights, FP8 codes    counted on the modules
    moments                                counted on the optimizer
    gradients                              float32 of what was gathered, and of the shards: FSDP2's reduce_dtype

Does not: run a forward. A token's way to its experts needs sizes that fake tensors do not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv3.model.config import ModelConfig
from dsv3.model.fp8 import fp8_modules
from dsv3.parallel.apply import parallelize
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.fsdp import local, sharded
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.stage import Stage
from dsv3.parallel.workers import trained
from dsv3.plan.job import Job
from dsv3.plan.memory import count, ranks_of, weights_and_gradients
from dsv3.plan.step import Layout
from dsv3.train.optim import build_optimizer


@contextmanager
def pretended(world: int, rank: int) -> Iterator[None]:
    """A process group of `world` ranks of which this process is one and the others do not exist.

    Raises:
        ValueError: the process has a real one.
    """
    if dist.is_initialized():
        raise ValueError(
            "a dry run pretends to be many processes and this one is among real ones: run it without torchrun"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


KINDS = ("weights", "gradients", "optimizer")


def rehearse(job: Job, layout: Layout, stages: Sequence[int] | None = None) -> dict[str, Any]:
    """Build the first data rank of every pipeline rank (or of `stages`), and compare.

    Returns:
        `world`; `largest_difference` of any rank from its plan, by kind, as a share; `held_bytes` by rank and kind.

    Raises:
        ValueError: the layout is not one that this package starts.
    """
    if layout.gpus == 1:
        raise ValueError(
            "a dry run tries how a model is spread over ranks, and 1 device spreads nothing: leave it out, or give more --gpus"
        )
    precision, held, worst = job.train.precision, {}, dict.fromkeys(KINDS, 0.0)
    for stage in range(layout.pipeline) if stages is None else stages:
        found = held_bytes(job.model, layout, stage, precision)
        planned = planned_bytes(job.model, layout, stage, precision)
        held[str(stage * layout.data)] = found
        worst = {kind: max(worst[kind], abs(found[kind] / planned[kind] - 1)) for kind in KINDS}
    return {"world": layout.gpus, "largest_difference": worst, "held_bytes": held}


def planned_bytes(model: ModelConfig, layout: Layout, stage: int, precision: str) -> dict[str, float]:
    parts = ranks_of(model, layout.pipeline, layout.schedule)[stage]
    return weights_and_gradients(count(model, parts, layout.expert), layout, precision)


def held_bytes(model: ModelConfig, layout: Layout, stage: int, precision: str) -> dict[str, float]:
    """Weights, gradients and moments of one rank, counted on its modules."""
    parallel = ParallelConfig(
        pipeline=layout.pipeline, expert=layout.expert, sharding=layout.sharding, schedule=layout.schedule  # type: ignore[arg-type]
    )  # fmt: skip
    with pretended(layout.gpus, stage * layout.data):
        mesh = Mesh(parallel, model)
        total = dict.fromkeys(KINDS, 0.0)
        for part in ranks_of(model, layout.pipeline, layout.schedule)[stage]:
            whole = Stage(model, part)
            with FakeTensorMode(allow_non_fake_inputs=True):
                _make_fake(whole)
                parallelize(whole, mesh, precision=precision, recompute=layout.recompute, compile_layers=False)
                for kind, size in _count(whole, layout, precision).items():
                    total[kind] += size
    return total


def _make_fake(module: nn.Module) -> None:
    """Parameters and buffers of a meta module as fake tensors of a device."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                owner._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _count(model: nn.Module, layout: Layout, precision: str) -> dict[str, float]:
    shards = sum(_bytes(local(parameter)) for parameter in model.parameters())
    summed = sum(
        _bytes(local(parameter))
        for name, parameter in model.named_parameters()
        if (layout.replicas if ".mlp.experts." in name else layout.data) > 1  # one rank's sums are its shards
    )
    optimizer = build_optimizer(trained(model), moments=torch.bfloat16 if precision == "fp8" else torch.float32)
    optimizer.materialise()
    moments = sum(
        _bytes(local(tensor))
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name.startswith("exp_avg")
    )
    codes = sum(_bytes(tensor) for module in fp8_modules(model) for cast in module.casts() for tensor in cast)
    if layout.sharding == "fsdp":
        return {"weights": shards + codes, "gradients": shards, "optimizer": moments}
    for module in sharded(model):
        module.unshard()
    gathered = list(model.parameters())
    wide = sum(_bytes(parameter) for parameter in gathered)
    sums = 4 * sum(parameter.numel() for parameter in gathered)
    return {"weights": shards + codes + wide, "gradients": sums + summed, "optimizer": moments}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
