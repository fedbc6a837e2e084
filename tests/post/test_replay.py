"""The gate: equal where it must be, loud where it is not; replay: the rollout's experts, the router's own weights."""

import copy
import dataclasses

import pytest
import torch

from dsv3.infer.engine import Engine
from dsv3.parallel.workers import Alone
from dsv3.post.batch import Part, RolloutBatch, cut
from dsv3.post.grpo import GrpoConfig, GrpoObjective
from dsv3.post.replay import Gate, GateConfig, GateError, RouterTap, Tapped, joined, routes
from dsv3.post.rollout import Answer, Prompt, make_batch, sample
from dsv3.post.tasks import Arithmetic
from tests.post.small import TOKENIZER, policy


def rollout(model, *, count: int = 6) -> list[Answer]:
    engine = Engine(model, TOKENIZER, cache_gb=0.01)
    task = Arithmetic()
    prompts = [
        Prompt(problem=task.problem(i), ids=TOKENIZER.encode(task.problem(i).prompt), number=i) for i in range(count)
    ]
    groups = sample(engine, prompts, group=2, max_tokens=12, seed=0, decode=TOKENIZER.decode)
    return [answer for group in groups for answer in group]


def rows(answers: list[Answer]) -> RolloutBatch:
    for i, answer in enumerate(answers):
        answer.advantage = 1.0 if i % 2 else -1.0
    return make_batch(answers, depth=1, layers=2, top_k=3, fresh=True)


def step(model, batch, gate: Gate, *, replay: bool = False, alpha: float = 1e-3):
    """What a trainer of one process does of a step, to the optimizer."""
    objective = GrpoObjective(GrpoConfig(kl=0.0), TOKENIZER.vocab_size, gate, replay=replay)
    workers = Alone(model, precision="float32", recompute=False, compile_layers=False)
    some = slice(0, len(batch.lengths))
    objective.begin(workers, batch, [some])
    out = objective(model, batch, some, depth=1, mtp_weight=0.1, alpha=alpha, device=torch.device("cpu"))
    objective.settle(workers, batch)
    return out


def tapped(model, tokens, experts=None) -> tuple[torch.Tensor, dict[int, Tapped]]:
    """The states of a pass and what its routers did."""
    tap = RouterTap(model, experts=experts)
    with torch.no_grad():
        return model.hidden(tokens, steer=tap).main, tap.take()


def whole(batch: RolloutBatch) -> Part:
    return cut(batch, slice(0, len(batch.lengths)), 1, torch.device("cpu"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rollout_and_training_pass_are_the_same_model(seed):
    """Experts are identical, log-probabilities within 1e-5, though one decodes over pages and the other reads whole rows."""
    model = policy(seed)
    gate = Gate(GateConfig(), "float32")
    step(model, rows(rollout(model)), gate)
    told = gate.report()
    assert told["route_mismatch"] == told["route_mismatch_tokens"] == 0
    assert told["logprob_gap_max"] <= 1e-5
    assert gate.report() == {}


def test_on_equal_batches_they_are_equal_to_the_bit():
    model, batch = policy(), None
    batch = rows(rollout(model))
    passes = []
    for _ in range(2):
        passes.append(tapped(model, batch.tokens[:, :-1]))
    assert torch.equal(passes[0][0], passes[1][0])
    assert all(torch.equal(passes[0][1][row].own, passes[1][1][row].own) for row in (0, 1))


def test_other_weights_are_stopped():
    model = policy()
    batch = rows(rollout(model))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.05)
    with pytest.raises(GateError, match="not the same model"):
        step(model, batch, Gate(GateConfig(), "float32"))


def test_other_experts_alone_are_stopped():
    model = policy()
    batch = rows(rollout(model))
    assert batch.experts is not None
    wrong = batch.experts.clone()
    known = batch.answer.nonzero()[0]
    row = wrong[known[0], known[1], 0]
    row[0] = next(e for e in range(8) if e not in row.tolist())
    with pytest.raises(GateError, match="other experts"):
        step(model, dataclasses.replace(batch, experts=wrong), Gate(GateConfig(logprob=1.0), "float32"))
    gate = Gate(GateConfig(logprob=1.0, action="warn"), "float32")
    step(model, dataclasses.replace(batch, experts=wrong), gate)
    assert len(gate.warnings) == 1
    assert gate.report()["route_mismatch"] == pytest.approx(1 / (2 * int(batch.answer.sum())))


def test_a_gate_that_is_off_measures_still():
    model = policy()
    batch = rows(rollout(model))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.05)
    gate = Gate(GateConfig(action="off"), "float32")
    step(model, batch, gate)
    assert gate.report()["logprob_gap_max"] > 1e-5
    assert gate.warnings == []


def test_stale_answers_are_not_compared():
    model = policy()
    batch = dataclasses.replace(rows(rollout(model)), fresh=False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.05)
    gate = Gate(GateConfig(), "float32")
    step(model, batch, gate)
    assert gate.report() == {}


