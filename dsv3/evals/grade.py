"""Whether a response answers a mathematics question: `math_equal(gold, text)`.

    find      the last \\boxed{}, else the last "#### x", else the last "answer is x", else what the last sentence comes to
    compare   numbers as exact fractions with their units; lists, sets, points and intervals part by part; words as words;
              the rest by math-verify (dsv3.evals.symbolic)

Written to be a reward too, so hard to please by anything but an answer:
    several answers     two that differ and stand side by side ("\\boxed{3} or \\boxed{4}") are no answer; after a correction, or
                        further on, the last counts
    unworked answers    where gold is a number the answer must be one, and exactly it: "12*34" does not answer what 12*34 is, nor
                        0.333 what 1 / 3 is; against roots and the like six digits count as math-verify has it
    units               5 km is not 5 m, 5 million not 5; a unit that gold does not name may stand beside the number
    an unfinished thought (<think> without its end), an empty box, a question handed back: no answer
    a gold that cannot be read raises `UnreadableGold`: the sample is to be dropped, not rewarded (open-r1 issue 293)
Does not: convert units (1 kg is not 1000 g), judge proofs.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dsv3.evals.symbolic import Judge, shared_judge

_FARTHEST = 2000  # characters to look for the end of an answer
_LONGEST = 400  # characters of an answer; longer ones are no answers, and cost a parser dear


class UnreadableGold(ValueError):
    """The reference answer itself is no answer."""


def math_equal(gold: str, text: str, *, judge: Judge | None = None) -> bool:
    """Whether the response `text` gives the answer `gold`.

    Args:
        gold: an answer, as the data set has it: `72`, `\\frac{1}{2}`, `\\boxed{3}`, `... #### 1,000`.
        text: all that the model wrote.
        judge: helper for what needs algebra; by default one is shared in this process.

    Raises:
        UnreadableGold: gold is empty or cannot be parsed.
    """
    reference = gold_answer(gold)
    if not _readable(reference, judge):
        raise UnreadableGold(f"gold answer {gold[:100]!r} cannot be read: drop the sample or mend it")
    if not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}, not a string: give the whole response")
    answer = find_answer(text, several=bool(_parts(clean(reference))))
    return answer is not None and same(reference, answer, judge)


def gold_answer(gold: str) -> str:
    """The answer within a data set's field: inside \\boxed{}, after ####, or all of it."""
    if not isinstance(gold, str):
        raise TypeError(f"gold is {type(gold).__name__}, not a string")
    inner = [content for _, _, content in boxes(gold)]
    return (inner[-1] if inner else gold.rsplit("####", 1)[-1]).strip()


def _readable(reference: str, judge: Judge | None) -> bool:
    cleaned = clean(reference)
    if not cleaned or len(cleaned) > _LONGEST or not _balanced(cleaned):
        return False
    if number(reference) is not None or _word(reference) is not None:
        return True
    parts = _parts(cleaned)
    if parts:
        return all(_readable(part, judge) for part in parts[1])
    return bool(re.search(r"\w", cleaned)) and (judge or shared_judge()).parses(cleaned)


# -- finding -------------------------------------------------------------------------------------------------------------

_SAID = re.compile(
    r"(?:(?:final\s+|correct\s+)?answer\s*(?:\*\*)?\s*(?:is\b|are\b|:|：|=)(?:\*\*)?\s*:?|(?:答案|结果)(?:是|为|[:：]))[ \t]*",
    re.IGNORECASE,
)
_SAID_NEXT = re.compile(rf"(?:The\s+|So\s+)?(?:{_SAID.pattern})", re.IGNORECASE)
_CORRECTED = re.compile(
    r"\b(wait|no|actually|instead|correct\w*|mistake|wrong|sorry|recheck|recompute|but|however)\b|不对|错", re.I
)
_NEXT_ITEM = re.compile(r"\n\s*(?:Question|Problem|Q|Human|User|Instruction)\s*[:：]", re.IGNORECASE)
_SIDE_BY_SIDE = 60  # characters between two answers that are one statement


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every closed \\boxed{} and \\fbox{}, an inner one within its outer's content only."""
    ends: dict[int, int] = {}  # opening brace -> the one that closes it
    opened: list[int] = []
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif opened:
            ends[opened.pop()] = brace.start()
    found, at = [], 0
    for match in re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|(?=[^\s{]))", text):
        if match.start() < at:
            continue
        if not match.group().endswith("{"):  # \boxed5
            found.append((match.start(), match.end() + 1, text[match.end()]))
            continue
        end = ends.get(match.end() - 1)
        if end is not None:
            found.append((match.start(), end + 1, text[match.end() : end]))
            at = end + 1
    return found


