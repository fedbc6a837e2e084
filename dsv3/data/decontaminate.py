"""Which texts share a run of words with an evaluation set: what may be neither pre-trained on nor distilled.

    item of `ngram` words or more    every run of `ngram` consecutive words of it contaminates
    shorter, of six words or more    contaminates as a whole

A run is a polynomial over 64-bit word hashes, modulo 2^64, computed for all places of a text at once. The hash is BLAKE2's,
not Python's own: the same in every process. Two different runs have one value with probability 2^-64.
Source: n-gram overlap as in GPT-3 (appendix C, 13 words). Does not: see paraphrases or translations.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.data.corpus import LINES, open_lines, parquet_rows, parse_line
from dsv3.data.language import words

_LEAST_WORDS = 6
_SUFFIXES = (*LINES, ".json", ".json.gz", ".parquet", ".csv", ".txt")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_KNOWN_WORDS = 1 << 20
"""Hashes remembered; more are forgotten at once, so that memory is bounded on any corpus."""


class Decontaminator:
    """Runs of `ngram` words of evaluation items. `texts`: how many items it holds.

    Args:
        paths: benchmark files (jsonl, json, parquet, csv, txt, .gz), or folders of them; every text in a record counts.

    Raises:
        ValueError: a path is missing or cannot be read, or ngram is below 4.
    """

    def __init__(self, paths: Iterable[Path] = (), *, ngram: int = 13) -> None:
        if ngram < 4:
            raise ValueError(f"ngram is {ngram}: below 4 words everything is contaminated")
        self.ngram, self.texts = ngram, 0
        self._runs: dict[int, dict[int, str]] = {ngram: {}}  # by length; the lengths below ngram are whole items'
        self._hashes: dict[str, int] = {}
        for path in paths:
            for where, text in _texts(Path(path)):
                self.add(text, where)

    def add(self, text: str, where: str) -> None:
        """Take an evaluation item in. One of fewer than six words is left out: it would contaminate by chance."""
        found = self._hashed(text)
        length = min(len(found), self.ngram)
        if length < _LEAST_WORDS and length < self.ngram:
            return
        self.texts += 1
        known = self._runs.setdefault(length, {})
        for run in _runs(found, length):
            known.setdefault(run, where)

    def touches(self, text: str) -> str | None:
        """Where the evaluation item stands that the text shares a run with."""
        found = self._hashed(text)
        for length, known in self._runs.items():
            for run in _runs(found, length):
                if run in known:
                    return known[run]
        return None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every run it holds."""
        held = [self.ngram, *((length, sorted(runs)) for length, runs in sorted(self._runs.items()))]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()

    def _hashed(self, text: str) -> np.ndarray:
        """(words,) uint64."""
        known = self._hashes
        if len(known) > _KNOWN_WORDS:
            known.clear()
        found = words(text)
        for word in set(found) - known.keys():
            known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter(map(known.__getitem__, found), dtype=np.uint64, count=len(found))


def _runs(found: np.ndarray, length: int) -> list[int]:
    """Values of the runs of `length` words, in order."""
    places = len(found) - length + 1
    if places <= 0:
        return []
    value = np.zeros(places, dtype=np.uint64)
    for at in range(length):
        value = value * _BASE + found[at : at + places]
    return value.tolist()


# -- evaluation sets ---------------------------------------------------------------------------------------------------


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """("FILE record N", text) of every string in every record."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES))
        if not files:
            raise ValueError(f"{path} holds no {', '.join(_SUFFIXES)}: give the evaluation sets' own files")
        for file in files:
            yield from _texts(file)
        return
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the evaluation sets' own files, or folders of them")
    if path.suffix == ".txt":
        yield str(path), path.read_text(encoding="utf-8")
        return
    for number, record in enumerate(_records(path), 1):
        for text in _strings(record):
            yield f"{path.name} record {number}", text


def _records(path: Path) -> Iterator[Any]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.reader(file)
    elif path.suffix == ".parquet":
        yield from (row for _, row in parquet_rows(path, whole=True))
    elif path.name.endswith((".json", ".json.gz")):
        try:
            with open_lines(path) as file:
                whole = json.loads(b"".join(file))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}): give the evaluation set's own file") from None
        yield from whole if isinstance(whole, list) else [whole]
    elif path.name.endswith(LINES):
        with open_lines(path) as file:
            yield from (parse_line(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip())
    else:
        raise ValueError(f"{path} ends in {path.suffix or 'no suffix'}: an evaluation set is {', '.join(_SUFFIXES)}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
