"""Throughput of a corpus build on real text, step by step and by executor; what is planted must go. One JSON line.

    python -m bench.corpus --data web=1:texts/ --data maths=1:gsm8k/train.jsonl --data code=1:python:code --tokenizer tok/
        --against gsm8k/test.jsonl [--rounds 3]

Each round builds the same corpus from nothing with one local worker, with two, and with two on Ray; the sides take turns. Told are
documents/s and MB/s of the input (wall clock, all stages) of each side's best round; of one worker the same by CPU seconds (which
others on the machine hardly change), and the best rate of each step.
The tokenizer has one thread, so that a worker is a core. Planted in the input: a document with a few words changed, an item of the
evaluation sets inside a document, an address and a telephone number; the bench fails if one is left, if a document is not
accounted for, or if any two builds differ in a byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # of the tokenizer, here and in the workers

from bench.common import machine
from dsv3.data.corpus import Source, open_lines, read_documents
from dsv3.data.machines import Machines
from dsv3.data.pipeline import BuildConfig, build
from dsv3.recipes.corpus import parse_sources

SIDES = {
    "one worker": Machines(),
    "two workers": Machines(workers=2),
    "two Ray workers": Machines(executor="ray", workers=2),
}
ADDRESS, PHONE, MARK = "planted.reader@fabrikam-labs.com", "+49 30 901820", "Planted for the bench."


def plant(sources: tuple[Source, ...], against: tuple[Path, ...], folder: Path) -> tuple[Source, list[str]]:
    """(a source of planted documents, made of the input's own and of items of the evaluation sets (.jsonl, .jsonl.gz), items)"""
    long = (
        d.text for source in sources for d in read_documents(source.paths) if len(d.text) > 3000 and d.text.isascii()
    )
    host, other, third = (next(long)[:3000].rpartition(" ")[0] for _ in range(3))
    texts = [
        f"{MARK} First: {host}",
        f"{MARK} Second: {host}",
        f"{third}\n\nWrite to {ADDRESS} or call {PHONE}. {MARK}",
    ]
    items: list[str] = []
    for path in against:
        with open_lines(path) as lines:
            items += [longest(json.loads(line)) for line in islice(lines, 5)]
    texts += [f"{other}\n\n{item}\n\n{third}" for item in items]
    (folder / "planted.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    return Source(name="planted", paths=(str(folder / "planted.jsonl"),)), items


def longest(record: dict[str, Any]) -> str:
    return max((value for value in record.values() if isinstance(value, str)), key=len)


def kept(out: Path) -> Iterator[str]:
    """Every document that was packed."""
    for path in sorted((out / "work" / "text").rglob("*.jsonl.zst")):
        with open_lines(path) as file:
            yield from (json.loads(line)["text"] for line in file)


def check(out: Path, items: list[str], report: dict[str, Any]) -> None:
    marked = 0
    for text in kept(out):
        assert ADDRESS not in text, text
        assert PHONE not in text, text
        assert not any(item in text for item in items), text
        marked += MARK in text
    assert marked == 2, f"{marked} of the three documents with the mark are left, of which two are near-duplicates"
    dropped = sum(sum(row["dropped"].values()) for row in report["steps"])
    assert report["documents"]["read"] == dropped + report["documents"]["packed"]


def summary(
    found: dict[str, Any], seconds: dict[str, list[float]], cpu: list[float], steps: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The JSON line. found: any report (they are alike); seconds, cpu: of each round; steps: their rows of one worker."""
    rates = ("documents_per_second", "mb_per_second", "tokens_per_second")
    read = steps["read"][0]
    size = read["mb_per_second"] * read["seconds"]
    return {
        "bench": "corpus",
        "documents": found["documents"],
        "input_mb": round(size, 2),
        "dropped": {row["step"]: sum(row["dropped"].values()) for row in found["steps"] if row["dropped"]},
        "replaced": found["replaced"],
        "tokens": {side: made["tokens"] for side, made in found["shards"].items()},
        "seconds": {side: [round(value, 1) for value in values] for side, values in seconds.items()},
        "best": {
            side: {"documents/s": round(found["documents"]["read"] / min(values)), "MB/s": round(size / min(values), 3)}
            for side, values in seconds.items()
        },
        "cpu_seconds": [round(value, 1) for value in cpu],
        "a_core": {
            "documents/s": round(found["documents"]["read"] / min(cpu)),
            "MB/s": round(size / min(cpu), 3),
            "tokens/s": round(sum(made["tokens"] for made in found["shards"].values()) / min(cpu)),
        },
        "speedup": {side: round(min(seconds["one worker"]) / min(values), 2) for side, values in seconds.items()},
        "steps": {
            step: {rate: round(max(row[rate] for row in rows), 3) for rate in rates if rows[0].get(rate)}
            for step, rows in steps.items()
        },
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--against", type=Path, action="append", default=[])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task-mb", type=float, default=2.0)
    options = parser.parse_args()
    against = tuple(options.against)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    cpu: list[float] = []
    steps: dict[str, list[dict[str, Any]]] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = parse_sources(options.data)
        planted, items = plant(sources, against, folder)
        config = BuildConfig(
            sources=(*sources, planted), tokenizer=options.tokenizer, against=against, task_mb=options.task_mb
        )
        for round_ in range(options.rounds):
            for side, machines in SIDES.items():
                start, used = time.perf_counter(), time.process_time()
                report = build(config, folder / "out", machines)
                seconds[side].append(time.perf_counter() - start)
                if side == "one worker":  # which is this process
                    cpu.append(time.process_time() - used)
                assert report is not None
                check(folder / "out", items, report)
                assert report["shards"] == found.get("shards", report["shards"]), f"{side} gave other shards"
                found = report
                for row in report["steps"] if side == "one worker" else ():
                    steps.setdefault(row["step"], []).append(row)
                shutil.rmtree(folder / "out")
                print(f"round {round_ + 1}: {side} {seconds[side][-1]:.1f} s", file=sys.stderr)
    print(json.dumps(summary(found, seconds, cpu, steps)))


if __name__ == "__main__":
    main()
