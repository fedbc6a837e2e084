"""Expert parallelism: each rank of a group holds E/ranks of a layer's experts, and tokens travel to them and back.

    dispatch   rows in expert order, which is rank order too -> all-to-all -> sorted by local expert
    compute    the same `experts(x, weights, ...)` as on one device, on the rows that arrived
    combine    all-to-all back -> each token's K rows summed in float32

Counts travel first, on their own: an all-to-all needs its sizes on the host, the one wait for a GPU in here. Shared experts are
multiplied while the dispatch is under way. In FP8 a row travels as e4m3 codes with power-of-two scales, forward to the experts
and backward from the combine, as the report has it (3.3.3); what arrives is what the experts' own cast would have made of it,
so no number changes. In other precisions it does so by option: half the bytes of bfloat16, and rows rounded to 3 bits behind
the leading one. Combines travel as they are.

A token reaches at most topk_group groups of experts (model.Router), and `ParallelConfig.check` keeps groups whole on ranks, so
it reaches few nodes. It travels once an expert, not once a node: the two hops of the report's kernels are not built here.
Source: V3 report sections 2.1.2, 3.2.2. Legend: N tokens here, D model, K top-k, R = N·K rows sent, R' rows received, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from dsv3.kernels.moe import permute, sequence_balance_loss, sort_by_expert, unpermute
from dsv3.kernels.quant import cast_tiles, dequantize_tiles
from dsv3.model.fp8 import Fp8Experts
from dsv3.model.transformer import Context, DeepseekV3, Experts, MoE, Routed


def spread_experts(model: DeepseekV3, group: dist.ProcessGroup, *, fp8: bool = False) -> None:
    """Keep this rank's experts of every MoE layer, in place, and make the layers send their tokens around.

    Parameters keep their names; rows rank·E/ranks to (rank + 1)·E/ranks - 1 of each stay.

    Args:
        fp8: rows travel as e4m3 codes also to experts that are not in FP8.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for module in model.modules():
        if isinstance(module, MoE):
            keep_rows(module.experts, rank, ranks)
            module.__class__ = ParallelMoE
            assert isinstance(module, ParallelMoE)
            module.group, module.fp8 = group, fp8 or isinstance(module.experts, Fp8Experts)


def keep_rows(experts: nn.Module, rank: int, ranks: int) -> None:
    """This rank's experts of a layer, in place."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        mine = parameter.detach().chunk(ranks)[rank].clone()
        setattr(experts, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))
    if isinstance(experts, Fp8Experts):
        experts.refresh()


class ParallelMoE(MoE):
    """MoE whose experts are this rank's share; see the file's head."""

    group: dist.ProcessGroup
    fp8: bool
    """Whether rows travel as codes."""

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Routed]:
        flat = x.flatten(0, -2)  # (N, D)
        scores, indices, weights = context.route(self.gate, flat)
        order, inverse, counts = sort_by_expert(indices, scores.shape[-1])
        ranks = dist.get_world_size(self.group)
        arriving = _swap_counts(counts, self.group)  # (ranks, E / ranks)
        sent, received = _host(counts.view(ranks, -1).sum(1), arriving.sum(1))
        rows, shares = permute(flat, order, inverse), permute(weights.reshape(-1, 1), order, inverse)
        beside: list[Tensor] = []  # the shared experts' result

        def meanwhile() -> None:
            if self.shared_experts is not None:
                with torch.enable_grad() if grad else torch.no_grad():
                    beside.append(self.shared_experts(flat)[0])

        grad = torch.is_grad_enabled()
        tokens = Exchange.apply(rows, sent, received, self.group, self.fp8, False, meanwhile)
        shares = Exchange.apply(shares, sent, received, self.group, False, False, _nothing)
        y = self._compute(tokens, shares, arriving)
        y = Exchange.apply(y, received, sent, self.group, False, self.fp8, _nothing)
        y = unpermute(y, order, inverse, indices.shape[-1])
        balance = scores.new_zeros(())
        if context.balance:
            balance = sequence_balance_loss(scores.view(*x.shape[:-1], -1), indices.shape[-1])
        return (y + beside[0] if beside else y).view_as(x), Routed(counts, balance, indices)

    def _compute(self, rows: Tensor, shares: Tensor, arriving: Tensor) -> Tensor:
        """Rows (R', D) by sending rank and then by expert, their weights (R', 1) -> weighted results (R', D), as they came."""
        ranks, local = arriving.shape
        names, came = torch.arange(local, device=rows.device).repeat(ranks), rows.shape[0]
        expert_of = names.repeat_interleave(arriving.flatten(), output_size=came)
        if came == 0:  # the replicas meet in here to gather the weights, so someone must come: a row of no weight
            rows, shares, expert_of = (pad(rows, (0, 0, 0, 1)), pad(shares, (0, 0, 0, 1)), names[:1])
        order, inverse, counts = sort_by_expert(expert_of.unsqueeze(1), local)
        assert isinstance(self.experts, (Experts, Fp8Experts))
        return self.experts(rows, shares, order, inverse, counts)[:came]


class Exchange(torch.autograd.Function):
    """All-to-all of rows: x (R, W), `sent[i]` of them to rank i -> (R', W), `received[i]` of them from rank i. Its backward is the
    same way back. With `fp8` or `fp8_back` rows travel as e4m3 codes and scales in that direction. `meanwhile` is called while
    the rows of the forward are under way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, fp8: bool, fp8_back: bool,
        meanwhile: Callable[[], None],
    ) -> Tensor:  # fmt: skip
        ctx.sizes, ctx.group, ctx.fp8_back = (sent, received), group, fp8_back
        return _exchange(x, sent, received, group, fp8, meanwhile)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sent, received = ctx.sizes
        return _exchange(grads[0], received, sent, ctx.group, ctx.fp8_back, _nothing), *(None,) * 6


def _exchange(
    x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, fp8: bool, meanwhile: Callable[[], None]
) -> Tensor:
    parts = [x.contiguous()]
    if fp8:
        codes, scales = cast_tiles(x, pow2=True)
        parts = [codes.view(torch.uint8), scales.contiguous()]
    arrived = [part.new_empty(sum(received), *part.shape[1:]) for part in parts]
    works = [
        dist.all_to_all_single(out, part, received, sent, group=group, async_op=True)
        for out, part in zip(arrived, parts, strict=True)
    ]
    meanwhile()
    for work in works:
        assert work is not None
        work.wait()
    return dequantize_tiles(arrived[0].view(torch.float8_e4m3fn), arrived[1], x.dtype) if fp8 else arrived[0]


def _nothing() -> None:
    """Nothing to do meanwhile."""


def _swap_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(E,) rows I send to each expert -> (ranks, E/ranks): rows that each rank sends to each of mine."""
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts, group=group)
    return out.view(dist.get_world_size(group), -1)


def _host(*sizes: Tensor) -> list[list[int]]:
    return torch.stack(sizes).tolist()
