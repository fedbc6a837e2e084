"""The steps of the corpus pipeline as datatrove's blocks: what reads, what may drop a document, what changes it, what packs it.

    Read -> Recall -> Language -> Quality -> Decontaminate -> Scrub        a document and its metadata: kind, language, source
    Part -> Split                                                          its side (train, held_out) and its part of the mixture
    Pack                                                                   shards of one task, by dsv3.data.shards

datatrove gives executors, filters, MinHash, formatters, writers and the statistics; ours are the steps for which it would need
a downloaded model, and the reader: its own logs a broken line and goes on, without a count or the line's number.
A document that is dropped is written, with the reason, to the folder `dropped`; nothing is lost without a trace.
Source: datatrove 0.10. Does not: decide the order of stages or where they run (data/pipeline.py).
"""

from __future__ import annotations

import gzip
import importlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from dsv3.data import corpus, language, private
from dsv3.data.decontaminate import Decontaminator
from dsv3.data.ledger import task_steps
from dsv3.data.quality import Judge
from dsv3.data.recall import CODE, PROSE, Classifier, kind_of
from dsv3.data.shards import write_shards
from dsv3.data.tokenizer import Tokenizer

TRAIN, HELD_OUT = "train", "held_out"
Documents = Any
"""A generator of datatrove's Document, or None: its own alias is a NewType, which no generator function fits."""
_TOLD = 200
"""Characters of a line that could not be read which are kept as an example."""


def writer(folder: Path, name: str = "${rank}.jsonl") -> JsonlWriter:
    """Lines of {text, id, metadata}, compressed."""
    return JsonlWriter(str(folder), output_filename=name, compression="zstd")


@dataclass(frozen=True)
class Slice:
    """What a task reads: a file, or of a .jsonl file the lines that begin in bytes [start, end); end -1 is the whole file."""

    source: str
    path: str
    start: int = 0
    end: int = -1


class Read(PipelineStep):
    """Documents of the task's slices, as dsv3.data.corpus reads them. Their id says file and line (in a later slice of a file:
    file and byte). A line, row or file that cannot be read is dropped with the reason, file and line, and the next one read."""

    type, name = "📖 - READER", "read"

    def __init__(self, plan: Path, dropped: Path) -> None:
        super().__init__()
        self.plan, self.dropped = plan, dropped

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Documents:
        plan = json.loads(self.plan.read_text(encoding="utf-8"))["tasks"]
        assert len(plan) == world_size, (len(plan), world_size)
        with writer(self.dropped) as lost:
            for slice_ in (Slice(**entry) for entry in plan[rank]):
                found = self.read(slice_)
                while True:
                    with self.track_time():
                        where, text, fault = next(found, ("", "", "end"))
                        if fault is None:
                            fault = _unusable(text)
                    if fault == "end":
                        break
                    self.stat_update("total")
                    if fault is not None:
                        reason, told = fault
                        self.stat_update("dropped", f"dropped_{reason}")
                        metadata = {"filter_reason": reason, "told": _sayable(told)}
                        lost.write(Document(_sayable(text[:_TOLD]) or "-", _sayable(where), metadata=metadata), rank)
                        continue
                    self.stat_update("forwarded")
                    self.stat_update("bytes", value=len(text.encode()))
                    known = {"kind": CODE} if corpus.is_code(slice_.path) else {}
                    yield Document(text, _sayable(where), metadata={"source": slice_.source, **known})

    def read(self, slice_: Slice) -> Iterator[tuple[str, str, tuple[str, str] | None]]:
        """(where, text, None), or (where, what is there, (reason, what people are told))."""
        path = Path(slice_.path)
        if path.name.lower().endswith(corpus.LINES):
            yield from _lines(path, slice_)
        elif path.suffix.lower() == ".parquet":
            try:
                for where, row in corpus.parquet_rows(path):
                    yield _parsed(row, where)
            except ValueError as error:
                yield str(path), "", ("unreadable", str(error))
        else:
            report = corpus.ReadReport()
            try:
                for where, text in corpus.read_path(slice_.path, report):
                    yield where, text, None
            except ValueError as error:
                yield str(path), "", ("unreadable", str(error))


def _unusable(text: str) -> tuple[str, str] | None:
    if not text.strip():
        return "empty", "no text"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say "\ud800", UTF-8 cannot
        return "half a surrogate pair", "no UTF-8 can say it"
    return None


