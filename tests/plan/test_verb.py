"""`dsv3 plan` on the command line."""

import json

import pytest

from dsv3.cli import main


def test_json_has_the_keys_that_scripts_read(capsys):
    main(["plan", "tiny", "--hardware", "cpu", "--gpus", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"gpu_hours", "memory_bytes", "layout", "mfu", "dollars", "step_seconds", "serving", "phases"} <= set(found)
    assert found["gpu_hours"] == pytest.approx(found["hours"])
    assert found["memory_bytes"]["total"] < 1e9


def test_the_table_names_every_kind_of_memory_and_the_cost(capsys):
    main(["plan", "tiny", "--hardware", "cpu"])
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in ("weights", "gradients", "optimizer", "activations", "buffers", "GPU-hours"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["v3", "--hardware", "tpu"], "there is no hardware 'tpu': known are h800, h100, h200, b200"),
        (["v4"], "there is no recipe 'v4': known are tiny, mini, v3"),
        (["mini", "--gpus", "0"], "--gpus is 0"),
        (["v3", "--hardware", "h100", "--gpus", "8"], "nothing fits h100's"),
        (["v3", "--context", "8000"], "give --serving with them"),
        (["v3", "--serving", "--search"], "--serving plans no training: drop --search"),
    ],
)
def test_a_mistake_is_one_line_with_what_would_work(arguments, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 1
    assert told in capsys.readouterr().err


def test_a_deployment_is_planned_where_training_would_not_fit(capsys):
    main(["plan", "v3", "--hardware", "h200", "--gpus", "16", "--serving", "--context", "8000", "--json"])
    serving = json.loads(capsys.readouterr().out)["serving"]
    assert serving["context"] == 8000
    assert serving["decode"]["devices"] == 16
    main(["plan", "v3", "--hardware", "h200", "--gpus", "4", "--serving"])
    assert "fits no unit" in capsys.readouterr().out


def test_a_short_run_costs_more_than_nothing(capsys):
    main(["plan", "tiny", "--hardware", "cpu"])
    shown = capsys.readouterr().out
    assert "0.07" in shown
    assert "this package today" not in shown  # it is who runs it
    assert "1 device)" in shown
