"""What is kept of a teacher's answers: reasons to reject one.

    failed        the teacher refused, or gave no answer in the end        cut          stopped at max_tokens
    too long      more characters than allowed                             wrong        by dsv3.post.rewards: maths, code, text
    ungradable    gold cannot be read, or the grader failed                mixed        languages: below 90% of the words are in
                                                                                        the script of the problem's language
    repetitive    of its runs of 8 words under half are distinct, or it ends in one line or phrase over and over
    contaminated  shares a run of words with an evaluation item            duplicate    of an answer kept before
                  (dsv3.data.decontaminate)

Source: V3 report section 5.1 and R1 section 2.3.3 (rejection sampling; mixed languages, long and chaotic answers are filtered out).
Does not: ask (distill_teacher.py), or weigh one right answer against another.
"""

from __future__ import annotations

from dsv3.data.language import words
from dsv3.post.rewards import LANGUAGES, language_share

LEAST_OWN = 0.9
_RUN, _LEAST_DISTINCT = 8, 0.5
_LONGEST_PHRASE = 200  # characters
_FIRST = ("en", "zh", "ja", "ru", "ko", "ar", "el", "he", "hi", "th")


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
