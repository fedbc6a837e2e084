"""GRPO's arithmetic against its formulas; the objective against the trainer's rules."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.post.batch import RolloutBatch, cut
from dsv3.post.grpo import GrpoConfig, GrpoObjective, advantages, k3, surrogate, token_logprobs
from dsv3.post.replay import Gate, GateConfig
from dsv3.post.rollout import Answer, make_batch
from tests.model.tiny import TINY, random_model

REWARDS = st.lists(st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=20)


@given(REWARDS)
def test_advantages_have_mean_zero_and_deviation_one_or_are_all_zero(rewards):
    values = advantages(rewards)
    assert len(values) == len(rewards)
    assert sum(values) == pytest.approx(0, abs=1e-6)
    if len(set(rewards)) == 1:
        assert values == [0.0] * len(rewards)
    else:
        assert sum(a * a for a in values) / len(values) == pytest.approx(1)
        assert sorted(values) == [a for _, a in sorted(zip(rewards, values))]  # more reward, more advantage


def test_advantages_of_one_right_answer_in_four():
    assert advantages([1, 0, 0, 0]) == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=20))
def test_k3_is_never_negative_and_zero_only_where_the_policies_agree(pairs):
    policy, reference = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs))
    assert (k3(policy, reference) >= 0).all()
    assert (k3(policy, policy) == 0).all()


def test_k3_is_unbiased():
    policy, reference = (
        torch.randn(5, generator=torch.Generator().manual_seed(i), dtype=torch.float64).log_softmax(0) for i in (0, 1)
    )
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * k3(policy, reference)).sum() == pytest.approx(float(exact))


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip", "gain", "cut_off"),
    [
        (1.5, 1.0, 0.2, 1.2, True),  # grown enough
        (1.5, -1.0, 0.2, -1.5, False),  # must still shrink
        (0.5, 1.0, 0.2, 0.5, False),
        (0.5, -1.0, 0.2, -0.8, True),
        (5.0, 1.0, 10.0, 5.0, False),  # R1's clip
        (12.0, 1.0, 10.0, 11.0, True),
        (1e-9, -1.0, 10.0, -1e-9, False),  # never from below
    ],
)
def test_the_clip_cuts_where_the_report_cuts(ratio, advantage, clip, gain, cut_off):
    policy = torch.tensor([math.log(ratio)], requires_grad=True)
    value, clipped = surrogate(policy, torch.zeros(1), torch.tensor([advantage]), clip)
    assert value.item() == pytest.approx(gain, rel=1e-5)
    assert bool(clipped) is cut_off
    value.sum().backward()
    assert policy.grad is not None
    assert (policy.grad.item() == 0) is cut_off


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_an_answer_far_from_what_it_was_gives_finite_numbers(advantage):
    policy, old = (
        torch.tensor([95.0, -1.0], requires_grad=True),
        torch.tensor([0.0, -1.0]),
    )  # long answers: level "sequence"
    value, _ = surrogate(policy, old, torch.full((2,), advantage), 10.0)
    (value.sum() + k3(policy, old).sum() + k3(old, policy).sum()).backward()
    assert policy.grad is not None
    assert bool(value.isfinite().all())
    assert bool(policy.grad.isfinite().all())
    assert policy.grad[1].item() == pytest.approx(advantage)


def test_the_defaults_are_those_of_r1():
    from dsv3.post.rl import RlConfig

    config = RlConfig(steps=1)
    assert (config.grpo.clip, config.grpo.kl, config.group) == (10.0, 0.001, 16)
    assert config.prompts * config.group == 8192
    assert config.train().schedule.batch_size == 512


def test_token_logprobs_are_those_of_a_softmax_in_blocks_too(monkeypatch):
    torch.manual_seed(0)
    states, head, targets = torch.randn(7, 5), torch.randn(11, 5), torch.randint(11, (7,))
    whole = (states @ head.t()).log_softmax(-1)
    monkeypatch.setattr("dsv3.post.grpo._BLOCK_VALUES", 22)
    states.requires_grad_()
    logprobs, entropies = token_logprobs(states, head, targets)
    torch.testing.assert_close(logprobs, whole.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropies, -(whole.exp() * whole).sum(-1))
    (got,) = torch.autograd.grad(logprobs.sum(), states)
    torch.testing.assert_close(got, (torch.nn.functional.one_hot(targets, 11) - whole.exp()) @ head)
    assert len(token_logprobs(states[:0], head, targets[:0])[0]) == 0


# -- the objective -------------------------------------------------------------------------------------------------------


def answers(model=None) -> list[Answer]:
    """Four answers of different lengths; with a model, as its own rollout would have them."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i, (start, count) in enumerate([(4, 3), (2, 6), (5, 1), (3, 4)]):
        ids = torch.randint(TINY.vocab_size, (start + count,), generator=generator).tolist()
        logprobs = [-2.0 - 0.1 * j for j in range(count)]
        if model is not None:
            with torch.no_grad():
                told = model(torch.tensor([ids])).log_softmax(-1)[0]
            logprobs = [float(told[start - 1 + j, ids[start + j]]) for j in range(count)]
        made.append(
            Answer(number=i, choice=0, problem="", question="", gold="", prompt=ids[:start], tokens=ids[start:], logprobs=logprobs,
                   advantage=[1.0, -0.5, -0.5, 0.25][i], reference=[x - 0.3 for x in logprobs])
        )  # fmt: skip
    return made


