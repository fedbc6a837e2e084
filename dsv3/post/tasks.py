"""Prompts with checkable answers: arithmetic made on the spot, reasoning-gym's tasks, and files.

    task   index -> Problem, for ever, the same for the same seed
    split  a problem is held out where a hash of its subject says so, else it is trained on. A subject is what is asked, whatever
           the words ("3+4"); where a task names none, the prompt. It is never on both sides, however few there are, whatever
           the seeds, and of several tasks that ask for the same

A problem's `kind` says how an answer is judged (post/rewards.py): "maths" (equal numbers or expressions), "text" (equal
strings), "code" (the answer holds tests to pass) or "checked" (by the task's own checker).
Files are JSONL: {"prompt", "answer"} or {"prompt", "tests"}, with "id", "kind", "language" and "system" where needed;
"question" and "problem" stand for "prompt" too, and of a GSM8K answer what follows #### is taken.
Source: reasoning-gym (arXiv 2505.24760). Does not: judge answers or render prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

KINDS = ("maths", "text", "code", "checked")
SPLITS = ("train", "held-out")
_HELD_OUT_OF = 8  # one subject in so many is held out
_TRIES = 10_000
_LOOKED_AT = 32


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A user's message and how its answer is judged.

    Attributes:
        id: names it in logs and saved rollouts.
        answer: the right answer; of "code" the tests.
        language: what the answer should be written in ("en", "zh", ...), None where it does not matter.
        check: of "checked": a share from 0 to 1 for an answer. 1 is right, anything less is not.
        subject: what is asked, whatever the words; None: the prompt.
    """

    id: str
    prompt: str
    answer: str
    kind: str = "text"
    language: str | None = None
    system: str | None = None
    check: Callable[[str], float] | None = field(default=None, compare=False, repr=False)
    subject: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of problem {self.id} is {self.kind!r}: give one of {', '.join(KINDS)}")
        if (self.kind == "checked") != (self.check is not None):
            raise ValueError(f"problem {self.id} of kind {self.kind!r}: a checker goes with kind 'checked' alone")

    @property
    def messages(self) -> list[dict[str, str]]:
        """In OpenAI's form."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.prompt}]


class Task(Protocol):
    """An endless source of problems. `problem` is a pure function of the index."""

    @property
    def name(self) -> str: ...

    def problem(self, index: int) -> Problem: ...


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """`What is 17 + 25?`: sums, differences and products of `terms` numbers of at most `digits` digits."""

    terms: int = 2
    digits: int = 2
    operators: str = "+-"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.terms < 2 or self.digits < 1 or not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(
                f"terms {self.terms}, digits {self.digits}, operators {self.operators!r}: "
                "give at least 2 terms of 1 digit and some of + - *"
            )

    @property
    def name(self) -> str:
        return "arithmetic"

    def problem(self, index: int) -> Problem:
        rng = random.Random(f"{self.seed}/{index}")
        numbers = [rng.randrange(10**self.digits) for _ in range(self.terms)]
        signs = [rng.choice(self.operators) for _ in numbers[1:]]
        expression = " ".join([str(numbers[0]), *(f"{s} {n}" for s, n in zip(signs, numbers[1:]))])
        return Problem(
            id=f"arithmetic-{self.seed}-{index}",
            prompt=f"What is {expression}?",
            answer=str(_value(numbers, signs)),
            kind="maths",
            subject=_no_spaces(expression),
        )


class ReasoningGym:
    """A task of reasoning-gym, judged by its own checker, of which only a full score counts: some give shares to answers
    that merely contain the right one.

    Args:
        dataset: its name there, such as chain_sum. options: its settings there.

    Raises:
        ValueError: reasoning-gym is not installed, or has no such task or setting.
    """

    def __init__(self, dataset: str, *, seed: int = 0, **options: Any) -> None:
        try:
            import reasoning_gym
        except ImportError:
            raise ValueError(
                f"task {dataset!r} needs reasoning-gym, which is not installed: pip install 'dsv3[post]'"
            ) from None
        try:
            self._data = reasoning_gym.create_dataset(dataset, seed=seed, size=2**40, **options)
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"reasoning-gym takes no task {dataset!r} with {options}: {error}") from error
        self.name, self.seed = dataset, seed

    def problem(self, index: int) -> Problem:
        entry = self._data[index]
        expression = entry.get("metadata", {}).get("expression")
        return Problem(
            id=f"{self.name}-{self.seed}-{index}",
            prompt=entry["question"],
            answer=str(entry["answer"]),
            kind="checked",
            check=lambda answer: float(self._data.score_answer(answer, entry)),
            subject=_no_spaces(expression) if isinstance(expression, str) else None,
        )


class FileTask:
    """Problems of a JSONL file, shuffled anew each time round.

    Raises:
        ValueError: no such file, no problem in it, or a line that is none (names line and field).
    """

    def __init__(self, path: str | Path, *, seed: int = 0) -> None:
        path = Path(path)
        if not path.exists():
            raise ValueError(f"no problems at {path}: give a JSONL file of prompt and answer")
        self.name, self.seed = path.stem, seed
        self.problems = [
            _read(line, f"{path} line {number}", f"{path.stem}-{number}")
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
            if line.strip()
        ]
        if not self.problems:
            raise ValueError(f"{path} holds no problem: write one JSON object of prompt and answer a line")

    def problem(self, index: int) -> Problem:
        time_round, at = divmod(index, len(self.problems))
        order = list(range(len(self.problems)))
        random.Random(f"{self.seed}/{time_round}").shuffle(order)
        return self.problems[order[at]]


class Split:
    """One side of a task, or of several by weight, as a task: problem i is the i-th draw that lies on this side.

    Raises:
        ValueError: no such side, or no tasks. From `problem`: none found on this side in many draws.
    """

    def __init__(self, tasks: Mapping[Task, float] | Task, side: str, *, seed: int = 0) -> None:
        if side not in SPLITS:
            raise ValueError(f"side is {side!r}: give one of {', '.join(SPLITS)}")
        weights = dict(tasks) if isinstance(tasks, Mapping) else {tasks: 1.0}
        if not weights or min(weights.values()) <= 0:
            raise ValueError(f"tasks have weights {list(weights.values())}: give at least one task, each above 0")
        self.tasks, self._weights, self.side, self.seed = list(weights), list(weights.values()), side, seed

    @property
    def name(self) -> str:
        return "+".join(task.name for task in self.tasks)

    def fingerprint(self) -> str:
        """Of the first problems: tasks of other settings, weights, seed or file make others."""
        first = [(one.prompt, one.answer, one.system) for one in map(self.problem, range(_LOOKED_AT))]
        return hashlib.sha256(json.dumps(first).encode()).hexdigest()

    def problem(self, index: int) -> Problem:
        rng = random.Random(f"{self.seed}/{self.side}/{index}")
        for _ in range(_TRIES):
            task = rng.choices(self.tasks, self._weights)[0]
            problem = task.problem(rng.randrange(2**40) if not isinstance(task, FileTask) else rng.randrange(2**20))
            if held_out(problem) == (self.side == "held-out"):
                return problem
        raise ValueError(
            f"task {self.name} has no {self.side} problem in {_TRIES:,} draws: its subjects are too few to hold some out"
        )

    def problems(self, count: int) -> Iterator[Problem]:
        """The first `count`, each prompt once; fewer if many draws bring nothing new."""
        seen: set[str] = set()
        for index in range(20 * count):
            problem = self.problem(index)
            if problem.prompt not in seen:
                seen.add(problem.prompt)
                yield problem
                if len(seen) == count:
                    return


def parse_tasks(specs: Sequence[str], *, seed: int = 0) -> dict[Task, float]:
    """Tasks by weight from NAME[:KEY=VALUE,...][@WEIGHT]: `arithmetic`, a JSONL file, or a task of reasoning-gym.

    `arithmetic:digits=1`, `chain_sum:max_terms=2,max_digits=2@0.5`, `gsm8k.jsonl@2`.

    Raises:
        ValueError: a spec is none of these.
    """
    tasks: dict[Task, float] = {}
    for spec in specs:
        text, _, weight = spec.partition("@")
        name, _, rest = text.partition(":")
        try:
            pairs = dict(pair.split("=", 1) for pair in rest.split(",") if pair)
            options = {key: _setting(value) for key, value in pairs.items()}
            share = float(weight or 1)
        except ValueError:
            raise ValueError(f"task {spec!r} is not NAME[:KEY=VALUE,...][@WEIGHT]: write it so") from None
        if name.endswith(".jsonl"):
            if options:
                raise ValueError(f"task {spec!r} is a file, which takes no settings: leave {rest!r} out")
            tasks[FileTask(name, seed=seed)] = share
        elif name == "arithmetic":
            known = {field.name for field in dataclasses.fields(Arithmetic)} - {"seed"}
            if options.keys() - known:
                raise ValueError(f"arithmetic has settings {', '.join(sorted(known))}, not {rest!r}")
            tasks[Arithmetic(**options, seed=seed)] = share
        else:
            tasks[ReasoningGym(name, seed=seed, **options)] = share
    return tasks


def _setting(value: str) -> Any:
    """A number, true, false, or a string."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def held_out(problem: Problem) -> bool:
    """Whether a problem is never trained on."""
    subject = problem.prompt if problem.subject is None else problem.subject
    return hashlib.blake2b(subject.encode(), digest_size=4).digest()[0] % _HELD_OUT_OF == 0


