"""What in a text may be somebody's own: numbers and keys that no model should learn, replaced by stand-ins.

    e-mail, IP address    by datatrove's PIIFormatter (data/steps.py), as email@example.com and 192.0.2.1
    phone                 +CC and 6 to 14 digits; (AAA) BBB-CCCC and AAA-BBB-CCCC; Chinese mobile numbers behind a word for phone
    card                  13 to 19 digits in groups, of a known issuer's prefix, whose check digit fits (Luhn)
    iban, id              IBAN (check digits), Chinese identity number (check digit), US social security number with dashes
    key                   private key blocks, tokens with a known prefix (AWS, GitHub, Google, Slack, OpenAI and alike, JWT)

A number without marks or check digit stays: arithmetic and code are full of numbers. Names and street addresses stay too.
Source: the kinds that StarCoder (section 4) and Dolma (section 4) remove. Does not: find what no pattern can (names).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

PHONE, CARD, IBAN, IDENTITY, KEY = "phone", "card", "iban", "id", "key"


def scrub(text: str) -> tuple[str, Counter[str]]:
    """(the text with stand-ins such as <phone>, how many of each kind)."""
    counts: Counter[str] = Counter()
    digits = any(char.isdigit() for char in text)
    for kind, marks, pattern, holds in _PATTERNS:
        if marks == "digits" and not digits:
            continue

        def stand_in(match: re.Match[str], kind: str = kind, holds: Callable[[str], bool] = holds) -> str:
            if not holds(match[0]):
                return match[0]
            counts[kind] += 1
            return f"<{kind}>"

        text = pattern.sub(stand_in, text)
    return text, counts


def _always(found: str) -> bool:
    return True


def _luhn(found: str) -> bool:
    digits = [int(char) for char in found if char.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _iban(found: str) -> bool:
    joined = found.replace(" ", "")
    number = "".join(str(int(char, 36)) for char in joined[4:] + joined[:4])
    return 15 <= len(joined) <= 34 and int(number) % 97 == 1


def _chinese_identity(found: str) -> bool:
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return "10X98765432"[sum(int(d) * w for d, w in zip(found, weights)) % 11] == found[-1].upper()


_PATTERNS: tuple[tuple[str, str, re.Pattern[str], Callable[[str], bool]], ...] = (
    (KEY, "any", re.compile(
        r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----.*?(?:-----END (?:[A-Z]+ )*PRIVATE KEY-----|\Z)", re.DOTALL), _always),
    (KEY, "digits", re.compile(
        r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}"
        r"|sk-[A-Za-z0-9_-]{32,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"), _always),
    (IDENTITY, "digits", re.compile(
        r"(?<!\d)[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)"), _chinese_identity),
    (CARD, "digits", re.compile(
        r"(?<![\w.])(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|3[47]\d\d|6011|65\d\d|62\d\d)(?:[ -]?\d{4,6}){2}(?:[ -]?\d{1,7})(?!\w|\.\d)"),
     _luhn),
    (IBAN, "digits", re.compile(r"\b[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    (IDENTITY, "digits", re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])"), _always),
    (PHONE, "digits", re.compile(
        r"(?<![\w+])\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}(?![\d%]|\.\d)"), _always),
    (PHONE, "digits", re.compile(r"(?<![\w-])(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?![\w-])"), _always),
    (PHONE, "digits", re.compile(
        r"(?:(?<=电话)|(?<=手机)|(?<=热线)|(?<=[:：])|(?<=tel)|(?<=phone))\s{0,2}1[3-9]\d{9}(?!\d)", re.IGNORECASE), _always),
)  # fmt: skip
