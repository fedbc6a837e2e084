"""A spike is undone and its rows skipped; a run killed anywhere in it ends where one never killed does; a skip can be undone."""

import dataclasses
import json
import math
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.mesh import Mesh
from dsv3.train.loss import PretrainObjective
from dsv3.train.metrics import MetricsLog, read_metrics
from dsv3.train.spikes import SKIPPED, Skip, Skipping, SpikeConfig, SpikeError, SpikeGuard, read_skips
from dsv3.train.trainer import NonFiniteError, Trainer
from tests.model.tiny import TINY
from tests.parallel.ranks import run_ranks
from tests.parallel.small import MadeUp, small_trainer

QUICK = SpikeConfig(window=8, least=4, factor=6, patience=2, margin=1, most=2)


class Killed(Exception):
    pass


class Rows:
    """Row n is the number n."""

    def __init__(self) -> None:
        self.position = 0

    def next_batch(self, rows: int) -> list[int]:
        self.position += rows
        return list(range(self.position - rows, self.position))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.position}

    def load_state_dict(self, state: Any) -> None:
        assert set(state) == {"rows"}
        self.position = state["rows"]


class Toy:
    """A trainer whose weights are the rows it was trained on. A poisoned row makes the loss high from then on, or not finite."""

    leads = True

    def barrier(self) -> None:
        """Of one process."""

    def leading(self, mine: Any) -> Any:
        return mine

    def __init__(self, folder: Path, poison: dict[int, float], save_every: int = 3) -> None:
        self.folder, self.poison, self.save_every = folder, poison, save_every
        self.loader, self.guard = Skipping(Rows(), folder), SpikeGuard(folder, QUICK)
        self.seen: list[int] = []
        self.step_index = 0

    def step(self) -> dict[str, Any]:
        batch = self.loader.next_batch(1 + self.step_index % 3)  # a ramp, of a kind
        worst = max(self.poison.get(row, 0.0) for row in [*self.seen, *batch])
        if math.isinf(worst) and any(row in self.poison for row in batch):
            raise NonFiniteError("loss is nan")
        self.seen += batch
        self.step_index += 1
        return {"step": self.step_index, "loss": 2 + 0.01 * (self.step_index % 5) + worst}

    def save(self) -> None:
        folder = self.folder / "checkpoints" / f"step-{self.step_index:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        state = {"step": self.step_index, "loader": self.loader.state_dict(), "seen": self.seen}
        (folder / "training.json").write_text(json.dumps(state))

    def restore(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / "training.json").read_text())
        self.loader.load_state_dict(state["loader"])
        self.step_index, self.seen = state["step"], state["seen"]

    def run(self, steps: int, kill: int = -1) -> None:
        """As the trainer's; `kill`: after so many things done."""
        done = 0

        def alive() -> None:
            nonlocal done
            done += 1
            if done == kill:
                raise Killed

        found = sorted((self.folder / "checkpoints").glob("step-*"))
        if found:
            self.restore(found[-1])
        log = MetricsLog(self.folder, resume_step=self.step_index)
        self.guard.recall(self.step_index)
        while self.step_index < steps:
            alive()
            try:
                record = self.step()
            except NonFiniteError as error:
                spike = self.guard.broken(self.step_index + 1, error)
            else:
                log.write(record)
                spike = self.guard.see(record)
            alive()
            rollback = self.guard.undo(spike, self.loader.rows, self) if spike else None
            if rollback is not None:
                alive()
                self.loader.reload()
                self.restore(rollback.checkpoint)
                log.close()
                log = MetricsLog(self.folder, resume_step=self.step_index)
                continue
            if self.step_index % self.save_every == 0:
                self.save()
        log.close()


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl")]


def test_a_spike_goes_back_before_it_and_skips_what_was_read_since(tmp_path):
    run = Toy(tmp_path, {24: 3.0})
    run.run(30)
    (skip,) = read_skips(tmp_path)
    assert skip.begin <= 24 < skip.end
    assert skip.to_step == 9  # row 24 is in step 13, and step 12's checkpoint is not trusted: a margin of one
    assert "2 steps above its usual 2.0" in skip.why
    assert all(loss > 5 for loss in skip.losses)
    assert not set(range(skip.begin, skip.end)) & set(run.seen)
    rows = run.loader.rows
    assert sorted(run.seen) == [n for n in range(rows) if not skip.begin <= n < skip.end]  # the others once each
    assert [step for step, _ in curve(tmp_path)] == list(range(1, 31))
    assert max(loss for _, loss in curve(tmp_path)) < 2.1
    assert run.loader.state_dict()["skipped"] == [[skip.begin, skip.end]]


