"""Pipeline parallelism: the stages of a model on the ranks of a group, and one training step over them.

    stages = [Stage(config, part, device) for part in split(config, ranks, schedule) if part.rank == rank]
    pipeline = Pipeline(stages, group, schedule, stream=torch.bfloat16)
    records, counts = pipeline.step(feed, micro_batches)      # gradients are in .grad, float32, of the step's whole loss

The order of forwards and backwards is the library's: Schedule1F1B, ScheduleZBVZeroBubble and ScheduleDualPipeV of
torch.distributed.pipelining. The two zero-bubble schedules run the backward pass in two halves, for the input at once and
for the weights when there is nothing else to do; their stages lie in a V, two a rank. The halves are ours (kernels/later.py):
Linears and experts, in FP8 too and where layers are computed again, promise their weights' gradients in the first half and
make them in the second. The library's own halves walk the graph twice, which custom operators and recomputation do not stand.

Every rank of the group reads the same batch (stage.Feed). A step ends with three exchanges over the group: the gradients of
the embedding and of its replica in the last stage become their sum, the loads of all routers one table, and the last stage's
records known everywhere. A loss that is not finite does not stop the schedule, which would leave the other ranks waiting:
look at the records.
Source: V3 report section 3.2.1; ZB-V: arXiv 2401.10241. Legend: B batch, T tokens, D model, V vocabulary, E experts.
Does not: shard parameters (a stage may be wrapped by fully_shard before it is given here), step an optimizer, or cut batches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from dsv3.kernels.later import LateLinear, Later
from dsv3.model.transformer import Hidden, Steer
from dsv3.parallel.stage import STAGES_A_RANK, Feed, Run, Stage, split


def least_micro_batches(ranks: int, schedule: str) -> int:
    """As few as the library's schedule takes. ZB-V takes any number, and keeps every rank at work from 2·ranks - 1 on."""
    return {"1f1b": ranks, "zero-bubble": 1, "dualpipev": 2 * ranks}[schedule]


