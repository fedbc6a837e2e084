"""The report: sums over tasks, rates of a core, examples with where and why; a document that vanished is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document

from dsv3.data.ledger import EXAMPLES, STEPS, examples, make_report, table, task_steps
from dsv3.data.steps import writer


def stats(name: str, seconds: float, **counts: Any) -> dict[str, Any]:
    return {"name": f"🧪 - KIND: {name}", "time_stats": {"total": seconds, "n": 1}, "stats": counts}


def work(tmp_path: Path, packed: int = 5) -> Path:
    """Two tasks that read five documents each, of which five go: one broken, one Danish, three near-duplicates."""
    tasks = {
        "clean": [
            [
                stats("read", 1.0, total=5, forwarded=4, dropped=1, dropped_malformed=1, bytes={"total": 4000, "n": 4}),
                stats("language", 2.0, total=4, dropped=1, dropped_da=1, bytes=4000),
                stats("scrub", 0.5, total=3, bytes=3000, bytes_out=2900, **{"replaced_e-mail": 2}),
                stats("🎯 MinHash stage 1", 4.5, total=3),
            ],
            [
                stats("read", 1.0, total=5, forwarded=5, bytes=6000),
                stats("language", 2.0, total=5, bytes=6000),
                stats("scrub", 0.5, total=5, bytes=6000, bytes_out=6100, replaced_phone=1),
                stats("🎯 MinHash stage 1", 4.5, total=5),
            ],
        ],
        "split": [
            [stats("🎯 MinHash stage 4", 0.1, total=3, dropped=1), stats("split", 0, **{"train/web-en": 2})],
            [stats("🎯 MinHash stage 4", 0.1, total=5, dropped=2), stats("split", 0, **{"train/web-en": 2, "held_out/web-en": 1})],
        ],
        "pack": [
            [stats("pack", 0.25, total=2, tokens=500, bytes=2000)],
            [stats("pack", 0.25, total=packed - 2, tokens=900, bytes=4000)],
        ],
    }  # fmt: skip
    for stage, listed in tasks.items():
        folder = tmp_path / "logs" / stage / "stats"
        folder.mkdir(parents=True)
        for number, task in enumerate(listed):
            (folder / f"{number:05d}.json").write_text(json.dumps(task))
    (tmp_path / "plan.json").write_text(json.dumps({"left_out": {".png files": 3}}))
    return tmp_path


def test_the_report_sums_over_tasks_and_every_document_is_somewhere(tmp_path):
    report = make_report(work(tmp_path))
    assert report["documents"] == {"read": 10, "packed": 5}
    assert {row["step"]: row["dropped"] for row in report["steps"]} == {
        "read": {"malformed": 1}, "language": {"da": 1}, "scrub": {}, "sign": {}, "near-duplicates": {"near-duplicate": 3},
        "pack": {},
    }  # fmt: skip
    assert report["replaced"] == {"e-mail": 2, "phone": 1}
    assert report["files_left_out"] == {".png files": 3}
    assert report["parts"] == {"held_out": {"web-en": 1}, "train": {"web-en": 4}}


def test_rates_are_of_a_step_alone(tmp_path):
    rows = {row["step"]: row for row in make_report(work(tmp_path))["steps"]}
    assert rows["language"]["documents_per_second"] == pytest.approx(9 / 4)
    assert rows["language"]["mb_per_second"] == pytest.approx(0.01 / 4)
    assert rows["sign"]["seconds"] == pytest.approx(2.0)  # 9.0 less the 7.0 of the steps that feed it
    assert rows["sign"]["mb_per_second"] == pytest.approx(0.009 / 2)  # of what the scrub left
    assert rows["pack"]["tokens_per_second"] == pytest.approx(1400 / 0.5)


def test_a_document_that_vanished_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="10 documents read, 5 dropped, 4 packed"):
        make_report(work(tmp_path, packed=4))


def test_examples_are_the_first_of_each_reason_with_where_and_why(tmp_path):
    with writer(tmp_path) as out:
        for n in range(EXAMPLES + 2):
            out.write(Document(text="x" * 500, id=f"a.jsonl:{n}", metadata={"filter_reason": "da", "told": f"t{n}"}), 0)
        out.write(Document(text="twin", id="b", metadata={"minhash_cluster_id": 7}), 1)
        out.write(Document(text="item", id="c", metadata={"filter_reason": "bench", "touches": "bench record 3"}), 1)
    found = examples(tmp_path)
    assert [e["where"] for e in found["da"]] == [f"a.jsonl:{n}" for n in range(EXAMPLES)]
    assert found["da"][0]["why"] == "t0"
    assert len(found["da"][0]["text"]) == 160
    assert found["near-duplicate"] == [{"where": "b", "text": "twin", "why": "cluster 7"}]
    assert found["bench"][0]["why"] == "bench record 3"


def test_the_table_names_the_most_frequent_reasons_and_counts_the_others():
    dropped = {f"reason {n}": 9 - n for n in range(6)}
    row = {
        "step": "quality",
        "documents_in": 12345,
        "dropped": dropped,
        "documents_per_second": 1234.5,
        "mb_per_second": 1.25,
    }
    assert table({"steps": [row]}) == [
        (
            "quality",
            "12,345",
            "39",
            "9 reason 0, 8 reason 1, 7 reason 2, 6 reason 3 and 2 more reasons",
            "1,234",
            "1.2",
            "",
        )
    ]


def test_a_tasks_statistics_are_numbers_or_objects(tmp_path):
    path = work(tmp_path) / "logs/clean/stats/00000.json"
    steps = task_steps(path)
    assert steps["read"]["bytes"] == 4000
    assert steps["read"]["seconds"] == 1.0
    assert {name for _, name, _ in STEPS} >= steps.keys()
