"""Training whose tokens go to their experts by way of nodes takes the steps of one process."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.dispatch import OneHop, TwoHops
from dsv3.parallel.mesh import Mesh
from tests.model.tiny import TINY
from tests.parallel.ranks import run_ranks
from tests.parallel.test_workers import take_steps

pytestmark = pytest.mark.dist
# Ranks a machine, degrees, changes of the training, and how far gradients may be off. In FP8 a partial sum is rounded once more
# (to bfloat16), and of some 700 tokens one goes elsewhere.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], float]] = {
    "some ranks empty, recomputed": (
        2, {"expert": 4, "sharding": "fsdp"}, {"recompute": True, "schedule": {"batch_size": 5}}, 1e-5,
    ),
    "zero-bubble": (1, {"pipeline": 2, "expert": 2, "schedule": "zero-bubble"}, {}, 1e-5),
    "fp8": (2, {"expert": 4}, {"precision": "fp8"}, 0.2),
}  # fmt: skip


def train_on_nodes(group: Any, folder: str) -> dict[str, dict[str, Any]]:
    told = {}
    for name, (node, degrees, changes, _) in LAYOUTS.items():
        os.environ["LOCAL_RANK"] = str(dist.get_rank() % node)
        way = Mesh(ParallelConfig(**degrees), TINY).way
        assert isinstance(way, TwoHops)
        assert dist.get_world_size(way.inside) == node
        told[name] = take_steps(group, degrees, f"{folder}/{name}", dict(changes), steps=1)
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    assert isinstance(Mesh(ParallelConfig(expert=4), TINY).way, OneHop)
    return told


def test_training_on_nodes_takes_the_step_of_one_process(tmp_path):
    ranks = run_ranks(train_on_nodes, 4, tmp_path / "ranks", str(tmp_path / "run"))
    for name, (_, _, changes, far) in LAYOUTS.items():
        alone = take_steps(None, None, str(tmp_path / name), dict(changes), steps=1)
        for told in ranks:
            assert told[name]["counts"] == alone["counts"] or name == "fp8"
            losses, one = torch.tensor(told[name]["loss"])[:, :3], torch.tensor(alone["loss"])[:, :3]
            torch.testing.assert_close(losses, one, rtol=1e-3 if name == "fp8" else 2e-5, atol=1e-6)
            for parameter, gradient in told[name]["gradients"].items():
                expected = alone["gradients"][parameter]
                off = float((gradient - expected).norm() / expected.norm())
                assert off <= far, (name, parameter, off)
            if name != "fp8":
                assert all(torch.equal(bias, alone["biases"][n]) for n, bias in told[name]["biases"].items())
