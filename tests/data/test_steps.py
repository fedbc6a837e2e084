"""Steps: every line of a file is read by exactly one task, what cannot be read is told, and the scrub leaves no address."""

import gzip
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.ledger import dropped
from dsv3.data.recall import CODE, PROSE
from dsv3.data.steps import Decontaminate, Language, Pack, Part, Read, Recall, Scrub, Slice, open_fasttext, writer


def read(tmp_path: Path, *slices: Slice) -> list[Document]:
    """What one task reads, its plan on the disk."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"tasks": [[vars(piece) for piece in slices]]}))
    return list(Read(plan, tmp_path / "dropped").run())


def documents(*texts: str, **meta: Any) -> Iterator[Document]:
    return (
        Document(text=text, id=str(n), metadata={"kind": PROSE, "source": "web", **meta})
        for n, text in enumerate(texts)
    )


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12), min_size=1, max_size=12),
    st.integers(1, 9),
    st.booleans(),
)
def test_every_line_is_read_by_exactly_one_slice(tmp_path_factory, texts, parts, closed):
    folder = tmp_path_factory.mktemp("lines")
    lines = [json.dumps({"text": text + "."}, ensure_ascii=False) for text in texts]
    path = folder / "a.jsonl"
    path.write_text("\n".join(lines) + "\n" * closed, encoding="utf-8")
    size = path.stat().st_size
    ends = [size * part // parts for part in range(parts + 1)]
    reader = Read(folder / "plan.json", folder / "dropped")
    found = [row for a, b in pairwise(ends) for row in reader.read(Slice("web", str(path), a, b))]
    assert [text for _, text, fault in found if fault is None] == [text + "." for text in texts]


def test_broken_lines_records_and_files_are_dropped_with_reason_file_and_line(tmp_path):
    lines = tmp_path / "a.jsonl"
    good = json.dumps({"text": "good"})
    lines.write_bytes(b"\n".join([
        good.encode(), b"{broken", b"", b'{"title": "no text"}', b'{"text": "  "}', b'{"text": "\\ud800"}', b'{"text": "\xff"}',
        good.encode(),
    ]))  # fmt: skip
    cut = tmp_path / "b.jsonl.gz"
    cut.write_bytes(gzip.compress((good + "\n").encode() * 900)[:-20])
    table = tmp_path / "c.parquet"
    table.write_bytes(b"no table")
    kept = read(
        tmp_path, Slice("web", str(lines), 0, lines.stat().st_size), Slice("web", str(cut)), Slice("web", str(table))
    )
    assert [d.id for d in kept[:2]] == [f"{lines}:1", f"{lines}:8"]
    assert {d.text for d in kept} == {"good"}
    told = {d["id"]: (d["metadata"]["filter_reason"], d["metadata"]["told"]) for d in dropped(tmp_path / "dropped")}
    assert [told[f"{lines}:{n}"][0] for n in (2, 4, 5, 6, 7)] == [
        "malformed", "no text", "empty", "half a surrogate pair", "malformed",
    ]  # fmt: skip
    assert f"{lines}:2 is no JSON" in told[f"{lines}:2"][1]
    assert "title" in told[f"{lines}:4"][1]
    [damaged] = [text for where, (reason, text) in told.items() if reason == "unreadable" and "b.jsonl.gz" in where]
    assert "is damaged behind line" in damaged
    assert told[str(table)][0] == "unreadable"


def test_a_broken_line_in_a_later_slice_is_told_by_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"text": "y"}) + "\n{broken\n")
    read(tmp_path, Slice("web", str(path), 5, path.stat().st_size))
    [lost] = dropped(tmp_path / "dropped")
    assert lost["id"] == f"{path}:3"


def test_language_keeps_those_asked_for_and_code_and_says_what_the_others_are(tmp_path):
    step = Language(tmp_path, ("en",), 0.3)
    english = "The house is on the hill and it was there before the war that they talk of."
    kept = list(
        step.run(
            documents(english, "Das Haus ist auf dem Berg und es war vor dem Krieg da.", "1 2 3", "屋在山上", rank=0)
        )
    )
    assert [d.text for d in kept] == [english]
    assert kept[0].metadata["language"] == "en"
    assert [d["metadata"]["filter_reason"] for d in dropped(tmp_path / "language")] == ["de", "und", "zh"]
    [code] = Language(tmp_path / "more", ("en",), 0.3).run(documents("x = 1", kind=CODE))
    assert code.metadata["language"] == CODE


def test_decontamination_names_the_item_that_a_document_touches(tmp_path):
    item = "which of the nine grey herons stood longest in the shallow river"
    (tmp_path / "bench.jsonl").write_text(json.dumps({"q": "two words"}) + "\n" + json.dumps({"q": item}) + "\n")
    step = Decontaminate(tmp_path / "dropped", (tmp_path / "bench.jsonl",), 8)
    assert [d.text for d in step.run(documents("a clean text", f"He asked: {item.upper()}?"))] == ["a clean text"]
    [lost] = dropped(tmp_path / "dropped" / "decontaminate")
    assert lost["metadata"]["touches"] == "bench.jsonl record 2"
    assert lost["metadata"]["filter_reason"] == "bench.jsonl"


def test_scrub_replaces_addresses_and_keeps_private_networks_and_decorators():
    texts = (
        "write to a.b+c@mail.example.co.uk or x@y.org",
        "ping 8.8.8.8 from 192.168.0.1",
        "@property and version 1.2.3",
    )
    step = Scrub()
    clean = [d.text for d in step.run(documents(*texts))]
    assert clean == [
        "write to email@example.com or email@example.com",
        "ping 192.0.2.1 from 192.168.0.1",
        "@property and version 1.2.3",
    ]
    assert step.stats["replaced_e-mail"].total == 2
    assert step.stats["replaced_IP address"].total == 1


def test_a_document_has_the_same_stand_in_wherever_it_stands():
    alone = [d.text for d in Scrub().run(documents("b@c.org"))]
    behind = [d.text for d in Scrub().run(documents("a@b.org", "b@c.org"))][1:]
    assert alone == behind


def test_recall_counts_kinds_and_part_reads_only_its_own_task(tmp_path):
    step = Recall({}, 0.9)
    kinds = [
        d.metadata["kind"]
        for d in step.run(documents("def f():\n    return 1\n\nf()\n", "A line of prose.", kind=None))
    ]
    assert kinds == [CODE, PROSE]
    (tmp_path / "notes.py").write_text('"A module that is a text alone."')
    [named] = step.run(iter(read(tmp_path, Slice("files", str(tmp_path / "notes.py")))))
    assert named.metadata["kind"] == CODE
    with writer(tmp_path) as out:
        out.write(Document(text="mine", id="1"), 3)
    assert [d.text for d in Part(tmp_path).run(None, 3, 9)] == ["mine"]
    assert list(Part(tmp_path).run(None, 4, 9)) == []


def test_a_language_model_that_is_none_is_refused(tmp_path):
    (tmp_path / "lid.bin").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"needs fastText: pip install|is no model of fastText's"):
        open_fasttext(tmp_path / "lid.bin")


def test_pack_of_a_task_without_documents_writes_nothing(tmp_path):
    stats = tmp_path / "stats"
    stats.mkdir()
    (stats / "00000.json").write_text(json.dumps([{"name": "✂ - SPLIT: split", "stats": {}, "time_stats": 0.0}]))
    from dsv3.data.tokenizer import Tokenizer

    Tokenizer.train(["some words to learn from"], 300).save(tmp_path / "tok")
    pack = Pack(
        tmp_path / "text", stats, tmp_path / "pieces", str(tmp_path / "tok"), fim_rate=0.1, split_rate=0.1, seed=0
    )
    pack.run(None, 0, 1)
    assert not (tmp_path / "pieces").exists()
