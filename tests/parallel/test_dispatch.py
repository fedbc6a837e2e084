"""Tokens that go once to a node and on from there: the numbers of one process, and who sends what to whom."""

import copy
import dataclasses
import itertools
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3.kernels.quant import cast_tiles, dequantize_tiles
from dsv3.model.fp8 import swap_fp8
from dsv3.model.transformer import Context, DeepseekV3, MoE
from dsv3.parallel import dispatch
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.dispatch import OneHop, TwoHops, nodes_of, pick_experts, pick_nodes, ranks_a_node, sizes_of, way_of
from dsv3.parallel.expert import spread_experts
from dsv3.parallel.mesh import Mesh
from tests.model.tiny import TINY, random_model
from tests.parallel.ranks import run_ranks
from tests.parallel.test_workers import take_steps

CONTEXT = Context(torch.empty(0), torch.empty(0))
NODE, TOKENS = 2, (9, 1, 14, 6)  # ranks a node; tokens of each of four ranks
LIMITED = dataclasses.replace(TINY, n_routed_experts=16)  # two of four groups: to both nodes
NARROW = dataclasses.replace(LIMITED, n_group=2, topk_group=1)  # to one of two
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "to several nodes": (LIMITED, {}),
    "to one node": (NARROW, {}),
    "as codes": (LIMITED, {}),
    "bfloat16": (LIMITED, {"dtype": torch.bfloat16}),
    "fp8": (LIMITED, {"dtype": torch.bfloat16, "fp8": True}),
    "crowded": (LIMITED, {"favoured": [0, 1, 4]}),  # nothing comes to the last rank of either node
}

# Ranks a machine, degrees, changes of the training, and how far gradients may be off. In FP8 a partial sum is rounded once more
# (to bfloat16), and of some 700 tokens one goes elsewhere.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], float]] = {
    "some ranks empty, recomputed": (
        2, {"expert": 4, "sharding": "fsdp"}, {"recompute": True, "schedule": {"batch_size": 5}}, 1e-5,
    ),
    "zero-bubble": (1, {"pipeline": 2, "expert": 2, "schedule": "zero-bubble"}, {}, 1e-5),
    "fp8": (2, {"expert": 4}, {"precision": "fp8"}, 0.2),
}  # fmt: skip


def layer_of(config: Any, dtype: torch.dtype = torch.float32, fp8: bool = False, favoured: Any = ()) -> DeepseekV3:
    model = random_model(config)
    for module in model.modules():
        if isinstance(module, MoE):
            module.gate.e_score_correction_bias[list(favoured)] = 4.0
    model.to(dtype)
    if fp8:
        swap_fp8(model)
    return model


def moe(model: DeepseekV3) -> MoE:
    return next(module for module in model.modules() if isinstance(module, MoE))


