"""How tokens travel to experts on other ranks and back: one all-to-all, or two where the ranks lie on several nodes.

    one hop    a token goes once an expert, to the expert's rank
    two hops   1  once a node that holds any of its experts, over the network, to the rank of the same place in that node
               2  once an expert, over the node's fast links, to the expert's rank
    back       2  rows of a token's experts in the node -> their sum          1  sums of a token's nodes -> their sum

Both sums are made in float32 and rounded once to the rows' own dtype, in which they travel: in bfloat16 that is one rounding more
than one hop has, a partial sum's. In the node they run over a token's experts in order, at home over its nodes in order, whoever
was first to arrive. The way there copies rows and the way back sums them, each the other's transpose: the backward pass of a
dispatch is a combine, and that of a combine a dispatch. Rows in FP8 are cast once, at home, and pass both hops as codes. Once an
expert on the fast links: once a rank would save little (7.5 of V3's 8 rows on 64 ranks) and round once more.

Sizes come from one exchange of counts for both hops, and for it the host waits once. Beside its row a token takes to each node
its K experts' names (int32) and weights (float32), for the rank there to pass it on by: 64 bytes to V3's 7,392 in FP8.
Source: V3 report section 3.2.2 (a token to four nodes at most, InfiniBand and then NVLink); DeepEP's kernels do the same.
Does not: multiply (expert.py), or do anything beside the second hop. Legend: N tokens here, D width, K top-k, E experts, M nodes,
n ranks a node, e experts a rank, T tokens that came to be passed on, S rows sent, R' rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.kernels.moe import sort_by_expert, sum_copies, unpermute
from dsv3.kernels.quant import cast_tiles, dequantize_tiles


def nothing() -> None:
    """Nothing to do while rows travel."""


# -- a route: who sends which rows to whom -------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of one hop, known on the host."""

    group: dist.ProcessGroup
    held: int
    """Rows that it picks from."""
    sent: list[int]
    """Rows to each rank of the group."""
    received: list[int]


