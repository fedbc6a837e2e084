"""A training pass with the engine's own numbers: the rollout to the bit, torch's gradient, and what differs is found."""

import contextlib
import dataclasses

import pytest
import torch

from dsv3.infer.engine import Engine
from dsv3.kernels import decode
from dsv3.post.exact import EnginePass, with_value
from dsv3.post.grpo import GrpoConfig, GrpoObjective
from dsv3.post.replay import Gate, GateConfig, GateError
from dsv3.post.rollout import Prompt, make_batch, sample
from dsv3.post.tasks import Arithmetic
from tests.post.small import TOKENIZER, policy

pytestmark = pytest.mark.skipif(decode.library() is None, reason="no C compiler: there are no kernels to be equal to")


def sharp(seed: int = 0):
    """A policy that is as sure as a trained one: rounding shows where it draws an unlikely token."""
    model = policy(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
        model.lm_head.weight[TOKENIZER.eos_id] = 0
        for router in model.routers():
            router.weight.mul_(8)
    return model


def rollout(model, *, count: int = 12, max_tokens: int = 90):
    """Answers longer than a page, several at a time, with drafts."""
    engine = Engine(model, TOKENIZER, cache_gb=0.02, max_running=5)
    problems = [Arithmetic().problem(i) for i in range(count)]
    prompts = [Prompt(problem=p, ids=TOKENIZER.encode(p.prompt), number=i) for i, p in enumerate(problems)]
    groups = sample(engine, prompts, group=2, max_tokens=max_tokens, seed=0, decode=TOKENIZER.decode)
    answers = [answer for group in groups for answer in group]
    for i, answer in enumerate(answers):
        answer.advantage = 1.0 if i % 3 else -1.0
    return make_batch(answers, depth=1, layers=2, top_k=3, fresh=True)


def taken(objective, model, batch, *, alpha: float = 1e-3):
    """What the objective makes of the whole batch."""
    rows = slice(0, len(batch.lengths))
    done = objective(model, batch, rows, depth=1, mtp_weight=0.1, alpha=alpha, device=torch.device("cpu"))
    if batch.fresh:
        objective.gate.judge()
    return done


def step(model, batch, *, exact: bool, precision: str = "float32", gate: Gate | None = None):
    """-> the gate's report, the loss and the gradients of a pass."""
    gate = gate or Gate(GateConfig(), precision)
    objective = GrpoObjective(GrpoConfig(kl=0.0, clip=0.2), TOKENIZER.vocab_size, gate)
    objective.engine = EnginePass(model) if exact else None
    model.zero_grad()
    done = taken(objective, model, batch)
    done.losses.total.backward()
    grads = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return gate.report(), done.losses, grads


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_training_pass_has_the_rollouts_numbers_to_the_bit(seed, precision):
    model = sharp(seed).to(getattr(torch, precision))
    batch = rollout(model)
    told, _, _ = step(model, batch, exact=True, precision=precision)
    assert told["logprob_gap_max"] == 0.0
    assert told["route_mismatch"] == 0.0
    assert told["layer_gap"] < (1e-5 if precision == "float32" else 0.1)
    assert int(batch.answer.sum()) > 1000
    if precision == "bfloat16":  # which torch's own pass is far from
        told, _, _ = step(model, batch, exact=False, precision=precision)
        assert told["logprob_gap_max"] > 0.1


def test_the_gradient_is_torchs():
    model = sharp()
    batch = rollout(model)
    _, plain, expected = step(model, batch, exact=False)
    _, losses, grads = step(model, batch, exact=True)
    torch.testing.assert_close(losses.main, plain.main, atol=1e-5, rtol=0)
    assert grads.keys() == expected.keys()
    for (
        name,
        grad,
    ) in grads.items():  # equal inputs up to float32 rounding, which a sharp model makes some ten times larger
        far = (grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        assert far < 1e-3, (name, far)


def test_layers_that_are_computed_again_give_the_same_gradient():
    from dsv3.parallel.apply import prepare

    model = sharp()
    batch = rollout(model)
    _, _, expected = step(model, batch, exact=True)
    prepare(model, recompute=True, compile_layers=False)
    gate = Gate(GateConfig(), "float32")
    objective = GrpoObjective(GrpoConfig(kl=0.0, clip=0.2), TOKENIZER.vocab_size, gate)
    objective.engine = EnginePass(model)
    model.zero_grad()
    done = taken(objective, model, batch)
    done.losses.total.backward()
    assert gate.report()["logprob_gap_max"] == 0.0
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name])