def test_what_is_not_finite_goes_back_at_once(tmp_path):
    run = Toy(tmp_path, {24: math.inf})
    run.run(20)
    (skip,) = read_skips(tmp_path)
    assert skip.step == 13
    assert skip.to_step == 12  # nothing was updated: the newest checkpoint is good
    assert 24 not in run.seen


def test_checkpoints_of_the_spike_are_set_aside(tmp_path):
    Toy(tmp_path, {24: 3.0}, save_every=1).run(20)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert [name for name in names if name.startswith("spiked")] == ["spiked-step-00000012", "spiked-step-00000013"]


def test_what_was_set_aside_is_kept_for_a_while_and_then_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("spiked-step-00000012", "gone-spiked-step-00000003", "step-00000010"):
        (folder / name).mkdir(parents=True)
    (folder / "spiked-step-00000012" / "shard").write_text("x")
    guard = SpikeGuard(tmp_path, SpikeConfig(keep=5))
    guard.recall(10)
    guard.see({"step": 16, "loss": 1.0})
    assert (folder / "spiked-step-00000012" / "shard").exists()
    for other in (guard, SpikeGuard(tmp_path, SpikeConfig(keep=5))):  # as another rank would
        other.see({"step": 17, "loss": 1.0})
    for thread in threading.enumerate():
        if thread.name.startswith("removes "):
            thread.join()
    assert [path.name for path in folder.iterdir()] == ["step-00000010"]


def test_a_run_that_goes_on_long_enough_leaves_nothing_aside(tmp_path):
    run = Toy(tmp_path, {24: 3.0}, save_every=1)
    run.run(20)
    run.guard.config = dataclasses.replace(run.guard.config, keep=10)
    assert len(run.guard._aside) == 2
    run.guard.see({"step": 23, "loss": 2.0})
    assert run.guard._aside == []


def test_without_a_checkpoint_a_spike_is_let_be_and_nan_is_told(tmp_path):
    run = Toy(tmp_path / "a", {24: 3.0}, save_every=100)
    run.run(20)
    assert read_skips(tmp_path / "a") == []
    with pytest.raises(NonFiniteError):
        Toy(tmp_path / "b", {24: math.inf}, save_every=100).run(20)


def test_spikes_that_come_again_and_again_stop_the_run(tmp_path):
    with pytest.raises(SpikeError, match=r"after 2 skips from step 12: it is not the data"):
        Toy(tmp_path, dict.fromkeys(range(24, 200), math.inf)).run(40)
    assert len(read_skips(tmp_path)) == 2


def test_a_deleted_entry_is_trained_on_again(tmp_path):
    Toy(tmp_path, {24: 3.0}).run(12)
    run = Toy(tmp_path, {24: 3.0})
    run.run(16)
    (tmp_path / SKIPPED).write_text("[]")
    for path in (tmp_path / "checkpoints").glob("step-*"):
        if int(path.name[-8:]) > 9:
            (path / "training.json").unlink()
            path.rmdir()
    again = Toy(tmp_path, {})
    again.run(16)
    assert 24 in again.seen
    assert again.seen == list(range(again.loader.rows))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_run_killed_anywhere_ends_as_one_never_killed(tmp_path_factory, data):
    rows = st.dictionaries(st.integers(12, 60), st.sampled_from([1.0, 5.0, math.inf]), max_size=2)
    poison, every = data.draw(rows), data.draw(st.integers(1, 6))
    whole, cut = (tmp_path_factory.mktemp(name) for name in ("whole", "cut"))
    once = Toy(whole, poison, every)
    try:
        once.run(30)
    except (SpikeError, NonFiniteError) as error:
        with pytest.raises(type(error)):
            Toy(cut, poison, every).run(30)
        return
    for kill in data.draw(st.lists(st.integers(1, 40), max_size=4)):
        try:
            Toy(cut, poison, every).run(30, kill)
        except Killed:
            continue
    last = Toy(cut, poison, every)
    last.run(30)
    assert last.seen == once.seen
    assert curve(cut) == curve(whole)
    assert [(s.begin, s.end, s.losses) for s in read_skips(cut)] == [
        (s.begin, s.end, s.losses) for s in read_skips(whole)
    ]
    for skip in read_skips(cut):
        assert not set(range(skip.begin, skip.end)) & set(last.seen)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=5), st.lists(st.integers(1, 7), max_size=30)
)
def test_rows_come_in_order_and_none_begins_in_a_skip(tmp_path_factory, ranges, batches):
    folder = tmp_path_factory.mktemp("skips")
    (folder / SKIPPED).write_text(json.dumps([{"from": a, "to": a + n} for a, n in ranges]))
    loader, firsts, read = Skipping(Rows(), folder), [], []
    for rows in batches:
        batch = loader.next_batch(rows)
        assert len(batch) == rows
        firsts.append(batch[0])
        read += batch
    assert read == sorted(set(read))
    assert not any(a <= first < a + n for first in firsts for a, n in ranges)