def _sayable(text: str) -> str:
    """For JSON in UTF-8: half a surrogate pair (also a byte of a file's name that is none) as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _lines(path: Path, slice_: Slice) -> Iterator[tuple[str, str, tuple[str, str] | None]]:
    with_numbers = slice_.start == 0
    number = 0
    try:
        for number, (at, line) in enumerate(_raw_lines(path, slice_), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}" if with_numbers else f"{path}@{at}"
            try:
                row = corpus.parse_line(line, where)
            except ValueError as error:
                where = f"{path}:{number if with_numbers else _line_number(path, at)}"
                yield where, line.decode("utf-8", "replace"), ("malformed", str(error))
                continue
            yield _parsed(row, where)
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        yield (
            f"{path}:{number}",
            "",
            ("unreadable", f"{path} is damaged behind line {number} ({error}): fetch it again"),
        )


def _raw_lines(path: Path, slice_: Slice) -> Iterator[tuple[int, bytes]]:
    """(byte where it begins, line) of the slice."""
    if slice_.end < 0:
        with corpus.open_lines(path) as file:
            yield from ((0, line) for line in file)
        return
    with path.open("rb") as file:
        if slice_.start:
            file.seek(slice_.start - 1)
            file.readline()  # the end of a line of the slice before, or its line break alone
        while (at := file.tell()) < slice_.end and (line := file.readline()):
            yield at, line


def _line_number(path: Path, at: int) -> int:
    """The number of the line that begins at a byte: read only where a broken line must be named."""
    breaks = 0
    with path.open("rb") as file:
        while at > 0 and (block := file.read(min(at, 1 << 20))):
            breaks += block.count(b"\n")
            at -= len(block)
    return breaks + 1


def _parsed(row: Any, where: str) -> tuple[str, str, tuple[str, str] | None]:
    try:
        return where, corpus.text_of(row, where), None
    except ValueError as error:
        return where, str(row), ("no text", str(error))


class Recall(PipelineStep):
    """Sets metadata kind, unless the file's name told it: code or maths by the rules, or the name of the first classifier that
    recognises the text."""

    type, name = "🔎 - RECALL", "recall"

    def __init__(self, classifiers: Mapping[str, Path], threshold: float) -> None:
        super().__init__()
        self.paths, self.threshold = dict(classifiers), threshold
        self._classifiers: dict[str, Classifier] | None = None

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        for document in data:
            with self.track_time():
                kind = document.metadata["kind"] = document.metadata.get("kind") or self._kind(document.text)
            self.stat_update("total", "forwarded", kind)
            self.stat_update("bytes", value=len(document.text.encode()))
            yield document

    def _kind(self, text: str) -> str:
        if self._classifiers is None:
            self._classifiers = {name: Classifier.load(path) for name, path in self.paths.items()}
        if (kind := kind_of(text)) != PROSE:
            return kind
        return next((name for name, one in self._classifiers.items() if one.score(text) >= self.threshold), PROSE)


class _Sieve(BaseFilter):
    """A filter that writes what it drops to `dropped`/its name. `_fault` gives the reason, None to keep the document."""

    def __init__(self, dropped: Path) -> None:
        super().__init__(writer(dropped / self.name))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        self.stat_update("bytes", value=len(doc.text.encode()))
        fault = self._fault(doc)
        return True if fault is None else (False, fault)

    def _fault(self, doc: Document) -> str | None:
        raise NotImplementedError


class Language(_Sieve):
    """Keeps documents in one of `languages`, and code. `model`: fastText's file; None: dsv3.data.language.

    Raises:
        ValueError: fastText is not installed, or the file is none of its models.
    """

    name = "language"

    def __init__(self, dropped: Path, languages: tuple[str, ...], least: float, model: Path | None = None) -> None:
        super().__init__(dropped)
        self.languages, self.least, self.model = languages, least, model
        self._fasttext: Any = None

    def _fault(self, doc: Document) -> str | None:
        if doc.metadata["kind"] == CODE:
            doc.metadata["language"] = CODE
            return None
        found, confidence = self._identify(doc.text)
        doc.metadata |= {"language": found, "confidence": round(confidence, 3)}
        if found not in self.languages:
            return found
        return None if confidence >= self.least else "doubtful"

    def _identify(self, text: str) -> tuple[str, float]:
        if self.model is None:
            return language.identify(text)
        if self._fasttext is None:
            self._fasttext = open_fasttext(self.model)
        labels, shares = self._fasttext.predict(text.replace("\n", " "), k=1)
        return labels[0].removeprefix("__label__").split("_")[0], float(shares[0])


def open_fasttext(path: Path) -> Any:
    """A model of fastText's, such as lid.176.bin."""
    try:
        module = importlib.import_module("fasttext.FastText")
    except ImportError:
        raise ValueError(f"--language-model {path} needs fastText: pip install fasttext-numpy2-wheel") from None
    try:
        return module._FastText(str(path))
    except ValueError as error:
        raise ValueError(f"{path} is no model of fastText's ({error}): fetch lid.176.bin again") from None


class Quality(_Sieve):
    """Drops what dsv3.data.quality finds fault with."""

    name = "quality"

    def __init__(self, dropped: Path, least_words: int) -> None:
        super().__init__(dropped)
        self.judge = Judge(least_words)

    def _fault(self, doc: Document) -> str | None:
        return self.judge.fault(doc.text, doc.metadata["language"], doc.metadata["kind"])


class Decontaminate(_Sieve):
    """Drops what shares a run of words with an evaluation item, which metadata `touches` names."""

    name = "decontaminate"

    def __init__(self, dropped: Path, against: tuple[Path, ...], ngram: int) -> None:
        super().__init__(dropped)
        self.against, self.ngram = against, ngram
        self._guard: Decontaminator | None = None

    def _fault(self, doc: Document) -> str | None:
        if self._guard is None:  # in the process that needs it: the sets are read there, not sent
            self._guard = Decontaminator(self.against, ngram=self.ngram)
        touched = self._guard.touches(doc.text)
        if touched is None:
            return None
        doc.metadata["touches"] = touched
        return touched.split(" record ")[0]


