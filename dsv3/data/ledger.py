"""What became of every document: the report of a corpus build, from the statistics and the dropped documents that its tasks wrote.

    read = dropped by each step, by reason + packed        (asserted: nothing is lost silently)

    report.json     documents {read, packed}, steps [{step, documents_in, dropped {reason: n}, seconds, documents_per_second,
                    mb_per_second[, tokens_per_second]}], examples {step: {reason: [{where, text, why}]}}, replaced {kind: n},
                    files_left_out {reason: n}, parts {side: {part: documents}}, shards {side: fingerprint, tokens, ...}

Seconds are those of all tasks together, so the rates are those of one core (where each task had one). A step's seconds are its own,
without those before it in the same task; "sign" holds what datatrove's generators cost between the steps too.
Does not: need datatrove: it reads what is on the disk.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3.data.corpus import open_lines, parse_line

EXAMPLES = 3
"""Examples a reason."""
_TOLD = 160
"""Characters of an example."""
# (stage, the step's name in datatrove's statistics, ours): in the order in which a document meets them.
STEPS = (
    ("clean", "read", "read"),
    ("clean", "recall", "recall"),
    ("clean", "language", "language"),
    ("clean", "quality", "quality"),
    ("clean", "decontaminate", "decontaminate"),
    ("clean", "scrub", "scrub"),
    ("clean", "🐿 Jsonl", "write"),
    ("clean", "🎯 MinHash stage 1", "sign"),
    ("split", "🎯 MinHash stage 4", "near-duplicates"),
    ("pack", "pack", "pack"),
)


def make_report(work: Path) -> dict[str, Any]:
    """See above, without the shards. `work`: the build's folder of that name, with logs/STAGE/stats and dropped/STEP."""
    stages = {stage: _stage(work / "logs" / stage / "stats") for stage, _, _ in STEPS}
    clean = stages["clean"]
    kept_bytes = clean["scrub"]["bytes_out"]
    rows, dropped_in_all = [], 0
    for stage, name, label in STEPS:
        stats = stages[stage].get(name)
        if stats is None:  # a step that this build does not have
            continue
        seconds = stats["seconds"] - (_before(clean, name) if label == "sign" else 0)
        size = stats["bytes"] or kept_bytes
        dropped = {key.removeprefix("dropped_"): int(n) for key, n in stats.items() if key.startswith("dropped_")}
        if label == "near-duplicates" and stats["dropped"]:
            dropped = {"near-duplicate": int(stats["dropped"])}
        dropped_in_all += sum(dropped.values())
        rows.append(
            {
                "step": label,
                "documents_in": int(stats["total"]),
                "dropped": dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0]))),
                "seconds": seconds,
                "documents_per_second": stats["total"] / seconds if seconds > 0 else None,
                "mb_per_second": size / seconds / 1e6 if seconds > 0 else None,
                **({"tokens_per_second": stats["tokens"] / seconds} if stats["tokens"] and seconds > 0 else {}),
            }
        )
    read, packed = int(clean["read"]["total"]), int(stages["pack"]["pack"]["total"])
    assert read == dropped_in_all + packed, f"{read} documents read, {dropped_in_all} dropped, {packed} packed"
    scrubbed = {k.removeprefix("replaced_"): int(n) for k, n in clean["scrub"].items() if k.startswith("replaced_")}
    return {
        "documents": {"read": read, "packed": packed},
        "steps": rows,
        "examples": {
            label: examples(work / "dropped" / label) for _, _, label in STEPS if (work / "dropped" / label).exists()
        },
        "replaced": scrubbed,
        "files_left_out": json.loads((work / "plan.json").read_text(encoding="utf-8"))["left_out"],
        "parts": _parts(stages["split"].get("split", Counter())),
    }


def table(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text: step, documents in, dropped, why, documents/s, MB/s, tokens/s."""
    rows: list[tuple[str, ...]] = []
    for step in report["steps"]:
        why = ", ".join(f"{n:,} {reason}" for reason, n in list(step["dropped"].items())[:4])
        more = len(step["dropped"]) - 4
        rates = (step["documents_per_second"], step["mb_per_second"], step.get("tokens_per_second"))
        rows.append((
            str(step["step"]), f"{step['documents_in']:,}", f"{sum(step['dropped'].values()):,}",
            why + (f" and {more} more reasons" if more > 0 else ""),
            *("" if rate is None else f"{rate:,.0f}" if rate >= 20 else f"{rate:.1f}" for rate in rates),
        ))  # fmt: skip
    return rows


def examples(folder: Path) -> dict[str, list[dict[str, str]]]:
    """reason -> the first EXAMPLES documents that were dropped for it, in the order of the input."""
    found: dict[str, list[dict[str, str]]] = {}
    for document in dropped(folder):
        meta = document.get("metadata", {})
        listed = found.setdefault(str(meta.get("filter_reason", "near-duplicate")), [])
        if len(listed) < EXAMPLES:
            cluster = meta.get("minhash_cluster_id")
            why = meta.get("told") or meta.get("touches") or (f"cluster {cluster}" if cluster is not None else "")
            listed.append({"where": document["id"], "text": document["text"][:_TOLD], "why": why})
    return found


def dropped(folder: Path) -> Iterator[dict[str, Any]]:
    """Every document that a step dropped: {text, id, metadata}."""
    for path in sorted(folder.glob("*.jsonl.zst")):
        with open_lines(path) as file:
            yield from (parse_line(line, f"{path}:{number}") for number, line in enumerate(file, 1))


def total(value: Any) -> float:
    """A statistic's total: datatrove writes a number, or an object where it has more to say."""
    return value["total"] if isinstance(value, dict) else value


def task_steps(path: Path) -> dict[str, Counter[str]]:
    """Step -> its statistics and `seconds`, of one task."""
    return {
        step["name"].partition(": ")[2]: Counter(
            {name: total(value) for name, value in step["stats"].items()} | {"seconds": total(step["time_stats"])}
        )
        for step in json.loads(path.read_text(encoding="utf-8"))
    }


def _stage(folder: Path) -> dict[str, Counter[str]]:
    """The sums over all tasks, of whichever run each was: datatrove's own stats.json holds those of the last run alone."""
    sums: dict[str, Counter[str]] = {}
    for path in sorted(folder.glob("*.json")):
        for name, stats in task_steps(path).items():
            sums.setdefault(name, Counter()).update(stats)
    return sums


def _before(steps: Mapping[str, Counter[str]], name: str) -> float:
    seconds = 0.0
    for other, stats in steps.items():
        if other == name:
            break
        seconds += stats["seconds"]
    return seconds


def _parts(split: Mapping[str, float]) -> dict[str, dict[str, int]]:
    parts: dict[str, dict[str, int]] = {}
    for name, count in sorted(split.items()):
        side, slash, part = name.partition("/")
        if slash:
            parts.setdefault(side, {})[part] = int(count)
    return parts
