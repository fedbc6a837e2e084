"""The picture of a plan."""

import dataclasses

import pytest

from dsv3.plan.draw import draw, drawn
from dsv3.plan.hardware import hardware_named
from dsv3.plan.plan import make_plan
from dsv3.plan.step import DSV3
from dsv3.recipes import tiny, v3


def test_a_deep_pipeline_is_drawn_with_as_many_micro_batches_as_fill_it_and_the_plans_bubble():
    job = dataclasses.replace(v3.job(), parallel=dataclasses.replace(v3.PARALLEL, schedule="zero-bubble"))
    time = make_plan(job, hardware_named("h200"), 2048, system=DSV3).chosen.time
    blocks = drawn(time, 16)
    assert {block.kind for block in blocks} == {"F", "I", "W"}
    assert len({part.micro for block in blocks for part in block.parts}) == 32
    assert max(block.end for block in blocks) == pytest.approx(32 * time.pair + time.bubble)


def test_the_picture_is_written_and_a_strange_name_refused(tmp_path):
    made = make_plan(tiny.job(), hardware_named("cpu"), 1)
    draw(made, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"plan\.xyz: name a file that ends in \.png"):
        draw(made, tmp_path / "plan.xyz")
