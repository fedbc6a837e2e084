"""The benchmarks as items to ask and ways to grade, with the settings of the V3 report as defaults.

    task        base model                              chat model                      report, base (table 3)
    mmlu        5 shots, likeliest of four letters      zero-shot, "Answer: $LETTER"    87.1
    gsm8k       8 shots, generated                      zero-shot, boxed                89.3
    math        4 shots, generated                      zero-shot, boxed, greedy        61.6 (MATH-500, chat: 90.2)
    humaneval   the prompt continued                    "implement the function"        65.2
    needle      a sentence hidden in a long text        the same                        figure 8
    bpb         bits a byte of plain text               -                               0.548 (Pile)

Multiple choice is perplexity-based, the rest generated (report section 4.4). Shots are the first of the set that the benchmark
has for them, in its own order: MMLU's dev of the item's subject, GSM8K's and MATH's train. The report prints no prompts, so
these are the usual ones (lm-eval's for base models, but GSM8K's shots without their <<calculator>> notes; simple-evals' for
chat), and their text stands in every row of the log.
Does not: run anything (dsv3.evals.run).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv3.evals import conventions, items
from dsv3.evals.sandbox import Limits, Sandbox
from dsv3.evals.symbolic import Judge

NAMES = ("mmlu", "gsm8k", "math", "humaneval", "needle", "bpb")
_COT_BOX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to ask.

    Attributes:
        prompt: text to continue; for chat, the user's message.
        kind: "generate", "choose" (which of `choices` is likeliest after the prompt), or "roll" (how likely the prompt itself is).
        gold: the reference; for "choose" the right choice's letter.
        group: what it shares a source with (a subject); errors are clustered by it where `Task.clustered`.
        about: what the grader needs besides.
    """

    id: str
    prompt: str
    kind: str = "generate"
    chat: bool = False
    gold: str = ""
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    max_tokens: int = 512
    group: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_hash(self) -> str:
        """SHA-256 of kind, role, prompt and choices."""
        whole = "\0".join((self.kind, "user" if self.chat else "text", self.prompt, *self.choices))
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


class Tools:
    """What graders share: the maths helper and the sandbox, each started when first needed."""

    def __init__(self, *, isolation: str = "auto", workers: int = 2, seconds: float = 10.0) -> None:
        self._isolation, self._workers, self._seconds = isolation, workers, seconds
        self._judge: Judge | None = None
        self._sandbox: Sandbox | None = None

    @property
    def judge(self) -> Judge:
        self._judge = self._judge or Judge()
        return self._judge

    @property
    def sandbox(self) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = Sandbox(Limits(seconds=self._seconds), isolation=self._isolation, workers=self._workers)
        return self._sandbox

    def close(self) -> None:
        if self._judge is not None:
            self._judge.close()
        if self._sandbox is not None:
            self._sandbox.close()