class Scrub(PIIFormatter):
    """Replaces personal data: e-mail and public IP addresses by datatrove's patterns, the rest by dsv3.data.private. One stand-in
    a kind, where datatrove's default goes through a list: so a document's text does not depend on those before it."""

    name = "scrub"

    def __init__(self) -> None:
        super().__init__(email_replacement="email@example.com", ip_replacement="192.0.2.1")

    def format(self, text: str) -> str:
        self.stat_update("bytes", value=len(text.encode()))
        if "@" in text:
            text = self._told("e-mail", text, self.emails_replacer)
        text, counts = private.scrub(text)
        if text.count(".") >= 3:
            text = self._told("IP address", text, self.ip_replacer)
        for kind, count in counts.items():
            self.stat_update(f"replaced_{kind}", value=count)
        self.stat_update("bytes_out", value=len(text.encode()))
        return text

    def _told(self, kind: str, text: str, replacer: Any) -> str:
        new = replacer.replace(text)
        stand_in = replacer.replacements[0]
        if count := new.count(stand_in) - text.count(stand_in):
            self.stat_update(f"replaced_{kind}", value=count)
        return new


class Part(JsonlReader):
    """What the same task of an earlier stage wrote to `folder`, if anything."""

    name = "part"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), add_file_path=False)

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> Documents:
        path = f"{rank:05d}.jsonl.zst"
        if self.data_folder.isfile(path):
            for document in self.read_files_shard([path]):
                self.update_doc_stats(document)
                yield document


class Split(PipelineStep):
    """Sets metadata side, by the hash of the text, and part: the source's name with the kind, or of prose the language."""

    type, name = "✂ - SPLIT", "split"

    def __init__(self, held_out: float, seed: int) -> None:
        super().__init__()
        self.held_out, self.seed = held_out, seed

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        for document in data:
            meta = document.metadata
            held = corpus.is_held_out(corpus.Document(document.text, "", ""), self.held_out, self.seed)
            meta["side"] = HELD_OUT if held else TRAIN
            meta["part"] = f"{meta['source']}-{meta['language'] if meta['kind'] == PROSE else meta['kind']}"
            self.stat_update(f"{meta['side']}/{meta['part']}")
            yield document


class Pack(PipelineStep):
    """Shards of this task's documents, `folder`/SIDE/RANK, numbered on from those of the tasks before (from `counts`, the
    statistics of the stage that wrote `texts`): joined in order they are what one process would have written."""

    type, name = "📦 - PACK", "pack"

    def __init__(
        self, texts: Path, counts: Path, folder: Path, tokenizer: str, *, fim_rate: float, split_rate: float, seed: int
    ) -> None:
        super().__init__()
        self.texts, self.counts, self.folder, self.tokenizer = texts, counts, folder, tokenizer
        self.rates, self.seed = {TRAIN: (fim_rate, split_rate), HELD_OUT: (0.0, 0.0)}, seed

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:
        first: dict[str, int] = {}
        mine: dict[str, int] = {}
        for task in range(rank + 1):
            mine = split_counts(self.counts / f"{task:05d}.json")
            if task < rank:
                for name, count in mine.items():
                    first[name] = first.get(name, 0) + count
        tokenizer = open_tokenizer(self.tokenizer)
        for side in (TRAIN, HELD_OUT):
            parts = sorted(name.removeprefix(f"{side}/") for name in mine if name.startswith(f"{side}/"))
            target = self.folder / side / f"{rank:05d}"
            shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed before it was marked
            if not parts:
                continue
            fim_rate, split_rate = self.rates[side]
            with self.track_time():
                made = write_shards(
                    {part: self._texts(side, part, rank) for part in parts},
                    dict.fromkeys(parts, 1.0),
                    tokenizer,
                    target,
                    fim_rate=fim_rate, split_rate=split_rate, seed=self.seed,
                    first={part: first.get(f"{side}/{part}", 0) for part in parts},
                )  # fmt: skip
            self.stat_update("total", value=sum(len(source.offsets) for source in made.sources))
            self.stat_update("tokens", value=made.total_tokens)
            self.stat_update("bytes", value=sum(source.text_bytes for source in made.sources))

    def _texts(self, side: str, part: str, rank: int) -> Iterator[str]:
        path = self.texts / side / part / f"{rank:05d}.jsonl.zst"
        with corpus.open_lines(path) as file:
            for number, line in enumerate(file, 1):
                yield corpus.parse_line(line, f"{path}:{number}")["text"]


def open_tokenizer(spec: str) -> Tokenizer:
    """A folder with tokenizer.json, or `official`."""
    return Tokenizer.official() if spec == "official" else Tokenizer.from_file(spec)


def split_counts(path: Path) -> dict[str, int]:
    """{"SIDE/PART": documents} of a task's statistics."""
    return {name: int(count) for name, count in task_steps(path)[Split.name].items() if "/" in name}
