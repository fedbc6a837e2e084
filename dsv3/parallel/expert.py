"""Expert parallelism: each rank of a group holds E/ranks of a layer's experts, and tokens travel to them and back.

    dispatch   rows to the ranks of their experts (dispatch.py) -> sorted by local expert
    compute    the same `experts(x, weights, ...)` as on one device, on the rows that arrived
    combine    the same way back -> each token's rows summed in float32

Weights go with the rows and are multiplied at the experts; their gradients come home the same way. Counts travel first, on their
own: an all-to-all needs its sizes on the host, the one wait for a GPU in here. Shared experts are multiplied while the dispatch
is under way. In FP8 a row travels as e4m3 codes with power-of-two scales, forward to the experts and backward from the combine,
as the report has it (3.3.3); what arrives is what the experts' own cast would have made of it, so no number changes. In other
precisions it does so by option: half the bytes of bfloat16, and rows rounded to 3 bits behind the leading one. Combines travel
as they are.

A token reaches at most topk_group groups of experts (model.Router), and `ParallelConfig.check` keeps groups whole on ranks, so
it reaches few nodes, and where the ranks lie on several it crosses once to each.
Source: V3 report sections 2.1.2, 3.2.2. Legend: N tokens here, D model, K top-k, R' rows received, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from dsv3.kernels.moe import sequence_balance_loss, sort_by_expert
from dsv3.model.fp8 import Fp8Experts
from dsv3.model.transformer import Context, DeepseekV3, Experts, MoE, Routed
from dsv3.parallel.dispatch import Combine, Dispatch, OneHop, TwoHops


def spread_experts(model: DeepseekV3, way: OneHop | TwoHops, *, fp8: bool = False) -> None:
    """Keep this rank's experts of every MoE layer, in place, and make the layers send their tokens around.

    Parameters keep their names; rows rank·E/ranks to (rank + 1)·E/ranks - 1 of each stay.

    Args:
        way: among the ranks (dispatch.way_of).
        fp8: rows travel as e4m3 codes also to experts that are not in FP8.
    """
    ranks, rank = dist.get_world_size(way.group), dist.get_rank(way.group)
    for module in model.modules():
        if isinstance(module, MoE):
            keep_rows(module.experts, rank, ranks)
            module.__class__ = ParallelMoE
            assert isinstance(module, ParallelMoE)
            module.way, module.fp8 = way, fp8 or isinstance(module.experts, Fp8Experts)


def keep_rows(experts: nn.Module, rank: int, ranks: int) -> None:
    """This rank's experts of a layer, in place."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        mine = parameter.detach().chunk(ranks)[rank].clone()
        setattr(experts, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))
    if isinstance(experts, Fp8Experts):
        experts.refresh()


class ParallelMoE(MoE):
    """MoE whose experts are this rank's share; see the file's head."""

    way: OneHop | TwoHops
    fp8: bool
    """Whether rows travel as codes."""

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Routed]:
        flat = x.flatten(0, -2)  # (N, D)
        scores, indices, weights = context.route(self.gate, flat)
        route, counts, arriving = self.way.plan(indices, scores.shape[-1])
        beside: list[Tensor] = []  # the shared experts' result

        def meanwhile() -> None:
            if self.shared_experts is not None:
                with torch.enable_grad() if grad else torch.no_grad():
                    beside.append(self.shared_experts(flat)[0])

        grad = torch.is_grad_enabled()
        rows, shares = Dispatch.apply(flat, weights, route, self.fp8, meanwhile)
        y = Combine.apply(self._compute(rows, shares, arriving), route, self.fp8)
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
