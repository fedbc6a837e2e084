"""Readers of every format, and what happens to what cannot be read."""

import gzip
import json

import pytest

from dsv3.data.corpus import (
    Document,
    ReadReport,
    Source,
    deduplicate,
    is_held_out,
    read_source,
    standard_library,
)


def read(*paths, report=None):
    source = Source(name="s", paths=tuple(map(str, paths)))
    return [document.text for document in read_source(source, report or ReadReport())]


def test_every_format_of_a_folder_in_sorted_order(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet
    import zstandard

    rows = [{"text": "one"}, {"question": "q", "answer": "a"}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.txt").write_text("plain é")
    (tmp_path / "b.md").write_text("# mark")
    (tmp_path / "c.py").write_text("x = 1\n")
    (tmp_path / "d.jsonl").write_bytes(lines)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "f.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet.write_table(arrow.table({"content": ["p1", "p2"]}), tmp_path / "g.parquet")
    (tmp_path / "h.bin").write_bytes(b"\0")
    (tmp_path / "i.txt").write_bytes(b"\xff\xfe")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "j.txt").write_text("  \n")
    report = ReadReport()
    texts = read(tmp_path, report=report)
    assert texts == ["plain é", "# mark", "x = 1\n", *["one", "q\na"] * 3, "p1", "p2"]
    assert report.left_out == {".bin files": 1, "files that are not UTF-8": 1, "hidden files": 1, "empty documents": 1}
    assert report.lines()[0] == "s: 11 documents, 41 characters"
    assert "1 hidden files" in report.lines()[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{oops\n', r"a.jsonl:2 is no JSON"),
        ("a.jsonl", b'{"body": "x"}', r"holds \['body'\], no text"),
        ("a.jsonl.gz", b"not gzip", "damaged"),
        ("a.txt", b"ab\xff", r"is not UTF-8 \(byte 2\)"),
        ("a.exe", b"MZ", "ends in .exe"),
        ("a.txt", b"", "holds no text"),
        ("a.parquet", b"no", "no readable parquet"),
    ],
)
def test_a_named_file_that_cannot_be_read_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_missing_path_and_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "none")
    with pytest.raises(ValueError, match="weight 0"):
        Source(name="a", paths=("x",), weight=0)
    with pytest.raises(ValueError, match="becomes a file name"):
        Source(name="a/b", paths=("x",))


def test_exact_duplicates_go_and_are_counted():
    report = ReadReport()
    documents = [Document(text, "s", "p") for text in ("a", "b", "a", "A", "a")]
    assert [d.text for d in deduplicate(documents, report)] == ["a", "b", "A"]
    assert report.duplicates == 2


def test_held_out_share_is_stable_and_of_the_asked_size():
    documents = [Document(f"text {i}", "s", "p") for i in range(4000)]
    held = [is_held_out(d, 0.1) for d in documents]
    # Binomial: 400 expected, standard deviation 19; five of them.
    assert abs(sum(held) - 400) < 95
    assert held == [is_held_out(Document(d.text, "other", "q"), 0.1) for d in documents]


def test_the_standard_library_is_code_and_english():
    code, english = standard_library()
    report = ReadReport()
    sources = {s.name: [d for d, _ in zip(read_source(s, report), range(30))] for s in (code, english)}
    assert all(d.path.endswith(".py") for d in sources["code"])
    assert any("assignment" in d.path for d in sources["english"])
    assert not any("/test/" in d.path for d in sources["code"])
