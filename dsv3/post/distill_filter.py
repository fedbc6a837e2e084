"""What is kept of a teacher's answers: reasons to reject one, and the evaluation sets that none may touch.

    failed        the teacher refused, or gave no answer in the end        cut          stopped at max_tokens
    too long      more characters than allowed                             wrong        by dsv3.post.rewards: maths, code, text
    ungradable    gold cannot be read, or the grader failed                mixed        languages: below 90% of the words are in
                                                                                        the script of the problem's language
    repetitive    of its runs of 8 words under half are distinct, or it ends in one line or phrase over and over
    contaminated  shares a run of `ngram` words with an evaluation item    duplicate    of an answer kept before

Words are letters and digits, lower case; scripts without spaces count a character as a word. Items shorter than a run
(but of six words or more) contaminate as a whole.
Source: V3 report section 5.1 and R1 section 2.3.3 (rejection sampling; mixed languages, long and chaotic answers are filtered out).
Does not: ask (distill_teacher.py), or weigh one right answer against another.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsv3.evals.items import read_records
from dsv3.post.rewards import LANGUAGES, language_share

LEAST_OWN = 0.9
_RUN, _LEAST_DISTINCT = 8, 0.5
_LEAST_WORDS = 6
_LONGEST_PHRASE = 200  # characters
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W_\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+")
_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".csv", ".txt")
_FIRST = ("en", "zh", "ja", "ru", "ko", "ar", "el", "he", "hi", "th")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def language_of(text: str) -> str | None:
    """The language whose script most of the words are in: "en" stands for all that are written in Latin; None for none."""
    assert set(_FIRST) <= set(LANGUAGES)
    shares = [(language_share(text, language), -place) for place, language in enumerate(_FIRST)]
    share, place = max(shares)
    return _FIRST[-place] if share > 0.5 else None


def mixes_languages(text: str, language: str | None) -> bool:
    """Whether too few words are in the language's script. A text of formulas alone mixes nothing."""
    if language is None or (language_of(text) is None and not any(language_share(text, one) for one in _FIRST)):
        return False
    return language_share(text, language) < LEAST_OWN


def is_repetitive(text: str) -> bool:
    """Whether it goes in circles."""
    found = words(text)
    if len(found) >= 5 * _RUN:
        runs = [tuple(found[i : i + _RUN]) for i in range(len(found) - _RUN + 1)]
        if len(set(runs)) < _LEAST_DISTINCT * len(runs):
            return True
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) >= 5 and len(lines[-1]) > 3 and len(set(lines[-5:])) == 1:
        return True
    tail = text.rstrip()[-8 * _LONGEST_PHRASE :]
    return any(tail.endswith(tail[-size:] * 8) for size in range(4, _LONGEST_PHRASE + 1) if len(tail) >= 8 * size)


class Decontaminator:
    """Runs of `ngram` words of evaluation items.

    Args:
        paths: benchmark files (jsonl, json, parquet, csv, txt, .gz), or folders of them; every text in a record counts.

    Raises:
        ValueError: a path is missing or cannot be read, or ngram is below 4.
    """

    def __init__(self, paths: Iterable[Path] = (), *, ngram: int = 13) -> None:
        if ngram < 4:
            raise ValueError(f"ngram is {ngram}: below 4 words everything is contaminated")
        self.ngram, self.texts = ngram, 0
        self._runs: dict[int, str] = {}
        self._whole: dict[tuple[str, ...], str] = {}
        for path in paths:
            for where, text in _texts(Path(path)):
                self.add(text, where)

    def add(self, text: str, where: str) -> None:
        found = words(text)
        if len(found) >= self.ngram:
            self.texts += 1
            for run in self._runs_of(found):
                self._runs.setdefault(run, where)
        elif len(found) >= _LEAST_WORDS:
            self.texts += 1
            self._whole.setdefault(tuple(found), where)

    def touches(self, text: str) -> str | None:
        """Where the evaluation item stands that the text shares a run with."""
        found = words(text)
        for run in self._runs_of(found):
            if run in self._runs:
                return self._runs[run]
        if not self._whole:
            return None
        for length in {len(item) for item in self._whole}:
            for at in range(len(found) - length + 1):
                if (item := tuple(found[at : at + length])) in self._whole:
                    return self._whole[item]
        return None

    def _runs_of(self, found: list[str]) -> Iterator[int]:
        for at in range(len(found) - self.ngram + 1):
            yield hash(tuple(found[at : at + self.ngram]))


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
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            records: list[Any] = list(csv.reader(file))
    else:
        records = list(read_records(path))
    for number, record in enumerate(records, 1):
        for text in _strings(record):
            yield f"{path.name} record {number}", text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
