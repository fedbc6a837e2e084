"""The plan of the report's run against what the report says of it."""

import dataclasses

import pytest

from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import ParallelConfig
from dsv3.plan.hardware import hardware_named
from dsv3.plan.job import job_from_file, plain_job, with_options
from dsv3.plan.memory import memory_of
from dsv3.plan.plan import make_plan
from dsv3.plan.search import layouts
from dsv3.plan.step import DSV3, ring_rate
from dsv3.plan.work import Setting, distinct, layer_cost, wire_seconds
from dsv3.recipes import mini, tiny, v3


@pytest.fixture(scope="module")
def report():
    return make_plan(v3.job(), hardware_named("h800"), 2048)


def test_the_reports_run_costs_what_the_report_says_within_ten_per_cent(report):
    found = report.to_json()
    assert found["gpu_hours"] == pytest.approx(2.664e6, rel=0.1)
    assert found["gpu_hours"] / found["tokens"] * 1e12 == pytest.approx(180e3, rel=0.1)
    assert found["gpu_hours_total"] == pytest.approx(2.788e6, rel=0.1)
    assert found["dollars_total"] == pytest.approx(5.576e6, rel=0.1)
    assert found["mfu"] == pytest.approx(0.3894, rel=0.1)


def test_the_reports_layout_fits_an_80_gb_device_without_tensor_parallelism(report):
    memory = report.to_json()["memory_bytes"]
    kinds = ("weights", "gradients", "optimizer", "activations", "buffers")
    assert sum(memory[kind] for kind in kinds) == pytest.approx(memory["total"])
    assert 40e9 < memory["total"] < memory["usable"]
    assert report.chosen.layout.data == 128
    assert report.chosen.layout.replicas == 2


def test_layouts_are_ranked_and_all_of_them_fit(report):
    seconds = [other.time.seconds for other in report.alternatives]
    assert len(seconds) == 10
    assert seconds == sorted(seconds)
    assert all(other.memory.total <= report.to_json()["memory_bytes"]["usable"] for other in report.alternatives)
    best = make_plan(v3.job(), hardware_named("h800"), 2048, search=True)
    assert best.chosen.time.seconds <= report.chosen.time.seconds


def test_a_price_changes_money_and_nothing_else(report):
    dear = make_plan(v3.job(), hardware_named("h800", price=3.0), 2048)
    assert dear.gpu_hours == report.gpu_hours
    assert dear.to_json()["dollars"] == pytest.approx(1.5 * report.to_json()["dollars"])


def test_what_does_not_fit_is_told_by_kind_with_what_would():
    with pytest.raises(
        ValueError, match=r"nothing fits h100's .* GiB a device on 1.*, most of it gradients .*: take 256 devices"
    ):
        make_plan(v3.job(), hardware_named("h100"), 1)


def test_mini_fits_one_h100_and_takes_about_a_day():
    made = make_plan(mini.job(), hardware_named("h100"), 1)
    assert made.why == "the recipe's"
    assert 12 < made.hours < 36


def test_a_config_json_and_a_toml_file_are_planned(tmp_path):
    import json

    (tmp_path / "config.json").write_text(json.dumps(mini.MODEL.to_hf()))
    (tmp_path / "run.toml").write_text(
        'model = "config.json"\ntokens = 1e10\nbatch_size = 256\nprecision = "bfloat16"\n[parallel]\nexpert = 8\n'
    )
    job = job_from_file(tmp_path / "run.toml")
    made = make_plan(job, hardware_named("h100"), 8)
    assert made.chosen.layout.expert == 8
    assert job.tokens == pytest.approx(1e10, rel=0.01)
    assert job_from_file(tmp_path / "config.json", tokens=2e9).tokens == pytest.approx(2e9, rel=0.01)
    (tmp_path / "bad.toml").write_text('model = "config.json"\nflavour = 3\n')
    with pytest.raises(ValueError, match="flavour"):
        job_from_file(tmp_path / "bad.toml")


def test_options_keep_the_tokens_unless_told_otherwise():
    job = v3.job()
    assert with_options(job, batch_size=7680).tokens == pytest.approx(job.tokens, rel=0.01)
    assert with_options(job, tokens=1e12).tokens == pytest.approx(1e12, rel=0.01)


def test_more_devices_take_less_time_and_not_fewer_gpu_hours():
    job = plain_job(
        "k",
        dataclasses.replace(ModelConfig(), num_nextn_predict_layers=0),
        tokens=1e12,
        precision="fp8",
        batch_size=15360,
    )
    few, many = (make_plan(job, hardware_named("h200"), gpus) for gpus in (512, 1024))
    assert many.hours < few.hours
    assert many.gpu_hours > 0.9 * few.gpu_hours


def test_tiny_is_planned_on_a_core():
    made = make_plan(tiny.job(), hardware_named("cpu"), 1)
    assert made.system.name == "dsv3"
    assert made.chosen.layout.gpus == 1


def test_a_plan_says_whose_schedule_it_times(report):
    (note,) = report.to_json()["notes"]
    assert "dualpipe" in note
    assert "this package runs 1f1b; memory is this package's" in note
    assert make_plan(v3.job(), hardware_named("h800"), 2048, system=DSV3).notes == ()


