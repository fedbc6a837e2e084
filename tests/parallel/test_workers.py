"""Several processes take the steps that one takes: losses, gradients, weights, router biases."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from dsv3.kernels.quant import cast_tiles, dequantize_tiles
from dsv3.model.transformer import DeepseekV3, Experts
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.fsdp import local, sharded
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline import _LibraryStage
from dsv3.parallel.workers import Alone, Together
from dsv3.train.trainer import NonFiniteError
from tests.model.tiny import TINY
from tests.parallel.ranks import run_ranks
from tests.parallel.small import small_trainer

pytestmark = pytest.mark.dist
STEPS = 3


def whole(run: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors of this rank's parts."""
    run.workers.settle()
    views = {name: run.workers.view(name, tensor) for name, tensor in tensors.items()}
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for n, v in views.items()}


def named(run: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for part in reversed(run.workers.parts) for name, p in part.named_parameters()}


def take_steps(
    _group: Any, degrees: dict[str, Any] | None, folder: str, changes: dict[str, Any], steps: int = STEPS
) -> dict[str, Any]:
    """Losses and counts of each step, the first step's gradients, and the weights and biases at the end."""
    mesh = None if degrees is None else Mesh(ParallelConfig(**degrees), TINY)
    run = small_trainer(Path(folder), mesh, **changes)
    gradients: dict[str, torch.Tensor] = {}
    clip = run.workers.clip

    def look(limit: float) -> torch.Tensor:
        if not gradients:
            gradients.update(whole(run, {n: p.grad for n, p in named(run).items()}))
        return clip(limit)

    run.workers.clip = look
    records = [run.step()]
    biases = {n: b.clone() for part in run.workers.parts for n, b in part.named_buffers()}
    records += [run.step() for _ in range(steps - 1)]
    return {
        "loss": [(r["loss"], *r["mtp_loss"], r["balance_loss"], r["grad_norm"]) for r in records],
        "counts": records[0]["expert_counts"],
        "fp8": sorted(records[0].get("fp8", {})),
        "gradients": gradients,
        "weights": whole(run, dict(named(run))),
        "biases": biases,
        "last_biases": {n: b for part in run.workers.parts for n, b in part.named_buffers()},
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    return take_steps(None, None, str(tmp_path_factory.mktemp("alone")), {})


@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [
        (2, {}),
        (2, {"sharding": "fsdp"}),
        (2, {"expert": 2}),
        (4, {"expert": 2, "sharding": "fsdp"}),
        (4, {"expert": 4}),
        (2, {"pipeline": 2}),
        (4, {"pipeline": 2, "expert": 2, "schedule": "zero-bubble"}),
        (4, {"pipeline": 2, "sharding": "fsdp"}),
        (4, {"pipeline": 2, "schedule": "dualpipev"}),
    ],
    ids=lambda value: str(value),
)
def test_ranks_take_the_steps_of_one_process(alone, tmp_path, ranks, degrees):
    # Float32 sums over ranks and micro-batches run in another order: a few units in the last place of the largest term.
    changes = {"micro_batch": 1} if degrees.get("schedule") == "dualpipev" else {}  # which needs four
    results = run_ranks(take_steps, ranks, tmp_path / "ranks", degrees, str(tmp_path / "run"), changes)
    for result in results:
        assert result["counts"] == alone["counts"]
        assert all(torch.equal(bias, alone["biases"][name]) for name, bias in result["biases"].items())
        torch.testing.assert_close(torch.tensor(result["loss"]), torch.tensor(alone["loss"]), rtol=2e-5, atol=1e-6)
        for name, grad in result["gradients"].items():
            scale = float(alone["gradients"][name].abs().max())
            torch.testing.assert_close(grad, alone["gradients"][name], rtol=1e-4, atol=1e-5 * scale, msg=name)
        # Adam's first steps are lr·sign(g): where g is next to nothing its sign is the order's, so weights are looser.
        for name, weight in result["weights"].items():
            off = (weight - alone["weights"][name]).abs()
            assert off.mean() < 1e-5, name
            assert off.max() <= 2.5e-2 * STEPS, name
        # And where one near tie in three steps sends a token elsewhere, it does so for all ranks.
        for name, bias in result["last_biases"].items():
            assert all(torch.equal(other["last_biases"].get(name, bias), bias) for other in results)
    for kind in ("gradients", "weights", "biases"):
        assert set().union(*(result[kind] for result in results)) == alone[kind].keys()


