"""Documents from files: folders, .txt, .md, source code, .jsonl(.gz, .zst), .parquet; and from Python itself.

A source is a named part of a mixture (language, code, maths) and yields its documents lazily, in sorted order of paths.
What a folder holds and no reader takes is counted in a ReadReport, for people to see; a file that the user named and
that cannot be read is an error. A long prose file is cut at blank lines into documents of at most 16,384 characters, so
that one big .txt can be shuffled and held out in parts; code files and records stay whole.

The default corpus is what every Python carries: the sources of its standard library (`python:code`) and, as English,
their documentation strings and the language reference of `pydoc` (`python:english`). Left out: test folders, idlelib,
lib2to3, turtledemo, installed packages, and encodings (generated tables).
Does not: filter quality, find near-duplicates or run on several machines (data/pipeline.py).
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import math
import os
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PROSE = frozenset((".txt", ".text", ".md", ".markdown", ".rst"))
_CODE_SUFFIXES = """
    .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt .js .jsx .mjs .ts .tsx .rb .php .swift .scala .cs .sh
    .sql .lua .r .jl .hs .ml .ex .erl .clj .zig .html .css .toml .yaml .yml .tex .cmake
"""
_CODE = frozenset(_CODE_SUFFIXES.split())
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# Where a record keeps its text, and what joins several fields (a HumanEval solution continues its prompt's last line).
_FIELDS = (
    (("text",), ""),
    (("content",), ""),
    (("question", "answer"), "\n"),
    (("prompt", "canonical_solution"), ""),
    (("prompt", "completion"), ""),
)
_KNOWN = "text and source code files, .jsonl(.gz, .zst) and .parquet"
_NOT_CODE = "test tests idlelib lib2to3 turtledemo encodings pydoc_data site-packages dist-packages __pycache__"
_NOT_CORPUS = frozenset(_NOT_CODE.split())
PYTHON_CODE, PYTHON_ENGLISH = "python:code", "python:english"
_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_PROSE = 16_384
"""Characters of a document cut from a longer prose file."""
_SHORTEST_DOCSTRING = 80
"""Characters; a shorter one is mostly a repetition of its function's name."""


@dataclass(frozen=True)
class Document:
    """A text, the name of the source it belongs to, and where it was found."""

    text: str
    source: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named part of a mixture. paths: files, folders, `python:code` or `python:english`; weight: its share of the
    training tokens, relative to the other sources' weights."""

    name: str
    paths: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"source {self.name!r} has weight {self.weight}: give a positive number, or leave it out")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"source name {self.name!r} becomes a file name: use letters, digits, '-', '_' and '.'")
        if isinstance(self.paths, str) or not self.paths:
            raise ValueError(f"source {self.name!r} has paths {self.paths!r}: give a tuple of one path or more")


@dataclass
class ReadReport:
    """What was read and what was left, for people. Counters by source name, and by reason."""

    documents: Counter[str] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0

    def lines(self) -> list[str]:
        """A line a source, then one for what was left out."""
        lines = [f"{name}: {n:,} documents, {self.characters[name]:,} characters" for name, n in self.documents.items()]
        left = [f"{count:,} {reason}" for reason, count in sorted(self.left_out.items())]
        left += [f"{self.duplicates:,} exact duplicates"] if self.duplicates else []
        return lines + (["left out: " + ", ".join(left)] if left else [])


def read_source(source: Source, report: ReadReport | None = None) -> Iterator[Document]:
    """Documents of a source in a fixed order; empty ones are left out and counted in `report`.

    Raises:
        ValueError: a path does not exist or cannot be read (names file and line), or the source holds no document.
    """
    return read_documents(source.paths, report, source=source.name)


def read_documents(
    paths: Sequence[str | Path], report: ReadReport | None = None, source: str = "text"
) -> Iterator[Document]:
    """The same for paths that are no Source yet."""
    report = ReadReport() if report is None else report
    found = False
    for path in paths:
        for where, text in read_path(str(path), report):
            if not text.strip():
                report.left_out["empty documents"] += 1
                continue
            if _SURROGATE.search(text):  # JSON can say "\ud800", UTF-8 cannot
                report.left_out["documents with half a surrogate pair"] += 1
                continue
            found = True
            report.documents[source] += 1
            report.characters[source] += len(text)
            yield Document(text, source, where)
    if not found:
        left = "; ".join(report.lines()[-1:]) if report.left_out else ""
        raise ValueError(
            f"{', '.join(map(str, paths))} holds no text{f' ({left})' if left else ''}: dsv3 reads {_KNOWN}"
        )


