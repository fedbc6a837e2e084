"""The same response under every convention by which published scores are made. The gap between them is part of the result.

    GSM8K   lm-eval strict (first "#### n"), lm-eval flexible (last number), simple-evals (last number after "Answer", as in
            its MGSM), math-verify (the library as it is), report (the number after the last "The answer is"), ours (math_equal)
    MATH    lm-eval ("The final answer is X. I hope it is correct."), simple-evals ("ANSWER: X"), math-verify, ours
    MMLU    simple-evals ("Answer: $LETTER"), ours (also a boxed or bare letter)
    HumanEval   completion (the raw text goes on from the prompt), first block (of a chat answer), whole module

The V3 report names shots and metrics, not its extraction rules; "report" here is the rule of its few-shot prompts. simple-evals
judges MATH by a language model, here by `math_equal` of what it would have judged.
Sources: lm-evaluation-harness gsm8k.yaml v3, minerva_math; openai/simple-evals mgsm_eval, math_eval, mmlu, humaneval.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dsv3.evals.grade import UnreadableGold, boxes, math_equal
from dsv3.evals.symbolic import Judge, shared_judge

_INVALID = "[invalid]"


def spread(graded: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """Share of right responses by convention, and "spread": the largest minus the smallest. Empty without responses."""
    if not graded:
        return {}
    means = {name: sum(bool(g[name]) for g in graded) / len(graded) for name in graded[0]}
    return means | {"spread": max(means.values()) - min(means.values())}


# -- GSM8K ---------------------------------------------------------------------------------------------------------------


def gsm8k_grades(gold: str, text: str, judge: Judge | None = None) -> dict[str, bool]:
    """One response by each convention.

    Args:
        gold: the data set's answer field, with its "#### n".

    Raises:
        UnreadableGold: it has no number.
    """
    reference = gold.rsplit("####", 1)[-1].strip()
    target = _lm_eval_normal(gold)
    strict = re.search(r"#### (\-?[0-9\.\,]+)", text)
    numbers = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    flexible = next((g for g in numbers[-1] if g), "") if numbers else _INVALID
    return {
        "ours": math_equal(reference, text, judge=judge),
        "lm-eval strict": _lm_eval_normal(strict.group(1) if strict else _INVALID) == target,
        "lm-eval flexible": _lm_eval_normal(flexible) == target,
        "simple-evals": _mgsm(text) == reference.replace(",", ""),
        "math-verify": (judge or shared_judge()).matches(f"${reference}$", text),
        "report": _said_number(text) == _plain(reference),
    }


def _lm_eval_normal(text: str) -> str:
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def _mgsm(text: str) -> str:
    if "Answer" not in text:
        return ""
    numbers = re.findall(r"\d+\.?\d*", text.split("Answer")[-1].replace(",", ""))
    last = numbers[-1].rstrip(".") if numbers else ""
    return last.rstrip("0").rstrip(".") if "." in last else last


def _said_number(text: str) -> str | None:
    text = re.split(r"\n\s*Question:", text)[0]
    after = text.rpartition("he answer is")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", after[2])
    return _plain(numbers[0] if after[1] else numbers[-1]) if numbers else None


def _plain(digits: str) -> str:
    digits = digits.replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


# -- MATH ----------------------------------------------------------------------------------------------------------------


def math_gold(solution: str) -> str:
    """The answer of a MATH solution: its last box.

    Raises:
        UnreadableGold: it has none.
    """
    found = boxes(solution)
    if not found:
        raise UnreadableGold(f"the solution has no \\boxed{{}}: {solution[:80]!r}")
    return found[-1][2]


def math_grades(gold: str, text: str, judge: Judge | None = None) -> dict[str, bool]:
    """One response by each convention. gold: the answer alone (`math_gold`)."""
    final = re.search(r"Final Answer: The final answer is(.*?). I hope it is correct.", text)
    line = re.findall(r"(?i)ANSWER\s*:\s*([^\n]+)", text)

    def ours(answer: str) -> bool:
        return math_equal(gold, f"\\boxed{{{answer}}}", judge=judge)

    return {
        "ours": math_equal(gold, text, judge=judge),
        "lm-eval": bool(final) and ours(final.group(1).strip().strip("$")),
        "simple-evals": bool(line) and ours(_inside(line[-1])),
        "math-verify": (judge or shared_judge()).matches(f"${gold}$", text),
    }


def _inside(answer: str) -> str:
    found = boxes(answer)
    return found[-1][2] if found else answer.strip().strip("$*. ")


# -- MMLU ----------------------------------------------------------------------------------------------------------------


def mmlu_letter(text: str) -> str | None:
    """simple-evals' letter: the first "Answer: X"."""
    found = re.search(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?", text)
    return found.group(1).upper() if found else None


def mmlu_grades(gold: str, text: str) -> dict[str, bool]:
    """gold: A to D."""
    if gold not in ("A", "B", "C", "D"):
        raise UnreadableGold(f"gold is {gold!r}, not a letter from A to D")
    first = mmlu_letter(text)
    return {"ours": math_equal(gold, text), "simple-evals": first == gold}


def choose(scores: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The likeliest option from log-probabilities; with `lengths` (bytes of each option) the likeliest per byte."""
    if lengths is not None:
        scores = [s / max(n, 1) for s, n in zip(scores, lengths)]
    return max(range(len(scores)), key=lambda i: scores[i])


# -- HumanEval -----------------------------------------------------------------------------------------------------------

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def python_blocks(text: str, *, closed: bool = False) -> list[str]:
    """What stands in code fences that name Python or nothing, in order; those of other languages are passed over whole.
    closed: an opened fence that is not closed is none; else it runs to the end."""
    end = r"```" if closed else r"(?:```|\Z)"
    found = re.findall(rf"```([^\n`]*)\n(.*?){end}", text, re.DOTALL)
    return [code for name, code in found if name.strip().lower() in ("", "python", "py", "python3")]


def humaneval_programs(prompt: str, entry_point: str, text: str) -> dict[str, str]:
    """What each convention would run for a response: a whole program each, to be followed by the item's tests."""
    cut = min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))
    blocks = python_blocks(text)
    first = blocks[0] if blocks else text
    body = first[first.find(":\n    ") + 2 :] if ":\n    " in first else first
    defines = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    module = next((b for b in reversed(blocks) if defines.search(b)), None)
    if module is None:
        module = text if defines.search(text) and not blocks else prompt + (first if blocks else text)
    return {
        "completion": prompt + text[:cut],
        "first block": prompt + body,
        "whole module": prompt[: prompt.index(f"def {entry_point}")] + "\n" + module,
    }


def humaneval_tests(test: str, entry_point: str) -> str:
    """What runs after a program."""
    return f"{test}\ncheck({entry_point})\n"
