"""What a training step asks of the processes that take it, the same of one and of many:

    part       which rows of the batch are mine, in micro-batches; every rank has equally many
    backward   of a micro-batch's loss; float32 gradients add up. With a `pipeline` its step does forwards and backwards
    collect    the step's gradients on `masters`, summed over the data ranks
    clip       their norm over all ranks
    total      sums of counts and losses over the data ranks
    refresh    the optimizer has moved the masters: what forwards read follows
    hidden     states to measure, in the ranks that have the head; `gather` adds up what these found
    forwards   the modules that are run, parts of the model or a copy of it
    policy     the whole model to generate with, `publish`ed when the masters have moved; `share` and `everyone` divide the work
    leading    what the first process has, where all must go by the same

`Alone` is one process with a compute copy (apply.py). `Together` is a mesh of them: experts spread (expert.py), the rest sharded
(fsdp.py), layers dealt out to a pipeline's ranks (pipeline.py). Does not: know objectives, loaders or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dsv3.model.fp8 import fp8_modules
from dsv3.model.initial import EXPERTS, fill_initial
from dsv3.model.transformer import DeepseekV3, Hidden, Steer
from dsv3.parallel.apply import compute_copy, parallelize, prepare, refresh_copy
from dsv3.parallel.fsdp import before_backward, local, settle, sum_every_time, whole_view
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline import Pipeline, micro_batches
from dsv3.parallel.stage import Stage, as_placed, split


class Alone:
    """One process: masters, and the twin that forwards run on.

    Args:
        model: float32 masters; kept, and moved by the optimizer.
        precision, recompute, compile_layers: see `compute_copy` and `prepare`.
    """

    leads = True
    mesh: Mesh | None = None
    pipeline: Pipeline | None = None

    def __init__(self, model: DeepseekV3, *, precision: str, recompute: bool, compile_layers: bool) -> None:
        self.model = model
        self.device = model.lm_head.weight.device
        self.parts = [model]
        self.masters = trained(model)
        self.twin = compute_copy(model, precision)
        self.forwards: list[DeepseekV3] = [self.twin]
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

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def turns(self, number: int) -> Iterator[tuple[int, bool]]:
        """Which of so many batches to measure, and whether it counts: every rank of several takes as many turns."""
        return ((turn, True) for turn in range(number))

    def hidden(
        self, tokens: Tensor, *, depth: int = 0, mask: Tensor | None = None, steer: Steer | None = None
    ) -> Hidden | None:
        return self.twin.hidden(tokens, depth=depth, mask=mask, steer=steer)

    @property
    def head(self) -> nn.Module:
        """Of the states that `hidden` gave; it follows at once."""
        return self.twin.lm_head

    @property
    def policy(self) -> DeepseekV3:
        """A plain model for an engine, as wide as products are."""
        return self.twin

    def publish(self) -> None:
        """Bring `policy` up to the masters; it shares their memory here."""

    def share(self, items: Sequence[Any]) -> list[Any]:
        """This process's part of some work."""
        return list(items)

    def everyone(self, mine: Any) -> list[Any]:
        """What all processes made of their parts."""
        return [mine]

    def leading(self, mine: Any) -> Any:
        """What the first process made of something that all look at."""
        return mine

    def loads(self, counts: Tensor) -> list[tuple[DeepseekV3, Tensor]]:
        """Of (L, E) counts of all routers, those of each part's."""
        return [(self.model, counts)]

    def refresh(self) -> None:
        # A float32 run's twin is the master itself, and its backward would add to what it finds here.
        self.abandon()
        refresh_copy(self.twin, self.model)

    def abandon(self) -> None:
        """Forget the step's gradients."""
        for parameter in (*self.masters, *trained(self.twin)):
            parameter.grad = None
        self._begun = False

    @torch.no_grad()
    def place(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Fill masters and router biases from whole tensors by name."""
        mine = self.model.state_dict()
        for name, whole in tensors:
            mine[name].copy_(whole)
        self.refresh()

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """What a checkpoint stores under that name."""
        return tensor

    def settle(self) -> None:
        """Before parameters are read by name."""

    def barrier(self) -> None: ...


class Together:
    """A mesh of processes, each with its shard of the masters; forwards run on the same modules, gathered.

    Args:
        model: the whole model, the same on every rank, and sharded in place; or on "meta", for `place` to fill. A pipeline's
            stages are cut from it.
        mesh: of this process.

    Raises:
        ValueError: more stages than layers; or compiled layers, with experts spread or in a schedule that divides their backward
            pass.
    """

    def __init__(self, model: DeepseekV3, mesh: Mesh, *, precision: str, recompute: bool, compile_layers: bool) -> None:
        self.mesh, self.leads, self.device, self.precision = mesh, mesh.leads, mesh.device, precision
        if compile_layers and mesh.config.expert > 1:
            raise ValueError(
                f"compile=True with expert {mesh.config.expert} would compile every number of rows that experts receive anew: "
                "drop one"
            )
        stages = _stages(model, mesh)
        self.parts: list[DeepseekV3] = [*stages] or [model]
        for part in self.parts:
            parallelize(part, mesh, precision=precision, recompute=recompute, compile_layers=compile_layers)
            if next(part.parameters()).is_meta:
                part.to_empty(device=mesh.device)
                for router in part.routers():
                    router.e_score_correction_bias.zero_()
        self.model = self.twin = self.parts[0]
        self.forwards = self.parts
        self.masters = [parameter for part in self.parts for parameter in trained(part)]
        self.pipeline: Pipeline | None = None
        if stages:
            for stage in stages if mesh.config.sharding == "fsdp" else ():
                sum_every_time(cast(FSDPModule, stage))
            stream = torch.float32 if precision == "float32" else torch.bfloat16
            self.pipeline = Pipeline(stages, mesh.pipeline.get_group(), mesh.config.schedule, stream=stream)

    def part(self, rows: int, micro_batch: int, rank: int | None = None) -> list[slice]:
        """Micro-batches of a data rank, None: of this one. Empty ones (start = stop) keep it in step with ranks that have more.

        Raises:
            ValueError: a pipeline's micro-batches must be of one size, and are not.
        """
        size, rank = -(-rows // self.mesh.data_size), self.mesh.data_rank if rank is None else rank
        if self.pipeline is not None:
            if rows % self.mesh.data_size:
                raise ValueError(
                    f"{rows} rows a step do not divide over {self.mesh.data_size} data ranks, and a pipeline's must: give "
                    f"{rows - rows % self.mesh.data_size or self.mesh.data_size}"
                )
            try:
                micros = micro_batches(size, micro_batch, self.pipeline.ranks, self.pipeline.schedule)
            except ValueError as error:
                raise ValueError(
                    f"of {rows} rows each of {self.mesh.data_size} data ranks takes {size}: {error}"
                ) from None
            return [slice(rank * size + m.start, rank * size + m.stop) for m in micros]
        mine = self.rows(rows, rank)
        starts = [mine.start + i for i in range(0, size, micro_batch)]
        return [slice(min(s, mine.stop), min(s + micro_batch, mine.stop)) for s in starts]

    def rows(self, number: int, rank: int | None = None) -> range:
        """Those of a batch of so many that `part` cuts into micro-batches."""
        size, rank = -(-number // self.mesh.data_size), self.mesh.data_rank if rank is None else rank
        return range(min(number, rank * size), min(number, (rank + 1) * size))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        before_backward(cast(FSDPModule, self.model), self.mesh, last)
        loss.backward()

    def collect(self) -> None:
        for parameter in self.masters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clip(self, limit: float) -> Tensor:
        """See Alone. Every element is on one rank alone, so the ranks' sums of squares add up."""
        replica = self._replica()
        grads = [
            (parameter is replica, local(parameter.grad)) for parameter in self.masters if parameter.grad is not None
        ]
        squares = torch.stack([g.double().square().sum() for copied, g in grads if not copied]).sum()
        dist.all_reduce(squares)
        norm = squares.sqrt().float()
        torch._foreach_mul_([g for _, g in grads if g.numel()], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def total(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.mesh.data.get_group())
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def turns(self, number: int) -> Iterator[tuple[int, bool]]:
        """See Alone."""
        size, rank = self.mesh.data_size, self.mesh.data_rank
        for first in range(0, number, size):
            yield min(first + rank, number - 1), first + rank < number

    def hidden(
        self, tokens: Tensor, *, depth: int = 0, mask: Tensor | None = None, steer: Steer | None = None
    ) -> Hidden | None:
        run = self.model if self.pipeline is None else self.pipeline
        return run.hidden(tokens, depth=depth, mask=mask, steer=steer)

    @property
    def head(self) -> nn.Module:
        """See Alone; None where the last stage is not."""
        return self.parts[-1].lm_head

    @cached_property
    def policy(self) -> DeepseekV3:
        """See Alone: whole on every rank, float32 and its copy."""
        with torch.device("meta"):
            whole = DeepseekV3(self.model.config)
        self._published = whole.to_empty(device=self.device)
        self.publish()
        return compute_copy(self._published, self.precision)

    @torch.no_grad()
    def publish(self) -> None:
        """See Alone; every rank gathers the masters of its stages, and a pipeline's ranks tell them to each other."""
        self.settle()
        mine = {name: tensor for part in self.parts for name, tensor in part.state_dict().items()}
        for name, whole in self._published.state_dict().items():
            holder = self.holder(name)
            if holder in (None, self.mesh.stage):
                view = self.view(name, mine[name])
                whole.copy_(view.full_tensor() if isinstance(view, DTensor) else view)
            if holder is not None:
                dist.broadcast(whole, group=self.mesh.pipeline.get_group(), group_src=holder)
        if "policy" in self.__dict__:
            refresh_copy(self.policy, self._published)

    def holder(self, name: str) -> int | None:
        """Of a pipeline's ranks, the first that has a parameter or buffer of the whole model."""
        if self.pipeline is None:
            return None
        return next(part.rank for part in self.pipeline.parts if part.holds(name))

    def share(self, items: Sequence[Any]) -> list[Any]:
        """See Alone."""
        return list(items[self.mesh.rank :: self.mesh.world])

    def everyone(self, mine: Any) -> list[Any]:
        """See Alone; in the order of ranks."""
        told: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(told, mine, group=self._patient)
        return told

    def leading(self, mine: Any) -> Any:
        """See Alone."""
        told = [mine]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    @cached_property
    def _patient(self) -> dist.ProcessGroup:
        """For shares of work that end hours apart, as those of long answers do; made by all at once, as it is used."""
        return self.mesh.patient_group()

    def loads(self, counts: Tensor) -> list[tuple[DeepseekV3, Tensor]]:
        """See Alone."""
        if self.pipeline is None:
            return [(self.model, counts)]
        return [(stage, counts[stage.rows]) for stage in self.pipeline.stages]

    def refresh(self) -> None:
        self.abandon()
        for module in (module for part in self.parts for module in fp8_modules(part)):
            module.stale = True  # cast again when its weight is next gathered

    def abandon(self) -> None:
        for parameter in self.masters:
            parameter.grad = None

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill masters and router biases as `DeepseekV3.init_weights` does in one process; every rank draws the experts and the
        layers that it holds, and of a matrix that is cut the whole."""
        replica, expert = self.mesh.replica, self.mesh.expert
        for part in self.parts:
            for name, held in part.named_parameters():
                fill = partial(fill_initial, name=name, seed=seed, std=part.config.initializer_range)
                if EXPERTS in name and expert.size() == 1:  # the replicas have whole experts
                    fill(local(held), first=replica.get_local_rank() * -(-len(held) // replica.size()))
                    continue
                whole = torch.empty(held.shape)
                fill(whole, first=expert.get_local_rank() * len(whole) if EXPERTS in name else 0)
                local(held).copy_(local(as_placed(whole.to(held.device), held)))
            for router in part.routers():
                router.e_score_correction_bias.zero_()
        self.refresh()

    @torch.no_grad()
    def place(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Fill masters and router biases from whole tensors by name; every rank walks all of them and keeps its own."""
        mine = [(part, dict(part.named_parameters()) | dict(part.named_buffers())) for part in self.parts]
        for name, whole in tensors:
            for _, held in mine:
                if name in held:
                    view = self.view(name, held[name])
                    local(view).copy_(local(as_placed(whole.to(view.device), view)))
        self.refresh()

    def view(self, name: str, tensor: Tensor) -> Tensor:
        return whole_view(name, tensor, self.mesh)

    def settle(self) -> None:
        for part in self.parts:
            settle(part)

    def barrier(self) -> None:
        dist.barrier()

    def _replica(self) -> Tensor | None:
        """The embedding's second copy, if it is here."""
        last = self.pipeline.stages[-1] if self.pipeline is not None else None
        if last is None or not (last.part.last and last.part.embedding):
            return None
        return last.model.embed_tokens.weight


def _stages(model: DeepseekV3, mesh: Mesh) -> list[Stage]:
    """This rank's of a pipeline."""
    ranks, schedule = mesh.config.pipeline, mesh.config.schedule
    if ranks == 1:
        return []
    return [Stage.cut(model, part) for part in split(model.config, ranks, schedule) if part.rank == mesh.stage]


Workers = Alone | Together


def assemble(model: DeepseekV3, mesh: Mesh | None, **options: Any) -> Workers:
    """Alone without a mesh, Together with one."""
    return Alone(model, **options) if mesh is None else Together(model, mesh, **options)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer moves; of a model with adapters, these alone."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