def test_bfloat16_is_measured_and_gated_only_if_told():
    assert GateConfig().limits("bfloat16") == (float("inf"), float("inf"))
    assert GateConfig().limits("float32") == (1e-5, 0.0)
    assert GateConfig(logprob=0.1, routes=0.2).limits("bfloat16") == (0.1, 0.2)
    for wrong in (dict(action="stop"), dict(logprob=-1.0), dict(routes=float("nan"))):
        with pytest.raises(ValueError):
            GateConfig(**wrong)


# -- replay --------------------------------------------------------------------------------------------------------------


def other_choice(model):
    """The same weights, whose routers choose otherwise: what a difference of precision does, made large."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for router in other.routers():
            router.e_score_correction_bias += torch.linspace(-0.3, 0.3, 8).roll(3)
    return other


def test_replay_makes_the_training_pass_the_rollout():
    """With the rollout's experts forced, the log-probabilities are the rollout's again; without, they are far off."""
    model = policy()
    batch, other = rows(rollout(model)), other_choice(model)
    gate = Gate(GateConfig(action="off"), "float32")
    step(other, batch, gate, replay=True)
    told = gate.report()
    assert told["free_route_mismatch"] > 0.2
    assert told["free_logprob_gap"] > 1e-3
    # Prompt positions are not told by the engine, and still choose otherwise: what is left comes from there.
    assert told["logprob_gap"] < told["free_logprob_gap"] / 1.5


def test_replay_with_every_position_told_gives_the_very_pass():
    """Routers forced to the choice that another pass made: equal to the bit, and counts follow the forced experts."""
    model = policy()
    other, tokens = other_choice(model), torch.randint(96, (3, 11))
    states, seen = tapped(model, tokens)
    experts = torch.stack([seen[row].own.unflatten(0, tokens.shape) for row in (0, 1)], dim=2)
    replayed, forced = tapped(other, tokens, experts)
    torch.testing.assert_close(replayed, states, atol=1e-6, rtol=1e-5)
    for row in (0, 1):
        assert torch.equal(forced[row].experts.sort(-1).values, seen[row].own.sort(-1).values)
    assert any(not torch.equal(x.own.sort(-1).values, x.experts.sort(-1).values) for x in forced.values())


def test_the_router_learns_through_replay():
    """Its weights are still its own scores: the gradient reaches gate.weight, and is that of the forced experts."""
    model = policy()
    batch, other = rows(rollout(model)), other_choice(model)
    out = step(other, batch, Gate(GateConfig(action="off"), "float32"), replay=True)
    out.losses.total.backward()
    assert all(float(router.weight.grad.abs().sum()) > 0 for router in other.routers())


def test_recomputed_layers_are_replayed_too():
    """Where a layer is computed again in the backward pass, it must send its tokens where the forward pass did."""
    from dsv3.parallel.apply import prepare

    model = policy()
    batch, grads = rows(rollout(model)), []
    other_rows = dataclasses.replace(batch, experts=batch.experts.flip(0))
    for recompute in (False, True):
        other = other_choice(model)
        prepare(other, recompute=recompute, compile_layers=False)
        out = step(other, batch, Gate(GateConfig(action="off"), "float32"), replay=True, alpha=0.1)
        step(other, other_rows, Gate(GateConfig(action="off"), "float32"), replay=True)  # in flight beside it
        out.losses.total.backward()
        grads.append([p.grad for p in other.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_tie_excuses_its_token_and_those_behind_it_alone():
    model = policy()
    batch = rows(rollout(model))
    _, seen = tapped(model, batch.tokens[:, :-1])
    where = batch.answer.nonzero()
    row, at = (int(x) for x in where[len(where) // 2])
    margin = seen[0].margin.clone()
    margin.view(batch.answer.shape)[row, at] = 0.0
    seen[0] = seen[0]._replace(margin=margin)
    told = routes(whole(batch), seen)
    found = joined([told[row] for row in sorted(told)], torch.ones(int(batch.answer.sum())))
    excused = (
        batch.answer & (torch.arange(batch.answer.shape[1]) >= at) & (torch.arange(len(batch.answer))[:, None] == row)
    )
    assert torch.equal(found.gaps < 0, excused[batch.answer])
    assert found.tied[:, 0].sum() == 1  # in the first layer the token itself, behind it all
    assert torch.equal(found.tied[:, 1], excused[batch.answer])


def test_rounding_of_a_few_tokens_is_let_through_and_another_model_is_not():
    """One token in twenty may be further off than the limit, by up to thirty times: no more tokens, and none by far."""
    model = policy()
    batch = rows(rollout(model))
    _, seen = tapped(model, batch.tokens[:, :-1])
    exact = batch.old[batch.answer]
    few = len(exact) // 20
    for count, gap, stops in ((few, 3e-5, False), (few, 2e-4, False), (few + 1, 3e-5, True), (1, 5e-4, True)):
        moved = exact.clone()
        moved[:count] += gap
        gate = Gate(GateConfig(action="warn"), "float32")
        gate.note(0, routes(whole(batch), seen), (moved - exact).abs())
        gate.judge()
        assert bool(gate.warnings) is stops, (count, gap)
