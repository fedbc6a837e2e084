"""Corpus: every reader, nothing skipped silently, damage named with file and line, and the default corpus."""

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import corpus
from dsv3.data.corpus import (
    MAX_PROSE,
    Document,
    ReadReport,
    Source,
    deduplicate,
    is_held_out,
    read_documents,
    read_source,
    split_held_out,
    standard_library,
)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(*paths: Path, report: ReadReport | None = None) -> list[str]:
    return [document.text for document in read_documents(paths, report)]


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


def parquet(path: Path, rows: list[dict]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def test_folder_is_read_in_sorted_order_and_the_rest_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "b.md", "# b\r\n")
    write(tmp_path / "a" / "z.py", "\ufeffx = 1\n")
    write(tmp_path / "a" / "c.txt", "c")
    write(tmp_path / "d.jsonl", lines({"text": "one"}, {"text": "two"}))
    write(tmp_path / "empty.txt", " \n")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "x.txt", "no")
    write(tmp_path / "image.png", b"\x89PNG\0")
    write(tmp_path / "LICENSE", "no")
    write(tmp_path / "binary.txt", b"a\0b")
    write(tmp_path / "latin.txt", "é".encode("latin-1"))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe.txt")
    report = ReadReport()
    found = list(read_source(Source(name="mine", paths=(str(tmp_path),)), report))
    # A folder's own files first, then its subfolders, each sorted; line ends as they are, byte-order marks gone.
    assert [d.text for d in found] == ["# b\r\n", "one", "two", "c", "x = 1\n"]
    assert {d.source for d in found} == {"mine"}
    assert [d.path for d in found[:2]] == [str(tmp_path / "b.md"), f"{tmp_path / 'd.jsonl'}:1"]
    assert report.documents == {"mine": 5}
    assert report.characters == {"mine": sum(len(d.text) for d in found)}
    assert report.left_out == {
        "empty documents": 1,
        "hidden files": 1,
        "hidden folders": 1,
        "linked folders": 1,
        "pipes, devices and broken links": 2,
        ".png files": 1,
        "suffixless files": 1,
        "binary files": 1,
        "files that are not UTF-8": 1,
    }
    assert report.lines()[0] == "mine: 5 documents, 18 characters"
    assert "1 .png files" in report.lines()[1]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "t", "content": "c"}, "t"),
        ({"content": "c", "id": 3}, "c"),
        ({"question": "q", "answer": "a"}, "q\na"),
        ({"prompt": "def f():\n", "canonical_solution": "    pass\n"}, "def f():\n    pass\n"),
    ],
)
def test_text_of_records(tmp_path: Path, row: dict, text: str) -> None:
    content = lines(row) + b"\n" + lines(row).rstrip()
    assert texts(write(tmp_path / "a.jsonl", content)) == [text, text]
    assert texts(write(tmp_path / "b.jsonl.gz", gzip.compress(content))) == [text, text]
    assert texts(write(tmp_path / "c.jsonl.zst", zstd(content[:7]) + zstd(content[7:]))) == [text, text]
    assert texts(parquet(tmp_path / "d.parquet", [row, row])) == [text, text]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines({"text": "x"}) + b"{oops\n", r"a.jsonl:2 is no JSON"),
        (lines({"text": "x"}, ["text"]), r"a.jsonl:2 holds a list"),
        (
            lines({"text": "x"}, {"b": 1, "a": 2}),
            r"a.jsonl:2 holds \['a', 'b'\].*text, content, question\+answer",
        ),
        (lines({"text": None}), r"a.jsonl:1 holds \['text'\], no text"),
        (b'{"text": "\xff"}', r"a.jsonl:1 is not UTF-8 \(byte 10"),
    ],
)
def test_bad_records_are_refused_with_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        texts(write(tmp_path / "a.jsonl", content))
    assert "\n" not in str(caught.value)


def test_truncated_archives_are_refused(tmp_path: Path) -> None:
    content = lines(*({"text": f"line {i} {os.urandom(40).hex()}"} for i in range(200)))
    for path in (
        write(tmp_path / "a.jsonl.gz", gzip.compress(content)[:-30]),
        write(tmp_path / "a.jsonl.zst", zstd(content)[:-30]),
        write(tmp_path / "b.jsonl.gz", b"no gzip"),
        write(tmp_path / "b.jsonl.zst", b"no zstd"),
        write(tmp_path / "b.parquet", b"PAR1 no parquet PAR1"),
    ):
        with pytest.raises(
            ValueError, match=f"{path.name} is (damaged|no readable parquet file) behind .*fetch it again"
        ):
            texts(path)