def micro_batches(rows: int, micro_batch: int, ranks: int, schedule: str) -> list[slice]:
    """The rows of each micro-batch of a step.

    Raises:
        ValueError: the rows do not fill them, or they are too few for the schedule; the message has numbers that work.
    """
    least = least_micro_batches(ranks, schedule)
    number, rest = divmod(rows, micro_batch)
    if rest:
        raise ValueError(
            f"{rows} rows do not fill micro-batches of {micro_batch}, and a pipeline's stages exchange states of one "
            f"shape: give {number * micro_batch or micro_batch} or {(number + 1) * micro_batch} rows a step, or "
            f"micro-batches of {max(d for d in range(1, micro_batch + 1) if rows % d == 0)}"
        )
    if number < least:
        fits = [d for d in range(1, micro_batch) if rows % d == 0 and rows // d >= least]
        raise ValueError(
            f"{rows} rows make {number} micro-batches of {micro_batch}, and {schedule!r} on {ranks} ranks needs {least}: "
            f"give at least {least * micro_batch} rows a step" + (f", or micro-batches of {fits[-1]}" if fits else "")
        )
    return [slice(start, start + micro_batch) for start in range(0, rows, micro_batch)]


class Pipeline:
    """The stages of this rank, and the steps that all ranks of the group take together.

    Args:
        stages: those that `split` gives this rank, in their order; already sharded or prepared, whatever is to be done to them.
        group: the pipeline's ranks, in the order of `Part.rank`.
        stream: dtype of the states that the layers pass on (that of the head in the compute copy).

    Raises:
        ValueError: the stages are not this rank's, or are compiled where the schedule divides their backward pass.
    """

    def __init__(self, stages: list[Stage], group: dist.ProcessGroup, schedule: str, *, stream: torch.dtype) -> None:
        self.stages, self.group, self.schedule, self.stream = stages, group, schedule, stream
        self.config = stages[0].config
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.parts = split(self.config, self.ranks, schedule)
        mine = [part for part in self.parts if part.rank == self.rank]
        if [stage.part for stage in stages] != mine:
            raise ValueError(
                f"rank {self.rank} of {self.ranks} holds stages {[part.index for part in mine]} under {schedule!r}, and was "
                f"given {[stage.part for stage in stages]}: build those of split(config, {self.ranks}, {schedule!r})"
            )
        halves = STAGES_A_RANK[schedule] > 1
        if halves and any(_is_compiled(stage) for stage in stages):
            raise ValueError(
                f"compiled layers have one backward pass, and {schedule!r} takes it in two halves: drop compile, or use '1f1b'"
            )
        self.later = [Later(torch.float32) if halves else None for _ in stages]
        for stage in stages if halves else []:
            for module in stage.model.layers.modules():
                if type(module) is nn.Linear:
                    module.__class__ = LateLinear
        self.device = next(stages[0].parameters()).device
        self._built: tuple[Any, Any] = (None, None)
        for stage in stages:
            if not isinstance(stage, FSDPModule):  # which has its own reduce_dtype
                accumulate_in_float32(stage)

    def step(self, feed: Feed, micro_batches: int, *, balance: bool = True) -> tuple[list[Any], Tensor]:
        """Forward and backward over all micro-batches. What `.grad` of the stages' parameters held before is dropped.

        Args:
            micro_batches: how many there are; all of one shape (see the function of that name).
            balance: compute the sequence-wise balance loss.

        Returns:
            On every rank: the feed's records, one a micro-batch, their tensors on the CPU; and the load of all routers,
            (L_moe, E) int64 in the order of the whole model's, over all micro-batches.
        """
        shape = feed.inputs(0)[0].shape
        run = Run(feed, self.config, shape=shape, stream=self.stream, balance=balance, device=self.device)
        for stage, later in zip(self.stages, self.later):
            stage.zero_grad(set_to_none=True)
            stage.run, stage.later = run, later
        numbers = torch.arange(micro_batches)
        schedule = self._schedule(micro_batches, shape)
        try:
            schedule.step(micro=numbers, target=numbers, return_outputs=False)
        finally:
            for stage in self.stages:
                stage.run = None
                if stage.later is not None:
                    stage.later.take()  # what a step that failed has left
        sync_shared_gradients(self.stages, self.group)
        dist.all_reduce(run.counts, group=self.group)
        return self._tell(run, micro_batches), run.counts

    @torch.no_grad()
    def hidden(
        self, tokens: Tensor, *, depth: int = 0, mask: Tensor | None = None, steer: Steer | None = None
    ) -> Hidden | None:
        """Final states of tokens (B, T + depth) under a mask (B, T, T), in the rank of the last stage; elsewhere None. Every
        rank gives the same tokens, and steers the routers that it has.

        One stage after the other, for measurements now and then.
        """
        x: Tensor | None = None
        shape = (tokens.shape[0], tokens.shape[1] - depth, self.config.hidden_size)
        for stage in sorted(self.stages, key=lambda stage: stage.part.index):
            place = stage.part.index
            if place and (before := self.parts[place - 1].rank) != self.rank:
                x = torch.empty(shape, dtype=self.stream, device=self.device)
                dist.recv(x, group=self.group, group_src=before)
            out = stage.advance(x, tokens, mask, depth=depth, stream=self.stream, steer=steer)
            if isinstance(out, Hidden):
                return out
            x = out
            if (after := self.parts[place + 1].rank) != self.rank:
                dist.send(x.contiguous(), group=self.group, group_dst=after)
        return None

    def _schedule(self, number: int, shape: torch.Size) -> Any:
        """The library's schedule with its stages, and their buffers: kept until a step has another shape."""
        key = (number, *shape)
        if self._built[0] != key:
            length = shape[1] - self.config.num_nextn_predict_layers
            x = torch.empty(shape[0], length, self.config.hidden_size, dtype=self.stream, device="meta")
            scalar = torch.empty((), device="meta").requires_grad_()
            between = (x.requires_grad_(), scalar)
            stages = [
                _LibraryStage(
                    stage,
                    stage.part.index,
                    stage.part.stages,
                    self.device,
                    input_args=() if stage.part.first else between,
                    output_args=(scalar,) if stage.part.last else between,
                    group=self.group,
                    dw_builder=None if later is None else later.take,
                )
                for stage, later in zip(self.stages, self.later)
            ]
            kind = {"1f1b": Schedule1F1B, "zero-bubble": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}
            held: Any = stages if STAGES_A_RANK[self.schedule] > 1 else stages[0]
            self._built = (key, kind[self.schedule](held, number, loss_fn=_the_loss, scale_grads=False))
        return self._built[1]

    def _tell(self, run: Run, number: int) -> list[Any]:
        """The last stage's records to every rank."""
        told: list[Any] = [None]
        if self.stages[-1].part.last:
            told = [tree_map(_plain, [run.records[micro] for micro in range(number)])]
        dist.broadcast_object_list(told, group=self.group, group_src=self.parts[-1].rank)
        return told[0]


class _LibraryStage(PipelineStage):
    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Greet the neighbours, but not oneself at the bottom of the V: gloo has no such connection (torch to 2.11 or 2.12)."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def _is_compiled(stage: Stage) -> bool:
    return any(layer._compiled_call_impl is not None for layer in stage.model.layers)


def accumulate_in_float32(module: nn.Module) -> None:
    """Let gradients of narrower parameters add up in float32 (report section 3.3.3)."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32


@torch.no_grad()
def sync_shared_gradients(stages: list[Stage], group: dist.ProcessGroup) -> None:
    """Make the gradients of the embedding and of its replica in the last stage their sum: the same bits on both sides, since
    a + b = b + a, so that the same optimizer keeps the two parameters the same. Nothing without MTP layers.

    A collective of the first and the last stage's ranks; where these are one rank, a local sum.
    """
    holders = [stage for stage in stages if stage.model.embed_tokens is not None and stage.part.stages > 1]
    gradients = [_local(stage.model.embed_tokens.weight.grad) for stage in holders]
    gradients = [gradient for gradient in gradients if gradient is not None]
    if not gradients or not stages[0].config.num_nextn_predict_layers:
        return
    if len(gradients) == 2:
        total = gradients[0] + gradients[1]
        for gradient in gradients:
            gradient.copy_(total)
        return
    mine, peer = gradients[0].contiguous(), 0 if holders[0].part.last else dist.get_world_size(group) - 1
    theirs = torch.empty_like(mine)
    operations = [
        dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
        dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    gradients[0].add_(theirs)


def _the_loss(output: Tensor, _target: Tensor) -> Tensor:
    """The last stage's output is its loss already: the head's weight is read inside its forward, where it is whole."""
    return output


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _plain(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