def deduplicate(documents: Iterable[Document], report: ReadReport | None = None) -> Iterator[Document]:
    """The first document of each exact text, across sources; the others are counted in `report`."""
    seen: set[bytes] = set()
    for document in documents:
        digest = _digest(document.text)
        if digest not in seen:
            seen.add(digest)
            yield document
        elif report is not None:
            report.duplicates += 1


def is_held_out(document: Document, fraction: float, seed: int = 0) -> bool:
    """Whether the document is of the held-out share; by its text, so it stays there whatever else the corpus holds."""
    if not 0 <= fraction < 1:
        raise ValueError(f"held-out fraction {fraction} must be at least 0 and below 1")
    return _draw(document, seed) < fraction


def split_held_out(
    documents: Iterable[Document], fraction: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents by `is_held_out`; of each source with two distinct texts or more, both get one.

    A small source may lie wholly on one side: then its nearest document, by the same draw, changes sides.
    """
    by_source: dict[str, tuple[list[Document], list[Document]]] = {}
    for document in documents:
        sides = by_source.setdefault(document.source, ([], []))
        sides[is_held_out(document, fraction, seed)].append(document)
    for train, held in by_source.values():
        if fraction > 0 and not held and len({d.text for d in train}) > 1:
            _move(train, held, min(train, key=lambda d: _draw(d, seed)).text)
        elif not train and len({d.text for d in held}) > 1:
            _move(held, train, max(held, key=lambda d: _draw(d, seed)).text)
    trains, helds = zip(*by_source.values()) if by_source else ((), ())
    return [d for side in trains for d in side], [d for side in helds for d in side]


def standard_library() -> tuple[Source, ...]:
    """The corpus that every Python carries: its library's sources, and their documentation as English."""
    return Source(name="code", paths=(PYTHON_CODE,)), Source(name="english", paths=(PYTHON_ENGLISH,))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _draw(document: Document, seed: int) -> float:
    """In [0, 1), uniform by the text; a seed turns the circle by so many golden sections."""
    turned = int.from_bytes(_digest(document.text)[:8], "big") + seed * 0x9E3779B97F4A7C15
    return turned % 2**64 / 2**64


def _move(origin: list[Document], target: list[Document], text: str) -> None:
    target.extend(d for d in origin if d.text == text)
    origin[:] = [d for d in origin if d.text != text]


# -- paths -------------------------------------------------------------------------------------------------------------


def read_path(name: str, report: ReadReport) -> Iterator[tuple[str, str]]:
    """(where, text) of each document of a file, a folder or a part of Python; raises as `read_source`."""
    path = Path(name)
    if name in (PYTHON_CODE, PYTHON_ENGLISH):
        yield from _python_code(report) if name == PYTHON_CODE else _python_english(report)
    elif path.is_dir():
        for file in walk_files(path, report):
            yield from _read_file(file, report, named=False)
    elif path.is_file():
        yield from _read_file(path, report, named=True)
    else:
        raise ValueError(f"{path} does not exist: give a file or a folder")


def walk_files(folder: Path, report: ReadReport, without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below a folder by sorted path, links to folders not followed."""
    for root, folders, files in os.walk(folder, onerror=_raise):
        report.left_out.update("hidden folders" for name in folders if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in without)
        report.left_out.update("linked folders" for name in folders if os.path.islink(os.path.join(root, name)))
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith("."):
                report.left_out["hidden files"] += 1
            elif not path.is_file():
                report.left_out["pipes, devices and broken links"] += 1
            else:
                yield path


def _raise(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read ({error.strerror}): change its permissions or leave it out")


def _read_file(path: Path, report: ReadReport, *, named: bool) -> Iterator[tuple[str, str]]:
    """(where, text) of each document of a file. named: by the user, so what cannot be read is an error."""
    name, suffix = path.name.lower(), path.suffix.lower()
    try:
        if name.endswith(LINES):
            yield from _read_lines(path)
        elif suffix == ".parquet":
            yield from ((where, text_of(row, where)) for where, row in parquet_rows(path))
        elif suffix not in _PROSE | _CODE:
            if named:
                raise ValueError(f"{path} ends in {suffix or 'no suffix'}: dsv3 reads {_KNOWN}")
            report.left_out[f"{suffix or 'suffixless'} files"] += 1
        elif b"\0" in (content := path.read_bytes()):
            if named:
                raise ValueError(f"{path} is binary (it holds a zero byte): give text, in UTF-8")
            report.left_out["binary files"] += 1
        else:
            text = content.decode("utf-8-sig")  # line ends as they are, less a byte-order mark
            yield from _cut(str(path), text) if suffix in _PROSE else [(str(path), text)]
    except UnicodeDecodeError as error:
        if named:
            raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it, for example with iconv") from None
        report.left_out["files that are not UTF-8"] += 1
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}): look at its permissions, or fetch it again"
        ) from None


def _cut(where: str, text: str) -> Iterator[tuple[str, str]]:
    """Pieces of at most MAX_PROSE characters that join to the text; cut behind a blank line, a line, or anywhere."""
    start = 0
    while len(text) - start > MAX_PROSE:
        least, most = start + MAX_PROSE // 2, start + MAX_PROSE
        ends = (text.rfind(mark, least, most) + len(mark) for mark in ("\n\n", "\n"))
        end = next((end for end in ends if end > least), most)
        yield f"{where}:{start}", text[start:end]
        start = end
    yield (f"{where}:{start}" if start else where), text[start:]


# -- records -----------------------------------------------------------------------------------------------------------


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        with open_lines(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", text_of(parse_line(line, f"{path}:{number}"), f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged behind line {number} ({error}): fetch it again") from None


def is_readable(path: Path) -> bool:
    """Whether a reader takes files of this name."""
    return path.name.lower().endswith((*LINES, ".parquet")) or path.suffix.lower() in _PROSE | _CODE


def is_code(name: str) -> bool:
    """Whether a path, or PYTHON_CODE, is source code by its name."""
    return name == PYTHON_CODE or Path(name).suffix.lower() in _CODE - {".html", ".tex"}


def open_lines(path: Path) -> AbstractContextManager[Iterable[bytes]]:
    """Lines of a .jsonl file, also .gz and .zst. A damaged one raises EOFError, gzip.BadGzipFile or zlib.error."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() != ".zst":
        return path.open("rb")
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path} needs zstandard: pip install 'dsv3[data]'") from None
    return _ZstdLines(zstandard, path)


class _ZstdLines(AbstractContextManager[Iterable[bytes]]):
    """Lines of a .zst file of one frame or several. One that ends early raises EOFError; zstandard itself would not."""

    def __init__(self, zstandard: Any, path: Path) -> None:
        self._zstandard, self._path = zstandard, path

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[bytes]:
        rest, frame = b"", None
        with self._path.open("rb") as file:
            while data := file.read(1 << 20):
                while data:
                    frame = frame or self._zstandard.ZstdDecompressor().decompressobj()
                    try:
                        *lines, rest = (rest + frame.decompress(data)).split(b"\n")
                    except self._zstandard.ZstdError as error:
                        raise EOFError(str(error)) from None
                    yield from lines
                    data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise EOFError("the last frame is not complete")
        if rest:
            yield rest


def parse_line(line: bytes, where: str) -> Any:
    """A line's JSON; a ValueError says where it is none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 (byte {error.start} of the line): convert the file with iconv"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error.msg}): one JSON object a line is needed") from None


def text_of(row: Any, where: str) -> str:
    """The text of a record, by the names of its fields; a ValueError says where it has none."""
    if isinstance(row, dict):
        for names, joint in _FIELDS:
            if all(isinstance(row.get(name), str) for name in names):
                return joint.join(row[name] for name in names)
    found = sorted(row) if isinstance(row, dict) else f"a {type(row).__name__}"
    known = ", ".join("+".join(names) for names, _ in _FIELDS)
    raise ValueError(f"{where} holds {found}, no text that dsv3 knows: rename the field to one of {known}")


def parquet_rows(path: Path, *, whole: bool = False) -> Iterator[tuple[str, Any]]:
    """(where, row) of a parquet file; unless `whole`, only of the columns that hold the text, if their names are known."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'dsv3[data]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            wanted = next((fields for fields, _ in _FIELDS if names.issuperset(fields)), tuple(names))
            for batch in file.iter_batches(batch_size=1024, columns=None if whole else list(wanted)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable parquet file behind row {number} ({error}): fetch it again") from None


# -- Python's own ------------------------------------------------------------------------------------------------------


def _python_code(report: ReadReport) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (
        [path for path in walk_files(root, ReadReport(), _NOT_CORPUS) if path.suffix == ".py"] if root.is_dir() else []
    )
    # The build's own settings hold paths and versions of this machine.
    files = [path for path in files if not path.name.startswith("_sysconfigdata")]
    if not files:
        raise ValueError(f"this Python has no sources in {root}: give your own text with --data PATH")
    for path in files:
        for _, text in _read_file(path, report, named=False):
            yield f"python/{path.relative_to(root).as_posix()}", text


def _python_english(report: ReadReport) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from ((f"python/topics/{name}", text) for name, text in sorted(topics.items()))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path, text in _python_code(report):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful escapes in other people's strings
            tree = ast.parse(text)
        docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        prose = "\n\n".join(doc for doc in docstrings if len(doc) >= _SHORTEST_DOCSTRING)
        if prose:
            yield f"{path}:docstrings", prose