def _no_spaces(expression: str) -> str:
    return "".join(expression.split())


def _value(numbers: list[int], signs: list[str]) -> int:
    """Products first, then sums from the left."""
    total, term = 0, numbers[0]
    for sign, number in zip(signs, numbers[1:]):
        if sign == "*":
            term *= number
        else:
            total, term = total + term, number if sign == "+" else -number
    return total + term


def _read(line: str, where: str, name: str) -> Problem:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): write one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}: write an object of prompt and answer")
    prompt = next((record[key] for key in ("prompt", "question", "problem") if key in record), None)
    answer = record.get("tests", record.get("answer"))
    prompt, answer = _filled(prompt, f"{where}, field 'prompt'"), _filled(answer, f"{where}, field 'answer'")
    for what in ("language", "system"):
        if not isinstance(record.get(what), str | None):
            raise ValueError(f"{where}, field {what!r}, is {record[what]!r:.80}: give a string or leave it out")
    kind = record.get("kind", "code" if "tests" in record else "maths")
    if kind not in KINDS[:3]:
        raise ValueError(f"{where}, field 'kind', is {kind!r}: give one of {', '.join(KINDS[:3])}")
    if kind == "maths" and "####" in answer:
        answer = answer.rsplit("####", 1)[1].strip()
    return Problem(
        id=str(record.get("id", name)),
        prompt=prompt,
        answer=answer,
        kind=kind,
        language=record.get("language"),
        system=record.get("system"),
    )


def _filled(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}, is {value!r:.80}: give a string that is not empty")
    return value
