"""Runs tasks over a model, keeps every answer, and says how sure the scores are.

    OUT/TASK.jsonl     a head (settings, model, sampling), then a row an item: prompt and its hash, every sample whole, every grade
    OUT/results.json   a task each: score, standard error, every convention and their spread, pass@k, what went wrong

A row is written when its item is finished, so a run that was killed goes on where it stood: no finished item is asked again.
A folder of other settings, another model or other prompts is refused. An item without an answer (too long, an engine's or a
server's error), or whose grader failed, counts as wrong, is counted, and is asked again by the next call; one whose gold cannot
be read is left out and counted.
Two folders are compared item by item (`compare`). Does not: print; that is the command's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from dsv3.evals.conventions import choose
from dsv3.evals.grade import UnreadableGold
from dsv3.evals.models import Answer, Failure, Model, Reply, Sampling, Scored
from dsv3.evals.sandbox import IsolationError
from dsv3.evals.stats import Comparison, compare_paired, pass_at_k, stderr
from dsv3.evals.symbolic import JudgeError
from dsv3.evals.tasks import Item, Task, Tools

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]  # task, items done, items in all


def run(
    model: Model,
    tasks: Sequence[Task],
    out: str | Path,
    *,
    sampling: Sampling = Sampling(),
    tools: Tools | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run each task, or what is left of it; the content of OUT/results.json.

    Raises:
        ValueError: OUT holds another run (other settings, model, sampling or prompts), or a damaged log.
        SandboxError: a task runs code and there is no isolation (`Tools(isolation=...)`).
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    own = tools or Tools()
    told: dict[str, Any] = {"model": model.name, "sampling": asdict(sampling), "tasks": {}}
    try:
        for task in tasks:
            rows = _run_task(model, task, out / f"{task.name}.jsonl", sampling, own, progress)
            told["tasks"][task.name] = summary(task, rows, sampling)
            _write(out / "results.json", json.dumps(told, indent=1, ensure_ascii=False))
    finally:
        if tools is None:
            own.close()
    return told


def _run_task(
    model: Model, task: Task, path: Path, sampling: Sampling, tools: Tools, progress: Progress | None
) -> list[Row]:
    ids = [item.id for item in task.items]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{task.name} has {len(ids) - len(set(ids))} item ids twice: each must be its own")
    head = {"task": task.name, "model": model.name, "sampling": asdict(sampling), "settings": dict(task.settings)}
    rows = {row["id"]: row for row in _resume(path, head, task)}
    left = [item for item in task.items if item.id not in rows]
    with path.open("a", encoding="utf-8") as log:
        if log.tell() == 0:
            log.write(json.dumps(head, ensure_ascii=False) + "\n")
        for item, reply in model.ask(left, sampling) if left else ():
            row = judged(task, item, reply, tools)
            log.write(json.dumps(row, ensure_ascii=False) + "\n")
            log.flush()
            rows[item.id] = row
            if progress is not None:
                progress(task.name, len(rows), len(task.items))
    return [rows[item.id] for item in task.items]


def _resume(path: Path, head: Mapping[str, Any], task: Task) -> list[Row]:
    """Rows of an earlier run of the same; a last line that was cut is cut off, and rows of what failed are taken out."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    found = read_log(path) if whole else (dict(head), [])
    for name, value in head.items():
        if found[0].get(name) != value:
            raise ValueError(
                f"{path} is of another run: its {name} is {json.dumps(found[0].get(name), ensure_ascii=False)}, this one's "
                f"{json.dumps(value, ensure_ascii=False)}; give another folder, or remove it"
            )
    hashes = {item.id: item.prompt_hash for item in task.items}
    for row in found[1]:
        if hashes.get(row["id"]) != row["prompt_sha256"]:
            raise ValueError(
                f"{path}: the prompt of {row['id']} is not the one asked before: give another folder, or remove it"
            )
    rows = [row for row in found[1] if "error" not in row]
    if len(rows) < len(found[1]):
        _write(path, "\n".join(json.dumps(record, ensure_ascii=False) for record in (found[0], *rows)))
    return rows