def test_losses_that_fall_wander_or_jump_once_are_no_spikes(tmp_path):
    guard, rng = SpikeGuard(tmp_path), random.Random(0)
    for step in range(1, 400):
        # while it falls fast, its own spread hides a jump
        loss = 2 + 8 * math.exp(-step / 60) + rng.gauss(0, 0.05) + (6 if step % 97 == 0 else 0)
        assert guard.see({"step": step, "loss": loss}) is None
        assert step < 200 or len(guard._high) == (step % 97 == 0)  # seen, but too short


@pytest.mark.parametrize(
    "text", ["{}", "[1]", '[{"from": 3}]', '[{"from": 5, "to": 5}]', "[", '[{"from": "a", "to": 2}]']
)
def test_a_damaged_list_is_refused(tmp_path, text):
    (tmp_path / SKIPPED).write_text(text)
    with pytest.raises(ValueError, match=r"skipped\.json"):
        read_skips(tmp_path)


def test_impossible_configs_and_loaders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="least 9 must be from 1 to window 8"):
        SpikeConfig(window=8, least=9)
    (tmp_path / SKIPPED).write_text('[{"from": 0, "to": 2}]')

    class Uncounted(Rows):
        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(ValueError, match="Uncounted counts none"):
        Skipping(Uncounted(), tmp_path)


def test_a_real_run_resumes_bit_for_bit_behind_a_skip(tmp_path):
    """Skip, two steps, checkpoint; another trainer goes on from there: the same weights as without the stop."""
    (tmp_path / SKIPPED).write_text('[{"from": 2, "to": 4}]')

    first = small_trainer(tmp_path)
    for _ in range(3):
        first.step()
    assert first.loader.state_dict()["rows"] == 5  # this loader counts batches: two trained on, two skipped, one more
    saved = first.save()
    losses = [first.step()["loss"] for _ in range(2)]
    second = small_trainer(tmp_path)
    second.restore(saved)
    assert json.loads((saved / "training.json").read_text())["loader"]["skipped"] == [[2, 4]]
    assert [second.step()["loss"] for _ in range(2)] == losses
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert Skip(2, 4) == read_skips(tmp_path)[0]


@dataclass(frozen=True, kw_only=True)
class Poisoned(PretrainObjective):
    """A batch whose loss is not a number."""

    marks: tuple[int, ...] = ()

    def losses(self, hidden, head, batch, rows, steer, **weights):
        step = super().losses(hidden, head, batch, rows, steer, **weights)
        bad = batch.tokens[0, :4].tolist() == list(self.marks)
        return step._replace(losses=step.losses._replace(total=step.losses.total * math.nan)) if bad else step


def poisoned(folder: Path, mesh: Mesh | None = None) -> Trainer:
    """The fifth batch breaks."""
    rows = MadeUp(TINY)
    marks = tuple([rows.next_batch(8).tokens[0, :4].tolist() for _ in range(5)][-1])
    run = small_trainer(folder, mesh, schedule={"steps": 8}, save_every=2, keep_last=9)
    run.objective = Poisoned(marks=marks)
    return run


def run_poisoned(_group: Any, folder: Path) -> float:
    run = poisoned(folder, Mesh(ParallelConfig(expert=2), TINY))
    run.run()
    return float(run.workers.masters[0].full_tensor().double().sum())


def test_a_batch_that_breaks_the_loss_costs_itself_and_is_on_record(tmp_path):
    poisoned(tmp_path / "met").run()
    (skip,) = read_skips(tmp_path / "met")
    assert (skip.begin, skip.end, skip.step, skip.to_step) == (4, 5, 5, 4)  # this loader counts batches
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / SKIPPED).write_text('[{"from": 4, "to": 5}]')
    poisoned(tmp_path / "told").run()
    met, told = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("met", "told"))
    assert [record["step"] for record in met] == list(range(1, 9))
    assert [record["loss"] for record in met] == [record["loss"] for record in told]


@pytest.mark.dist
def test_processes_go_back_together(tmp_path):
    results = run_ranks(run_poisoned, 2, tmp_path / "ranks", tmp_path / "run")
    assert results[0] == results[1]
    assert [(skip.begin, skip.end) for skip in read_skips(tmp_path / "run")] == [(4, 5)]
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_the_first_batches_break_with_nothing_to_go_back_to(tmp_path):
    run = poisoned(tmp_path)
    run.loader.load_state_dict({"rows": 4})
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        run.run()