def find_answer(text: str, *, several: bool = False) -> str | None:
    """The answer that a response settles on, as it wrote it; None if it does not.

    Args:
        several: gold is a list: boxes side by side are its parts.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:  # one that has no end, the first or another
        return None
    cut = next((m.start() for m in _NEXT_ITEM.finditer(text) if text[: m.start()].strip()), len(text))
    text = text[:cut]
    boxed = boxes(text)
    hashed = [(m.start(), m.end(), m.group(1)) for m in re.finditer(r"####[ \t]*([^\n#]*)", text)]
    if boxed:
        settled = _settle(boxed, text, several=several)
        if settled is None or (hashed and not same(settled, _settle(hashed, text) or "", None)):
            return None
        return settled
    if hashed:
        return _settle(hashed, text)
    if re.search(r"\\(?:boxed|fbox)\s*\{", text):  # never closed
        return None
    marks = [
        m for m in _SAID.finditer(text) if not _SAID_NEXT.match(text, m.end())
    ]  # "Final Answer: the answer is" is one
    said = [(m.start(), m.end(), _said(text[m.end() : m.end() + _FARTHEST])) for m in marks]
    if said:
        return _settle([(a, b + len(c), c) for a, b, c in said], text)
    return _come_to(text)


def _settle(found: list[tuple[int, int, str]], text: str, *, several: bool = False) -> str | None:
    """The last of several, unless it stands beside a different one with no word of correction."""
    last = len(found) - 1
    first = last
    while first > 0 and len(between := text[found[first - 1][1] : found[first][0]]) <= _SIDE_BY_SIDE:
        if _CORRECTED.search(between):
            break
        first -= 1
    together = [content.strip() for _, _, content in found[first:]]
    if not all(together):
        return None if not together[-1] or len({clean(t) for t in together if t}) != 1 else together[-1]
    distinct = list(dict.fromkeys(clean(content) for content in together))
    if len(distinct) == 1 or all(number(d) == number(distinct[0]) is not None for d in distinct):
        return together[-1]
    return ",".join(together) if several else None


def _said(rest: str) -> str:
    """What follows "the answer is": to the end of the sentence."""
    rest = (
        rest.split("\n", 1)[0].strip() if rest.strip() and not rest.startswith("\n") else rest.strip().split("\n", 1)[0]
    )
    rest = re.sub(r"^(?:therefore|thus|then|simply|just|about|equal to|:)\s+", "", rest.strip("* "))
    maths = re.match(r"\\\((.+?)\\\)|\\\[(.+?)\\\]|(?<!\\)\$((?:\\.|[^$\\])+)\$", rest)
    if maths and (len(rest) == maths.end() or not re.match(r"\s*(?:\w|[$\\])", rest[maths.end() :])):
        return next(g for g in maths.groups() if g is not None)
    rest = re.split(r"[.。!](?:\s|$)|[。；;]", rest, maxsplit=1)[0].strip(" *\"'")
    if number(rest) is None and _word(rest) is None:
        numbers = re.findall(_PLAIN_NUMBER, rest)
        if len(numbers) == 1 and not re.search(r"\bnot\b", rest) and re.fullmatch(r"[\w\s,.'$%€£°-]*", rest):
            return numbers[0]
    return rest


def _come_to(text: str) -> str | None:
    """What a response without a mark comes to: its last sentence's formula, or the number in it."""
    lines = [line.strip() for line in text.strip().split("\n") if line.strip()]
    if not lines or lines[-1].rstrip("*\"' ").endswith(("?", "？", ":")):
        return None
    line = lines[-1].strip("* ")
    if number(line.rstrip(".")) is not None or not re.search(r"\s", line):
        return line.rstrip(".")
    sentence = [s for s in re.split(r"(?<=[.。!])\s+", line) if s.strip()][-1].rstrip(".。! ")
    if re.search(r"\b(or|either|maybe|perhaps|not)\b|n[’']t\b", sentence, re.IGNORECASE):
        return None
    maths = re.findall(r"\\\((.+?)\\\)|\\\[(.+?)\\\]|(?<!\\)\$((?:\\.|[^$\\])+)\$", sentence)
    if maths and number(sentence) is None:
        return _after_equals(next(g for g in maths[-1] if g))
    after = _after_equals(sentence)
    if number(after) is not None:
        return after
    numbers = re.findall(_PLAIN_NUMBER, after)
    return numbers[-1].strip() if numbers else None


