"""`dsv3 doctor`: alone, under torchrun, and its exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.cli import main

QUICK = ["--disk-mb", "1", "--message-mb", "0.1"]


def test_alone_it_reports_as_json(tmp_path, capsys):
    main(["doctor", "--folder", str(tmp_path), "--json", *QUICK])
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"]
    assert len(report["ranks"]) == 1


def test_what_is_wrong_is_the_exit_status_and_has_a_cure(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--folder", str(tmp_path), "--needs-gb", "1e9", *QUICK])
    assert left.value.code == 1
    out = capsys.readouterr().out
    assert "wrong: rank 0" in out
    assert "-> make room" in out
    assert "not fit for a run" in out


def test_a_mistake_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--folder", str(tmp_path / "none")])
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith("dsv3: ")


@pytest.mark.dist
def test_under_torchrun_one_rank_speaks_for_all(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dsv3.cli", "doctor"]
    command += ["--folder", str(tmp_path), *QUICK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fit for a run") == 1
    assert "all-reduce" in done.stdout
    assert "ranks: 2" in done.stdout


def test_cuda_where_there_is_none_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--folder", str(tmp_path), "--device", "cuda", *QUICK])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "take --device cpu" in line
