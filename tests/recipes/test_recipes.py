"""mini and v3: the schedule against the report's tokens, and the files that start them."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

from dsv3.cli.launch import Launch, main, recipe_job
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.census import census
from dsv3.plan.rehearse import rehearse
from dsv3.plan.search import layout_of, refusal
from dsv3.recipes import mini, v3

LAUNCH = Path(__file__).parents[2] / "launch"


def read(share: float) -> float:
    """Tokens read when that share of v3's steps is done."""
    schedule = v3.SCHEDULE
    return sum(schedule.rows(step) for step in range(round(share * schedule.steps))) * v3.SEQ_LEN


def test_v3_reads_the_reports_tokens_and_turns_where_the_report_turns():
    assert v3.job().tokens == pytest.approx(14.8e12, rel=1e-4)
    schedule = v3.SCHEDULE
    for share, tokens in (
        (schedule.batch_ramp_until, 469e9),
        (schedule.constant_until, 10e12),
        (schedule.cosine_until, 14.3e12),
        (schedule.second_constant_from, 14.633e12),
    ):
        assert read(share) == pytest.approx(tokens, rel=1e-3)


def test_v3s_phases_are_the_reports():
    schedule, last = v3.SCHEDULE, v3.SCHEDULE.steps - 1
    assert schedule.rows(0) == 3072
    assert schedule.rows(last) == 15360
    assert schedule.lr(1999) == schedule.lr(100_000) == pytest.approx(2.2e-4)
    assert schedule.lr(round(schedule.steps * v3.share(14.4e12))) == pytest.approx(2.2e-5)
    assert schedule.lr(last) == pytest.approx(7.3e-6)
    assert [schedule.bias_speed(step) for step in (0, last)] == [1e-3, 0.0]
    assert [schedule.mtp_lambda(step) for step in (0, last)] == pytest.approx([0.3, 0.1])
    assert census(v3.MODEL).total == 671_026_419_200


def test_v3s_layout_is_one_that_this_package_starts():
    job = v3.job()
    layout = layout_of(job.parallel, job.gpus, micro_batch=job.train.micro_batch, recompute=job.train.recompute)
    assert refusal(job.model, layout, v3.FIRST_ROWS) is None
    assert all(rows % layout.data == 0 for rows in job.rows())


def test_mini_has_one_to_two_billion_parameters_in_fp8():
    assert 1e9 < census(mini.MODEL).in_memory < 2e9
    assert mini.TRAIN.precision == "fp8"


@pytest.mark.parametrize("name", ["v3.sbatch", "torchrun.sh", "mini.sh"])
def test_launch_files_are_shell_and_their_command_is_understood(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    text = (LAUNCH / name).read_text().replace("\\\n", " ")
    command = re.search(r"-m dsv3\.cli\.launch (.*)", text)
    assert command
    verb = tyro.cli(Launch, args=shlex.split(command[1]))
    assert recipe_job(verb.recipe).name == verb.recipe


def test_the_slurm_file_asks_for_the_recipes_devices_and_its_ranks_build():
    text = (LAUNCH / "v3.sbatch").read_text()
    nodes, each = (int(re.search(rf"--{name}=(\d+)", text)[1]) for name in ("nodes", "nproc-per-node"))
    job = v3.job()
    assert nodes * each == job.gpus
    assert "--gpus-per-node=8" in text
    layout = layout_of(job.parallel, nodes * each, micro_batch=1, recompute=False)
    found = rehearse(job, layout, stages=(15,))
    assert found["world"] == 2048
    assert max(found["largest_difference"].values()) < 1e-3


@pytest.mark.parametrize(
    ("raised", "code", "told"), [(KeyboardInterrupt, 130, "interrupted"), (ValueError("x"), 1, "dsv3: x")]
)
def test_a_launch_that_is_stopped_or_mistaken_says_so_in_one_line(monkeypatch, capsys, raised, code, told):
    def stop(verb):
        raise raised

    monkeypatch.setattr("dsv3.cli.launch.launch", stop)
    with pytest.raises(SystemExit) as left:
        main(["mini", "--shards", "s", "--tokenizer", "t", "--out", "o"])
    assert left.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)


def test_shards_that_are_not_there_are_told(tmp_path, capsys):
    Tokenizer.train(["some text to learn from"], 320).save(tmp_path / "tok")
    with pytest.raises(SystemExit):
        main(
            [
                "mini",
                "--shards",
                str(tmp_path / "none"),
                "--tokenizer",
                str(tmp_path / "tok"),
                "--out",
                str(tmp_path / "o"),
            ]
        )
    assert str(tmp_path / "none") in capsys.readouterr().err