def _after_equals(text: str) -> str:
    return text.rsplit("=", 1)[-1].strip()


# -- comparing -----------------------------------------------------------------------------------------------------------

_PLAIN_NUMBER = r"(?<![\w.,])[-−]?[$€£]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?(?![\d])"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?P<money>[$€£¥]?)(?P<sign2>[-+]?)(?:"
    rf"(?P<whole>\d+ ?)?\\frac\{{(?P<top>-?(?:{_DIGITS}))\}}\{{(?P<bottom>-?(?:{_DIGITS}))\}}"
    rf"|(?:(?P<mixed>\d+) )?(?P<over>{_DIGITS}) ?/ ?(?P<under>{_DIGITS})"
    rf"|(?:(?P<scale>{_DIGITS}) ?(?:\\times|\\cdot|×|\*) ?)?10 ?(?:\^|\*\*) ?\{{?(?P<power>[-+]?\d{{1,3}})\}}?"
    rf"|(?P<plain>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d{{1,3}}))?"
    rf")(?P<rest>.*)",
    re.DOTALL,
)
_TIMES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_MONEY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yuan"}
_UNITS = {
    "%": "percent", "usd": "dollar", "buck": "dollar", "°": "degree", "deg": "degree", "metre": "meter", "m": "meter",
    "cm": "centimeter", "centimetre": "centimeter", "mm": "millimeter", "km": "kilometer", "kilometre": "kilometer",
    "kg": "kilogram", "g": "gram", "gm": "gram", "mg": "milligram", "s": "second", "sec": "second", "min": "minute",
    "h": "hour", "hr": "hour", "l": "liter", "litre": "liter", "ml": "milliliter", "ft": "foot", "feet": "foot",
    "in": "inch", "inches": "inch", "lb": "pound", "lbs": "pound", "oz": "ounce", "percentage": "percent", "¢": "cent",
}  # fmt: skip
_NO_UNITS = frozenset(
    {"and", "or", "to", "mod", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "times", "plus", "minus",
     "over", "half", "third", "quarter", "not", "if", "is", "k"}
)  # fmt: skip


_RELATION = re.compile(r"=|<|>|\\le|\\ge|\\in\b")
_NAMED = re.compile(r"^[A-Za-z](?:\([a-z]\))?\s*(?:=|\\in\b)\s*")