Grade = Callable[[Item, str, Tools], dict[str, bool]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark ready to run.

    Attributes:
        grade: (item, response, tools) -> right or wrong by each convention; unused for "choose" and "roll".
        reported: the convention whose number is the task's score.
        settings: all that fixes prompts and answers' lengths; stored beside the score, and the same in a resumed run.
    """

    name: str
    items: Sequence[Item]
    grade: Grade
    reported: str
    settings: Mapping[str, Any]
    clustered: bool = False


def open_task(
    name: str,
    path: str | Path,
    *,
    chat: bool = False,
    shots: int | None = None,
    shots_path: str | Path | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
) -> Task:
    """A task over files in the benchmark's own format, or the hub's (dsv3.evals.items). Needles: `dsv3.evals.needle`.

    Args:
        chat: ask as a user, zero-shot; else few-shot text to continue.
        shots: other than the report's. shots_path: where they are from, if not beside `path` (train.jsonl, dev/).
        limit: only the first so many items.
        max_tokens: of an answer.

    Raises:
        ValueError: no such task; a file is missing or broken; too few shots; shots for a chat.
    """
    makers: dict[str, Callable[..., Task]] = {
        "mmlu": _mmlu,
        "gsm8k": _gsm8k,
        "math": _math,
        "humaneval": _humaneval,
        "bpb": _bpb,
    }
    if name not in makers:
        raise ValueError(f"task is {name!r}: give one of {', '.join(makers)}, or needle")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give at least 1")
    if chat and shots:
        raise ValueError(f"shots={shots} with chat: the chat settings are zero-shot; leave one out")
    if chat and name == "bpb":
        raise ValueError("bpb measures plain text: it has no chat form")
    default = 0 if chat else {"mmlu": 5, "gsm8k": 8, "math": 4}.get(name, 0)
    count = default if shots is None else shots
    if count and name in ("humaneval", "bpb"):
        raise ValueError(f"shots={count}: {name} is zero-shot")
    task = makers[name](path, chat, count, shots_path, limit, max_tokens)
    return replace(task, settings={**task.settings, "max_tokens": max_tokens})


def _shots(
    count: int, given: str | Path | None, near: Sequence[str | Path], read: Callable[[str | Path], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Records to take shots from: the given place, or the first of the usual ones that exists."""
    if not count:
        return []
    place = given if given is not None else next((p for p in near if items.exists(p)), None)
    if place is None:
        raise ValueError(
            f"{count} shots need examples, and none of {', '.join(map(str, near))} exists: give shots_path, or shots=0"
        )
    return read(place)


def _take(records: Sequence[dict[str, Any]], count: int, what: str) -> list[dict[str, Any]]:
    if len(records) < count:
        raise ValueError(f"{count} shots wanted of {what}, {len(records)} are there: give fewer")
    return list(records[:count])


def _settings(name: str, path: str | Path, chat: bool, shots: int, limit: int | None, reported: str) -> dict[str, Any]:
    return {
        "task": name,
        "file": str(path) if str(path).startswith("hub:") else Path(path).name,
        "chat": chat,
        "shots": shots,
        "limit": limit,
        "reported": reported,
    }


# -- MMLU ----------------------------------------------------------------------------------------------------------------

_MMLU_CHAT = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
)


def _mmlu(path: str | Path, chat: bool, shots: int, given: Any, limit: int | None, max_tokens: int | None) -> Task:
    records = items.read_mmlu(path)[:limit]
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for record in _shots(shots, given, items.beside(path, "dev"), items.read_mmlu):
        by_subject.setdefault(record["subject"], []).append(record)
    made = []
    for number, record in enumerate(records):
        body = f"{record['question'].strip()}\n" + "\n".join(f"{a}. {c}" for a, c in zip("ABCD", record["choices"]))
        common = {"id": f"mmlu/{number}", "gold": record["answer"], "group": record["subject"]}
        if chat:
            options = "\n".join(f"{a}) {c}" for a, c in zip("ABCD", record["choices"]))
            prompt = f"{_MMLU_CHAT}\n\n{record['question'].strip()}\n\n{options}"
            made.append(Item(prompt=prompt, chat=True, max_tokens=max_tokens or 2048, **common))
            continue
        head = f"The following are multiple choice questions (with answers) about {record['subject'].replace('_', ' ')}.\n\n"
        examples = _take(by_subject.get(record["subject"], []), shots, f"subject {record['subject']!r}")
        for example in examples:
            lines = "\n".join(f"{a}. {c}" for a, c in zip("ABCD", example["choices"]))
            head += f"{example['question'].strip()}\n{lines}\nAnswer: {example['answer']}\n\n"
        choices = tuple(f" {letter}" for letter in "ABCD")
        made.append(Item(prompt=f"{head}{body}\nAnswer:", kind="choose", choices=choices, **common))
    reported = "simple-evals" if chat else "likeliest"

    def grade(item: Item, text: str, tools: Tools) -> dict[str, bool]:
        return conventions.mmlu_grades(item.gold, text)

    settings = _settings("mmlu", path, chat, shots, limit, reported)
    return Task(name="mmlu", items=made, grade=grade, reported=reported, settings=settings, clustered=True)


# -- mathematics ---------------------------------------------------------------------------------------------------------


