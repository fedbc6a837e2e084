"""Benchmark files as they are published, read into dictionaries: jsonl, json, csv, parquet, each also as .gz where that is done.

    GSM8K       test.jsonl: {question, answer "... #### n"}
    MATH        a folder of test/SUBJECT/N.json, or jsonl: {problem, solution[, answer, level, type or subject]}
    MMLU        a folder of test/SUBJECT_test.csv (question, A, B, C, D, letter; no header), or jsonl / parquet with
                {question, choices, answer 0-3 or letter[, subject]}
    HumanEval   HumanEval.jsonl.gz: {task_id, prompt, entry_point, canonical_solution, test}
    text        .txt, or jsonl {text}
    hub:NAME[@CONFIG]:SPLIT    any of them from the Hugging Face hub, by `datasets`: hub:openai/gsm8k@main:test

Files are read as they lie; only "hub:" downloads. A broken line is named, with its number and what is wrong.
Does not: build prompts (dsv3.evals.tasks).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LETTERS = "ABCD"


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a jsonl, json or parquet file.

    Raises:
        ValueError: the file is missing, of another kind or empty, or a line is no object; the line is named.
    """
    if (named := _hub(path)) is not None:
        return named
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: give the benchmark's own file, or hub:NAME:SPLIT")
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        records = parquet.read_table(path).to_pylist()
    else:
        records = list(_json_records(path))
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def _hub(path: str | Path) -> list[dict[str, Any]] | None:
    """Records of hub:NAME[@CONFIG]:SPLIT, None if the path is no such name."""
    if not str(path).startswith("hub:"):
        return None
    match = re.fullmatch(r"hub:([^@:]+)(?:@([^:]+))?:([\w\[\]:%-]+)", str(path))
    if match is None:
        raise ValueError(
            f"{path} is no hub data set: write hub:NAME:SPLIT or hub:NAME@CONFIG:SPLIT, as hub:openai/gsm8k@main:test"
        )
    import datasets

    records = [dict(row) for row in datasets.load_dataset(match[1], match[2], split=match[3])]
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def beside(path: str | Path, split: str) -> list[str | Path]:
    """Where another split of the same set usually lies: folder, file of that name, or the hub's."""
    if str(path).startswith("hub:"):
        return [str(path).rpartition(":")[0] + f":{split}"]
    path = Path(path)
    named = path.with_name(re.sub("test", split, path.name))
    places = [path.parent / split, *(path.with_name(split + s) for s in (".jsonl", ".parquet")), named]
    return list(dict.fromkeys(p for p in places if p != path))


def exists(path: str | Path) -> bool:
    return str(path).startswith("hub:") or Path(path).exists()


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    kind = "".join(path.suffixes[-2:]).removesuffix(".gz")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    if kind.endswith(".json"):
        whole = json.loads(text)
        yield from whole if isinstance(whole, list) else [whole]
        return
    if not kind.endswith(".jsonl"):
        raise ValueError(f"{path} ends in {kind or 'nothing'}: give a .jsonl, .json or .parquet file")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} holds a {type(record).__name__}, not an object")
        yield record


def need(record: dict[str, Any], names: Iterable[str], path: str | Path, number: int) -> None:
    """Check a record's fields.

    Raises:
        ValueError: one is missing; record (counted from 1) and field are named.
    """
    for name in names:
        if record.get(name) is None:
            raise ValueError(
                f"{path} record {number} has no {name!r}; it has {', '.join(map(repr, record)) or 'nothing'}"
            )


def read_gsm8k(path: str | Path) -> list[dict[str, Any]]:
    records = read_records(path)
    for number, record in enumerate(records, 1):
        need(record, ("question", "answer"), path, number)
        if "####" not in record["answer"]:
            raise ValueError(f"{path} record {number}: its answer has no '#### n': {record['answer'][-60:]!r}")
    return records


def read_math(path: str | Path) -> list[dict[str, Any]]:
    """problem, solution, answer, subject of each."""
    from dsv3.evals.conventions import math_gold

    folder = Path(path).is_dir()
    files = sorted(Path(path).rglob("*.json")) if folder else [path]
    if not files:
        raise ValueError(f"{path} holds no .json file: give MATH's test folder, or a jsonl file")
    found = []
    for file in files:
        for number, record in enumerate(read_records(file), 1):
            need(record, ("problem", "solution"), file, number)
            subject = record.get("type") or record.get("subject") or (Path(file).parent.name if folder else "")
            answer = record.get("answer") or math_gold(record["solution"])
            name = record.get("unique_id") or (str(Path(file).relative_to(path)) if folder else f"math/{number}")
            found.append({**record, "answer": answer, "subject": subject, "id": name})
    return found


def read_mmlu(path: str | Path) -> list[dict[str, Any]]:
    """question, choices (four), answer (a letter), subject of each."""
    here = Path(path)
    files = sorted(here.glob("*.csv")) or sorted(here.rglob("*.parquet")) if here.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no .csv or .parquet file: give MMLU's test folder, or a file")
    found = []
    for file in files:
        subject = Path(file).stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val")
        rows = _csv_rows(Path(file)) if str(file).endswith(".csv") else read_records(file)
        for number, record in enumerate(rows, 1):
            need(record, ("question", "choices", "answer"), file, number)
            answer, choices = record["answer"], [str(c) for c in record["choices"]]
            letter = LETTERS[answer] if isinstance(answer, int) and 0 <= answer < 4 else str(answer).strip().upper()
            if len(choices) != 4 or letter not in LETTERS or len(letter) != 1:
                raise ValueError(
                    f"{file} record {number}: {len(choices)} choices and answer {answer!r}, not four and one of A-D"
                )
            about = record.get("subject") or subject
            found.append({"question": record["question"], "choices": choices, "answer": letter, "subject": about})
    return found


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        if row == ["question", "A", "B", "C", "D", "answer"]:
            continue
        if len(row) != 6:
            raise ValueError(f"{path} row {number} has {len(row)} fields, not 6 (question, A, B, C, D, letter)")
        yield {"question": row[0], "choices": row[1:5], "answer": row[5]}


def read_humaneval(path: str | Path) -> list[dict[str, Any]]:
    records = read_records(path)
    for number, record in enumerate(records, 1):
        need(record, ("task_id", "prompt", "entry_point", "test"), path, number)
    return records


def read_texts(path: str | Path) -> list[str]:
    """Documents: a .txt file is one, a jsonl file one a line."""
    if str(path).endswith(".txt"):
        if not Path(path).is_file():
            raise ValueError(f"{path} is no file")
        texts = [Path(path).read_text(encoding="utf-8")]
    else:
        texts = []
        for number, record in enumerate(read_records(path), 1):
            need(record, ("text",), path, number)
            texts.append(record["text"])
    if not any(texts):
        raise ValueError(f"{path} holds no text")
    return [text for text in texts if text]
