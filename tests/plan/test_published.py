"""The planner against published runs, each predicted without its own number."""

import statistics

import pytest

from dsv3.plan.hardware import KEPT
from dsv3.plan.published import ISCA, RUNS, deployments, held_out, kept_of, report_run, step_of_the_report


def test_the_reports_run_is_predicted_from_other_runs_within_ten_per_cent_whichever_of_them_one_leaves_out():
    (hours,) = report_run()
    assert abs(hours.error) < 0.1
    for left_out in range(1, len(RUNS)):
        (hours,) = report_run(RUNS[:left_out] + RUNS[left_out + 1 :])
        assert abs(hours.error) < 0.1, RUNS[left_out].name


def test_every_other_published_training_is_within_a_fifth_without_its_own_number():
    found = held_out()
    assert len(found) >= 5
    assert all(abs(each.error) < 0.2 for each in found), [(each.name, round(each.error, 3)) for each in found]


def test_the_share_that_a_run_keeps_is_the_median_of_all():
    assert round(statistics.median(kept_of(run) for run in RUNS), 2) == KEPT


def test_the_reports_step_its_parts_and_its_flops_agree_with_isca():
    found = {each.name: each for each in step_of_the_report()}
    assert sum(ISCA.values()) == pytest.approx(19.926, abs=0.03)
    assert abs(found["seconds of a step"].error) < 0.05
    assert abs(found["TFLOPS a device, causal"].error) < 0.01
    assert abs(found["of it 1F1B"].error) < 0.1
    assert abs(found["of it 1B"].error) < 0.1
    # Every rank is counted at the slowest one's pace: what the others wait is in the published bubble, and in our passes.
    busy = [name for name in found if name.startswith("of it")]
    assert sum(found[name].ours for name in busy) == pytest.approx(found["seconds of a step"].ours)
    assert 0.3 < found["of it bubble"].ours / ISCA["bubble"] < 1


def test_the_bound_of_decoding_is_iscas_and_measured_deployments_stay_near_ours():
    bound, *measured, day = deployments()
    assert abs(bound.error) < 0.02
    assert all(abs(each.error) < 0.2 for each in measured), [(each.name, round(each.error, 3)) for each in measured]
    assert 0 < day.error < 0.6  # production at changing load reaches less than a full batch would