def test_fp8_dispatch_shortens_the_network_of_a_bfloat16_run():
    def network(dispatch):
        parallel = ParallelConfig(pipeline=16, expert=64, dispatch=dispatch)
        job = plain_job("k", ModelConfig(), tokens=1e12, batch_size=15360, parallel=parallel, recompute=True)
        return make_plan(job, hardware_named("h200"), 2048, system=DSV3).chosen.time.network

    assert network("fp8") < 0.8 * network("precision")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('model = {}\ntokens = "x"', "tokens = 'x' is of the wrong kind"),
        ("model = 5", "model = 5 is of the wrong kind"),
        ("model = {}\nparallel = 3", "parallel = 3 is of the wrong kind"),
        ('model = {}\n[parallel]\nexpert = "x"', r"\[parallel\] expert = 'x' must be of the kind int"),
        ("model = {}\nbatch_size = 0", "batch_size 0 and seq_len 4096 must be positive"),
    ],
)
def test_a_file_of_wrong_values_is_refused(tmp_path, text, told):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=told):
        job_from_file(tmp_path / "run.toml")


def test_options_that_no_run_has_are_refused():
    for options in ({"tokens": -5.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            with_options(tiny.job(), **options)


def test_too_few_rows_for_the_devices_are_told_with_how_many_it_takes():
    with pytest.raises(ValueError, match=r"256 rows a step make .* take at least \d+ rows .*or fewer devices"):
        make_plan(mini.job(), hardware_named("h100"), 2048)


def test_a_number_that_divides_badly_is_told_with_one_that_does():
    with pytest.raises(ValueError, match=r"on 1000: .* divides badly among layers and experts: 256 devices fit"):
        make_plan(v3.job(), hardware_named("h100"), 1000)


def test_a_first_step_of_too_few_rows_is_told_as_that():
    with pytest.raises(ValueError, match=r"on 4096: .* take more than the 3072 rows of the smallest step: give more"):
        make_plan(v3.job(), hardware_named("h800"), 4096)


def test_a_schedule_that_the_ramps_first_steps_are_too_short_for_is_not_planned(report):
    layouts = [report.chosen.layout, *(other.layout for other in report.alternatives)]
    assert min(v3.job().rows()) == 3072
    for layout in layouts:
        needed = 2 * layout.pipeline if layout.schedule == "dualpipev" else 1
        assert 3072 / layout.data >= needed, layout


def test_long_rows_are_given_to_as_many_devices_as_hold_the_weights(report):
    room = report.hardware.memory * report.hardware.usable
    for phase in report.phases[1:]:
        layout = dataclasses.replace(report.chosen.layout, gpus=phase.gpus, expert=min(64, phase.gpus // 16))
        memory = memory_of(report.job.model, layout, seq_len=4096, precision="fp8")
        assert memory.weights + memory.gradients + memory.optimizer <= room
    assert [phase.fits for phase in report.phases] == [True, False, False, True]


def test_a_recipe_whose_own_layout_does_not_fit_is_told_why():
    promising = dataclasses.replace(v3.PARALLEL, schedule="zero-bubble")
    made = make_plan(dataclasses.replace(v3.job(), parallel=promising), hardware_named("h800"), 2048)
    assert made.why == "the fastest that fits"
    assert "the recipe's own layout (pipeline 16, expert 64, data 128, zero-bubble" in made.notes[0]
    assert "is not taken: it takes 92.2 GiB a rank" in made.notes[0]


def test_a_search_keeps_what_the_run_dispatches():
    found = list(layouts(mini.job().model, 8, True))
    assert {layout.fp8_dispatch for layout in found if layout.expert > 1} == {True}
    assert {layout.fp8_dispatch for layout in found if layout.expert == 1} == {None}


def test_a_ring_over_whole_nodes_leaves_each_once():
    h800 = hardware_named("h800")
    assert ring_rate(8, 1, h800) == h800.inside
    assert ring_rate(128, 1, h800) == h800.inside < 8 * h800.between  # NVLink is the slower
    assert ring_rate(2, 64, h800) == h800.between  # one device a node
    assert ring_rate(16, 4, h800) == 2 * h800.between


def test_this_package_dispatches_twice_in_fp8_and_the_report_does_not():
    setting = Setting(precision="fp8", seq_len=4096, tokens=4096, expert=64)
    once, twice = (
        layer_cost(ModelConfig(), 30, dataclasses.replace(setting, dispatch_again=again), hardware_named("h800"))
        for again in (False, True)
    )
    assert once.backward.wire == once.forward.wire
    assert twice.backward.wire == pytest.approx(once.backward.wire * (1 + 1.03125 / 3.03125))
    behind = layer_cost(ModelConfig(), 30, dataclasses.replace(setting, behind_shared="both"), hardware_named("h800"))
    assert 0.5 * once.forward.wire <= behind.forward.wire < once.forward.wire


def test_hops_in_turn_take_what_both_networks_take_and_go_once_an_expert_inside():
    hardware, model = hardware_named("h800"), v3.MODEL
    base = Setting(precision="fp8", seq_len=4096, tokens=4096, expert=64)
    at_once, in_turn, once_an_expert = (
        wire_seconds(model, 10, dataclasses.replace(base, **changes), hardware)
        for changes in ({}, {"in_turn": True}, {"limited": False})
    )
    row = model.hidden_size * (1 + 4 / 128) + model.hidden_size * 2
    inside = row * model.num_experts_per_tok / hardware.inside
    assert at_once == pytest.approx(row * distinct(model, 8) / hardware.between)  # the slower one
    assert in_turn == pytest.approx(at_once + inside)
    assert at_once < in_turn < once_an_expert
    one_node = dataclasses.replace(base, expert=8, in_turn=True)
    assert wire_seconds(model, 10, one_node, hardware) == pytest.approx(inside)