class Route(NamedTuple):
    """A batch's way to its experts. `sizes` of each hop; `maps` on the device, three of each hop and one at the end:

    pick    (S,) the row, of those held, that each sent one is a copy of: by rank, and for one expert in the order held
    order   (S,) the copies, those of a row together and in order of their ranks ...
    starts  (held,) ... and where each row's begin; empty in one hop, where each has K
    pairs   (S,) of the last hop: which of its row's K slots each is a copy for, as row·K + slot
    """

    sizes: tuple[Sizes, ...]
    maps: tuple[Tensor, ...]
    top_k: int

    def there(self, parts: list[Tensor], weights: list[Tensor], meanwhile: Callable[[], None]) -> list[Tensor]:
        """Parts of rows (N, ...), and weights (N, K) if any -> at the experts, (R', ...) each, and (R', 1)."""
        for hop, sizes in enumerate(self.sizes):
            pick = self.maps[3 * hop]
            rows = [part.index_select(0, pick) for part in parts]
            if weights and hop == len(self.sizes) - 1:
                rows.append(weights[0].reshape(-1, 1).index_select(0, self.maps[-1]))
            elif weights:
                rows.append(weights[0].index_select(0, pick))
            arrived = exchange(rows, sizes.sent, sizes.received, sizes.group, nothing if hop else meanwhile)
            parts, weights = arrived[: len(parts)], arrived[len(parts) :]
        return [*parts, *weights]

    def back(self, rows: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """The transpose: rows (R', D) -> their sums (N, D), and (R', 1) if any -> (N, K)."""
        for hop in reversed(range(len(self.sizes))):
            sizes = self.sizes[hop]
            rows, *weights = exchange([rows, *weights], sizes.received, sizes.sent, sizes.group, nothing)
            rows = self._sum(hop, rows)
            if weights and hop == len(self.sizes) - 1:
                slots = rows.new_zeros(sizes.held * self.top_k, 1, dtype=weights[0].dtype)
                weights = [slots.index_copy_(0, self.maps[-1], weights[0]).view(sizes.held, self.top_k)]
            elif weights:
                weights = [self._sum(hop, weights[0])]
        return [rows, *weights]

    def _sum(self, hop: int, rows: Tensor) -> Tensor:
        """(S, W) -> (held, W)."""
        pick, order, starts = self.maps[3 * hop : 3 * hop + 3]
        return unpermute(rows, pick, order, self.top_k) if len(self.sizes) == 1 else sum_copies(rows, order, starts)


class Plan(NamedTuple):
    """What a batch's routing comes to."""

    route: Route
    counts: Tensor
    """(E,) int64: rows of mine to each expert."""
    arriving: Tensor
    """(senders, e) int64: rows to each of my experts by the rank that they come from last, in which order they come."""


@dataclass(frozen=True, kw_only=True)
class OneHop:
    """A token once an expert."""

    group: dist.ProcessGroup

    def plan(self, indices: Tensor, experts: int) -> Plan:
        """indices (N, K) int64 of E experts, of which each rank of the group holds as many."""
        order, inverse, counts = sort_by_expert(indices, experts)
        arriving = _swap(counts.view(dist.get_world_size(self.group), -1), self.group)
        sent, received = _host(counts.view_as(arriving).sum(1), arriving.sum(1))
        sizes = (Sizes(self.group, indices.shape[0], sent, received),)
        maps = (order // indices.shape[1], inverse, order[:0], order)
        return Plan(Route(sizes, maps, indices.shape[1]), counts, arriving)


@dataclass(frozen=True, kw_only=True)
class TwoHops:
    """A token once a node, and there once an expert. Ranks are numbered node by node."""

    group: dist.ProcessGroup
    across: dist.ProcessGroup
    """The ranks of my place in each node."""
    inside: dist.ProcessGroup
    """The ranks of my node."""

    def plan(self, indices: Tensor, experts: int) -> Plan:
        """See OneHop."""
        nodes, ranks = dist.get_world_size(self.across), dist.get_world_size(self.inside)
        counts = indices.new_zeros(experts).scatter_add_(0, indices.flatten(), torch.ones_like(indices).flatten())
        needs = nodes_of(indices, nodes, experts // nodes)
        mine = torch.cat([needs.sum(0).unsqueeze(1), counts.view(nodes, -1)], 1)  # (M, 1 + n·e)
        told = _swap(mine.repeat_interleave(ranks, 0), self.group).view(nodes, ranks, -1)
        came, passed, arriving = sizes_of(told, dist.get_rank(self.inside))
        sent, received, passed, taken = _host(mine[:, 0], came, passed, arriving.sum(1))
        first = pick_nodes(needs, sum(sent))
        # What a rank passes tokens on by goes ahead of them.
        names = exchange([indices.int().index_select(0, first[0])], sent, received, self.across, nothing)[0]
        local = names.long() - dist.get_rank(self.across) * (experts // nodes)
        *second, pairs = pick_experts(local, experts // nodes, sum(passed))
        sizes = (
            Sizes(self.across, indices.shape[0], sent, received),
            Sizes(self.inside, sum(received), passed, taken),
        )
        return Plan(Route(sizes, (*first, *second, pairs), indices.shape[1]), counts, arriving)


def way_of(group: dist.ProcessGroup, node: int | None = None) -> OneHop | TwoHops:
    """How the ranks of a group reach each other; called by all of them.

    Args:
        node: ranks in a row that a node holds; None, or all of them: one hop.

    Raises:
        ValueError: the group does not divide into nodes of that many.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if node is None or node == world:
        return OneHop(group=group)
    if node < 1 or world % node:
        fits = [size for size in range(1, world + 1) if world % size == 0]
        raise ValueError(f"{world} expert ranks do not lie on nodes of {node}: take one of {fits}")
    ranks = dist.get_process_group_ranks(group)
    start, place = rank // node * node, rank % node
    # Of their members' making alone: in a world of thousands the others have no part in them.
    inside, across = (
        cast(dist.ProcessGroup, dist.new_group(members, use_local_synchronization=True, group_desc=name))
        for name, members in (("expert node", ranks[start : start + node]), ("expert nodes", ranks[place::node]))
    )
    return TwoHops(group=group, across=across, inside=inside)


# -- bookkeeping: tensors in, tensors out ---------------------------------------------------------------------------------


def ranks_a_node(machines: list[int]) -> int:
    """machines: of each rank of a group, in order -> how many neighbours share one; all of them, so that they are one node, where
    machines have not as many each."""
    runs = [len(list(run)) for _, run in groupby(machines)]
    even = len(set(runs)) == 1 and len(runs) == len(set(machines))
    return runs[0] if even else len(machines)


def nodes_of(indices: Tensor, nodes: int, experts: int) -> Tensor:
    """indices (N, K), nodes of so many experts each -> (N, M) bool: the nodes that hold any of a token's experts."""
    needs = torch.zeros(indices.shape[0], nodes, dtype=torch.bool, device=indices.device)
    return needs.scatter_(1, indices // experts, True)


def sizes_of(told: Tensor, place: int) -> tuple[Tensor, Tensor, Tensor]:
    """What every rank told a node (M, n, 1 + n·e), how many tokens it needs the node for and how many rows of theirs each of its
    experts gets -> for the rank of that place there: tokens that come from each node (M,), rows to pass on to each rank (n,),
    and rows that come for each of its experts, by who passes them on (n, e)."""
    rows = told[:, :, 1:].unflatten(2, (told.shape[1], -1))  # (M, n, n, e): from each rank, to each expert of each rank
    return told[:, place, 0], rows[:, place].sum((0, 2)), rows[:, :, place].sum(0)


def pick_nodes(needs: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """needs (N, M), of which so many are true -> a first hop's pick, order and starts (see Route)."""
    wanted = needs.t().reshape(-1)
    pick = wanted.logical_not().byte().argsort(stable=True)[:rows] % max(1, needs.shape[0])
    return pick, *_by_row(pick, needs.sum(1))


def pick_experts(local: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """local (T, K): names of experts as the node counts its own, of which so many rows are for its `experts` -> a last hop's pick,
    order, starts and pairs (see Route)."""
    here = (local >= 0) & (local < experts)
    pairs = torch.where(here, local, experts).reshape(-1).argsort(stable=True)[:rows]
    pick = pairs // local.shape[1]
    return pick, *_by_row(pick, here.sum(1)), pairs


def _by_row(pick: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Order and starts of copies, so many of each row."""
    return pick.argsort(stable=True), copies.cumsum(0) - copies


# -- the travel, with its gradients ---------------------------------------------------------------------------------------


class Dispatch(torch.autograd.Function):
    """x (N, D) and weights (N, K) -> rows (R', D) at their experts and their weights (R', 1). With `fp8` rows travel as e4m3 codes
    and scales. `meanwhile` is called while the first hop is under way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, route: Route, fp8: bool, meanwhile: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        _save(ctx, route)
        *rows, shares = route.there(_parts(x, fp8), [weights], meanwhile)
        return _joined(rows, x.dtype), shares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return *_saved(ctx).back(grads[0], [grads[1]]), None, None, None


class Combine(torch.autograd.Function):
    """Results of rows (R', D) -> each token's sum (N, D). With `fp8` the gradient travels as codes, never the sums."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, route: Route, fp8: bool) -> Tensor:
        _save(ctx, route)
        ctx.fp8 = fp8
        return route.back(y, [])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _joined(_saved(ctx).there(_parts(grads[0], ctx.fp8), [], nothing), grads[0].dtype), None, None


def _save(ctx: Any, route: Route) -> None:
    """Maps as saved tensors, so that layers which are computed again do not keep them."""
    ctx.save_for_backward(*route.maps)
    ctx.route = route._replace(maps=())


def _saved(ctx: Any) -> Route:
    return ctx.route._replace(maps=ctx.saved_tensors)


def _parts(x: Tensor, fp8: bool) -> list[Tensor]:
    if not fp8:
        return [x]
    codes, scales = cast_tiles(x, pow2=True)
    return [codes.view(torch.uint8), scales]


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else dequantize_tiles(parts[0].view(torch.float8_e4m3fn), parts[1], dtype)


def exchange(
    parts: list[Tensor], sent: list[int], received: list[int], group: dist.ProcessGroup, meanwhile: Callable[[], None]
) -> list[Tensor]:
    """All-to-all of the first dimension of each part, `sent[i]` to rank i; `meanwhile` is called while all are under way."""
    parts = [part.contiguous() for part in parts]
    arrived = [part.new_empty(sum(received), *part.shape[1:]) for part in parts]
    works = [
        dist.all_to_all_single(out, part, received, sent, group=group, async_op=True)
        for out, part in zip(arrived, parts, strict=True)
    ]
    meanwhile()
    for work in works:
        assert work is not None
        work.wait()
    return arrived


def _swap(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, W): a row for each rank -> a row from each."""
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=group)
    return out


def _host(*sizes: Tensor) -> list[list[int]]:
    """The one wait for a GPU in here."""
    told = torch.cat(sizes).tolist()
    lists = []
    for size in sizes:
        lists.append(told[: len(size)])
        told = told[len(size) :]
    return lists
