"""Documents from files: folders, .txt, .md, source code, .jsonl(.gz, .zst), .parquet; and from Python itself.

What a folder holds and no reader takes is counted in a ReadReport and told to the user; a file that the user named and that
cannot be read is an error. The order is that of sorted paths, the same on every machine.
Does not: filter quality or find near-duplicates (the extra `data` brings datatrove for that).
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TEXT = {".txt", ".md", ".rst"}
_CODE = {
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt",
    ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".swift", ".scala", ".sh", ".sql", ".lua", ".r",
    ".jl", ".hs", ".ml", ".html", ".css", ".toml", ".yaml", ".yml", ".tex",
}  # fmt: skip
_LINES = {".jsonl", ".gz", ".zst"}
# Where a JSON object or a parquet row keeps its text; several fields are joined by a line break.
_FIELDS = (("text",), ("content",), ("question", "answer"), ("prompt", "canonical_solution"), ("prompt", "completion"))
_NOT_CORPUS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "turtledemo",
    "encodings",
}
PYTHON_CODE, PYTHON_ENGLISH = "python:code", "python:english"


@dataclass(frozen=True)
class Document:
    """A text, the source it belongs to, and where it was found."""

    text: str
    source: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named part of a mixture. weight: its share of the training tokens, relative to the other sources."""

    name: str
    paths: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(
                f"source {self.name!r} has weight {self.weight}: give a positive weight, or leave the source out"
            )
        if not self.name or not self.name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise ValueError(f"source name {self.name!r} becomes a file name: use letters, digits, '-', '_' and '.'")


@dataclass
class ReadReport:
    """What was read and what was left, for people."""

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


def read_source(source: Source, report: ReadReport) -> Iterator[Document]:
    """Documents of a source in a fixed order; empty ones are left out and counted.

    Raises:
        ValueError: a path does not exist or cannot be read, or the source holds no document.
    """
    found = False
    for path in source.paths:
        for where, text in _read_path(path, report):
            if not text.strip():
                report.left_out["empty documents"] += 1
                continue
            found = True
            report.documents[source.name] += 1
            report.characters[source.name] += len(text)
            yield Document(text, source.name, where)
    if not found:
        raise ValueError(
            f"{', '.join(source.paths)} holds no text: give .txt, .md, source code, .jsonl or .parquet files"
        )


def deduplicate(documents: Iterable[Document], report: ReadReport) -> Iterator[Document]:
    """The first of each exact text."""
    seen: set[bytes] = set()
    for document in documents:
        digest = _digest(document.text)
        if digest in seen:
            report.duplicates += 1
            continue
        seen.add(digest)
        yield document


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether the document belongs to the held-out share; by its text, so it stays there whatever else the corpus holds."""
    return int.from_bytes(_digest(document.text)[:8], "big") < fraction * 2**64


def standard_library() -> tuple[Source, ...]:
    """The corpus that every Python carries: its library's sources, and their documentation as English."""
    return Source(name="code", paths=(PYTHON_CODE,)), Source(name="english", paths=(PYTHON_ENGLISH,))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _read_path(name: str, report: ReadReport) -> Iterator[tuple[str, str]]:
    if name == PYTHON_CODE:
        yield from _python_code(report)
    elif name == PYTHON_ENGLISH:
        yield from _python_english(report)
    elif (path := Path(name)).is_dir():
        yield from _read_folder(path, report)
    elif path.is_file():
        if path.suffix not in _TEXT | _CODE | _LINES | {".parquet"}:
            raise ValueError(
                f"{path} ends in {path.suffix or 'nothing'}: dsv3 reads text, source code, .jsonl(.gz, .zst) and .parquet"
            )
        yield from _read_file(path)
    else:
        raise ValueError(f"{path} does not exist: give a file or a folder")


def _read_folder(folder: Path, report: ReadReport) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            report.left_out["hidden files"] += 1
        elif path.suffix not in _TEXT | _CODE | _LINES | {".parquet"}:
            report.left_out[f"{path.suffix or 'no-suffix'} files"] += 1
        elif path.suffix in _TEXT | _CODE:
            try:
                yield str(path), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                report.left_out["files that are not UTF-8"] += 1
        else:
            yield from _read_file(path)


def _read_file(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix in _LINES:
        yield from _read_lines(path)
    else:
        try:
            yield str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it, for example with iconv") from None


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _text_of(_json(line, path, number), f"{path}:{number}")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or not UTF-8 ({error}): fetch it again") from None


def _open(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path} needs zstandard: pip install 'dsv3[data]'") from None
        return zstandard.open(path, "rt", encoding="utf-8")  # type: ignore[return-value]
    return path.open(encoding="utf-8")


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number} is no JSON ({error.msg}): one JSON object a line is needed") from None


def _text_of(row: Any, where: str) -> str:
    if isinstance(row, dict):
        for fields in _FIELDS:
            if all(isinstance(row.get(name), str) for name in fields):
                return "\n".join(row[name] for name in fields)
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    known = ", ".join("+".join(fields) for fields in _FIELDS)
    raise ValueError(f"{where} holds {found}, no text that dsv3 knows: rename the field to one of {known}")


def _read_parquet(path: Path) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'dsv3[data]'") from None
    try:
        file, number = parquet.ParquetFile(path), 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", _text_of(row, f"{path}:{number}")
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no readable parquet file ({error}): fetch it again") from None


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [p for p in sorted(root.rglob("*.py")) if not _NOT_CORPUS & set(p.relative_to(root).parts)]


def _python_code(report: ReadReport) -> Iterator[tuple[str, str]]:
    for path in _library_files():
        try:
            yield str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            report.left_out["files that are not UTF-8"] += 1


def _python_english(report: ReadReport) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from ((f"topics:{name}", text) for name, text in sorted(topics.items()))
    for path, text in _python_code(report):
        tree = ast.parse(text)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        prose = "\n\n".join(doc for doc in docs if len(doc) >= 80)
        if prose:
            yield f"{path}:docstrings", prose
