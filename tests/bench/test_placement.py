"""The placement bench reads a run's expert counts, and its table tells redundancy from none."""

import json

import numpy as np
import pytest

from bench.placement import compare, loads_of_run, show
from dsv3.infer.redundancy import Cluster


def test_counts_of_a_run_become_two_halves_and_a_table(tmp_path, capsys):
    draw = np.random.default_rng(0)
    skew = 1 + 9 * draw.random((2, 8))
    lines = [
        {"step": step, "loss": 1.0} | ({"expert_counts": draw.poisson(skew * 50).tolist()} if step % 2 else {})
        for step in range(1, 9)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loads = loads_of_run(path)
    counts = [np.array(line["expert_counts"]) for line in lines if "expert_counts" in line]
    assert (loads["training"][0] == counts[0] + counts[1]).all()
    assert (loads["training"][1] == counts[2] + counts[3]).all()

    units = {f"{slots} slots": Cluster(gpus=4, slots=slots) for slots in (8, 16)}
    rows = compare(loads, units)
    assert {r["method"] for r in rows if r["unit"] == "16 slots"} == {
        "greedy",
        "eplb",
        "plan",
    }  # "none" takes no copies
    worst = {(r["unit"], r["method"]): r["layers"].mean() for r in rows if r["half"] == "next"}
    assert worst["16 slots", "plan"] < worst["8 slots", "none"]
    show(rows)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows) // 2


def test_a_run_without_counts_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SystemExit, match="0 records with expert_counts"):
        loads_of_run(tmp_path / "metrics.jsonl")
