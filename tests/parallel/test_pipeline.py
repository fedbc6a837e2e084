"""A pipeline's step against the same step in one process; how layers are dealt out; what is refused."""

import dataclasses
import itertools
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3, Hidden, Routing, Steer
from dsv3.parallel.apply import compute_copy, prepare
from dsv3.parallel.pipeline import Pipeline, micro_batches
from dsv3.parallel.stage import STAGES_A_RANK, Part, Stage, _costs, _cuts, _folded, split
from dsv3.train.loss import PretrainObjective, Step
from tests.model.tiny import TINY, random_model
from tests.parallel.ranks import run_ranks

LENGTH, ALPHA, MTP_WEIGHT = 12, 0.1, 0.3  # alpha as large as shows in a gradient
DEEP = dataclasses.replace(TINY, num_hidden_layers=7, num_nextn_predict_layers=2)
PLAIN = dataclasses.replace(TINY, num_nextn_predict_layers=0)
Case = tuple[ModelConfig, str, str, int]
"""Model, schedule, what is done to the stages, micro-batches."""
TWO_RANKS: dict[str, Case] = {
    "1F1B": (TINY, "1f1b", "float32", 3),
    "ZB-V": (TINY, "zero-bubble", "float32", 4),
    "DualPipeV": (TINY, "dualpipev", "float32", 5),
    "recomputed": (TINY, "zero-bubble", "recompute", 3),
    "bfloat16": (TINY, "zero-bubble", "bfloat16", 3),
    "fp8": (TINY, "dualpipev", "fp8", 4),
    "without balance loss": (TINY, "zero-bubble", "unbalanced", 3),
    "without MTP": (PLAIN, "zero-bubble", "float32", 3),
}
FOUR_RANKS: dict[str, Case] = {
    "1F1B, four": (TINY, "1f1b", "float32", 4),
    "ZB-V, fewer micro-batches than ranks": (DEEP, "zero-bubble", "float32", 2),
    "DualPipeV, two MTP depths": (DEEP, "dualpipev", "float32", 9),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the ranks have: products of another number of threads add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Rows:
    """Made-up rows, one a micro-batch, packed documents masked, in shares that differ; a stage.Feed."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        self.depth, self.objective = config.num_nextn_predict_layers, PretrainObjective(mask_documents=True)
        tokens = torch.randint(config.vocab_size, (number, LENGTH + self.depth + 1), generator=draw)
        documents = torch.randint(2, (number, LENGTH + self.depth), generator=draw).cumsum(1)
        self.batch = SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:], doc_ids=documents)
        shares = torch.rand(number, generator=draw)
        self.shares = (shares / shares.sum()).tolist()

    def inputs(self, micro: int) -> tuple[Tensor, Tensor | None]:
        rows = slice(micro, micro + 1)
        return self.objective.inputs(self.batch, rows, depth=self.depth, device=torch.device("cpu"))

    def around(self, micro: int, stage: DeepseekV3) -> AbstractContextManager[None]:
        return nullcontext()

    def routed(self, micro: int, routing: Routing, steer: Steer | None) -> Routing:
        return routing

    def loss(self, micro: int, hidden: Hidden, head: Tensor, steer: Steer | None = None) -> tuple[Tensor, Step]:
        rows = slice(micro, micro + 1)
        step = self.objective.losses(hidden, head, self.batch, rows, None, mtp_weight=MTP_WEIGHT, alpha=ALPHA)
        return step.losses.total * self.shares[micro], step


def alone(config: ModelConfig, kind: str, number: int) -> tuple[list[Step], Tensor, dict[str, Tensor]]:
    """Records, counts and float32 gradients of the step in one process."""
    model, rows, grads = prepared(random_model(config), kind), Rows(config, number), dict[str, Tensor]()
    records = []
    for micro in range(number):
        tokens, mask = rows.inputs(micro)
        hidden = model.hidden(tokens, depth=rows.depth, mask=mask, balance=kind != "unbalanced")
        loss, step = rows.loss(micro, hidden, model.lm_head.weight)
        loss.backward()
        records.append(step)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grads[name] = grads.get(name, 0) + parameter.grad.float()
            parameter.grad = None
    return records, sum(step.counts for step in records), grads


def prepared(model: DeepseekV3, kind: str, *, compiled: bool = False) -> DeepseekV3:
    model = compute_copy(model, kind if kind in ("bfloat16", "fp8") else "float32")
    prepare(model, recompute=kind == "recompute", compile_layers=compiled)
    return model


def stages_of(group: Any, config: ModelConfig, schedule: str, kind: str, **options: Any) -> list[Any]:
    parts = [part for part in split(config, group.size(), schedule) if part.rank == dist.get_rank(group)]
    return [prepared(Stage.cut(random_model(config), part), kind, **options) for part in parts]


def piped(group: Any, cases: list[Case]) -> list[tuple[list[Step], Tensor, list[dict[str, Tensor]]]]:
    """Of each case the records, the counts, and the gradients of each stage of the rank."""
    results = []
    for config, schedule, kind, number in cases:
        stages = stages_of(group, config, schedule, kind)
        stream = torch.bfloat16 if kind in ("bfloat16", "fp8") else torch.float32
        pipeline = Pipeline(stages, group, schedule, stream=stream)
        for _ in range(2):  # the second step finds buffers and gradients of the first
            records, counts = pipeline.step(Rows(config, number), number, balance=kind != "unbalanced")
        grads = [{name: p.grad for name, p in stage.named_parameters()} for stage in stages]
        results.append((records, counts, grads))
    return results


def piped_and_refused(group: Any, cases: list[Case]) -> list[Any]:
    compiled = stages_of(group, TINY, "zero-bubble", "float32", compiled=True)
    with pytest.raises(ValueError, match="drop compile, or use '1f1b'"):
        Pipeline(compiled, group, "zero-bubble", stream=torch.float32)
    with pytest.raises(ValueError, match=r"holds stages \[\d\] under '1f1b'"):
        Pipeline(compiled, group, "1f1b", stream=torch.float32)
    return piped(group, cases)


@pytest.fixture(scope="module")
def stepped(tmp_path_factory) -> dict[str, list[Any]]:
    """Of each case what every rank returned, computed by one start of the processes."""
    found = {}
    for ranks, work, cases in ((2, piped_and_refused, TWO_RANKS), (4, piped, FOUR_RANKS)):
        results = run_ranks(work, ranks, tmp_path_factory.mktemp(f"ranks{ranks}"), list(cases.values()))
        found |= {name: list(result) for name, *result in zip(cases, *results, strict=True)}
    return found


@pytest.mark.dist
@pytest.mark.parametrize("name", [*TWO_RANKS, *FOUR_RANKS])
def test_a_pipeline_takes_the_step_of_one_process(stepped: dict[str, list[Any]], name: str) -> None:
    """Every layer computes the same bits; only sums of several addends differ: the embedding's two gradients and the balance
    losses (float32: 2^-24 a sum, limit 1e-6), and in bfloat16 those of the head, which one process rounds to bfloat16 between
    main model and MTP and the pipeline does not (2^-9 a rounding, limit 1e-2)."""
    config, _, kind, number = (TWO_RANKS | FOUR_RANKS)[name]
    limit = 1e-2 if kind in ("bfloat16", "fp8") else 1e-6
    records, counts, grads = alone(config, kind, number)
    found = dict[str, list[Tensor]]()
    for got_records, got_counts, stages in stepped[name]:
        assert torch.equal(got_counts, counts)
        for step, want in zip(got_records, records, strict=True):
            torch.testing.assert_close(step.losses, want.losses, rtol=1e-6, atol=0)
        for parameter, grad in (item for stage in stages for item in stage.items()):
            found.setdefault(parameter, []).append(grad)
    assert found.keys() == grads.keys()
    for parameter, copies in found.items():
        assert len(copies) == 1 + (parameter == "model.embed_tokens.weight" and config.num_nextn_predict_layers > 0)
        assert torch.equal(copies[0], copies[-1]), parameter
        assert copies[0].dtype == torch.float32
        if parameter in ("model.embed_tokens.weight", "lm_head.weight") or "gate.weight" in parameter:
            assert (copies[0] - grads[parameter]).norm() <= limit * grads[parameter].norm(), parameter
        else:
            assert torch.equal(copies[0], grads[parameter]), parameter


# -- stages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "schedule"), [(TINY, "1f1b"), (TINY, "dualpipev"), (PLAIN, "zero-bubble")])
def test_stages_have_the_names_and_the_first_weights_of_the_whole_model(config: ModelConfig, schedule: str) -> None:
    whole = DeepseekV3(config)
    whole.init_weights(3)
    expected, names = whole.state_dict(), []
    for part in split(config, 2, schedule):
        stage = Stage(config, part, "cpu")
        stage.init_weights(3)
        for name, tensor in stage.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        assert {name for name in expected if part.holds(name)} == stage.state_dict().keys()
        names += stage.state_dict()
        for name, tensor in Stage.cut(whole, part).state_dict().items():
            assert torch.equal(tensor, expected[name])
            assert tensor.data_ptr() != expected[name].data_ptr()
    replicas = ["model.embed_tokens.weight"] * (config.num_nextn_predict_layers > 0)
    assert sorted(names) == sorted([*expected, *replicas])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2), st.integers(1, 20), st.sampled_from(sorted(STAGES_A_RANK)))
def test_every_layer_is_in_one_stage_and_every_rank_has_its_stages(
    layers: int, depth: int, ranks: int, schedule: str
) -> None:
    config = dataclasses.replace(TINY, num_hidden_layers=layers, num_nextn_predict_layers=depth)
    stages = ranks * STAGES_A_RANK[schedule]
    if stages > layers + 1:
        with pytest.raises(ValueError, match=f"give 1 to {(layers + 1) // STAGES_A_RANK[schedule]} ranks"):
            split(config, ranks, schedule)
        return
    parts = split(config, ranks, schedule)
    assert [layer for part in parts for layer in part.layers] == list(range(layers + depth))
    assert all(part.layers for part in parts[:-1])
    ranks_of = list(range(ranks)) + (list(reversed(range(ranks))) if schedule != "1f1b" else [])
    assert [part.rank for part in parts] == ranks_of
    assert [part.embedding for part in parts[1:]] == [False] * (stages - 2) + [depth > 0] * (stages > 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 12), st.integers(1, 5))
def test_no_other_cut_has_a_faster_slowest_stage(costs: list[int], tail: int, stages: int) -> None:
    layers = len(costs)
    if stages > layers + 1:
        return

    def loads(borders: list[int]) -> list[float]:
        found = [float(sum(costs[a:b])) for a, b in itertools.pairwise(borders)]
        found[0] += 0.5
        found[-1] += tail
        return found

    inner = itertools.combinations(range(1, layers + 1), stages - 1)
    every = [(max(found), sum(x * x for x in found)) for found in (loads([0, *cut, layers]) for cut in inner)]
    best = loads(_cuts([float(cost) for cost in costs], 0.5, float(tail), stages))
    assert (max(best), sum(x * x for x in best)) == min(every)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 12), st.integers(1, 3))
def test_no_other_v_has_a_less_loaded_rank_and_then_a_faster_slowest_stage(
    costs: list[int], tail: int, ranks: int
) -> None:
    layers, stages = len(costs), 2 * ranks
    if stages > layers + 1:
        return

    def loads(borders: list[int]) -> tuple[float, float]:
        found = [float(sum(costs[a:b])) for a, b in itertools.pairwise(borders)]
        found[0] += 0.5
        found[-1] += tail
        return max(a + b for a, b in zip(found, reversed(found))), max(found)

    inner = itertools.combinations(range(1, layers + 1), stages - 1)
    every = [loads([0, *cut, layers]) for cut in inner]
    borders = _folded([float(cost) for cost in costs], 0.5, float(tail), ranks)
    assert len(borders) == stages + 1
    assert loads(borders) == min(every)


def test_the_published_model_in_a_v_on_sixteen_ranks_loads_the_first_rank_with_a_layer_and_the_end_alone() -> None:
    """The end, MTP and two heads, is as much as four layers, and the first stage has one: no deal is below 1.21 of the mean."""
    layers, embedding, tail = _costs(ModelConfig())
    loads = [0.0] * 16
    for part in split(ModelConfig(), 16, "dualpipev"):
        main = [layers[i] for i in part.layers if i < len(layers)]
        loads[part.rank] += sum(main) + embedding * part.first + tail * part.last
    assert max(loads) < 1.22 * sum(loads) / 16
    assert sorted(loads)[-2] < sum(loads) / 16


def test_the_published_model_on_sixteen_ranks_spares_the_last_stage_a_layer_for_head_and_mtp() -> None:
    sizes = [len(part.layers) for part in split(ModelConfig(), 16, "1f1b")]
    assert sum(sizes) == 62
    assert set(sizes[1:-1]) <= {3, 4}
    assert sizes[-1] - 1 < min(sizes[1:-1])  # one of them is the MTP layer


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_schedule_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="'gpipe': choose one of 1f1b, zero-bubble, dualpipev"):
        split(TINY, 2, "gpipe")


def test_more_stages_than_layers_are_refused_with_the_degrees_that_work() -> None:
    with pytest.raises(ValueError, match=r"4 ranks has 8 stages.*give 1 to 2 ranks, or 1 to 4 under '1f1b'"):
        split(TINY, 4, "dualpipev")


def test_rows_become_micro_batches_or_are_refused_with_numbers_that_work() -> None:
    assert micro_batches(8, 2, 2, "dualpipev") == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert micro_batches(2, 2, 4, "zero-bubble") == [slice(0, 2)]
    with pytest.raises(ValueError, match="give 8 or 10 rows a step, or micro-batches of 1"):
        micro_batches(9, 2, 2, "1f1b")
    with pytest.raises(
        ValueError, match="make 3 micro-batches of 2, and 'dualpipev' on 2 ranks needs 4: give at least 8"
    ):
        micro_batches(6, 2, 2, "dualpipev")
    with pytest.raises(ValueError, match=r"or micro-batches of 1$"):
        micro_batches(6, 2, 2, "dualpipev")


def test_a_stage_alone_does_not_run() -> None:
    stage = Stage(TINY, Part(index=0, stages=2, rank=0, layers=range(2), embedding=True))
    with pytest.raises(AssertionError, match=r"only Pipeline.step runs a stage"):
        stage(micro=torch.tensor([0]))
