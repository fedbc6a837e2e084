"""Maths and code among other text: by rules, and by a classifier that seed documents teach and the corpus itself widens.

Rules (`kind_of`), cheap and without training:

    code     of the lines (less blank ones, and comments with # and *) at least 35% look like a statement, a definition, a
             closing brace, a tag; 60% of fewer than ten lines
    maths    LaTeX commands and formulas, equations and calculations make up at least 1 in 25 of the words, with at least
             three of them. Word problems without a formula are prose to it: that is what a classifier is for

Classifier (`Classifier`): logistic regression on hashed words and pairs of words (2^18 weights), each text's counts as
log(1 + n), of length 1; Nesterov's gradient descent on all texts, with weight decay, in numpy: a rate for each weight (Adam)
would make a rule of every rare word, and find nothing new. Words are `\\w+` or single marks, lower case, digits as 0.

Widening (`widen`): train on seeds against half of a sample of the corpus; what of the other half scores at least `threshold`
joins the seeds, and what does not stays among the others; again, `rounds` times. So seeds of one style find other styles.

Source: DeepSeekMath section 2.1 and DeepSeek-Coder-V2 section 2 (a fastText classifier, from OpenWebMath or code pages as seeds, in
three or four rounds), which V3's corpus builds on; here without domains, by which they chose what was annotated by hand.
Does not: judge quality (data/quality.py).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROSE, MATHS, CODE = "prose", "maths", "code"
_LOOKED_AT = 20_000
"""Characters of a text that decide."""
_LEAST_CODE, _LEAST_CODE_OF_FEW, _FEW_LINES = 0.35, 0.6, 10
_LEAST_MATHS, _LEAST_FORMULAS = 0.04, 3

_CODE_LINE = re.compile(
    r"""^\s*(?:
        (?:def|class|import|from\s+[\w.]+\s+import|return|elif|else|try|except|finally|with|async|await|raise|assert|yield|lambda
           |public|private|protected|static|void|int|char|double|float|bool|const|let|var|function|struct|enum|interface
           |package|using|namespace|template|typedef|fn|impl|pub|use|mod|func|go|defer|select|switch|case|break|continue
           |echo|export|local|fi|done|esac)\b (?=.*[(){}\[\]=:;<>*"]|$)
        | (?:SELECT|FROM|WHERE|JOIN|GROUP\ BY|ORDER\ BY|INSERT|UPDATE|CREATE)\b | set\ -\w+ | .* ;\ (?:then|do) \s*$
        | (?:if|while|for)\b .* [:({)] \s*$
        | \#\s*(?:include|define|ifdef|ifndef|endif|pragma|!)
        | [\w.\[\]\->*&:"']+ \s* (?:[-+*/%|&^]|<<|>>)? = (?!=) \s* \S      # assignment
        | [\w.:>-]+ \( .* \) \s* [;{:,)]? \s*$                             # call
        | [)}\]]+ [;,)]* \s*$ | .* [;{}] \s*$ | @\w+ | </?\w+[^>]*>\s*$ | (?://|/\*|"\"") .*
        | ["'][\w-]+["'] \s* : .*
    )""",
    re.VERBOSE,
)
_EITHER = re.compile(r"\s*(?:#+ |\*)")  # a comment, or Markdown's headings and lists
_FORMULA = re.compile(
    r"""\\(?:frac|sqrt|sum|int|prod|lim|begin|left|right|alpha|beta|gamma|theta|lambda|pi|infty|cdot|times|leq?|geq?|neq
          |in|mathbb|mathrm|partial|nabla|text|ldots|to|log|sin|cos)\b
      | \$\$? [^$\n]{1,200} [\\^_=<>+] [^$\n]{0,200} \$\$?          # $x^2$, not "costs $5 and $6"
      | [∑∫∏√≤≥≠≈∈∀∃∞∂∇⊂∪∩→⇒±×÷]
      | \d \s* [-+*/×÷] \s* [\d(] | [\w)\]] \s* = \s* [-\d(\w\\$] | \w\^[\w({]
    """,
    re.VERBOSE,
)
_TOKEN = re.compile(r"\w+|[^\w\s]")
_DIGITS = re.compile(r"\d+")
_BITS = 18
_LEAST_SEEDS = 10
_RATE, _DECAY = 4.0, 1e-3
"""The rate is one over the loss's curvature: texts have length 1, their shares sum to 1, the sigmoid's slope is at most 1/4."""


def kind_of(text: str) -> str:
    """CODE, MATHS or PROSE, by the rules."""
    text = text[:_LOOKED_AT]
    lines = [line for line in text.splitlines() if line.strip() and not _EITHER.match(line)]
    least = _LEAST_CODE if len(lines) >= _FEW_LINES else _LEAST_CODE_OF_FEW
    if len(lines) >= 3 and sum(_CODE_LINE.match(line) is not None for line in lines) >= least * len(lines):
        return CODE
    formulas = len(_FORMULA.findall(text))
    if formulas >= _LEAST_FORMULAS and formulas >= _LEAST_MATHS * len(text.split()):
        return MATHS
    return PROSE


@dataclass(frozen=True)
class Classifier:
    """weights (2^18,) float32, bias: `score` of a text is the probability that it is of the seeds' kind."""

    weights: np.ndarray
    bias: float

    @classmethod
    def train(cls, seeds: Sequence[str], others: Sequence[str], *, steps: int = 200) -> Classifier:
        """Both kinds count alike, however many there are of each. The same texts give the same classifier.

        Raises:
            ValueError: fewer than ten texts of either kind.
        """
        if min(len(seeds), len(others)) < _LEAST_SEEDS:
            raise ValueError(
                f"{len(seeds)} seeds and {len(others)} other texts: a classifier needs at least {_LEAST_SEEDS} of each"
            )
        features = [_features(text) for text in (*seeds, *others)]
        index = np.concatenate([at for at, _ in features])
        value = np.concatenate([values for _, values in features])
        row = np.repeat(np.arange(len(features)), [len(at) for at, _ in features])
        target = np.arange(len(features)) < len(seeds)
        balance = np.where(target, 0.5 / len(seeds), 0.5 / len(others))
        used, index = np.unique(index, return_inverse=True)  # the others would stay zero
        weights = before = np.zeros(len(used) + 1)  # the bias last
        for step in range(steps):
            ahead = weights + step / (step + 3) * (weights - before)
            scores = np.bincount(row, ahead[index] * value, len(features)) + ahead[-1]
            error = balance * (_sigmoid(scores) - target)
            gradient = np.append(np.bincount(index, value * error[row], len(used)), error.sum())
            gradient[:-1] += _DECAY * ahead[:-1]
            weights, before = ahead - _RATE * gradient, weights
        whole = np.zeros(1 << _BITS, dtype=np.float32)
        whole[used] = weights[:-1]
        return cls(whole, float(weights[-1]))

    def score(self, text: str) -> float:
        index, value = _features(text)
        return float(_sigmoid(self.weights[index] @ value + self.bias))

    def save(self, path: Path) -> None:
        used = np.flatnonzero(self.weights)
        np.savez_compressed(path, used=used, weights=self.weights[used], bias=np.float64(self.bias))

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """What `save` wrote.

        Raises:
            ValueError: the file is no such classifier.
        """
        try:
            with np.load(path) as file:
                weights = np.zeros(1 << _BITS, dtype=np.float32)
                weights[file["used"]] = file["weights"]
                return cls(weights, float(file["bias"]))
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is no classifier that Classifier.save wrote ({error})") from None


def widen(
    seeds: Sequence[str], corpus: Sequence[str], *, rounds: int = 3, threshold: float = 0.5
) -> tuple[Classifier, list[int]]:
    """(classifier, texts recalled after each round): see above. `corpus`: a sample of the text that it will be run on.

    Raises:
        ValueError: fewer than ten seeds, or fewer than ten texts in a half of the corpus left that are not of the kind.
    """
    found: list[bool] = [False] * len(corpus)
    recalled = []
    for _ in range(rounds):
        # Half by half, each by what the other half taught: a text that was among the others would be learnt as one of them.
        halves = [_train(seeds, corpus, found, half) for half in (0, 1)]
        found = [
            is_in or halves[1 - _half(text)].score(text) >= threshold for text, is_in in zip(corpus, found, strict=True)
        ]
        recalled.append(sum(found))
    return _train(seeds, corpus, found), recalled


def _train(seeds: Sequence[str], corpus: Sequence[str], found: Sequence[bool], half: int | None = None) -> Classifier:
    """Of the seeds and what was found against the rest, in the whole of the corpus or in a half of it."""
    taken = [at for at, text in enumerate(corpus) if half is None or _half(text) == half]
    positives = [*seeds, *(corpus[at] for at in taken if found[at])]
    return Classifier.train(positives, [corpus[at] for at in taken if not found[at]])


def _half(text: str) -> int:
    return zlib.crc32(text[:_LOOKED_AT].encode("utf-8", "surrogatepass")) % 2


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _features(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(buckets (n,) int64, values (n,) float64 of length 1) of words and of pairs of neighbours."""
    tokens = _TOKEN.findall(_DIGITS.sub("0", text[:_LOOKED_AT].lower()))
    if not tokens:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    hashes = {token: zlib.crc32(token.encode("utf-8", "surrogatepass")) for token in set(tokens)}
    single = np.fromiter((hashes[token] for token in tokens), dtype=np.uint64, count=len(tokens))
    pairs = single[:-1] * np.uint64(0x9E3779B97F4A7C15) + single[1:]
    mixed = np.concatenate([single, pairs]) * np.uint64(0xD6E8FEB86659FD93)
    buckets, counts = np.unique((mixed >> np.uint64(64 - _BITS)).astype(np.int64), return_counts=True)
    values = np.log1p(counts)
    return buckets, values / math.sqrt(float(values @ values))
