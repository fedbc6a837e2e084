"""The timeline of a pipeline, and the picture."""

import itertools

import pytest

from dsv3.plan.draw import blocks, draw
from dsv3.plan.hardware import hardware_named
from dsv3.plan.plan import make_plan
from dsv3.recipes import tiny


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 2), (4, 8), (4, 3), (16, 32)])
def test_1f1b_ends_after_its_micro_batches_and_the_bubble_of_the_formula(ranks, micro_batches):
    forward, backward = 1.0, 2.0
    rows = blocks(ranks, micro_batches, forward, backward)
    end = max(start + seconds for row in rows for _, _, start, seconds in row)
    assert end == pytest.approx((micro_batches + ranks - 1) * (forward + backward))
    assert all(len(row) == 2 * micro_batches for row in rows)


def test_no_rank_does_two_things_at_once_and_nothing_before_what_it_reads():
    rows = blocks(4, 8, 1.0, 2.0)
    ends = {(kind, micro, rank): start + s for rank, row in enumerate(rows) for kind, micro, start, s in row}
    for rank, row in enumerate(rows):
        for (*_, start, seconds), (*_, after, _) in itertools.pairwise(row):
            assert after >= start + seconds
        for kind, micro, start, _ in row:
            before = ends.get((kind, micro, rank - 1 if kind == "F" else rank + 1), 0.0)
            assert start >= before


def test_the_picture_is_written_and_a_strange_name_refused(tmp_path):
    made = make_plan(tiny.job(), hardware_named("cpu"), 1)
    draw(made, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"plan\.xyz: name a file that ends in \.png"):
        draw(made, tmp_path / "plan.xyz")
