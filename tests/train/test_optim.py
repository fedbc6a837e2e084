"""Schedules at their corners; the bias rule in exact integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.train.optim import CosineConfig, ScheduleConfig, build_optimizer, update_router_bias
from tests.model.tiny import random_model


def test_published_schedule():
    schedule = ScheduleConfig(steps=1_480_000, batch_ramp_from=3072)
    assert schedule.lr(0) == pytest.approx(2.2e-4 / 2000)
    assert schedule.lr(1999) == schedule.lr(999_999) == 2.2e-4
    assert schedule.lr(1_429_999) == pytest.approx(2.2e-5, rel=1e-3)
    assert schedule.lr(1_440_000) == pytest.approx(2.2e-5)
    assert schedule.lr(1_470_000) == pytest.approx(7.3e-6)
    assert (schedule.rows(0), schedule.rows(46_900), schedule.rows(10**6)) == (3072, 15360, 15360)
    assert (schedule.bias_speed(0), schedule.bias_speed(1_430_001)) == (1e-3, 0.0)
    assert (schedule.mtp_lambda(0), schedule.mtp_lambda(1_000_001)) == (0.3, pytest.approx(0.1))


def test_published_schedule_of_fine_tuning():
    schedule = CosineConfig(steps=101, batch_size=8)
    assert schedule.lr(0) == pytest.approx(5e-6)
    assert schedule.lr(50) == pytest.approx(3e-6)
    assert schedule.lr(100) == pytest.approx(1e-6)
    warm = CosineConfig(steps=21, batch_size=8, warmup_steps=10, gamma=0.0)
    assert [warm.lr(0), warm.lr(9), warm.lr(10), warm.lr(20)] == pytest.approx([5e-7, 5e-6, 5e-6, 1e-6])
    assert warm.bias_speed(3) == 0.0
    assert CosineConfig(steps=1, batch_size=1).lr(0) == pytest.approx(5e-6)
    with pytest.raises(ValueError, match=r"last_lr 0.1 must be from 0 to first_lr 5e-06"):
        CosineConfig(steps=1, batch_size=1, last_lr=0.1)


@given(st.integers(0, 99))
def test_schedules_stay_in_their_bounds(step):
    schedule = ScheduleConfig(steps=100, warmup_steps=10, batch_size=16, batch_ramp_from=4)
    assert 0 < schedule.lr(step) <= schedule.peak_lr
    assert 4 <= schedule.rows(step) <= 16


def test_bad_schedule_names_both_values():
    with pytest.raises(ValueError, match="warmup_steps 10 must be below steps 5"):
        ScheduleConfig(steps=5, warmup_steps=10)


def test_one_token_of_a_million_moves_the_bias():
    """In bfloat16 both counts would read 1,000,000 and nothing would move."""
    model = random_model()
    for router in model.routers():
        router.e_score_correction_bias.zero_()
    counts = torch.full((3, 8), 1_000_000, dtype=torch.int64)
    counts[:, 0] += 1
    counts[:, 1] -= 1
    update_router_bias(model, counts, 1e-3)
    bias = model.routers()[2].e_score_correction_bias
    assert bias.tolist() == pytest.approx([-1e-3, 1e-3, 0, 0, 0, 0, 0, 0])
    frozen = bias.clone()
    update_router_bias(model, counts, 0.0)
    assert torch.equal(bias, frozen)


def test_only_matrices_decay_and_the_bias_is_no_parameter():
    model = random_model()
    decayed, rest = build_optimizer(list(model.parameters())).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_bfloat16_moments_follow_float32_ones():
    """A moment rounded to eight bits a step: the parameter's path stays within a few thousandths of the exact one."""
    torch.manual_seed(0)
    pair = [torch.nn.ParameterList([torch.nn.Parameter(torch.ones(64, 64))]) for _ in range(2)]
    optimizers = [build_optimizer(list(p), moments=d) for p, d in zip(pair, (torch.float32, torch.bfloat16))]
    for _ in range(50):
        gradient = torch.randn(64, 64) + 0.3
        for parameters, optimizer in zip(pair, optimizers):
            parameters[0].grad = gradient
            optimizer.param_groups[0]["lr"] = 1e-2
            optimizer.step()
    state = optimizers[1].state[pair[1][0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert state["step"].item() == 50
    moved = [p[0].detach() - 1 for p in pair]
    assert ((moved[1] - moved[0]).norm() / moved[0].norm()) < 5e-3
