"""Decontamination: runs of words found whatever the case and the marks, the same in every process, and no others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.decontaminate import Decontaminator
from dsv3.data.language import words

ROOT = Path(__file__).parents[2]


def test_runs_of_words_and_whole_short_items_contaminate():
    long = "Take the first nine primes, multiply them pairwise and add up every third of the products"
    guard = Decontaminator(ngram=8)
    guard.add(f"{long}.", "bench record 1")
    guard.add("What is the capital of France?", "bench record 2")
    assert guard.touches(f"Please: {long.upper()}!") == "bench record 1"
    assert guard.touches("Take the first nine primes and stop") is None
    assert guard.touches("Tell me: what is the capital of France, please") == "bench record 2"
    assert guard.touches("What is the capital of Spain?") is None


def test_published_sets_are_found_in_their_own_paraphrase():
    data = next((path for path in (ROOT / "shared" / "data", ROOT.parent / "shared" / "data") if path.exists()), ROOT)
    files = sorted(data.glob("gsm8k/*test*.jsonl"))
    if not files:
        pytest.skip("no copy of GSM8K here")
    guard = Decontaminator(files[:1])
    items = [json.loads(line)["question"] for line in files[0].read_text().splitlines()[:200]]
    assert all(guard.touches(f"Solve this. {item} Show your work.") for item in items)
    assert (
        guard.touches(
            "A baker sells 3 loaves at 2 dollars each and a cake for 5. How much does he get for all of them?"
        )
        is None
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(list("abcd")), max_size=30), st.lists(st.sampled_from(list("abcd")), max_size=30))
def test_a_text_is_touched_exactly_if_it_shares_a_run(item: list[str], text: list[str]) -> None:
    """Against runs compared as tuples: few words, so that shared runs are frequent."""
    guard = Decontaminator(ngram=7)
    guard.add(" ".join(item), "item")
    length = min(len(item), 7)
    runs = {tuple(item[i : i + length]) for i in range(len(item) - length + 1)} if length >= 6 else set()
    shared = any(tuple(text[i : i + length]) in runs for i in range(len(text) - length + 1))
    assert (guard.touches(" ".join(text)) is not None) == shared


def test_another_process_finds_the_same(tmp_path: Path) -> None:
    """Workers build it anew: Python's own hash of a string differs between processes."""
    code = "from dsv3.data.decontaminate import Decontaminator as D; print(D()._hashed('one two').tolist())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""


def test_every_format_of_an_evaluation_set_is_read(tmp_path: Path) -> None:
    item = "a quick brown fox jumps over the lazy dog and then it sleeps"
    (tmp_path / "a.json").write_text(json.dumps([{"question": {"stem": item}}]))
    (tmp_path / "b.csv").write_text(f'1,"{item}"\n')
    (tmp_path / "c.txt").write_text(item)
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist([{"text": "x", "other": item}]), tmp_path / "d.parquet")
    for name in ("a.json", "b.csv", "c.txt", "d.parquet"):
        assert name in (Decontaminator([tmp_path / name]).touches(f"so {item} !") or ""), name
    assert Decontaminator([tmp_path]).texts == 4
    (tmp_path / "e.jsonl").write_text('{"question": "x"}\n{')
    with pytest.raises(ValueError, match=r"e\.jsonl:2 is no JSON"):
        Decontaminator([tmp_path / "e.jsonl"])
    with pytest.raises(ValueError, match="an evaluation set is"):
        Decontaminator([Path(__file__)])


def test_chinese_counts_characters() -> None:
    guard = Decontaminator()
    guard.add("北冥有鱼，其名为鲲。鲲之大，不知其几千里也。", "zhuangzi")
    assert len(words("北冥有鱼，其名为鲲")) == 8
    assert guard.touches("书云：鱼其名为鲲鲲之大不知其几千里也") == "zhuangzi"
    assert guard.touches("北冥有鱼，其名为鳗") is None
