"""The corpus bench's own eyes: what it plants, and that it fails when something planted is left."""

import json

import pytest

from bench.corpus import ADDRESS, MARK, check, plant
from dsv3.data.corpus import Source
from dsv3.data.steps import writer


def report_of(read: int, dropped: int, packed: int) -> dict:
    return {"documents": {"read": read, "packed": packed}, "steps": [{"dropped": {"a": dropped}}]}


def test_items_a_near_duplicate_and_an_address_are_planted(tmp_path):
    (tmp_path / "bench.jsonl").write_text(json.dumps({"id": "x", "question": "an item of the set"}) + "\n")
    source, items = plant((Source(name="web", paths=("python:english",)),), (tmp_path / "bench.jsonl",), tmp_path)
    assert items == ["an item of the set"]
    texts = [json.loads(line)["text"] for line in (tmp_path / "planted.jsonl").read_text().splitlines()]
    assert source.paths == (str(tmp_path / "planted.jsonl"),)
    assert [MARK in text for text in texts] == [True, True, True, False]
    assert texts[0].split(": ", 1)[1] == texts[1].split(": ", 1)[1]
    assert ADDRESS in texts[2]
    assert items[0] in texts[3]


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        ([f"{MARK} a", f"{MARK} b"], None),
        ([f"{MARK} a", f"{MARK} b", f"{MARK} c"], "3 of the three"),
        ([f"{MARK} a", f"{MARK} b {ADDRESS}"], ADDRESS),
        ([f"{MARK} a", f"{MARK} b", "holds an item of the set"], "an item of the set"),
    ],
)
def test_what_is_left_fails_the_bench(tmp_path, texts, fault):
    from datatrove.data import Document

    with writer(tmp_path / "work" / "text" / "train" / "web") as out:
        for number, text in enumerate(texts):
            out.write(Document(text=text, id=str(number)), 0)
    if fault is None:
        check(tmp_path, ["an item of the set"], report_of(5, 3, 2))
        with pytest.raises(AssertionError):
            check(tmp_path, ["an item of the set"], report_of(5, 2, 2))
    else:
        with pytest.raises(AssertionError, match=fault):
            check(tmp_path, ["an item of the set"], report_of(5, 3, 2))
