"""Sampling: each parameter does what it says, draws are reproducible, rejection keeps the distribution."""

import pytest
import torch

from dsv3.infer.sampling import SamplingParams, accept, adjust, chance, distribution, draw


def sampled(**params):
    return SamplingParams(temperature=1.0, **params)


P = torch.tensor([0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_p": 0.7}, [0.5, 0.3]),
        ({"top_p": 0.5}, [0.5]),
        ({"top_k": 3}, [0.5, 0.3, 0.15]),
        ({"min_p": 0.2}, [0.5, 0.3, 0.15]),
        ({"top_k": 3, "top_p": 0.6}, [0.5, 0.3]),
        ({}, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_a_cut_keeps_the_likeliest(params, kept):
    expected = torch.tensor(kept) / sum(kept)
    assert distribution(P.log(), sampled(**params)).tolist() == pytest.approx(
        [*expected.tolist(), *[0] * (4 - len(kept))]
    )


def test_temperature_sharpens_and_zero_takes_the_first():
    p = distribution(P.log(), SamplingParams(temperature=0.5))
    assert p.tolist() == pytest.approx((P**2 / (P**2).sum()).tolist())
    assert distribution(P.log(), SamplingParams()).tolist() == [1, 0, 0, 0]


def test_penalties_count_the_answer_and_repetition_counts_the_prompt_too():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.0])
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    assert adjust(logits, params, [0, 1], [2, 2]).tolist() == [2.0, -2.0, -1.0, 0.0]
    assert adjust(logits, SamplingParams(repetition_penalty=2.0), [0, 1], [2]).tolist() == [1.0, -4.0, 0.5, 0.0]
    biased = adjust(logits, SamplingParams(logit_bias={1: 5.0, 3: -100}), [], [])
    assert biased.tolist() == [2.0, 3.0, 1.0, -float("inf")]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]


def test_draws_follow_the_distribution_and_the_seed_alone():
    counts = torch.zeros(4)
    for seed in range(6000):
        counts[draw(P, chance(seed, 0, 3, "sample"))] += 1
    # Standard error of a share is below 0.5/sqrt(6000) = 0.0065; four of them.
    assert (counts / 6000 - P).abs().max() < 0.026
    assert chance(1, 0, 3, "sample") == chance(1, 0, 3, "sample")
    assert (
        len({chance(1, 0, 3, "sample"), chance(2, 0, 3, "sample"), chance(1, 1, 3, "sample"), chance(1, 0, 3, "draft")})
        == 4
    )


def test_a_draw_never_takes_what_is_impossible():
    p = torch.tensor([0.0, 1.0, 0.0])
    assert {draw(p, u) for u in (0.0, 0.5, 1 - 2**-53)} == {1}


def test_rejection_keeps_the_distribution():
    torch.manual_seed(0)
    p, q = torch.rand(5).softmax(0), torch.rand(5).mul(3).softmax(0)
    counts, n = torch.zeros(5), 6000
    for i in range(n):
        d = draw(q, chance(i, 0, 0, "draft"))
        counts[accept(d, p, q, chance(i, 0, 0, "accept"), chance(i, 0, 0, "sample"))[1]] += 1
    assert (counts / n - p).abs().max() < 0.026


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.5), ("top_k", -1),
        ("min_p", 2), ("presence_penalty", 3), ("repetition_penalty", 0), ("n", 0), ("logprobs", 21), ("stop", ("",)),
        ("logit_bias", {1: float("nan")}), ("min_tokens", 65),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})