def batch(made: list[Answer] | None = None, *, fresh: bool = False) -> RolloutBatch:
    return make_batch(made or answers(), depth=1, layers=2, top_k=3, fresh=fresh)


def objective(**changes) -> GrpoObjective:
    return GrpoObjective(GrpoConfig(**changes), TINY.vocab_size, Gate(GateConfig(), "float32"))


def step(objective, model, batch, rows=slice(0, 4), alpha=0.0, mtp_weight=0.3):
    return objective(model, batch, rows, depth=1, mtp_weight=mtp_weight, alpha=alpha, device=torch.device("cpu"))


def by_hand(model, made, *, clip, kl, level) -> float:
    gains = []
    for a in made:
        row = model(torch.tensor([[*a.prompt, *a.tokens]])).log_softmax(-1)[0]
        new = torch.stack([row[len(a.prompt) - 1 + j, t] for j, t in enumerate(a.tokens)]).double()
        old, reference = torch.tensor(a.logprobs).double(), torch.tensor(a.reference).double()
        if level == "sequence":
            new, old, reference = (x.sum(0, keepdim=True) for x in (new, old, reference))
        ratio = (new - old).exp()
        gain = torch.minimum(ratio * a.advantage, ratio.clamp(1 - clip, 1 + clip) * a.advantage)
        gains.append((gain - kl * ((reference - new).exp() - (reference - new) - 1)).mean())
    return -torch.stack(gains).mean().item()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_loss_is_the_report_s_formula(level):
    model, made = random_model(), answers()
    out = step(objective(clip=0.2, kl=0.04, level=level), model, batch(made))
    assert out.losses.main.item() == pytest.approx(by_hand(model, made, clip=0.2, kl=0.04, level=level), rel=1e-4)
    assert out.losses.total.item() == pytest.approx(out.losses.main.item() + 0.3 * out.losses.mtp[0].item(), rel=1e-5)
    assert set(out.extras) == {"entropy", "clipped", "ratio", "kl"}


def test_on_policy_the_gradient_is_that_of_reinforce():
    """With the rollout's own weights rho is 1: dJ = mean of A times d log pi."""
    model = random_model()
    made = answers(model)
    step(objective(kl=0.0), model, batch(made), mtp_weight=0.0).losses.total.backward()
    grads = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    model.zero_grad()
    loss = 0.0
    for a in made:
        row = model(torch.tensor([[*a.prompt, *a.tokens]])).log_softmax(-1)[0]
        loss = (
            loss - a.advantage * torch.stack([row[len(a.prompt) - 1 + j, t] for j, t in enumerate(a.tokens)]).mean() / 4
        )
    loss.backward()
    for got, parameter in zip(grads, model.parameters()):
        if parameter.grad is not None:
            torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=1e-3)


