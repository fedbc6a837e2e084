"""Placement of experts: the published example, what every placement must hold, and the optimum at sizes where all can be tried."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.infer.redundancy import Cluster, Placement, place

# The worked example of deepseek-ai/EPLB's README: 2 layers of 12 experts in 4 groups, 16 slots, 8 GPUs, 2 nodes.
LOADS = np.array([
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
])  # fmt: skip
SLOTS = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
CLUSTER = Cluster(gpus=8, nodes=2, slots=16, groups=4)


def test_the_published_example_slot_for_slot():
    assert place(LOADS, CLUSTER, "eplb").slots.tolist() == SLOTS


def test_refining_makes_the_example_better_or_equal_and_keeps_groups_in_nodes():
    planned, published = place(LOADS, CLUSTER), Placement(np.array(SLOTS), 12, CLUSTER)
    assert (planned.imbalance(LOADS) <= published.imbalance(LOADS)).all()
    assert groups_stay(planned)


def groups_stay(placement: Placement) -> bool:
    """Whether all copies of all experts of a group are in one node."""
    cluster = placement.cluster
    size, wide = placement.experts // cluster.groups, cluster.slots // cluster.nodes
    return all(
        len({slot // wide for slot, expert in enumerate(row) if expert // size == group}) == 1
        for row in placement.slots
        for group in range(cluster.groups)
    )


@st.composite
def cases(draw):
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    gpus = nodes * per_node
    groups = draw(st.sampled_from([1, nodes, 2 * nodes]))
    unit = np.lcm(gpus, groups)  # so that experts in order are a placement too
    experts = int(unit) * draw(st.integers(1, 2))
    slots = experts + gpus * draw(st.integers(0, 2))
    rows = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    loads = np.array(draw(st.lists(rows, min_size=1, max_size=2)))
    return loads, Cluster(gpus=gpus, nodes=nodes, slots=slots, groups=groups)


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(["plan", "eplb", "greedy"]))
def test_every_placement_is_one(case, method):
    loads, cluster = case
    placed = place(loads, cluster, method)
    assert placed.slots.shape == (len(loads), cluster.slots)
    assert (placed.copies >= 1).all()
    assert (placed.copies.sum(1) == cluster.slots).all()
    np.testing.assert_allclose(placed.gpu_loads(loads).sum(1), loads.sum(1))  # nothing lost
    assert (placed.imbalance(loads) >= 1 - 1e-9).all()
    for row, slots in zip(placed.slots, placed.slots_of()):
        assert sorted(slot for expert in slots for slot in expert) == list(range(cluster.slots))
        assert all(row[slot] == expert for expert, there in enumerate(slots) for slot in there)
    if cluster.hierarchical and method != "greedy":
        assert groups_stay(placed)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_the_plan_is_never_worse_than_no_redundancy_or_eplb(case):
    loads, cluster = case
    plain = place(
        loads, Cluster(gpus=cluster.gpus, nodes=cluster.nodes, slots=loads.shape[1], groups=cluster.groups), "none"
    )
    planned = place(loads, cluster).imbalance(loads)
    assert (planned <= plain.imbalance(loads) + 1e-9).all()
    assert (planned <= place(loads, cluster, "eplb").imbalance(loads) + 1e-9).all()


def optimum(load: list[int], gpus: int, slots: int) -> float:
    """Least load of the heaviest GPU, by trying every number of copies and every way to deal them out."""
    best, room = float("inf"), slots // gpus
    for extra in itertools.combinations_with_replacement(range(len(load)), slots - len(load)):
        copies = [1 + extra.count(e) for e in range(len(load))]
        items = [load[e] / copies[e] for e in range(len(load)) for _ in range(copies[e])]
        best = min(best, dealt(sorted(items, reverse=True), [0.0] * gpus, [room] * gpus, best))
    return best


def dealt(items: list[float], totals: list[float], room: list[int], bound: float) -> float:
    if not items:
        return max(totals)
    tried = set()
    for gpu, total in enumerate(totals):
        if room[gpu] and (total, room[gpu]) not in tried and total + items[0] < bound:
            tried.add((total, room[gpu]))
            totals[gpu], room[gpu] = total + items[0], room[gpu] - 1
            bound = min(bound, dealt(items[1:], totals, room, bound))
            totals[gpu], room[gpu] = total, room[gpu] + 1
    return bound


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=4, max_size=4), st.sampled_from([(2, 4), (2, 6), (3, 6), (4, 4), (4, 8)]))
def test_at_tiny_sizes_the_plan_is_within_half_of_the_optimum(load, sizes):
    gpus, slots = sizes
    found = place(np.array([load]), Cluster(gpus=gpus, slots=slots)).gpu_loads(np.array([load])).max()
    best = optimum(load, gpus, slots)
    assert best <= found + 1e-9
    assert found <= 1.5 * best + 1e-9  # 1.32 is the worst of 2,400 drawn, 1.02 their mean


def test_groups_that_do_not_divide_are_placed_over_all_nodes_at_once():
    loads, cluster = np.random.default_rng(0).integers(1, 100, (2, 12)), Cluster(gpus=9, nodes=3, slots=18, groups=4)
    whole = Cluster(gpus=9, nodes=1, slots=18, groups=1)
    assert not cluster.hierarchical
    assert (place(loads, cluster).slots == place(loads, whole).slots).all()


def test_a_heavy_expert_gets_the_copies():
    loads = np.array([[100.0, 1, 1, 1]])
    placed = place(loads, Cluster(gpus=4, slots=8))
    assert placed.copies[0, 0] >= 4
    assert placed.imbalance(loads)[0] < 1.1
    assert place(loads, Cluster(gpus=4, slots=4), "none").imbalance(loads)[0] == pytest.approx(400 / 103)


def test_no_load_is_balanced():
    assert place(np.zeros((1, 4)), Cluster(gpus=2, slots=6)).imbalance(np.zeros((1, 4))).tolist() == [1.0]


@pytest.mark.parametrize(
    ("loads", "sizes", "message"),
    [
        (np.ones(4), {"gpus": 2, "slots": 4}, r"shape \(4,\)"),
        (-np.ones((1, 4)), {"gpus": 2, "slots": 4}, "not negative"),
        (np.ones((1, 4)), {"gpus": 2, "slots": 5}, "take 6"),
        (np.ones((1, 4)), {"gpus": 2, "slots": 2}, "take 4"),
        (np.ones((1, 4)), {"gpus": 3, "nodes": 2, "slots": 6}, "multiple of 2 nodes"),
        (np.ones((1, 4)), {"gpus": 2, "slots": 4, "groups": 3}, "of 3 groups"),
    ],
)
def test_what_does_not_divide_is_refused(loads, sizes, message):
    with pytest.raises(ValueError, match=message):
        place(loads, Cluster(**sizes))


def test_none_takes_no_copies():
    with pytest.raises(ValueError, match="without redundancy"):
        place(np.ones((1, 4)), Cluster(gpus=2, slots=6), "none")
