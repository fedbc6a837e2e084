"""Rewards by rule: is the answer right, is it in form, does it keep to its language. No reward model.

    accuracy   maths: dsv3.evals.grade (math-verify behind exact numbers) · code: the tests pass in the sandbox
               text: equal strings · checked: the task's own checker says 1, no share counts
    format     the asked form, once: thought then answer, one box or one tag
    language   share of the words in the script of the problem's language; formulas and code do not count (R1's reward for
               language consistency)

Written to be hard to please by anything but an answer. Each is tested: an empty answer, one that was cut off, two answers side by
side, the prompt handed back, the answer in the thought only, a gold that cannot be read. Not prevented: a program whose answers
call themselves equal to anything (dsv3.evals.jail).
An answer that cannot be judged (unreadable gold, a grader that fails) has no reward: it is dropped and counted, and the run goes
on. Rewarding it is how open-r1 came to pay 1.0 for anything (issue 293).
`Monitor` watches for a reward that rises while held-out accuracy falls.
Source: V3 report section 5.2.1, R1 (arXiv 2501.12948) section 2.2.2. Does not: sample, or make advantages.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv3.evals.conventions import python_blocks
from dsv3.evals.grade import UnreadableGold, boxes, math_equal
from dsv3.evals.sandbox import Program, Sandbox
from dsv3.post.tasks import Problem

ANSWERS = ("whole", "boxed", "tag")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ECHO = 12  # characters from which a prompt found in an answer is an echo, and no accident


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What counts how much in an answer's reward, and where the answer stands."""

    accuracy: float = 1.0
    format: float = 0.0
    """For the form alone. An answer that is wrong gets it too unless `only_right`: see that accuracy outweighs it."""
    language: float = 0.0
    """Times the share of words in the problem's language."""
    only_right: bool = True
    """Pay format and language to right answers only: paid to all, form is learnt and accuracy lost (open-r1 issue 255)."""
    think: bool = False
    """The form asks for <think>...</think> before the answer."""
    answer: str = "whole"
    """Where a text answer stands: all that follows the thought, in one \\boxed{}, or in one <answer></answer>. Maths and code
    find theirs by their own rules."""

    def __post_init__(self) -> None:
        for name in ("accuracy", "format", "language"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"reward weight {name} is {getattr(self, name)}: give at least 0")
        if self.accuracy == self.format == self.language == 0:
            raise ValueError("all reward weights are 0: give one above")
        if self.answer not in ANSWERS:
            raise ValueError(f"answer is {self.answer!r}: give one of {', '.join(ANSWERS)}")


@dataclass(frozen=True)
class Reward:
    """Of one answer. total None: it could not be judged. `note` says in words why it is what it is."""

    total: float | None
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def right(self) -> bool:
        return self.parts.get("accuracy") == 1.0


