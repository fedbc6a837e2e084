"""Which expert goes on which GPU in serving, and which go there twice: from load statistics, so that no GPU is waited for.

A copy of an expert takes 1 / copies of its load. Slots hold one expert each, every GPU equally many; the step of a layer takes
as long as its heaviest GPU. What is minimised is heaviest / mean, a layer at a time, by

    eplb      groups of experts packed onto nodes, where groups divide among nodes (a token goes to few groups, so to few nodes);
              in each node one more copy, again and again, to the expert with the most load a copy; copies packed onto GPUs.
              Packing: heaviest first, each to the lightest pack with room. Where groups do not divide: the same over all at once.
    refine    exchanges between the heaviest GPU and another of its node (global: any), while that makes the pair lighter
    greedy    to compare with: the heaviest experts twice, packed without regard to groups
    none      experts in order, no copies

`plan` refines three: eplb, eplb with at most one copy of an expert a GPU, and the plain order, and keeps the best: it is never
worse than no redundancy. Copies hold the same weights, so placement changes no output but by the order of sums.
Source: V3 report section 3.4; the procedure and example of deepseek-ai/EPLB. Does not: predict loads, or move weights.
Legend: L layers, E experts, S slots, P GPUs, numbered node by node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Method = Literal["plan", "eplb", "greedy", "none"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where experts are served."""

    gpus: int
    nodes: int = 1
    slots: int
    """Experts held over all GPUs, copies included."""
    groups: int = 1
    """n_group of the model."""

    def check(self, experts: int) -> None:
        """Refuse what does not divide.

        Raises:
            ValueError: with the sizes.
        """
        if min(self.gpus, self.nodes, self.groups) < 1 or self.gpus % self.nodes or experts % self.groups:
            raise ValueError(
                f"{self.gpus} GPUs must be a multiple of {self.nodes} nodes, and {experts} experts of {self.groups} groups"
            )
        if self.slots < experts or self.slots % self.gpus:
            fits = -(-max(self.slots, experts) // self.gpus) * self.gpus
            raise ValueError(
                f"{self.slots} slots must hold {experts} experts and be a multiple of {self.gpus} GPUs: take {fits}"
            )

    @property
    def hierarchical(self) -> bool:
        """Whether whole groups stay in a node."""
        return self.groups % self.nodes == 0


@dataclass(frozen=True)
class Placement:
    """Of each layer the expert in each slot; slots are numbered GPU by GPU."""

    slots: np.ndarray
    """(L, S) int64."""
    experts: int
    cluster: Cluster

    @property
    def copies(self) -> np.ndarray:
        """(L, E) int64: at least 1."""
        return np.stack([np.bincount(row, minlength=self.experts) for row in self.slots])

    def gpu_loads(self, loads: np.ndarray) -> np.ndarray:
        """(L, P) float64: what each GPU has to do when experts have these loads (L, E)."""
        share = np.asarray(loads, dtype=np.float64) / self.copies
        return np.take_along_axis(share, self.slots, axis=1).reshape(len(share), self.cluster.gpus, -1).sum(-1)

    def imbalance(self, loads: np.ndarray) -> np.ndarray:
        """(L,) heaviest GPU / mean of GPUs; 1 is perfect. A layer without load is 1."""
        per_gpu = self.gpu_loads(loads)
        mean = per_gpu.mean(1)
        return np.where(mean > 0, per_gpu.max(1) / np.where(mean > 0, mean, 1), 1.0)

    def slots_of(self) -> list[list[list[int]]]:
        """Of each layer and expert its slots, ascending: what a dispatcher chooses from."""
        return [[np.flatnonzero(row == expert).tolist() for expert in range(self.experts)] for row in self.slots]


def place(loads: np.ndarray, cluster: Cluster, method: Method = "plan") -> Placement:
    """Place the experts of every layer.

    Args:
        loads: (L, E), not negative: tokens sent to each expert over some time.

    Raises:
        ValueError: loads that are no such array, or a cluster that does not divide; "none" needs as many slots as experts.
    """
    loads = np.asarray(loads, dtype=np.float64)
    if loads.ndim != 2 or loads.size == 0 or not np.isfinite(loads).all() or loads.min() < 0:
        raise ValueError(f"loads of shape {loads.shape} must be (layers, experts), finite and not negative")
    cluster.check(loads.shape[1])
    if method == "none" and cluster.slots != loads.shape[1]:
        raise ValueError(f"{loads.shape[1]} experts without redundancy take as many slots, not {cluster.slots}")
    placers = {"plan": _plan, "eplb": _eplb, "greedy": _greedy, "none": lambda load, cluster: np.arange(load.size)}
    return Placement(np.stack([placers[method](load, cluster) for load in loads]), loads.shape[1], cluster)


def _plan(load: np.ndarray, cluster: Cluster) -> np.ndarray:
    """(E,) -> (S,), refined."""
    starts = [_eplb(load, cluster), _eplb(load, cluster, spread=True)]
    if load.size % cluster.gpus == 0:
        # Experts in order, each GPU's free slots filled with second copies of its own: as heavy as without redundancy.
        own = np.arange(load.size).reshape(cluster.gpus, -1)
        starts.append(np.take(own, np.arange(cluster.slots // cluster.gpus) % own.shape[1], axis=1).ravel())
    ends = [_refine(slots, load, cluster) for slots in starts]
    return min(ends, key=lambda slots: _heaviest(slots, load, cluster))


def _heaviest(slots: np.ndarray, load: np.ndarray, cluster: Cluster) -> float:
    share = load / np.maximum(np.bincount(slots, minlength=load.size), 1)
    return float(share[slots].reshape(cluster.gpus, -1).sum(1).max())


def _eplb(load: np.ndarray, cluster: Cluster, *, spread: bool = False) -> np.ndarray:
    """(E,) -> (S,); with `spread` an expert has no more copies than its node has GPUs, as far as slots allow."""
    nodes, groups = (cluster.nodes, cluster.groups) if cluster.hierarchical else (1, 1)
    members = np.arange(load.size).reshape(groups, -1)
    node_groups = _pack(load[members].sum(1), nodes)
    placed = []
    for mine in node_groups:
        experts = members[mine].ravel()
        most = cluster.gpus // nodes if spread else cluster.slots
        copies = _replicate(load[experts], cluster.slots // nodes, most)
        share = load[experts] / np.bincount(copies)
        placed.append(experts[copies[_pack(share[copies], cluster.gpus // nodes)]].ravel())
    return np.concatenate(placed)


def _greedy(load: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Copies go to the heaviest experts in turn, not again to the one that has the most load a copy."""
    heaviest = np.argsort(-load, kind="stable")
    slots = np.concatenate([np.arange(load.size), np.resize(heaviest, cluster.slots - load.size)])
    share = load / np.bincount(slots)
    return slots[_pack(share[slots], cluster.gpus)].ravel()


def _replicate(load: np.ndarray, slots: int, most: int) -> np.ndarray:
    """(S,): every expert once, in order, then one more copy, again and again, of the one with the most load a copy, of those that
    have fewer than `most`."""
    copies, order = np.ones(load.size), list(range(load.size))
    for _ in range(slots - load.size):
        heaviest = int(np.argmax(np.where(copies < most, load / copies, -1)))
        copies[heaviest] += 1
        order.append(heaviest)
    return np.array(order)


def _pack(weights: np.ndarray, packs: int) -> np.ndarray:
    """(packs, n / packs) indices of the n weights: heaviest first, each to the lightest pack that has room."""
    room = weights.size // packs
    if room == 1:
        return np.arange(packs)[:, None]
    held, total = [[] for _ in range(packs)], np.zeros(packs)
    for item in np.argsort(-weights, kind="stable"):
        lightest = min((p for p in range(packs) if len(held[p]) < room), key=lambda p: total[p])
        held[lightest].append(int(item))
        total[lightest] += weights[item]
    return np.array(held)


def _refine(slots: np.ndarray, load: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Exchange slots of the heaviest GPU with others' while the heavier of the two becomes lighter by it."""
    held, share = slots.reshape(cluster.gpus, -1).copy(), load / np.bincount(slots, minlength=load.size)
    nodes = cluster.nodes if cluster.hierarchical else 1
    node = np.arange(cluster.gpus) // (cluster.gpus // nodes)
    for home in range(nodes):
        mine = np.flatnonzero(node == home)
        for _ in range(16 * mine.size):  # each exchange makes the list of loads smaller; the bound is for time
            weights = share[held[mine]]  # (GPUs, slots)
            total = weights.sum(1)
            top = int(total.argmax())
            less = (
                weights[top][:, None, None] - weights[None]
            )  # (slot of the heaviest, GPU, slot there): load that leaves
            pair = np.maximum(total[top] - less, total[None, :, None] + less)
            pair[:, top] = np.inf
            best = np.unravel_index(int(pair.argmin()), pair.shape)
            if not pair[best] < total[top] * (1 - 1e-12):
                break
            a, other, b = (int(i) for i in best)
            held[mine[top], a], held[mine[other], b] = held[mine[other], b], held[mine[top], a]
    return held.ravel()
