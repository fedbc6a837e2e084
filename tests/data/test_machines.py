"""Where a build runs: what Slurm is handed, that its tasks run as submitted, and that no job is submitted twice."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.data.machines import Machines
from dsv3.data.pipeline import STAGES, build, progress
from tests.data.planted import plant

SBATCH = """#!{python}
import pathlib, sys
here = pathlib.Path({folder!r})
number = len(list(here.glob("*.script"))) + 101
(here / f"{{number}}.script").write_text(pathlib.Path(sys.argv[-1]).read_text())
(here / f"{{number}}.arguments").write_text(" ".join(sys.argv[1:-1]))
print("Submitted batch job", number)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder that takes what sbatch is given; squeue shows the jobs that its file `queue` names."""
    binaries, taken = tmp_path / "bin", tmp_path / "taken"
    binaries.mkdir()
    taken.mkdir()
    (taken / "queue").write_text("")
    (binaries / "sbatch").write_text(SBATCH.format(python=sys.executable, folder=str(taken)))
    (binaries / "squeue").write_text(f"#!/bin/sh\ncat {taken}/queue\n")
    for path in binaries.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    return taken


def test_slurm_gets_an_array_a_stage_and_each_waits_for_the_one_before(cluster, tmp_path):
    planted = plant(tmp_path)
    machines = Machines(
        executor="slurm",
        workers=2,
        memory_gb=3,
        partition="cpu-small",
        time="02:00:00",
        activate="source /opt/venv/bin/activate",
    )
    said: list[str] = []
    assert build(planted.config, tmp_path / "out", machines, said.append) is None
    scripts = {int(path.stem): path.read_text() for path in cluster.glob("*.script")}
    stages = {n: text for n, text in sorted(scripts.items()) if "launch_pickled_pipeline" in text}
    names = [re.search("job-name=dsv3-(.*)", text)[1] for text in stages.values()]
    assert names == list(STAGES)
    tasks = progress(tmp_path / "out")[0][2]
    arrays = [re.search("array=(.*)", text)[1] for text in stages.values()]
    assert arrays == [f"0-{tasks - 1}%2", f"0-{tasks - 1}%2", "0-0%1", f"0-{tasks - 1}%2", f"0-{tasks - 1}%2", "0-0%1"]
    numbers = list(stages)
    for before, number in zip([None, *numbers], numbers, strict=False):
        waits = re.search(r"--dependency=(\S+)", (cluster / f"{number}.arguments").read_text())
        assert waits is None if before is None else waits is not None and waits[1] == f"afterok:{before}"
    for text in stages.values():
        assert "#SBATCH --mem-per-cpu=3G" in text
        assert "#SBATCH --partition=cpu-small" in text
        assert "#SBATCH --time=02:00:00" in text
        assert text.index("source /opt/venv/bin/activate") < text.index("srun")
    assert said == ["submitted: " + ", ".join(f"{name} as job {n}" for name, n in zip(names, numbers, strict=True))]


def test_jobs_in_the_queue_are_not_submitted_again_and_finished_stages_neither(cluster, tmp_path):
    planted, slurm = plant(tmp_path), Machines(executor="slurm", workers=2)
    build(planted.config, tmp_path / "out", slurm)
    first = json.loads((tmp_path / "out/work/slurm.json").read_text())
    (cluster / "queue").write_text(f"{first[3]}\n{first[3]}\n")
    submitted, told = len(list(cluster.glob("*.script"))), []
    assert build(planted.config, tmp_path / "out", slurm, told.append) is None
    assert told == [f"jobs {first[3]} are still in Slurm's queue: wait for them (squeue), or scancel them"]
    assert len(list(cluster.glob("*.script"))) == submitted
    (cluster / "queue").write_text("")
    tasks = progress(tmp_path / "out")[0][2]
    for task in range(tasks):
        marks = tmp_path / "out/work/logs/clean/completions"
        marks.mkdir(exist_ok=True)
        (marks / f"{task:05d}").touch()
    said: list[str] = []
    build(planted.config, tmp_path / "out", slurm, said.append)
    assert [part.split(" as ")[0] for part in said[0].removeprefix("submitted: ").split(", ")] == list(STAGES)[1:]


def test_what_slurm_would_start_runs_a_task_of_the_build(cluster, tmp_path):
    """A node's part: the script's last command in a process of its own, with the variables that Slurm sets."""
    planted = plant(tmp_path)
    config = dataclasses.replace(planted.config, sources=planted.config.sources[1:], task_mb=10)
    build(config, tmp_path / "out", Machines(executor="slurm"))
    script = next(t for p in sorted(cluster.glob("*.script")) if "dsv3-clean" in (t := p.read_text()))
    [pickled] = re.findall(r"launch_pickled_pipeline (\S+)", script)
    (cluster.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho node1\n")
    (cluster.parent / "bin" / "scontrol").chmod(0o755)
    code = (
        f"from datatrove.tools.launch_pickled_pipeline import main; import sys; sys.argv = ['x', {pickled!r}]; main()"
    )
    variables = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "SLURM_NODELIST": "node1"}
    subprocess.run([sys.executable, "-c", code], env=variables, check=True, capture_output=True)
    assert [done for _, done, _ in progress(tmp_path / "out")] == [1, 0, 0, 0, 0, 0]


def test_machines_of_no_use_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="workers 0 must be at least 1"):
        Machines(workers=0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch, which is not here"):
        Machines(executor="slurm")
