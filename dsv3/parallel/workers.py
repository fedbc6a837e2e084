"""What a training step asks of the processes that take it, the same of one and of many:

    part       which rows of the batch are mine, in micro-batches; every rank has equally many
    backward   of a micro-batch's loss; float32 gradients add up
    collect    the step's gradients on `masters`, summed over the data ranks
    clip       their norm over all ranks
    total      sums of counts and losses over the data ranks
    refresh    the optimizer has moved the masters: what forwards read follows

`Alone` is one process with a compute copy (apply.py). `Together` is a mesh of them: experts spread (expert.py), the rest sharded
(fsdp.py). Does not: know objectives, loaders or optimizers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dsv3.model.fp8 import fp8_modules
from dsv3.model.transformer import DeepseekV3
from dsv3.parallel.apply import compute_copy, parallelize, prepare, refresh_copy
from dsv3.parallel.fsdp import before_backward, local, settle, whole_view
from dsv3.parallel.mesh import Mesh


class Alone:
    """One process: masters, and the twin that forwards run on.

    Args:
        model: float32 masters; kept, and moved by the optimizer.
        precision, recompute, compile_layers: see `compute_copy` and `prepare`.
    """

    leads = True
    mesh: Mesh | None = None

    def __init__(self, model: DeepseekV3, *, precision: str, recompute: bool, compile_layers: bool) -> None:
        self.model = model
        self.masters = trained(model)
        self.twin = compute_copy(model, precision)
        prepare(self.twin, recompute=recompute, compile_layers=compile_layers)
        self.grads = [torch.zeros_like(parameter) for parameter in self.masters]
        self._begun = False

    def part(self, rows: int, micro_batch: int, rank: int = 0) -> list[slice]:
        """Micro-batches of a batch of `rows` rows."""
        return [slice(start, min(start + micro_batch, rows)) for start in range(0, rows, micro_batch)]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        for grad, parameter in zip(self.grads, trained(self.twin), strict=True):
            if parameter.grad is not None and not self._begun:
                grad.copy_(parameter.grad)
            elif parameter.grad is not None:
                grad.add_(parameter.grad)
            elif not self._begun:
                grad.zero_()
            parameter.grad = None
        self._begun = not last

    def collect(self) -> None:
        for parameter, grad in zip(self.masters, self.grads):
            parameter.grad = grad

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients to the norm `limit` at most; the norm before."""
        return torch.nn.utils.clip_grad_norm_(self.masters, limit)

    def total(self, tensor: Tensor) -> Tensor:
        return tensor

    def refresh(self) -> None:
        # A float32 run's twin is the master itself, and its backward would add to what it finds here.
        self.abandon()
        refresh_copy(self.twin, self.model)

    def abandon(self) -> None:
        """Forget the step's gradients."""
        for parameter in (*self.masters, *trained(self.twin)):
            parameter.grad = None
        self._begun = False

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """What a checkpoint stores under that name."""
        return tensor

    def settle(self) -> None:
        """Before parameters are read by name."""

    def barrier(self) -> None: ...


class Together:
    """A mesh of processes, each with its shard of the masters; forwards run on the same modules, gathered.

    Args:
        model: the whole model, the same on every rank; sharded in place.
        mesh: of this process.
    """

    def __init__(self, model: DeepseekV3, mesh: Mesh, *, precision: str, recompute: bool, compile_layers: bool) -> None:
        self.mesh, self.leads = mesh, mesh.leads
        parallelize(model, mesh, precision=precision, recompute=recompute, compile_layers=compile_layers)
        self.model = self.twin = model
        self.masters = trained(model)

    def part(self, rows: int, micro_batch: int, rank: int | None = None) -> list[slice]:
        """Micro-batches of a data rank, None: of this one. Empty ones (start = stop) keep it in step with ranks that have more."""
        size, rank = -(-rows // self.mesh.data_size), self.mesh.data_rank if rank is None else rank
        begin, end = min(rows, rank * size), min(rows, (rank + 1) * size)
        starts = [begin + i for i in range(0, size, micro_batch)]
        return [slice(min(s, end), min(s + micro_batch, end)) for s in starts]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        before_backward(cast(FSDPModule, self.model), self.mesh, last)
        loss.backward()

    def collect(self) -> None:
        for parameter in self.masters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clip(self, limit: float) -> Tensor:
        """See Alone. Every element is on one rank alone, so the ranks' sums of squares add up."""
        grads = [local(parameter.grad) for parameter in self.masters if parameter.grad is not None]
        squares = torch.stack([g.double().square().sum() for g in grads]).sum()
        dist.all_reduce(squares)
        norm = squares.sqrt().float()
        torch._foreach_mul_([g for g in grads if g.numel()], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def total(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.mesh.data.get_group())
        return tensor

    def refresh(self) -> None:
        self.abandon()
        for module in fp8_modules(self.model):
            module.stale = True  # cast again when its weight is next gathered

    def abandon(self) -> None:
        for parameter in self.masters:
            parameter.grad = None

    def view(self, name: str, tensor: Tensor) -> Tensor:
        return whole_view(name, tensor, self.mesh)

    def settle(self) -> None:
        settle(self.model)

    def barrier(self) -> None:
        dist.barrier()


Workers = Alone | Together


def assemble(model: DeepseekV3, mesh: Mesh | None, **options: Any) -> Workers:
    """Alone without a mesh, Together with one."""
    return Alone(model, **options) if mesh is None else Together(model, mesh, **options)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer moves; of a model with adapters, these alone."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
