"""A rank that sleeps in a layer is named with that layer, and the collective the other waits in; healthy steps say nothing."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dsv3.parallel.mesh import Mesh, ParallelConfig
from dsv3.train.watchdog import WatchConfig, Watchdog, absent, verdict
from tests.model.tiny import TINY
from tests.parallel.ranks import run_ranks
from tests.parallel.small import small_trainer

QUICK = WatchConfig(factor=3, least_s=1.0, most_s=3.0, poll_s=0.1)


def place(**changes: Any) -> dict[str, Any]:
    return {
        "who": "n0, pid 7", "step": 4, "inside": True, "seconds": 99.0, "layer": "model.layers.2", "pass": "forward",
        "module": "model.layers.2.mlp", "at": "dispatch.py:1 in exchange", "in_collective": "wait", "cuda": False,
        "pending": [{"name": "gloo:all_to_all", "group": "3", "p2p": False, "number": 12}], "counts": {"3": 12, "0": 5},
    } | changes  # fmt: skip


AWAY = {"in_collective": None, "pending": [], "counts": {"3": 11, "0": 5}, "module": "model.layers.2.self_attn"}


def test_the_deadline_follows_earlier_steps_between_its_bounds():
    config = WatchConfig(factor=10, least_s=60, most_s=480)
    assert config.deadline([]) == 480  # nothing to compare with
    assert config.deadline([0.1] * 5) == 60
    assert config.deadline([20, 20, 20, 900]) == 200  # one slow step does not move it
    assert config.deadline([100] * 5) == 480
    assert config.deadline([400] * 5) == 800  # a step that always takes so long is not late
    with pytest.raises(ValueError, match="least_s"):
        WatchConfig(least_s=10, most_s=5)


def test_the_one_that_waits_for_no_one_is_not_there():
    places = {0: place(), 1: place(**AWAY), 2: place()}
    assert absent(places, 3) == [1]
    text = verdict(places, 3, {})
    assert "rank 1 (n0, pid 7) is not there: it is in model.layers.2.self_attn (forward)" in text
    assert "ranks 0, 2 wait in model.layers.2.mlp (forward), in gloo:all_to_all number 12 of group 3" in text


def test_a_rank_without_a_sign_is_named():
    assert absent({0: place(), 2: place()}, 3) == [1]
    assert "rank 1 (n1, pid 9) gives no sign" in verdict({0: place(), 2: place()}, 3, {1: "n1, pid 9"})


def test_of_ranks_that_all_wait_the_one_behind_is_named():
    other = place(
        pending=[{"name": "gloo:all_reduce", "group": "0", "p2p": False, "number": 5}], counts={"3": 11, "0": 5}
    )
    places = {0: place(counts={"3": 12, "0": 4}), 1: other, 2: place(counts={"3": 12, "0": 5})}
    assert absent(places, 3) == [0, 1]  # each is behind in the other's group: they disagree
    assert absent({0: place(), 1: other}, 2) == [1]
    assert "the network" in verdict({0: place(), 1: place()}, 2, {})


def test_on_a_gpu_a_collective_under_way_counts_though_the_thread_ran_ahead():
    ahead = place(in_collective=None, cuda=True)
    assert absent({0: ahead, 1: place(**AWAY)}, 2) == [1]


def test_many_ranks_are_told_in_few_words():
    places = {rank: place() for rank in range(2048)} | {7: place(**AWAY)}
    text = verdict(places, 2048, {})
    assert "rank 7 (n0" in text
    assert "and 2039 more wait" in text
    assert len(text) < 500


class Sleeper(nn.Module):
    """Two layers, the second of which sleeps when told."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.seconds = 0.0
        self.layers[1].register_forward_hook(lambda *_: time.sleep(self.seconds))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_one_process_alone_names_its_layer_once_and_goes_on(tmp_path):
    model, said = Sleeper(), []
    with Watchdog(tmp_path / "run", [model], said.append, QUICK) as watch:
        for step in range(1, 5):
            with watch.step(step):
                model(torch.ones(1, 4))
        assert said == []
        model.seconds = 2.2
        with watch.step(5):
            model(torch.ones(1, 4))
    assert len(said) == 2
    assert said[0].startswith("step 5 hangs")
    assert "rank 0" in said[0]
    assert "in layers.1 (forward)" in said[0]
    assert said[1].startswith("step 5 went on")
    stacks = (tmp_path / "run" / "hang-rank0.txt").read_text()
    assert "test_watchdog.py" in stacks
    assert "time.sleep" in stacks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.layers[:1])  # marks are gone