class Rewarder:
    """Judges answers.

    Args:
        sandbox: runs code; without one a problem of kind "code" is refused.

    Attributes:
        counts: since it was made: judged, unreadable_gold, crashed.
        last_fault: of the last that crashed.
    """

    def __init__(self, config: RewardConfig = RewardConfig(), sandbox: Sandbox | None = None) -> None:
        self.config, self.sandbox = config, sandbox
        self.counts: Counter[str] = Counter()
        self.last_fault = ""

    def score(self, problem: Problem, text: str, *, finished: bool = True) -> Reward:
        """
        Args:
            text: all that the model wrote, with the <think> that the prompt opened.
            finished: whether it ended by itself. What was cut off has no answer.

        Raises:
            ValueError: code without a sandbox.
        """
        if problem.kind == "code" and self.sandbox is None:
            raise ValueError(f"problem {problem.id} is code and there is no sandbox: give Rewarder one")
        self.counts["judged"] += 1
        try:
            return self._score(problem, text, finished)
        except UnreadableGold as error:
            self.counts["unreadable_gold"] += 1
            return Reward(None, note=f"dropped: {error}")
        except Exception as error:  # a grader's fault, or a keeper's that died: this answer's loss, not the run's
            self.counts["crashed"] += 1
            self.last_fault = f"{type(error).__name__}: {error}"
            return Reward(None, note=f"dropped: the grader failed ({self.last_fault:.200})")

    def score_all(self, answers: Sequence[tuple[Problem, str, bool]]) -> list[Reward]:
        """Of each (problem, text, finished), in order; programs run as many at once as the sandbox has workers."""
        if self.sandbox is None or self.sandbox.workers == 1 or all(p.kind != "code" for p, _, _ in answers):
            return [self.score(problem, text, finished=finished) for problem, text, finished in answers]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            return list(pool.map(lambda answer: self.score(answer[0], answer[1], finished=answer[2]), answers))

    def _score(self, problem: Problem, text: str, finished: bool) -> Reward:
        said = without_echo(text, problem.prompt)
        right, note = self._right(problem, said) if finished else (False, "cut off before its end")
        if not finished and problem.kind == "maths":
            math_equal(problem.answer, "")  # raises for an unreadable gold: all of a group must be dropped alike
        form = float(finished and in_form(said, self.config))
        parts = {"accuracy": float(right)}
        if self.config.format:
            parts["format"] = form
        if self.config.language and problem.language is not None:
            parts["language"] = language_share(said, problem.language)
        paid = parts if right or not self.config.only_right else {"accuracy": parts["accuracy"]}
        return Reward(sum(getattr(self.config, name) * value for name, value in paid.items()), parts, note)

    def _right(self, problem: Problem, text: str) -> tuple[bool, str]:
        """Whether the answer is right, and why not."""
        if problem.kind == "maths":
            right = math_equal(problem.answer, text)
            return right, "right" if right else f"not {problem.answer}"
        answered = after_thought(text)
        if answered is None:
            return False, "its thought has no end"
        if problem.kind == "code":
            programs = python_blocks(answered, closed=True)
            if not programs:
                return False, "no program in a closed code block"
            assert self.sandbox is not None
            program = Program(code=programs[-1], tests=problem.answer)
            ran = self.sandbox.run(program.code, tests=program.tests)
            return ran.ok, "tests passed" if ran.ok else _why(ran.killed, ran.stderr)
        answer = find(answered, self.config.answer)
        if not answer:
            return False, f"no answer, or several ({self.config.answer})"
        right = problem.check(answer) >= 1.0 if problem.check else answer == problem.answer.strip()
        return right, "right" if right else f"{answer[:60]!r} is not {problem.answer[:60]!r}"


def after_thought(text: str) -> str | None:
    """What follows the last </think>; all of a text without a thought; None where a thought has no end."""
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after.strip() if "<think>" not in after else None
    return None if "<think>" in text else after.strip()


def find(answered: str, where: str) -> str | None:
    """The one answer of a text without its thought; None if there is none, or several that differ."""
    if where == "whole":
        return answered.strip() or None
    found = [content for _, _, content in boxes(answered)] if where == "boxed" else _TAG.findall(answered)
    distinct = {content.strip() for content in found}
    return distinct.pop() or None if len(distinct) == 1 else None


def in_form(text: str, config: RewardConfig) -> bool:
    """Whether a text keeps the form: a thought that is not empty, if asked for, then one answer."""
    if config.think:
        opened, closed = text.count("<think>"), text.count("</think>")
        thought = re.match(r"\s*<think>(.*?)</think>", text, re.DOTALL)
        if opened != 1 or closed != 1 or thought is None or not thought[1].strip():
            return False
    answered = after_thought(text)
    if not answered:
        return False
    if config.answer == "boxed":
        return len(boxes(answered)) == 1 and answered.count("\\boxed") == 1
    return config.answer != "tag" or (len(_TAG.findall(answered)) == 1 and answered.count("<answer>") == 1)


def without_echo(text: str, prompt: str) -> str:
    """A text without the prompt that it repeats: a prompt may hold boxes, examples, even the answer."""
    prompt = prompt.strip()
    return text.replace(prompt, " ") if len(prompt) >= _ECHO else text


def _why(killed: str | None, stderr: str) -> str:
    if killed is not None:
        return f"stopped: {killed}"
    lines = stderr.strip().splitlines()
    return f"tests failed: {lines[-1][:120]}" if lines else "tests failed"


# -- language ------------------------------------------------------------------------------------------------------------