@pytest.mark.parametrize("degrees", [{}, {"expert": 2}, {"sharding": "fsdp"}], ids=str)
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_narrow_precisions_follow_one_process(tmp_path, degrees, precision):
    # The first step's products are the same numbers; behind it, weights rounded the other way send some tokens elsewhere.
    changes = {"precision": precision}
    one = torch.tensor(take_steps(None, None, str(tmp_path / "one"), changes)["loss"])
    for result in run_ranks(take_steps, 2, tmp_path / "ranks", degrees, str(tmp_path / "run"), changes):
        losses = torch.tensor(result["loss"])
        torch.testing.assert_close(losses[0, :3], one[0, :3], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(losses, one, rtol=5e-2, atol=1e-3)


def both_orders(group: Any, folder: str) -> list[dict[str, torch.Tensor]]:
    changes = {"precision": "bfloat16", "micro_batch": 1}
    orders = [{"pipeline": 2, "schedule": schedule} for schedule in ("1f1b", "zero-bubble")]
    return [take_steps(group, d, f"{folder}/{d['schedule']}", changes)["gradients"] for d in orders]


def test_weights_gradients_that_wait_are_summed_in_float32(tmp_path):
    """In bfloat16, several in a row: only what the two orders' stages share, embedding and head, is summed otherwise."""
    found: list[dict[str, torch.Tensor]] = [{}, {}]
    for result in run_ranks(both_orders, 2, tmp_path / "ranks", str(tmp_path / "run")):
        for gradients, mine in zip(found, result):
            gradients.update(mine)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_first_rank_tells_the_fp8_health_of_every_stage(tmp_path):
    changes = {"precision": "fp8"}
    one = take_steps(None, None, str(tmp_path / "one"), changes)
    results = run_ranks(take_steps, 2, tmp_path / "ranks", {"pipeline": 2}, str(tmp_path / "run"), changes)
    assert results[0]["fp8"] == one["fp8"]
    assert len(one["fp8"]) > 20


class Rounded(torch.autograd.Function):
    """Rows to e4m3 and back, on the way there or in the backward pass."""

    @staticmethod
    def forward(ctx, x, there):
        ctx.there = there
        return rounded(x) if there else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.there else rounded(grad)), None


def rounded(x: torch.Tensor) -> torch.Tensor:
    return dequantize_tiles(*cast_tiles(x, pow2=True), x.dtype)


def test_tokens_travel_as_codes_in_any_precision_if_told(alone, tmp_path, monkeypatch):
    """Equal to one process that rounds what would travel: the experts' input, and the gradient of their output."""
    degrees = {"expert": 2, "dispatch": "fp8"}
    results = run_ranks(take_steps, 2, tmp_path / "ranks", degrees, str(tmp_path / "run"), {})
    plain = Experts.forward
    monkeypatch.setattr(Experts, "forward", lambda s, x, *a: Rounded.apply(plain(s, Rounded.apply(x, True), *a), False))
    one = take_steps(None, None, str(tmp_path / "one"), {})
    assert (torch.tensor(one["loss"]) - torch.tensor(alone["loss"])).abs().max() > 1e-4
    for result in results:
        torch.testing.assert_close(torch.tensor(result["loss"])[0], torch.tensor(one["loss"])[0], rtol=2e-5, atol=1e-6)
        for name, grad in result["gradients"].items():
            scale = float(one["gradients"][name].abs().max())
            # A sum in another order may round a code to its neighbour, 6% of one value.
            torch.testing.assert_close(grad, one["gradients"][name], rtol=1e-2, atol=1e-3 * scale, msg=name)