def stop(_group: Any, folder: str) -> list[str]:
    """Rank 0 is stopped in step 5, and let go on; what this rank's watchdog said."""
    said = []
    with Watchdog(Path(folder), [], said.append, QUICK) as watch:
        for step in range(1, 7):
            with watch.step(step):
                if dist.get_rank() == 0 and step == 5:
                    subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
                    os.kill(os.getpid(), signal.SIGSTOP)
                dist.all_reduce(torch.ones(1))
        time.sleep(1)  # rank 0 hears of the alarm only now
    return said


def hang(_group: Any, folder: str) -> list[str]:
    """Rank 1 sleeps in layer 2, forward in step 4 and backward in step 6; what this rank's watchdog said."""
    run, said = small_trainer(Path(folder), Mesh(ParallelConfig(expert=2), TINY)), []
    layer = run.twin.get_submodule("model.layers.2")

    def sleep_at(step: int) -> Any:
        return lambda *_: time.sleep(3 if dist.get_rank() == 1 and run.step_index + 1 == step else 0)

    layer.self_attn.register_forward_pre_hook(sleep_at(4))
    layer.self_attn.register_forward_hook(lambda _m, _i, y: y.register_hook(sleep_at(6)) and None)
    with Watchdog(run.folder, run.workers.parts, said.append, QUICK) as watch:
        for step in range(1, 7):
            with watch.step(step):
                run.step()
    return said


def again(folder: str) -> list[str]:
    """A second watchdog of a folder in whose first sitting a step hung; what is wrong with it."""
    mine, said = Path(folder) / f"hang-rank{dist.get_rank()}.txt", []
    mine.unlink(missing_ok=True)
    with Watchdog(Path(folder), [], said.append, QUICK):
        time.sleep(3 * QUICK.poll_s)
    return said + [str(mine)] * mine.exists()


def both(group: Any, folder: str) -> tuple[list[str], list[str], list[str]]:
    return hang(group, f"{folder}/run"), stop(group, f"{folder}/stopped"), again(f"{folder}/stopped")


@pytest.mark.dist
def test_a_rank_that_sleeps_or_is_stopped_is_named_by_the_other(tmp_path):
    (spoke, woken, *old), (silent, waited, *also) = run_ranks(both, 2, tmp_path / "ranks", str(tmp_path))
    assert old == also == [[]]  # of the first sitting's alarm the second hears nothing
    assert not any("step 5 hangs" in text for text in woken)  # it was stopped itself
    (told,) = [text for text in waited if "step 5 hangs" in text]
    assert ") gives no sign" in told.split("rank 0 (")[1]
    assert "rank 1 waits in gloo:all_reduce" in told

    hangs = {
        text.split(" hangs")[0]: text for text in spoke if " hangs" in text
    }  # a busy machine may make others late too
    assert not {"step 4", "step 6"} & {text.split(" hangs")[0] for text in silent}  # one rank speaks
    for step, where in ((4, ".self_attn (forward)"), (6, " (backward)")):
        text = hangs[f"step {step}"]
        who, told = text.split("is not there")
        assert "rank 1 (" in who
        assert f"in model.layers.2{where}" in told.split(";")[0]
        assert "rank 0 waits in model.layers." in told
        assert "gloo:all" in told
        assert any(said.startswith(f"step {step} went on") for said in spoke)
    assert (tmp_path / "run" / "hang.txt").read_text().startswith(list(hangs)[-1])
    stacks = [(tmp_path / "run" / f"hang-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "time.sleep(3" in stacks[1]
    assert "dispatch.py" in stacks[0]