_SCRIPTS = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "tr", "vi", "id"), ("LATIN",)),
    **dict.fromkeys(("ru", "uk", "bg", "sr"), ("CYRILLIC",)),
    "zh": ("CJK",), "ja": ("CJK", "HIRAGANA", "KATAKANA"), "ko": ("HANGUL",), "ar": ("ARABIC",), "fa": ("ARABIC",),
    "he": ("HEBREW",), "el": ("GREEK",), "hi": ("DEVANAGARI",), "th": ("THAI",),
}  # fmt: skip
LANGUAGES = tuple(_SCRIPTS)
_NOT_PROSE = re.compile(
    r"```.*?(?:```|$)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\boxed\{[^{}]*\}|\\[A-Za-z]+|https?://\S+|</?\w+>",
    re.DOTALL,
)
_ONE_A_WORD = ("CJK", "HIRAGANA", "KATAKANA", "THAI")  # written without spaces: a character counts as a word


def language_share(text: str, language: str) -> float:
    """Share of the words written in the language's script; 0 for a text without words.

    Scripts tell Chinese from English, not German from English: what mixes in practice is caught, and nothing is guessed.

    Raises:
        ValueError: the language's script is not known.
    """
    if language not in _SCRIPTS:
        raise ValueError(f"language is {language!r}: give one of {', '.join(LANGUAGES)}")
    own = total = 0
    for word in re.findall(r"[^\W\d_]+", _NOT_PROSE.sub(" ", text)):
        runs: list[list[Any]] = []
        for script in map(_script, word):
            if not runs or runs[-1][0] != script or script in _ONE_A_WORD:
                runs.append([script, 0])
            runs[-1][1] += 1
        for script, length in runs:
            if length > 1 or script in _ONE_A_WORD or len(word) > 1:  # a lone letter is a variable
                total += 1
                own += script in _SCRIPTS[language]
    return own / total if total else 0.0


def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").split(" ", 1)[0].split("-", 1)[0]


# -- the alarm -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """When a reward that rises is not believed."""

    window: int = 3
    """Evaluations on each side of the comparison."""
    rise: float = 0.02
    """By how much the mean reward must have risen."""
    deviations: float = 2.0
    """By how many standard errors held-out accuracy must have fallen."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.rise < 0 or self.deviations <= 0:
            raise ValueError(
                f"window {self.window} must be at least 1, rise {self.rise} at least 0, deviations {self.deviations} above 0"
            )


class Monitor:
    """Compares the last evaluations with the best stretch before them. Its state is what it was told."""

    def __init__(self, config: MonitorConfig = MonitorConfig()) -> None:
        self.config = config
        self.history: list[tuple[float, float, int]] = []

    def add(self, reward: float, accuracy: float, problems: int) -> str | None:
        """The mean training reward since the last evaluation, and held-out accuracy of so many problems.

        Returns:
            The alarm, in words, if reward rose while accuracy fell.
        """
        self.history.append((reward, accuracy, problems))
        window, history = self.config.window, self.history
        if len(history) < 2 * window:
            return None
        now = history[-window:]
        before = [history[i : i + window] for i in range(len(history) - 2 * window + 1)]
        best = max(before, key=lambda stretch: sum(a for _, a, _ in stretch))
        (reward_then, accuracy_then, seen_then), (reward_now, accuracy_now, seen_now) = map(_mean, (best, now))
        pooled = (accuracy_then * seen_then + accuracy_now * seen_now) / (seen_then + seen_now)
        error = math.sqrt(max(pooled * (1 - pooled), 1e-12) * (1 / seen_then + 1 / seen_now))
        if (
            reward_now - reward_then > self.config.rise
            and accuracy_then - accuracy_now > self.config.deviations * error
        ):
            return (
                f"reward rose from {reward_then:.3f} to {reward_now:.3f} while held-out accuracy fell from {accuracy_then:.1%} to "
                f"{accuracy_now:.1%}: the reward is being pleased without right answers. Read the latest rollouts in the view, "
                "close the hole in the reward, and go back to the checkpoint before"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"history": [list(entry) for entry in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [(float(r), float(a), int(n)) for r, a, n in state["history"]]


def _mean(stretch: list[tuple[float, float, int]]) -> tuple[float, float, int]:
    return (
        sum(reward for reward, _, _ in stretch) / len(stretch),
        sum(accuracy for _, accuracy, _ in stretch) / len(stretch),
        sum(problems for _, _, problems in stretch),
    )
