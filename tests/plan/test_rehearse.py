"""The plan's bytes against the model as this package shards it, on fake tensors and ranks that do not exist."""

import dataclasses

import pytest
import torch.distributed as dist

from dsv3.plan.plan import layout_of
from dsv3.plan.rehearse import rehearse
from dsv3.plan.step import Layout
from dsv3.recipes import mini, v3


def test_the_reports_671b_on_2048_ranks_hold_what_the_plan_says():
    job = v3.job()
    layout = layout_of(job.parallel, job.gpus, micro_batch=1, recompute=False)
    found = rehearse(job, layout, stages=(0, 7))
    assert found["world"] == 2048
    assert all(difference < 1e-3 for difference in found["largest_difference"].values()), found
    assert not dist.is_initialized()


@pytest.mark.parametrize("sharding", ["zero1", "fsdp"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32", "fp8"])
def test_a_small_model_over_64_ranks_holds_what_the_plan_says(sharding, precision):
    job = mini.job()
    model = dataclasses.replace(job.model, num_hidden_layers=3)
    job = dataclasses.replace(job, model=model, train=dataclasses.replace(job.train, precision=precision))
    layout = Layout(gpus=64, expert=8, sharding=sharding, micro_batch=1)
    found = rehearse(job, layout)["largest_difference"]
    assert all(difference < 1e-2 for difference in found.values()), found


def test_one_device_has_nothing_to_rehearse():
    with pytest.raises(ValueError, match="1 device spreads nothing"):
        rehearse(mini.job(), Layout(gpus=1))