def test_missing_libraries_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, library in (("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ValueError, match=rf"needs {library}: pip install 'dsv3\[data\]'"):
            texts(write(tmp_path / name, "x"))


def test_what_the_user_names_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        texts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no text: dsv3 reads text"):
        texts(tmp_path)
    write(tmp_path / "only.png", "x")
    with pytest.raises(ValueError, match=r"holds no text \(left out: 1 .png files\)"):
        texts(tmp_path)
    with pytest.raises(ValueError, match=r"only.png ends in .png"):
        texts(tmp_path / "only.png")
    for content, fault in ((b"a\0b", "is binary"), (b"ab\xff", r"is not UTF-8 \(byte 2\)")):
        with pytest.raises(ValueError, match=rf"b.txt {fault}"):
            texts(write(tmp_path / "b.txt", content))


def test_half_a_surrogate_pair_is_left_out_and_counted(tmp_path: Path) -> None:
    report = ReadReport()
    path = write(tmp_path / "a.jsonl", b'{"text": "a\\ud800"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(path, report=report) == ["😀"]
    assert report.left_out == {"documents with half a surrogate pair": 1}


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(["a", "b\n", "c\n\n", "é\r\n\r\n"]), st.integers(1, 9000)), max_size=6))
def test_long_prose_is_cut_without_loss(parts: list[tuple[str, int]]) -> None:
    text = "".join(piece * times for piece, times in parts)
    pieces = [piece for _, piece in corpus._cut("x", text)]
    assert "".join(pieces) == text
    assert all(len(piece) <= MAX_PROSE for piece in pieces)
    assert all(len(piece) > MAX_PROSE // 2 for piece in pieces[:-1])


def test_prose_is_cut_at_blank_lines_and_code_is_not(tmp_path: Path) -> None:
    paragraph = "word " * 100 + "\nnext line\n\n"
    pieces = texts(write(tmp_path / "a.txt", paragraph * 200))
    assert len(pieces) > 5
    assert all(piece.endswith("\n\n") and piece.startswith("word") for piece in pieces)
    assert texts(write(tmp_path / "a.py", paragraph * 200)) == [paragraph * 200]


def test_exact_duplicates_are_removed_across_sources_and_counted() -> None:
    documents = [Document(text, source, "p") for source in "ab" for text in ("x", "y", "x", "x ")]
    report = ReadReport()
    assert [(d.text, d.source) for d in deduplicate(documents, report)] == [("x", "a"), ("y", "a"), ("x ", "a")]
    assert report.duplicates == 5
    assert "5 exact duplicates" in report.lines()[-1]


def documents_named(source: str, count: int) -> list[Document]:
    return [Document(f"{source} {i}", source, str(i)) for i in range(count)]


def test_held_out_share_is_right_and_depends_on_text_and_seed_alone() -> None:
    documents = documents_named("a", 4000)
    held = [is_held_out(d, 0.1) for d in documents]
    assert 320 < sum(held) < 480
    moved = [Document(d.text, "other", "elsewhere") for d in documents]
    assert [is_held_out(d, 0.1) for d in moved] == held
    assert [is_held_out(d, 0.1, seed=1) for d in documents] != held
    assert all(is_held_out(d, 0.2) for d, apart in zip(documents, held, strict=True) if apart)
    assert not any(is_held_out(d, 0.0) for d in documents)
    with pytest.raises(ValueError, match=r"fraction 1\.5"):
        is_held_out(documents[0], 1.5)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), max_size=3), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 3))
def test_split_serves_both_sides_of_every_source(sizes: list[int], fraction: float, seed: int) -> None:
    documents = [d for s, size in enumerate(sizes) for d in documents_named(f"s{s}", size) * 2]
    train, held = split_held_out(iter(documents), fraction, seed)
    assert Counter(train) + Counter(held) == Counter(documents)
    assert not {d.text for d in train} & {d.text for d in held}
    for s, size in enumerate(sizes):
        if size > 1:
            assert all(any(d.source == f"s{s}" for d in side) for side in (train, held))
    assert split_held_out(documents, fraction, seed) == (train, held)
    assert split_held_out(documents, 0.0)[1] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0.0}, "has weight 0.0"),
        ({"weight": float("inf")}, "has weight inf"),
        ({"name": "../x"}, "'../x' becomes a file name"),
        ({"name": ""}, "becomes a file name"),
        ({"paths": ()}, "give a tuple of one path"),
        ({"paths": "abc"}, "give a tuple of one path"),
    ],
)
def test_bad_sources_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**{"name": "a", "paths": ("x",), **fields})


def test_standard_library_is_code_and_english_and_lazy() -> None:
    code, english = standard_library()
    report = ReadReport()
    first = next(iter(read_source(code, report)))
    assert report.documents == {"code": 1}
    assert first.path == "python/__future__.py"
    documents = list(read_source(code, report))
    paths = [d.path for d in documents]
    assert "python/json/decoder.py" in paths
    assert not [p for p in paths if {"test", "tests", "idlelib", "site-packages", "encodings"} & set(p.split("/"))]
    assert sum(len(d.text) for d in documents) > 4_000_000
    prose = {d.path: d.text for d in read_source(english, report)}
    assert "python/topics/assert" in prose
    assert prose["python/json/__init__.py:docstrings"].startswith("JSON (JavaScript Object Notation)")
    assert sum(map(len, prose.values())) > 1_000_000


def test_python_without_sources_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match=r"has no sources in .*--data PATH"):
        list(read_source(standard_library()[0]))