def read_log(path: str | Path) -> tuple[dict[str, Any], list[Row]]:
    """Head and rows of a task's log.

    Raises:
        ValueError: a line is no JSON (its number is named), or there is no head.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} line {number} is damaged ({error}): remove it to run its item again"
                ) from None
    if not records or "settings" not in records[0]:
        raise ValueError(f"{path} has no head line: it is no log of dsv3.evals.run")
    return records[0], records[1:]


def judged(task: Task, item: Item, reply: Reply, tools: Tools) -> Row:
    """The log's row of an item."""
    row: Row = {
        "id": item.id, "kind": item.kind, "group": item.group, "prompt_sha256": item.prompt_hash, "chat": item.chat,
        "prompt": item.prompt, "gold": item.gold, **({"about": dict(item.about)} if item.about else {}),
    }  # fmt: skip
    if isinstance(reply, Failure):
        return row | {"error": reply.error}
    if item.kind == "choose":
        scores = [r.logprob for r in reply if isinstance(r, Scored)]
        right = ord(item.gold) - ord("A")
        grades = {
            "likeliest": choose(scores) == right,
            "likeliest per byte": choose(scores, [len(c.encode()) for c in item.choices]) == right,
        }
        return row | {"choices": list(item.choices), "logprobs": scores, "grades": grades}
    if item.kind == "roll":
        parts = [r for r in reply if isinstance(r, Scored)]
        total = math.fsum(p.logprob for p in parts)
        size = {
            "bytes": len(item.prompt.encode()),
            "words": len(item.prompt.split()),
            "tokens": sum(p.tokens for p in parts),
        }
        return row | {"logprob": total, **size, "bpb": -total / math.log(2) / size["bytes"]}
    samples = []
    for answer in reply:
        assert isinstance(answer, Answer)
        try:
            grades = task.grade(item, answer.text, tools)
        except UnreadableGold as error:
            return row | {"unreadable": str(error)}
        except (IsolationError, JudgeError):  # nothing can be graded here
            raise
        except Exception as error:  # a grader's fault, or a keeper's that died: this item's loss, not the run's
            fault = f"the grader failed ({type(error).__name__}: {error})"
            return row | {"error": fault, "ungraded": [asdict(a) for a in reply if isinstance(a, Answer)]}
        samples.append({**asdict(answer), "grades": grades})
    return row | {"samples": samples}


# -- scores --------------------------------------------------------------------------------------------------------------


def item_scores(rows: Sequence[Row], convention: str) -> dict[str, float]:
    """Of each item that counts: the mean of its samples under a convention; 0 for one without an answer."""
    scores = {}
    for row in rows:
        if "unreadable" in row:
            continue
        if "error" in row:
            scores[row["id"]] = math.nan if row["kind"] == "roll" else 0.0
        elif row["kind"] == "roll":
            scores[row["id"]] = row["bpb"]
        else:
            grades = [s["grades"] for s in row["samples"]] if "samples" in row else [row["grades"]]
            scores[row["id"]] = fmean(float(g[convention]) for g in grades)
    return scores


def summary(task: Task, rows: Sequence[Row], sampling: Sampling) -> dict[str, Any]:
    """One task's entry in results.json."""
    prompts = hashlib.sha256("\n".join(f"{row['id']} {row['prompt_sha256']}" for row in rows).encode()).hexdigest()
    told: dict[str, Any] = {
        "items": len(rows),
        "unreadable": sum("unreadable" in row for row in rows),
        "errors": sum("error" in row for row in rows),
        "prompts_sha256": prompts,
        "first_prompt": rows[0]["prompt"] if rows else "",
        "settings": dict(task.settings),
        "reported": task.reported,
    }
    errors = [row["error"] for row in rows if "error" in row]
    told |= {"first_error": errors[0]} if errors else {}
    if any(row["kind"] == "roll" for row in rows):
        return told | _bits(rows)
    counted = [row for row in rows if "unreadable" not in row]
    names = next((list((row.get("samples") or [row])[0]["grades"]) for row in counted if "error" not in row), [])
    groups = [row["group"] for row in counted] if task.clustered else None
    by_name = {}
    for name in names:
        values = list(item_scores(counted, name).values())
        by_name[name] = {"mean": fmean(values), "stderr": stderr(values, groups)}
    means = [entry["mean"] for entry in by_name.values()]
    told["conventions"] = by_name
    told["spread"] = max(means) - min(means) if means else math.nan
    told |= (
        {"score": by_name[task.reported]["mean"], "stderr": by_name[task.reported]["stderr"]}
        if names
        else {"score": 0.0}
    )
    sampled = [row for row in counted if "samples" in row]
    if sampled:
        answers = [s for row in sampled for s in row["samples"]]
        told["cut_short"] = fmean(a["finish_reason"] == "length" for a in answers)
        told["pass@k"] = {str(k): _pass(counted, task.reported, sampling.samples, k) for k in _powers(sampling.samples)}
    by_group: dict[str, list[float]] = {}
    for row, value in zip(counted, item_scores(counted, task.reported).values() if names else ()):
        by_group.setdefault(row["group"], []).append(value)
    if len(by_group) > 1:
        told["groups"] = {
            name: {"mean": fmean(values), "items": len(values)} for name, values in sorted(by_group.items())
        }
    return told