def take_steps_and_refuse(group: Any, degrees: dict[str, Any], folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    with pytest.raises(ValueError, match="compile=True with expert 2 would compile every number of rows"):
        take_steps(group, degrees, folder, {"compile": True})
    return take_steps(group, degrees, folder, changes)


def test_recomputed_layers_change_nothing(alone, tmp_path):
    degrees, changes = {"expert": 2, "sharding": "fsdp"}, {"recompute": True}
    for result in run_ranks(take_steps_and_refuse, 2, tmp_path / "ranks", degrees, str(tmp_path / "run"), changes):
        assert result["counts"] == alone["counts"]
        torch.testing.assert_close(torch.tensor(result["loss"]), torch.tensor(alone["loss"]), rtol=2e-5, atol=1e-6)
        for name, grad in result["gradients"].items():
            scale = float(alone["gradients"][name].abs().max())
            torch.testing.assert_close(grad, alone["gradients"][name], rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_rows_that_do_not_divide_leave_ranks_empty_and_change_nothing(tmp_path):
    changes = {"schedule": {"batch_size": 5}}
    one = take_steps(None, None, str(tmp_path / "one"), changes)
    for result in run_ranks(take_steps, 4, tmp_path / "ranks", {"expert": 2}, str(tmp_path / "run"), changes):
        assert result["counts"] == one["counts"]
        torch.testing.assert_close(torch.tensor(result["loss"]), torch.tensor(one["loss"]), rtol=2e-5, atol=1e-6)


def hold(_group: Any, degrees: dict[str, Any], folder: str) -> list[tuple[int, int]]:
    """After each backward of a pipeline's step, groups of parameters that are gathered, and that hold whole gradients."""
    run = small_trainer(Path(folder), Mesh(ParallelConfig(**degrees), TINY))
    (stage,), seen, backward = run.workers.parts, [], _LibraryStage.backward_one_chunk

    def look(self: Any, *args: Any, **options: Any) -> None:
        backward(self, *args, **options)
        groups = [module._get_fsdp_state()._fsdp_param_group for module in sharded(stage)]
        params = [[p for p in group.fsdp_params if hasattr(p, "_unsharded_param")] for group in groups if group]
        whole = [
            any(p._unsharded_param.grad is not None or p.unsharded_accumulated_grad is not None for p in ps)
            for ps in params
        ]
        seen.append((sum(group.is_unsharded for group in groups if group), sum(whole)))

    _LibraryStage.backward_one_chunk = look
    run.step()
    return seen


def test_a_stage_under_fsdp_keeps_nothing_whole_between_micro_batches(tmp_path):
    degrees = {"pipeline": 2, "sharding": "fsdp"}
    for seen in run_ranks(hold, 4, tmp_path / "ranks", degrees, str(tmp_path / "run")):
        assert seen == [(0, 0)] * 2


def break_down(_group: Any, degrees: dict[str, Any], folder: str) -> str:
    run = small_trainer(Path(folder), Mesh(ParallelConfig(**degrees), TINY))
    part = run.workers.parts[-1]
    if part.lm_head is not None:
        with torch.no_grad():
            local(part.lm_head.weight)[:1] = float("nan")
    with pytest.raises(NonFiniteError) as raised:
        run.step()
    return str(raised.value)


def test_a_loss_that_is_no_number_is_one_error_of_all_ranks_of_a_pipeline(tmp_path):
    for told in run_ranks(break_down, 2, tmp_path / "ranks", {"pipeline": 2}, str(tmp_path / "run")):
        assert "loss is not finite on data ranks [0] at step 1, batch rows 0 to 7" in told


def test_micro_batches_of_a_batch_cover_it_once():
    run = object.__new__(Alone)
    assert run.part(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]


@pytest.mark.parametrize("rows", [1, 3, 8, 17])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_the_rows_that_a_rank_reads_are_those_of_its_micro_batches(rows, ranks):
    run: Any = object.__new__(Together)
    run.pipeline, read = None, []
    for rank in range(ranks):
        run.mesh = SimpleNamespace(data_size=ranks, data_rank=rank)
        micros = run.part(rows, 2)
        assert [row for micro in micros for row in range(micro.start, micro.stop)] == list(run.rows(rows))
        read += run.rows(rows)
    assert read == list(range(rows))


@pytest.mark.parametrize(
    ("degrees", "world", "told"),
    [
        ({"expert": 3}, 3, "take it from"),
        ({"pipeline": 3}, 4, "no multiple of pipeline 3"),
        ({"expert": 2}, 3, "start 2 or a multiple"),
        ({"expert": 0}, 1, "at least 1"),
        ({"sharding": "zero3"}, 2, "sharding is 'zero3': choose one of zero1, fsdp"),
        ({"pipeline": 2, "schedule": "dualpipev", "sharding": "fsdp"}, 2, "take sharding 'zero1', or schedule '1f1b'"),
        ({"dispatch": "fp8"}, 2, "no token travels"),
        ({"schedule": "zero-bubble"}, 2, "order of a pipeline, and pipeline is 1: give a pipeline of at least 2"),
        ({"sharding": "fsdp"}, 1, "1 process is one for each of pipeline 1: start 2 or more"),
        ({"pipeline": 2, "sharding": "fsdp"}, 2, "2 processes are one for each of pipeline 2: start 4 or more"),
        ({"expert": 2}, 6, "do not divide over 3 replicas.*start 4 processes"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_those_that_would(degrees, world, told):
    with pytest.raises(ValueError, match=told):
        ParallelConfig(**degrees).check(TINY, world)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_defaults_fit_any_number_of_processes(world):
    ParallelConfig().check(TINY, world)


LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"expert": 4},
    {"expert": 2, "sharding": "fsdp"},
    {"pipeline": 2, "expert": 2, "schedule": "zero-bubble"},
    {"pipeline": 2, "sharding": "fsdp"},
)


def first_weights(_group: Any) -> list[dict[str, torch.Tensor]]:
    found = []
    for degrees in LAYOUTS:
        with torch.device("meta"):
            model = DeepseekV3(TINY)
        workers = Together(
            model, Mesh(ParallelConfig(**degrees), TINY), precision="float32", recompute=False, compile_layers=False
        )
        workers.init_weights(3)
        run = SimpleNamespace(workers=workers)
        found.append(whole(run, named(run) | {n: b for part in workers.parts for n, b in part.named_buffers()}))
    return found


def test_a_runs_first_weights_are_the_same_bits_in_every_layout(tmp_path):
    alone = DeepseekV3(TINY)
    alone.init_weights(3)
    results = run_ranks(first_weights, 4, tmp_path / "ranks")
    for number, degrees in enumerate(LAYOUTS):
        held = [result[number] for result in results]
        assert set().union(*held) == alone.state_dict().keys()
        for name, expected in alone.state_dict().items():
            assert all(torch.equal(tensors.get(name, expected), expected) for tensors in held), (degrees, name)
