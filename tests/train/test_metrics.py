"""Expert load by hand, metrics.jsonl through kills and resumes, the console on and off a terminal."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console as RichConsole

from dsv3.train import metrics
from dsv3.train.metrics import TIMING_FIELDS, Console, MetricsLog, expert_load, measure_peak, read_metrics


def record(step: int, speed: float = 1000.0) -> dict:
    return {
        "step": step,
        "tokens": step * 64,
        "loss": 5.0 / step,
        "mtp_loss": [6.0 / step],
        "load": {"max_vio": [0.5, 0.25], "entropy": [0.9, 1.0], "dead_experts": [0, 1]},
        "expert_counts": [[1, 2], [3, 0]],
        "tokens_per_s": speed,
    }


def write(folder: Path, resume: int | None, first: int, last: int, speed: float = 1000.0) -> None:
    with MetricsLog(folder, resume) as log:
        for step in range(first, last + 1):
            log.write(record(step, speed))


# -- expert load ------------------------------------------------------------------------------------------------------


def test_expert_load_equals_hand_computed_values() -> None:
    load = expert_load(torch.tensor([[5, 5, 5, 5], [8, 4, 4, 0], [16, 0, 0, 0]]))
    assert load["max_vio"] == [0.0, 1.0, 3.0]
    assert load["dead_experts"] == [0, 1, 3]
    # (8, 4, 4, 0)/16: 1/2·ln 2 + 2·1/4·ln 4 = 1.5 ln 2, of ln 4 = 2 ln 2.
    assert load["entropy"] == pytest.approx([1.0, 0.75, 0.0], abs=1e-15)


def test_expert_load_sees_one_token_in_millions() -> None:
    count = 2**24  # float32 holds no odd integer above
    load = expert_load(torch.tensor([[count + 1, count, count]]))
    assert load["max_vio"] == [2 / (3 * count + 1)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=40).filter(any))
def test_expert_load_stays_in_its_bounds(row: list[int]) -> None:
    load = expert_load(torch.tensor([row]))
    assert 0 <= load["max_vio"][0] <= len(row) - 1
    assert 0 <= load["entropy"][0] <= 1
    assert (load["max_vio"][0] == 0) == (len(set(row)) == 1)


@pytest.mark.parametrize("counts", [torch.ones(2, 4), torch.ones(4, dtype=torch.long), torch.tensor([[1, 1], [0, 0]])])
def test_expert_load_refuses_what_is_no_count(counts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="give"):
        expert_load(counts)


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_records_come_back_as_written_and_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, None, 1, 3)
    assert read_metrics(tmp_path / "metrics.jsonl") == [record(s) for s in (1, 2, 3)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"loss", "mtp_loss/0", "load/max_vio/0", "load/max_vio/1", "tokens_per_s"} <= set(board.Tags()["scalars"])
    assert not [tag for tag in board.Tags()["scalars"] if tag.startswith("expert_counts")]
    assert [(e.step, e.value) for e in board.Scalars("load/max_vio/1")] == [(s, 0.25) for s in (1, 2, 3)]


def test_a_record_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, None)
    log.write(record(1))
    assert read_metrics(tmp_path / "metrics.jsonl") == [record(1)]
    log.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 8, "loss": 1.', b"\x00\x00\x00", b"\xff"])
def test_a_killed_and_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path, torn: bytes) -> None:
    write(tmp_path / "whole", None, 1, 9)
    write(tmp_path / "killed", None, 1, 7, speed=7.0)
    path = tmp_path / "killed/metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    write(tmp_path / "killed", 4, 5, 9, speed=7.0)

    def timeless(path: Path) -> list[dict]:
        return [{k: v for k, v in r.items() if k not in TIMING_FIELDS} for r in read_metrics(path)]

    assert timeless(path) == timeless(tmp_path / "whole/metrics.jsonl")
    assert path.read_bytes().count(b"\n") == 9
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    write(tmp_path, None, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(tmp_path, 2, 3, 3)
    assert read_metrics(path) == [record(s) for s in (1, 2, 3)]


def test_a_failed_cut_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, None, 1, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        MetricsLog(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".metrics*"))


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    write(tmp_path, None, 1, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 of 3"):
        read_metrics(path)


def test_a_new_run_refuses_a_folder_with_records_and_missing_metrics_are_named(tmp_path: Path) -> None:
    write(tmp_path, None, 1, 3)
    with pytest.raises(ValueError, match="already holds 3 records"):
        MetricsLog(tmp_path, None)
    write(tmp_path, 0, 1, 1)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    with pytest.raises(ValueError, match="no metrics at"):
        read_metrics(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    with MetricsLog(tmp_path, None) as log:
        with pytest.raises(ValueError, match=r"step 1 are not finite: {'mtp_loss/1'"):
            log.write({"step": 1, "loss": 2.0, "mtp_loss": [1.0, bad]})
        log.write(record(1))
    assert read_metrics(tmp_path / "metrics.jsonl") == [record(1)]


# -- console ----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


def test_off_a_terminal_the_console_prints_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    with Console(1200, console=RichConsole(file=out, force_terminal=False), every_s=10) as console:
        for step in range(1, 1201):
            clock.now += 0.5
            console.update(
                {"step": step, "loss": 3.14159, "mtp_loss": [4.0], "tokens_per_s": 12345.6, "peak_share": 0.424}
            )
        console.log("saved [bold]step[/bold] :smile: " + "x" * 200)
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + 59 + 1 + 1  # the first, one every 20 steps, the last, the log
    assert lines[0] == "step 1/1,200  0%  ETA 10:00  loss 3.142  mtp 4.000  12,346 tok/s  42% of peak"
    assert lines[-2].startswith("step 1,200/1,200  100%  ETA 0:00  loss 3.142")
    assert lines[-1] == "saved [bold]step[/bold] :smile: " + "x" * 200
    assert "\x1b" not in out.getvalue()


def test_eta_of_a_resumed_run_counts_only_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    with Console(10_000, start_step=9_000, console=RichConsole(file=out, force_terminal=False)) as console:
        clock.now += 40.0
        console.update({"step": 9_010})
    assert out.getvalue() == "step 9,010/10,000  90%  ETA 1:06:00\n"


def test_on_a_terminal_the_bar_shows_the_step_and_logs_go_above_it() -> None:
    out = io.StringIO()
    with Console(10, console=RichConsole(file=out, force_terminal=True, force_interactive=True, width=100)) as console:
        console.update({"step": 3, "loss": 2.5})
        console.log("checkpoint saved")
        console.update({"step": 10, "loss": 2.25})
    text = out.getvalue()
    assert "10/10  100%" in text
    assert "loss 2.250" in text
    assert "checkpoint saved\n" in text
    assert "step 3" not in text  # no plain lines between


def test_the_console_writes_to_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # with these rich takes any stream for a terminal
        monkeypatch.delenv(name, raising=False)
    with Console(2) as console:
        console.update({"step": 2})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("step 2/2  100%")


# -- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_peak_is_a_rate_and_leaves_the_random_state(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    rate = measure_peak(dtype, seconds=0.05)
    assert 1e8 < rate < 1e15
    assert torch.equal(torch.get_rng_state(), before)


def test_heavy_libraries_are_not_imported_with_the_module() -> None:
    import subprocess

    code = "import sys, dsv3.train.metrics, dsv3.train.report; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    ).stdout
    assert not {"rich", "matplotlib", "tensorboard"} & set(json.loads(out))