def _pass(rows: Sequence[Row], convention: str, samples: int, k: int) -> float:
    right = [sum(s["grades"][convention] for s in row.get("samples", ())) for row in rows]
    return fmean(pass_at_k(samples, c, k) for c in right)


def _powers(samples: int) -> list[int]:
    return sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < samples} | {samples})


def _bits(rows: Sequence[Row]) -> dict[str, Any]:
    """Over all bytes, not over documents; the error is of the ratio, documents drawn."""
    known = [row for row in rows if "logprob" in row]
    if not known:
        return {"score": math.nan, "stderr": math.nan}
    size, words = sum(r["bytes"] for r in known), sum(r["words"] for r in known)
    nats = -math.fsum(r["logprob"] for r in known)
    score = nats / math.log(2) / size
    residuals = [(r["bpb"] - score) * r["bytes"] for r in known]
    error = stderr(residuals) * len(known) / size
    return {
        "score": score, "stderr": error, "bytes": size, "tokens": sum(r["tokens"] for r in known),
        "word_perplexity": math.exp(min(nats / words, 700)) if words else math.nan,
    }  # fmt: skip


def table(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows for the console: every value a string, a column each."""
    made = []
    for name, told in results["tasks"].items():
        percent = name != "bpb"
        scale, form = (100, "{:.1f}") if percent else (1, "{:.4f}")

        def show(value: float, scale: int = scale, form: str = form) -> str:
            return "-" if math.isnan(value) else form.format(value * scale)

        others = [f"{k} {show(v['mean'])}" for k, v in told.get("conventions", {}).items() if k != told["reported"]]
        wrong = [f"{told[k]} {k}" for k in ("errors", "unreadable") if told[k]]
        wrong += [f"{told['cut_short']:.0%} cut short"] if told.get("cut_short") else []
        passes = [f"{k}: {show(v)}" for k, v in told.get("pass@k", {}).items() if k != "1"]
        made.append({
            "task": name, "settings": _setting(told["settings"]), "items": str(told["items"]), "score": show(told["score"]),
            "±": show(told.get("stderr", math.nan)), "by": told["reported"], "pass@k": ", ".join(passes),
            "other conventions": ", ".join(others), "spread": show(told.get("spread", math.nan)), "remarks": ", ".join(wrong),
            "prompts": told["prompts_sha256"][:12],
        })  # fmt: skip
    return made


def _setting(settings: Mapping[str, Any]) -> str:
    shots = f"{settings['shots']}-shot" if "shots" in settings else ""
    return " ".join(filter(None, ("chat" if settings.get("chat") else "", shots)))


def compare(a: str | Path, b: str | Path) -> dict[str, Comparison]:
    """Two runs' folders, task by task where both have it: item by item, under each task's reported convention.

    Raises:
        ValueError: no task in common; the items or their prompts differ.
    """
    results = [json.loads((Path(folder) / "results.json").read_text(encoding="utf-8")) for folder in (a, b)]
    names = [name for name in results[0]["tasks"] if name in results[1]["tasks"]]
    if not names:
        raise ValueError(f"{a} has {list(results[0]['tasks'])}, {b} has {list(results[1]['tasks'])}: no task in common")
    told = {}
    for name in names:
        logs = [read_log(Path(folder) / f"{name}.jsonl")[1] for folder in (a, b)]
        prompts = [{row["id"]: row["prompt_sha256"] for row in rows} for rows in logs]
        changed = [i for i in prompts[0] if prompts[1].get(i, prompts[0][i]) != prompts[0][i]]
        if changed:
            raise ValueError(
                f"{name}: the prompts of {len(changed)} items differ ({changed[0]} first): compare runs of the same prompts"
            )
        convention = results[0]["tasks"][name]["reported"]
        scores = [item_scores(rows, convention) for rows in logs]
        kept = [i for i in scores[0] if not math.isnan(scores[0][i] + scores[1].get(i, 0.0))]
        told[name] = compare_paired(
            {i: scores[0][i] for i in kept}, {i: s for i, s in scores[1].items() if not math.isnan(s)}
        )
    return told


def _write(path: Path, content: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(content + "\n", encoding="utf-8")
    os.replace(part, path)