def _gsm8k(path: str | Path, chat: bool, shots: int, given: Any, limit: int | None, max_tokens: int | None) -> Task:
    records = items.read_gsm8k(path)[:limit]
    examples = _take(_shots(shots, given, items.beside(path, "train"), items.read_gsm8k), shots, "GSM8K's train")
    head = "".join(f"Question: {e['question']}\nAnswer: {_without_calculator(e['answer'])}\n\n" for e in examples)
    made = [
        Item(
            id=f"gsm8k/{number}",
            prompt=record["question"] + _COT_BOX if chat else f"{head}Question: {record['question']}\nAnswer:",
            chat=chat,
            gold=record["answer"],
            stop=() if chat else ("Question:",),
            max_tokens=max_tokens or (2048 if chat else 512),
        )
        for number, record in enumerate(records)
    ]

    def grade(item: Item, text: str, tools: Tools) -> dict[str, bool]:
        return conventions.gsm8k_grades(item.gold, text, tools.judge)

    return Task(
        name="gsm8k",
        items=made,
        grade=grade,
        reported="ours",
        settings=_settings("gsm8k", path, chat, shots, limit, "ours"),
    )


def _without_calculator(answer: str) -> str:
    return re.sub(r"<<[^>]*>>", "", answer)


def _math(path: str | Path, chat: bool, shots: int, given: Any, limit: int | None, max_tokens: int | None) -> Task:
    records = items.read_math(path)[:limit]
    examples = _take(_shots(shots, given, items.beside(path, "train"), items.read_math), shots, "MATH's train")
    head = "".join(
        f"Problem:\n{e['problem']}\n\nSolution:\n{e['solution']}\n"
        f"Final Answer: The final answer is ${e['answer']}$. I hope it is correct.\n\n"
        for e in examples
    )
    made = [
        Item(
            id=record["id"],
            prompt=record["problem"] + _COT_BOX if chat else f"{head}Problem:\n{record['problem']}\n\nSolution:",
            chat=chat,
            gold=record["answer"],
            stop=() if chat else ("Problem:",),
            max_tokens=max_tokens or (8192 if chat else 1024),
            group=record["subject"],
        )
        for record in records
    ]

    def grade(item: Item, text: str, tools: Tools) -> dict[str, bool]:
        return conventions.math_grades(item.gold, text, tools.judge)

    return Task(
        name="math",
        items=made,
        grade=grade,
        reported="ours",
        settings=_settings("math", path, chat, shots, limit, "ours"),
    )


# -- code and text -------------------------------------------------------------------------------------------------------

_CODE_CHAT = (
    "Read the following function signature and docstring, and fully implement the function described. Your response should only "
    "contain the code for this function.\n"
)


def _humaneval(path: str | Path, chat: bool, shots: int, given: Any, limit: int | None, max_tokens: int | None) -> Task:
    made = [
        Item(
            id=record["task_id"],
            prompt=_CODE_CHAT + record["prompt"] if chat else record["prompt"],
            chat=chat,
            stop=() if chat else conventions.STOPS,
            max_tokens=max_tokens or (2048 if chat else 512),
            about={"prompt": record["prompt"], "entry_point": record["entry_point"], "test": record["test"]},
        )
        for record in items.read_humaneval(path)[:limit]
    ]
    reported = "first block" if chat else "completion"
    settings = _settings("humaneval", path, chat, shots, limit, reported)
    return Task(name="humaneval", items=made, grade=grade_code, reported=reported, settings=settings)


def grade_code(item: Item, text: str, tools: Tools) -> dict[str, bool]:
    """Each convention's program, run with the tests; equal programs once."""
    programs = conventions.humaneval_programs(item.about["prompt"], item.about["entry_point"], text)
    tests = conventions.humaneval_tests(item.about["test"], item.about["entry_point"])
    passed = {code: tools.sandbox.run(code, tests=tests).ok for code in dict.fromkeys(programs.values())}
    return {name: passed[code] for name, code in programs.items()}


def _bpb(path: str | Path, chat: bool, shots: int, given: Any, limit: int | None, max_tokens: int | None) -> Task:
    texts = items.read_texts(path)[:limit]
    made = [Item(id=f"bpb/{number}", prompt=text, kind="roll") for number, text in enumerate(texts)]

    def grade(item: Item, text: str, tools: Tools) -> dict[str, bool]:
        return {}

    return Task(
        name="bpb", items=made, grade=grade, reported="bpb", settings=_settings("bpb", path, chat, 0, limit, "bpb")
    )