def clean(text: str) -> str:
    """An answer without what does not change its meaning: dollars around it, spacing, \\left, \\text, bold, a full stop."""
    text = text.strip()
    while (box := re.fullmatch(r"\\(?:boxed|fbox)\s*\{(.*)\}", text, re.DOTALL)) and _balanced(box[1]):
        text = box[1].strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`")):
        if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            text = inner.strip() if opening not in inner.replace(r"\$", "") else text
    text = text.replace(r"\$", "$").replace("−", "-").replace("–", "-").replace("\u00a0", " ").replace("：", ":")
    text = text.replace("{,}", ",").replace(r"\%", "%").replace(r"\!", "").replace("\\\n", " ")
    text = re.sub(r"(\d)\\[,;: ](?=\d{3}(?!\d))", r"\1,", text)
    text = re.sub(r"(?<!\\)\\(?:[,;:> ]|quad\b|qquad\b)|~", " ", text)
    text = re.sub(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\\circ\b", "°", text)
    text = re.sub(
        r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 ", text
    )
    text = re.sub(r"\s+", " ", text).strip()
    return text[:-1].strip() if text.endswith(".") and not text.endswith("..") else text


def number(text: str) -> tuple[Fraction, str] | None:
    """An exact value and its unit ("" if none), of text that is one number and nothing else."""
    if len(text) > 100:
        return None
    cleaned = re.sub(r"^[A-Za-z]\w?\s*=\s*|^\\approx ?", "", clean(text))
    cleaned = re.sub(r"^(-?)\{(.*)\}$", r"\1\2", cleaned)
    repeating = re.fullmatch(r"(-?)(\d*)\.(\d{0,20})\\overline\{(\d{1,20})\}", cleaned)
    if repeating:
        sign, whole, fixed, period = repeating.groups()
        size = Fraction(int(whole + fixed or "0") + Fraction(int(period), 10 ** len(period) - 1), 10 ** len(fixed))
        return (-size if sign else size), ""
    match = _NUMBER.fullmatch(cleaned)
    if match is None or (match["sign"] and match["sign2"]):
        return None

    def value(digits: str | None) -> Fraction:
        return Fraction((digits or "0").replace(",", "").replace(" ", "").rstrip(".") or "0")

    if match["plain"] is not None:
        result = value(match["plain"]) * Fraction(10) ** int(match["exponent"] or 0)
    elif match["power"] is not None:
        result = (value(match["scale"]) if match["scale"] else 1) * Fraction(10) ** int(match["power"])
    else:
        over, under = value(match["top"] or match["over"]), value(match["bottom"] or match["under"])
        if not under:
            return None
        result = value(match["whole"] or match["mixed"]) + over / under
    times, unit = _unit(match["rest"])
    if unit is None:
        return None
    unit = _MONEY[match["money"]] if match["money"] and unit in ("", _MONEY[match["money"]]) else unit
    if match["money"] and unit != _MONEY[match["money"]]:
        return None
    return (-result if "-" in (match["sign"], match["sign2"]) else result) * times, unit


def _unit(rest: str) -> tuple[int, str | None]:
    """Factor and unit of what follows a number; None if that is no unit."""
    rest = rest.strip()
    if not rest:
        return 1, ""
    words = re.fullmatch(r"([%°€£$¢]|[A-Za-z]+)((?:[ /]+(?:[A-Za-z]+))*)(?: ?\^ ?\{?[23]\}?|[²³])?", rest)
    if words is None:
        return 1, None
    power = re.search(r"[23²³]\}?$", rest)
    names = [name.lower() for name in re.findall(r"[A-Za-z]+|[%°€£$¢]", rest)]
    if any(name in _NO_UNITS for name in names) or len(names) > 5:
        return 1, None
    times = 1
    while names and names[0] in _TIMES:
        times, names = times * _TIMES[names[0]], names[1:]
    if names and len(names[0]) == 1 and names[0].isalpha() and names[0] not in _UNITS:
        return 1, None  # 5x
    known = [
        _MONEY.get(n) or _UNITS.get(n) or (_UNITS.get(n[:-1]) or n[:-1] if n.endswith("s") and len(n) > 2 else n)
        for n in names
    ]
    return times, " ".join(known) + ({"²": "2", "³": "3"}.get(p := power.group()[0], p) if power else "")


def same(gold: str, answer: str, judge: Judge | None = None) -> bool:
    """Whether two answers, no text around them, are the same."""
    a, b = clean(gold), clean(answer)
    if not a or not b or len(b) > _LONGEST or not _balanced(b):
        return False
    if bool(_RELATION.search(a)) != bool(_RELATION.search(b)):  # y = 2x and 2x say the same, and nothing longer does
        a, b = _NAMED.sub("", a), _NAMED.sub("", b)
        if _RELATION.search(a) or _RELATION.search(b):
            return False
        gold, answer = a, b
    ours, theirs = number(gold), number(answer)
    if ours is not None:
        return theirs is not None and _same_number(ours, theirs)
    word = _word(gold)
    if word is not None:
        return word == _word(answer)
    parts, other = _parts(a), _parts(b)
    if parts:
        return other is not None and _same_parts(parts, other, judge)
    if a == b:
        return True
    if other or (
        theirs is None and _word(answer) is not None and len(_word(answer) or "") > 1 and not b.startswith("\\")
    ):
        return False
    if _costly(a) or _costly(b):
        return False
    return (judge or shared_judge()).equal(a, b)


def _same_number(gold: tuple[Fraction, str], answer: tuple[Fraction, str]) -> bool:
    (a, unit), (b, other) = gold, answer
    if "percent" in (unit, other):
        if unit not in ("", "percent") or other not in ("", "percent"):
            return False
        return a == b or (unit != other and (a == b * 100 if unit else a * 100 == b))
    return a == b and (not unit or not other or unit == other)


def _word(text: str) -> str | None:
    """Words, or the letter of a choice, in lower case; None for anything with mathematics in it."""
    cleaned = clean(text)
    letter = re.fullmatch(r"\(?([A-Z])\)?", cleaned)
    if letter:
        return letter.group(1).lower()
    words = cleaned.strip("\"'“”")
    return re.sub(r"\s+", " ", words.lower()) if re.fullmatch(r"[^\W\d_]{2,}(?:[ '’-]+[^\W\d_]+){0,8}", words) else None


def _parts(cleaned: str) -> tuple[str, list[str]] | None:
    """("brackets", members) of a list, set, point or interval of two members at least; None for anything else."""
    inner, brackets = cleaned, ""
    enclosed = re.fullmatch(r"(\\\{|\(|\[)(.*)(\\\}|\)|\])", cleaned, re.DOTALL)
    if enclosed and _balanced_inside(enclosed.group(2)):
        brackets, inner = enclosed.group(1) + enclosed.group(3), enclosed.group(2)
    members, depth, start = [], 0, 0
    for i, c in enumerate(inner):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0 and not re.match(r"\d,\d{3}(?!\d)", inner[max(i - 1, 0) : i + 5]):
            members.append(inner[start:i])
            start = i + 1
    members = [m.strip() for m in (*members, inner[start:])]
    if not brackets:
        members = [part.strip() for m in members for part in re.split(r"\band\b|\bor\b|\\text\{ ?(?:and|or) ?\}", m)]
        members = [re.sub(r"^[A-Za-z]\s*=\s*", "", m) for m in members if m]
    if len(members) < 2 or not all(members) or re.search(r"\\begin", cleaned):
        return None
    return brackets, members


def _same_parts(gold: tuple[str, list[str]], answer: tuple[str, list[str]], judge: Judge | None) -> bool:
    """Points and intervals in order and with their brackets; sets and bare lists in any order."""
    (kind, ours), (other, theirs) = gold, answer
    loose = ("", r"\{\}")
    if len(ours) != len(theirs) or (kind != other and not (kind in loose and other in loose)):
        return False
    if kind not in loose:
        return all(same(a, b, judge) for a, b in zip(ours, theirs))
    left = list(theirs)
    for a in ours:
        found = next((i for i, b in enumerate(left) if same(a, b, judge)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _balanced(text: str) -> bool:
    """Braces close what they open; brackets may be an interval's."""
    depth = 0
    for i, c in enumerate(text):
        if i and text[i - 1] == "\\":
            continue
        depth += (c == "{") - (c == "}")
        if depth < 0:
            return False
    return depth == 0


def _balanced_inside(text: str) -> bool:
    depth = 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if depth < 0:
            return False
    return depth == 0


def _costly(text: str) -> bool:
    """Powers and factorials that nobody wants worked out."""
    power = re.search(r"\^\s*\{?\s*-?(\d{5,}|\d+\s*\^)|!\s*!|\d{4,}\s*!|(?:\^[^\^]*){4}", text)
    return power is not None or len(text) > _LONGEST
