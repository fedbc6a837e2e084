"""torchrun's processes on the command line: a rank that dies costs the steps since the last checkpoint, and nothing else."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3.cli import main
from dsv3.train.checkpoint import checkpoints, latest_checkpoint
from dsv3.train.metrics import TIMING_FIELDS, read_metrics
from tests.model.tiny import TINY

pytestmark = [pytest.mark.dist, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with tok/, shards/ and model.json."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(60)]
    for i in range(40):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{i}.txt").write_text(" ".join(draw.choices(words, k=300)), encoding="utf-8")
    main(["tokenizer", "--data", str(folder / "text"), "--vocab-size", "320", "--out", str(folder / "tok")])
    command = ["data", "--data", str(folder / "text"), "--tokenizer", str(folder / "tok"), "--out"]
    main([*command, str(folder / "shards")])
    sizes = {key: value for key, value in TINY.to_hf().items() if key not in ("vocab_size", "architectures")}
    (folder / "model.json").write_text(json.dumps(sizes), encoding="utf-8")
    return folder


def start(data: Path, out: Path, processes: int, *options: str, restarts: int = 0) -> subprocess.Popen:
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--max-restarts", str(restarts),
        "--standalone", "--monitor-interval", "0.1",
    ]  # fmt: skip
    verb = [
        "-m", "dsv3.cli", "pretrain", "--shards", str(data / "shards"), "--tokenizer", str(data / "tok"), "--model",
        str(data / "model.json"), "--steps", str(STEPS), "--warmup-steps", "2", "--batch-size", "8", "--micro-batch", "2",
        "--seq-len", "32", "--save-every", "2", "--precision", "float32", "--out", str(out), *options,
    ]  # fmt: skip
    return subprocess.Popen(
        [*torchrun, *verb], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=180)
    return errors.decode()


def curve(out: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMING_FIELDS} for r in read_metrics(out / "metrics.jsonl")]


def workers_of(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in listed.stdout.split()]


def test_a_killed_rank_is_started_again_and_the_curve_is_the_same(data, tmp_path):
    options = ("--parallel.expert", "2", "--parallel.sharding", "fsdp")
    whole = start(data, tmp_path / "whole", 2, *options)
    errors = finish(whole)
    assert whole.returncode == 0, errors
    process = start(data, tmp_path / "killed", 2, *options, restarts=1)
    deadline = time.time() + 90
    while latest_checkpoint(tmp_path / "killed") is None and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(0.03)  # into a step behind the checkpoint
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    errors = finish(process)
    assert process.returncode == 0, errors
    assert "resumed from step-" in errors
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert [record["step"] for record in curve(tmp_path / "killed")] == list(range(1, STEPS + 1))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".tmp*"))
    assert checkpoints(tmp_path / "killed")[-1].name == f"step-{STEPS:08d}"


def test_a_pipeline_on_the_command_line_ends_where_one_process_does(data, tmp_path):
    one, two = start(data, tmp_path / "one", 1), None
    assert (errors := finish(one), one.returncode)[1] == 0, errors
    two = start(data, tmp_path / "two", 2, "--parallel.pipeline", "2", "--parallel.schedule", "zero-bubble")
    assert (errors := finish(two), two.returncode)[1] == 0, errors
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b.get("heldout_bpb", 0) == pytest.approx(a.get("heldout_bpb", 0), rel=1e-3)
        assert b.get("acceptance", []) == pytest.approx(a.get("acceptance", []), abs=0.02)


def test_degrees_without_their_processes_are_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([
            "pretrain", "--shards", str(data / "shards"), "--tokenizer", str(data / "tok"), "--model", str(data / "model.json"),
            "--seq-len", "32", "--out", str(tmp_path / "run"), "--parallel.expert", "2",
        ])  # fmt: skip
    told = capsys.readouterr().err
    assert "1 process is no multiple of pipeline 1 x expert 2: start 2 or a multiple (torchrun" in told
    assert not (tmp_path / "run").exists()
