"""A maths tutor that checks its own answers: it solves a question several times, and says so when it does not agree with itself.

dsv3 serve runs/tiny
python examples/tutor.py "What is 12 + 30?"
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from openai import OpenAI

import dsv3

SOLVE = "Solve the question step by step. Put the final answer into \\boxed{{}}.\n\n{question}"
CHECK = (
    "A pupil answered the question below with {answer}. Work it out anew, without trusting the pupil, and put your own final "
    "answer into \\boxed{{}}.\n\n{question}"
)


@dataclass(frozen=True)
class Lesson:
    """`agreed`: of `asked` solutions, those with this answer; `checked`: whether a second look came to it too."""

    answer: str
    explanation: str
    agreed: int
    asked: int
    checked: bool

    @property
    def sure(self) -> bool:
        return self.checked and 2 * self.agreed > self.asked


def teach(client: OpenAI, model: str, question: str, samples: int = 5) -> Lesson:
    """Ask several times, take the answer that most solutions share, and have it checked.

    Raises:
        ValueError: no solution came to an answer.
    """
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": SOLVE.format(question=question)}],
        n=samples, temperature=0.7, max_tokens=1024,
    )  # fmt: skip
    solutions = [(text, boxed(text)) for text in (choice.message.content or "" for choice in reply.choices)]
    groups: list[list[tuple[str, str]]] = []  # solutions of equal answers, however they are written
    for text, answer in solutions:
        group = next((g for g in groups if answer is not None and equal(g[0][1], answer)), None)
        if group is not None and answer is not None:
            group.append((text, answer))
        elif answer is not None:
            groups.append([(text, answer)])
    if not groups:
        raise ValueError(f"none of {samples} solutions came to an answer: ask in other words")
    best = max(groups, key=len)
    explanation, answer = min(best, key=lambda one: len(one[0]))  # the shortest of those that agree
    look = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": CHECK.format(question=question, answer=answer)}],
        temperature=0, max_tokens=1024,
    )  # fmt: skip
    second = boxed(look.choices[0].message.content or "")
    return Lesson(answer, explanation, len(best), samples, second is not None and equal(answer, second))


def boxed(text: str) -> str | None:
    """What the last \\boxed{} holds, braces within it counted."""
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    depth, start = 0, at + len("\\boxed")
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : start + match.start()].strip() or None
    return None


def equal(one: str, other: str) -> bool:
    """Whether two answers are the same number or expression."""
    try:
        return dsv3.math_equal(one, f"\\boxed{{{other}}}")
    except ValueError:  # one is no mathematics: then letters must do
        return one == other


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="unused")
    parser.add_argument("--model", default="deepseek-chat")
    asked = parser.parse_args()
    lesson = teach(OpenAI(base_url=asked.base_url, api_key=asked.api_key), asked.model, asked.question)
    doubt = "" if lesson.sure else f"? I am not sure: {lesson.agreed} of {lesson.asked} agree"
    print(f"{lesson.explanation}\n\n{lesson.answer}{doubt}")
