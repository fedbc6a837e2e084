"""The planner against published runs, each predicted without its own number."""

import statistics

from dsv3.plan.hardware import KEPT
from dsv3.plan.published import RUNS, deployments, held_out, kept_of, report_run, step_of_the_report


def test_the_reports_run_is_predicted_from_other_runs_within_ten_per_cent():
    (hours,) = report_run()
    assert abs(hours.error) < 0.1


def test_every_other_published_training_is_within_a_fifth_without_its_own_number():
    found = held_out()
    assert len(found) >= 5
    assert all(abs(each.error) < 0.2 for each in found), [(each.name, round(each.error, 3)) for each in found]


def test_the_share_that_a_run_keeps_is_the_median_of_all():
    assert round(statistics.median(kept_of(run) for run in RUNS), 2) == KEPT


def test_the_reports_step_and_its_flops_agree_with_isca():
    assert all(abs(each.error) < 0.1 for each in step_of_the_report())


def test_the_bound_of_decoding_is_iscas_and_measured_deployments_stay_near_ours():
    bound, *measured, day = deployments()
    assert abs(bound.error) < 0.02
    assert all(abs(each.error) < 0.2 for each in measured), [(each.name, round(each.error, 3)) for each in measured]
    assert 0 < day.error < 0.6  # production at changing load reaches less than a full batch would
