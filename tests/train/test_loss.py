"""Exact MTP targets to the row's end, the weights of the parts, and what a step makes of rows that count unequally."""

import dataclasses
from pathlib import Path

import pytest
import torch

from bench.common import RandomLoader
from dsv3.kernels.cross_entropy import cross_entropy_reference
from dsv3.train.loss import Losses, Objective, PretrainObjective, Step, document_mask, training_losses
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer
from tests.model.tiny import TINY, random_model


def test_depth_k_is_scored_on_the_kth_later_target():
    torch.manual_seed(0)
    states = [torch.randn(2, 6, 8) for _ in range(3)]
    head, targets = torch.randn(30, 8), torch.randint(0, 30, (2, 8))
    with torch.no_grad():
        losses = training_losses(
            states[0], tuple(states[1:]), torch.tensor(2.0), head, targets, mtp_weight=0.3, alpha=0.01
        )
        parts = [cross_entropy_reference(s, head, targets[:, k : k + 6]) for k, s in enumerate(states)]
    torch.testing.assert_close(losses.total, parts[0] + 0.15 * (parts[1] + parts[2]) + 0.02)


def make_trainer(objective=None, **changes) -> Trainer:
    schedule = ScheduleConfig(steps=12, warmup_steps=2, peak_lr=3e-3, batch_size=4)
    config = TrainConfig(schedule=schedule, **{"seq_len": 24, "micro_batch": 2, **changes})
    model = random_model(dataclasses.replace(TINY, rope_scaling=None))
    return Trainer(model, RandomLoader(96, 24, 1), config, Path("unused"), objective=objective)


@pytest.mark.parametrize("masked", [False, True])
def test_pretraining_is_bit_for_bit_what_it_was_before_there_were_objectives(masked):
    """Loss and gradients of a step against the loop that the trainer held itself, written out here."""
    now, then = (make_trainer(mask_documents=masked) for _ in range(2))
    losses, counts, extras = now._accumulate(now.loader.next_batch(3), 0.3)
    batch, total, grads = then.loader.next_batch(3), None, [torch.zeros_like(p) for p in then.model.parameters()]
    for micro in (slice(0, 2), slice(2, 3)):
        share = (micro.stop - micro.start) / 3
        mask = document_mask(batch.doc_ids[micro, :24]) if masked else None
        hidden = then.twin.hidden(batch.tokens[micro], depth=1, mask=mask, balance=True)
        args = hidden.main, hidden.mtp, hidden.routing.balance, then.twin.lm_head.weight, batch.targets[micro]
        part = training_losses(*args, mtp_weight=0.3, alpha=1e-4)
        (part.total * share).backward()
        for grad, parameter in zip(grads, then.twin.parameters(), strict=True):
            if parameter.grad is not None:
                grad.add_(parameter.grad)
            parameter.grad = None
        total = part.main * share if total is None else total + part.main * share
    assert torch.equal(losses.main, total)
    assert counts.sum() == 3 * 3 * 24 * 3
    assert extras == {}
    assert all(torch.equal(a, b) for a, b in zip(now.workers.grads, grads, strict=True))


def test_pretraining_gives_the_numbers_of_commit_7cf606f():
    """float32, so that only the order of sums may differ between machines."""
    run = make_trainer(precision="float32", mask_documents=True)
    records = [run.step() for _ in range(3)]
    assert [r["loss"] for r in records] == pytest.approx([4.6883965, 4.8133135, 4.6528952], rel=1e-5)
    assert [r["mtp_loss"][0] for r in records] == pytest.approx([4.7659645, 4.7369788, 4.6424568], rel=1e-5)
    assert records[-1]["grad_norm"] == pytest.approx(2.7407601, rel=1e-4)


class CountedRows(Objective):
    """Row i has i + 1 targets; its loss is i on each of them."""

    def shares(self, batch):
        return torch.arange(1, batch.tokens.shape[0] + 1, dtype=torch.float64)

    def __call__(self, model, batch, rows, *, depth, mtp_weight, alpha, device):
        weights = self.shares(batch)[rows]
        mean = float((weights * (weights - 1)).sum() / weights.sum())
        loss = model.lm_head.weight.sum() * 0 + mean
        counts = torch.ones(3, 8, dtype=torch.int64)
        return Step(Losses(loss, loss.detach(), (), loss.detach()), counts, {"twice": torch.tensor(2 * mean).double()})


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_rows_count_by_their_shares_in_any_micro_batches(micro):
    run = make_trainer(CountedRows(), micro_batch=micro, precision="float32")
    losses, counts, extras = run._accumulate(run.loader.next_batch(4), 0.0)
    assert losses.main.item() == pytest.approx((0 * 1 + 1 * 2 + 2 * 3 + 3 * 4) / 10)
    assert extras["twice"] == pytest.approx(2 * losses.main.item())
    assert counts[0, 0] == -(-4 // micro)


def test_an_objectives_extras_stand_in_the_record():
    record = make_trainer(CountedRows(), precision="float32").step()
    assert record["twice"] == pytest.approx(4.0)
    assert isinstance(make_trainer().objective, PretrainObjective)