def test_nothing_is_left_on_the_model():
    model = policy()
    before = [dict(vars(module)) for module in model.modules()]
    step(model, rollout(model, max_tokens=8), exact=True)
    assert [vars(module).keys() for module in model.modules()] == [names.keys() for names in before]
    reading = EnginePass(model).read(torch.arange(2, 10).view(1, 8))
    with contextlib.suppress(RuntimeError), reading.told(model):
        assert "forward" in vars(model.model.norm)
        raise RuntimeError
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("precision", "factor", "stream"),
    [("float32", 1.01, 1), ("float32", 1.01, 300), ("float32", float("nan"), 1), ("bfloat16", -1.0, 1)],
)
def test_torchs_layer_must_be_the_engines(precision, factor, stream):
    """The values are the engine's, so a layer that is not the same function shows nowhere but here."""
    model = policy()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(stream)
    model = model.to(getattr(torch, precision))
    batch = rollout(model, max_tokens=8)
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x, context: (forward(x, context)[0] * factor, forward(x, context)[1])
    with pytest.raises(GateError, match=r"a layer came out .* apart"):
        step(model, batch, exact=True, precision=precision)


def test_torchs_head_must_be_the_engines():
    model = policy()
    batch = rollout(model, max_tokens=8)
    engine = EnginePass(model)
    reading = engine.read(batch.tokens[:, :-1])
    states = reading.states[batch.answer]
    reading.head(states @ model.lm_head.weight.T, states)
    assert reading.gap < 1e-5
    reading.head(-states @ model.lm_head.weight.T, states)
    assert reading.gap > 1


@torch.no_grad()
def test_a_policy_that_is_its_reference_has_no_divergence_in_bfloat16():
    from dsv3.post.rollout import add_reference

    model = sharp().bfloat16()
    engine = Engine(model, TOKENIZER, cache_gb=0.02)
    problem = Arithmetic().problem(0)
    prompts = [Prompt(problem=problem, ids=TOKENIZER.encode(problem.prompt))]
    (answers,) = sample(engine, prompts, group=3, max_tokens=40, seed=0, decode=TOKENIZER.decode)
    add_reference(answers, model, vocabulary=TOKENIZER.vocab_size, micro_batch=2, exact=True)
    assert all(answer.reference == answer.logprobs for answer in answers)


def test_torchs_router_must_be_the_engines():
    model = policy()
    batch = rollout(model, max_tokens=8)
    engine = EnginePass(model)
    reading = engine.read(batch.tokens[:, :-1])
    reading.experts = (reading.experts + 1) % model.config.n_routed_experts
    engine.read = lambda tokens, real: dataclasses.replace(reading, real=real)
    gate = Gate(GateConfig(action="warn"), "float32")
    objective = GrpoObjective(GrpoConfig(kl=0.0), TOKENIZER.vocab_size, gate)
    objective.engine = engine
    taken(objective, model, batch, alpha=0.0)
    assert "routers chose otherwise" in gate.warnings[0]
    assert gate.report()["router_gap"] > 0.5


def test_weights_that_moved_are_read_as_they_are():
    model = policy()
    engine = EnginePass(model)
    tokens = torch.arange(2, 42).view(2, 20)
    before = engine.read(tokens).states
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    after = engine.read(tokens).states
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.hidden(tokens).main, atol=1e-5, rtol=1e-4)


def test_stale_answers_still_have_the_policys_numbers():
    """The second minibatch of a round: the policy has moved, the ratio is of its own numbers, and nothing is compared."""
    model = policy()
    batch = dataclasses.replace(rollout(model, max_tokens=8), fresh=False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    told, losses, _ = step(model, batch, exact=True)
    _, plain, _ = step(model, batch, exact=False)
    assert told == {}
    torch.testing.assert_close(losses.main, plain.main, atol=1e-5, rtol=1e-4)


def test_a_value_takes_the_place_and_the_gradient_stays():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = with_value(x * 3, torch.tensor([7.0, 8.0]))
    assert y.tolist() == [7.0, 8.0]
    y.square().sum().backward()
    assert x.grad.tolist() == [42.0, 48.0]