def test_padding_and_other_rows_change_nothing():
    """Each row alone and all together: the same loss, counts and balance."""
    model, goal, whole = random_model(), objective(), batch()
    together = step(goal, model, whole, alpha=0.1)
    alone = [step(goal, model, whole, slice(i, i + 1), alpha=0.1) for i in range(4)]
    assert torch.equal(together.counts, sum(part.counts for part in alone))
    lengths = [len(a.prompt) + len(a.tokens) - 1 for a in answers()]
    assert together.counts.sum(1).tolist() == [3 * sum(lengths)] * 3  # no token of padding
    for name in ("total", "main", "balance"):
        mean = sum(getattr(part.losses, name) for part in alone) / 4
        torch.testing.assert_close(getattr(together.losses, name), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.losses.mtp[0], sum(p.losses.mtp[0] for p in alone) / 4, atol=1e-5, rtol=1e-4)


def test_blank_rows_and_the_length_of_the_longest_count_for_nothing():
    """What a pipeline's minibatch has besides: the same loss, counts, extras and gradients, and none of blank rows alone."""
    goal, made = objective(), []
    even = make_batch(answers(), depth=1, layers=2, top_k=3, fresh=False, even=7)
    assert (goal.rows(even), goal.shares(even).tolist()) == (4, [1.0] * 4 + [0.0] * 3)
    for rows, some in ((slice(2, 4), batch()), (slice(2, 6), even)):
        model = random_model()
        out = step(goal, model, some, rows, alpha=0.1)
        out.losses.total.backward()
        made.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (plain, grads), (padded, others) = made
    assert cut(even, slice(2, 6), 1, torch.device("cpu")).shape == (4, even.answer.shape[1])
    assert torch.equal(plain.counts, padded.counts)
    torch.testing.assert_close(padded.losses, plain.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded.extras, plain.extras, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    blank = step(goal, random_model(), even, slice(5, 7), alpha=0.1)
    blank.losses.total.backward()
    assert (blank.losses.total.item(), int(blank.counts.sum())) == (0.0, 0)
    assert {name: float(value) for name, value in blank.extras.items()} == dict.fromkeys(plain.extras, 0.0)


def test_mtp_learns_the_answers_tokens_from_the_second_on():
    model, made = random_model(), answers()[:1]
    a = made[0]
    ids = torch.tensor([[*a.prompt, *a.tokens]])
    hidden = model.hidden(torch.cat((ids, ids[:, :1]), 1)[:, : ids.shape[1] + 1], depth=1)
    told = model.lm_head(hidden.mtp[0]).log_softmax(-1)[0]
    start = len(a.prompt) - 1
    by_hand = -torch.stack([told[start + j, a.tokens[j + 1]] for j in range(len(a.tokens) - 1)]).mean()
    out = step(objective(), model, batch(made), slice(0, 1))
    torch.testing.assert_close(out.losses.mtp[0], by_hand.detach(), atol=1e-5, rtol=1e-4)


def test_the_head_s_rows_beyond_the_vocabulary_take_no_part():
    model, goal = random_model(), objective()
    goal.vocabulary = 96
    model.lm_head.weight.data[90:] = 50.0
    goal.vocabulary = 90
    made = [a for a in answers() if max(a.tokens) < 90]
    out = step(goal, model, batch(made), slice(0, len(made)))
    assert out.losses.total.isfinite()
    assert out.extras["entropy"] > 1


def test_rows_are_cut_to_the_longest_of_them():
    part = cut(batch(), slice(2, 3), 1, torch.device("cpu"))
    assert part.tokens.shape == (1, 6)  # 5 + 1 - 1 positions, one more for MTP
    assert part.shape == (1, 5)
    assert [len(learnt.at) for learnt in part.learnt] == [1, 0]


def test_constants_that_make_no_sense_are_refused():
    for wrong in (dict(clip=0.0), dict(kl=-1.0), dict(level="word")):
        with pytest.raises(ValueError):
            GrpoConfig(**wrong)