def inputs(rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a rank, and the gradient of what becomes of them."""
    draw = torch.Generator().manual_seed(rank)
    return tuple(torch.randn(2, TOKENS[rank], TINY.hidden_size, generator=draw).to(dtype).unbind())  # type: ignore


def run_layer(layer: MoE, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y, routed = layer(x, CONTEXT)
    y.backward(grad)
    found = {name: p.grad for name, p in layer.named_parameters()}
    with torch.no_grad():
        assert torch.equal(layer(x, CONTEXT)[0], y)
    return {"y": y.detach(), "x": x.grad, "counts": routed.counts, **found}  # type: ignore


def watched(layer: Any, way: Any, x: torch.Tensor, grad: torch.Tensor) -> dict[str, Any]:
    """`run_layer`, the rows of every exchange that crosses nodes, and the rows that came to the experts first."""
    plain, compute = dispatch.exchange, layer._compute
    sent: list[int] = []
    came: list[torch.Tensor] = []

    def look(parts: Any, sizes: list[int], received: Any, group: Any, meanwhile: Any) -> Any:
        if group is getattr(way, "across", way.group):
            sent.append(sum(sizes))
        return plain(parts, sizes, received, group, meanwhile)

    def note(rows: torch.Tensor, *rest: Any) -> Any:
        came.append(rows.detach().clone())
        return compute(rows, *rest)

    dispatch.exchange, layer._compute = look, note
    try:
        return run_layer(layer, x, grad) | {"sent": sent, "came": came[0]}
    finally:
        dispatch.exchange = plain


class Waits(TorchDispatchMode):
    """Notes operations that a GPU's host must wait for: those whose result's shape, or whose Python number, hangs on values."""

    NAMES = ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        chosen = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        repeated = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        self.seen += [name] if name in self.NAMES or chosen or repeated else []
        return func(*args, **(kwargs or {}))


def waits_of(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> tuple[list[str], int]:
    """Of a forward and backward pass: operations that wait, and exchanges of sizes."""
    plain, hosts = dispatch._host, []
    dispatch._host = lambda *sizes: hosts.append(1) or plain(*sizes)
    try:
        with Waits() as waits:
            layer(x.clone().requires_grad_(), CONTEXT)[0].backward(grad)
        return waits.seen, len(hosts)
    finally:
        dispatch._host = plain


def try_ways(group: Any) -> dict[str, dict[int, dict[str, Any]]]:
    """Of each case, by the ranks of a node."""
    ways, found = {size: way_of(group, size) for size in (1, NODE, 4)}, {}
    with pytest.raises(ValueError, match=r"4 expert ranks do not lie on nodes of 3: take one of \[1, 2, 4\]"):
        way_of(group, 3)
    for name, (config, options) in CASES.items():
        whole, found[name] = layer_of(config, **options), {}
        for size, way in ways.items():
            model = copy.deepcopy(whole)
            spread_experts(model, way, fp8=name == "as codes")
            given = inputs(dist.get_rank(group), options.get("dtype", torch.float32))
            waits = waits_of(moe(model), *given) if name == "to several nodes" else None
            model.zero_grad()
            found[name][size] = watched(moe(model), way, *given) | {"waits": waits}
    return found


def train_on_nodes(group: Any, folder: str) -> dict[str, dict[str, Any]]:
    told = {}
    for name, (node, degrees, changes, _) in LAYOUTS.items():
        os.environ["LOCAL_RANK"] = str(dist.get_rank() % node)
        way = Mesh(ParallelConfig(**degrees), TINY).way
        assert isinstance(way, TwoHops)
        assert dist.get_world_size(way.inside) == node
        told[name] = take_steps(group, degrees, f"{folder}/{name}", dict(changes), steps=1)
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    assert isinstance(Mesh(ParallelConfig(expert=4), TINY).way, OneHop)
    return told


def try_all(group: Any, folder: str) -> tuple[Any, Any]:
    """In one start of the processes, which is most of the time."""
    return try_ways(group), train_on_nodes(group, folder)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[tuple[Any, Any]]:
    return run_ranks(try_all, 4, tmp_path_factory.mktemp("ranks"), str(tmp_path_factory.mktemp("runs")))


@pytest.fixture
def tried(told) -> list[dict[str, dict[int, dict[str, Any]]]]:
    return [ways for ways, _ in told]


@pytest.fixture
def trained(told) -> list[dict[str, dict[str, Any]]]:
    return [runs for _, runs in told]


def one_process(case: str) -> tuple[MoE, dict[str, torch.Tensor]]:
    config, options = CASES[case]
    layer = moe(layer_of(config, **options))
    both = [inputs(rank, options.get("dtype", torch.float32)) for rank in range(4)]
    return layer, run_layer(layer, *(torch.cat(parts) for parts in zip(*both)))


def gathered(tried: Any, case: str, size: int) -> dict[str, torch.Tensor]:
    """Of all ranks what one process has."""
    parts = [told[case][size] for told in tried]
    joined = {key: torch.cat([part[key] for part in parts]) for key in ("y", "x")}
    for name in parts[0].keys() - {"y", "x", "sent", "came", "waits"}:
        of = [part[name] for part in parts]
        joined[name] = torch.cat(of) if name.startswith("experts.") else torch.stack(of).sum(0)
    return joined


@pytest.mark.dist
@pytest.mark.parametrize("case", ["to several nodes", "to one node", "crowded"])
def test_the_layer_and_all_its_gradients_are_one_processs(tried, case):
    _, one = one_process(case)
    for size in (1, NODE, 4):
        for name, value in gathered(tried, case, size).items():
            torch.testing.assert_close(value, one[name], rtol=2e-5, atol=2e-6, msg=f"{name} on nodes of {size}")


@pytest.mark.dist
def test_a_rank_that_no_token_comes_to_keeps_up(tried):
    assert [len(told["crowded"][NODE]["came"]) for told in tried].count(0) == 2


@pytest.mark.dist
@pytest.mark.parametrize(("case", "tolerance"), [("bfloat16", 3e-3), ("fp8", 3e-3), ("as codes", 2e-6)])
def test_two_hops_round_as_one_does_but_for_a_partial_sum(tried, case, tolerance):
    one = gathered(tried, case, 4)
    for name, value in gathered(tried, case, NODE).items():
        difference = (value.float() - one[name].float()).norm()
        assert difference <= tolerance * one[name].float().norm(), name
    assert (one["y"].float() - one_process("to several nodes")[1]["y"]).norm() > 0


@pytest.mark.dist
@pytest.mark.parametrize("case", ["as codes", "fp8"])
def test_the_same_codes_come_to_the_experts_by_two_hops_as_by_one(tried, case):
    for told in tried:
        one, two = (sorted(told[case][size]["came"].float().tolist()) for size in (4, NODE))
        assert one == two
    rows = dequantize_tiles(*cast_tiles(inputs(0)[0], pow2=True), torch.float32).tolist()
    assert {tuple(row) for row in rows} <= {
        tuple(row) for told in tried for row in told["as codes"][1]["came"].tolist()
    }


@pytest.mark.dist
@pytest.mark.parametrize("case", ["to several nodes", "to one node"])
def test_a_token_crosses_once_to_each_node_that_it_needs_and_once_back(tried, case):
    layer, _ = one_process(case)
    total = 0
    for rank, told in enumerate(tried):
        _, indices, _ = layer.gate(inputs(rank)[0])
        needed = [len(set((token // 8).tolist())) for token in indices]  # 8 experts a node
        assert max(needed) <= layer.gate.config.topk_group
        names, rows, sums, gradients, back, *again = told[case][NODE]["sent"]
        assert names == rows == gradients == sum(needed)
        assert sums == back
        assert again == [names, rows, sums]
        assert told[case][4]["sent"][0] == indices.numel()  # in one hop once an expert
        total += sum(needed) - sums
    assert total == 0


@pytest.mark.dist
@pytest.mark.parametrize("size", [NODE, 4])
def test_the_host_waits_once_for_the_sizes_of_all_hops_and_for_nothing_else(tried, size):
    assert [told["to several nodes"][size]["waits"] for told in tried] == [([], 1)] * 4


@pytest.mark.dist
def test_training_on_nodes_takes_the_step_of_one_process(trained, tmp_path):
    for name, (_, _, changes, far) in LAYOUTS.items():
        alone = take_steps(None, None, str(tmp_path / name), dict(changes), steps=1)
        for told in trained:
            assert told[name]["counts"] == alone["counts"] or name == "fp8"
            losses, one = torch.tensor(told[name]["loss"])[:, :3], torch.tensor(alone["loss"])[:, :3]
            torch.testing.assert_close(losses, one, rtol=1e-3 if name == "fp8" else 2e-5, atol=1e-6)
            for parameter, gradient in told[name]["gradients"].items():
                expected = alone["gradients"][parameter]
                off = float((gradient - expected).norm() / expected.norm())
                assert off <= far, (name, parameter, off)
            if name != "fp8":
                assert all(torch.equal(bias, alone["biases"][n]) for n, bias in told[name]["biases"].items())


# -- bookkeeping ---------------------------------------------------------------------------------------------------------


@st.composite
def routings(draw: Any) -> tuple[int, int, int, list[torch.Tensor]]:
    """Nodes, ranks of each, experts of each rank, and the experts (N, K) of every rank's tokens."""
    nodes, ranks, local = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    experts = nodes * ranks * local
    top_k, seed = draw(st.integers(1, min(4, experts))), draw(st.integers(0, 10**6))
    source = torch.Generator().manual_seed(seed)
    tokens = draw(st.lists(st.integers(0, 5), min_size=nodes * ranks, max_size=nodes * ranks))
    skew = torch.rand(experts, generator=source) * draw(st.sampled_from([0.0, 3.0]))
    return nodes, ranks, local, [(torch.rand(n, experts, generator=source) + skew).topk(top_k).indices for n in tokens]


@settings(max_examples=60, deadline=None)
@given(routings())
def test_every_row_comes_to_its_expert_by_way_of_its_place_in_the_node(routing):
    nodes, ranks, local, indices = routing
    node, world = ranks * local, range(nodes * ranks)
    needs = [nodes_of(of, nodes, node) for of in indices]
    counts = [torch.bincount(of.flatten(), minlength=nodes * node).view(nodes, node) for of in indices]
    told = torch.stack([torch.cat([n.sum(0).unsqueeze(1), c], 1) for n, c in zip(needs, counts)])  # (from, M, 1 + n·e)
    first = [pick_nodes(n, int(n.sum())) for n in needs]
    passed: dict[int, list[tuple[int, int]]] = {}  # what each rank passes on: (from, token), in the order that it came
    for rank in world:
        there, place = rank // ranks, rank % ranks
        came, _, _ = sizes_of(told[:, there].view(nodes, ranks, -1), place)
        passed[rank] = []
        for other in range(nodes):
            source = other * ranks + place
            starts = needs[source].sum(0).cumsum(0) - needs[source].sum(0)
            sent = first[source][0][starts[there] : starts[there] + came[other]].tolist()
            assert sent == [t for t, of in enumerate(indices[source].tolist()) if there in {e // node for e in of}]
            passed[rank] += [(source, token) for token in sent]
    for rank in world:
        there, place = rank // ranks, rank % ranks
        mine, here = range(rank * local, (rank + 1) * local), told[:, there].view(nodes, ranks, -1)
        arriving, got = sizes_of(here, place)[2], []
        for helper in range(ranks):
            by = there * ranks + helper
            sent = sizes_of(here, helper)[1]
            rows = torch.stack([indices[s][t] for s, t in passed[by]]) if passed[by] else indices[0].new_empty(0, 1)
            pick, order, starts, pairs = pick_experts(rows - there * node, node, int(sent.sum()))
            begin = int(sent[:place].sum())
            taken = pairs[begin : begin + int(sent[place])]
            names = rows.flatten()[taken].tolist()
            assert torch.bincount(torch.tensor(names, dtype=torch.int64) - mine.start, minlength=local).equal(
                arriving[helper]
            )
            assert names == sorted(names)
            got += [(*passed[by][int(pair) // rows.shape[1]], name) for pair, name in zip(taken, names)]
            bounds = [*starts.tolist(), len(order)]
            for row, (begin, end) in enumerate(itertools.pairwise(bounds)):  # back: each row's own, expert by expert
                of = order[begin:end]
                assert (pick[of] == row).all()
                assert rows.flatten()[pairs[of]].tolist() == sorted(e for e in rows[row].tolist() if e // node == there)
        plain = [(s, t, e) for s in world for t, of in enumerate(indices[s].tolist()) for e in sorted(of) if e in mine]
        assert sorted(got) == plain
    for source in world:
        pick, order, starts = first[source]
        for row, (begin, end) in enumerate(itertools.pairwise([*starts.tolist(), len(order)])):
            assert (pick[order[begin:end]] == row).all()
            assert order[begin:end].tolist() == sorted(order[begin:end].tolist())  # node by node


@pytest.mark.parametrize(
    ("machines", "ranks"),
    [
        ([0, 0, 0, 0], 4),
        ([8, 8, 16, 16], 2),
        ([0, 1, 2, 3], 1),
        ([0, 0, 0, 3], 4),  # not as many on each
        ([0, 4, 0, 4], 4),  # not neighbours
    ],
)
def test_ranks_of_a_node_are_neighbours_on_a_machine_as_many_on_each(machines, ranks):
    assert ranks_a_node(machines) == ranks
