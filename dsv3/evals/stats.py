"""How sure a score is: pass@k, standard errors, and whether two runs differ.

    pass@k     1 - C(n-c, k) / C(n, k) for c right of n samples, averaged over items; unbiased (Codex paper, arXiv 2107.03374)
    stderr     of a mean over items: items are drawn, samples within one are not independent: the item's mean counts once.
               Clustered where items share a passage (arXiv 2411.00640, "Adding Error Bars to Evals")
    paired     the same items under two models: the differences' mean and standard error, a sign-flip permutation p, and for
               right-or-wrong scores McNemar's exact p, which looks only at the items that changed

Scores are numbers, mostly 0 or 1. Standard library only.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k samples is right, from `right` of `samples`.

    Raises:
        ValueError: k is not within 1 and samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k} with {samples} samples: give 1 to {samples}")
    if not 0 <= right <= samples:
        raise ValueError(f"right is {right} of {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def stderr(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float:
    """Standard error of the mean of item scores; of items in clusters, if those are given. NaN for a single one.

    Raises:
        ValueError: clusters are not as many as values.
    """
    n = len(values)
    if clusters is not None and len(clusters) != n:
        raise ValueError(f"{n} values and {len(clusters)} clusters: give one each")
    mean = fmean(values) if values else math.nan
    sums: dict[Hashable, float] = defaultdict(float)
    for key, value in zip(clusters if clusters is not None else range(n), values):
        sums[key] += value - mean
    groups = len(sums)
    if groups < 2:
        return math.nan
    return math.sqrt(groups / (groups - 1) * math.fsum(s * s for s in sums.values())) / n


@dataclass(frozen=True)
class Comparison:
    """Of two runs on the same items.

    Attributes:
        a, b: their means; difference: b - a, with its standard error and its 95 percent interval.
        p: chance of so large a difference if the two were alike: sign-flip permutation. mcnemar: the exact test of the items
            that changed, None for scores that are not 0 or 1. better, worse: items on which b scores above and below a.
    """

    items: int
    a: float
    b: float
    difference: float
    stderr: float
    low: float
    high: float
    p: float
    mcnemar: float | None
    better: int
    worse: int

    @property
    def significant(self) -> bool:
        return (self.p if self.mcnemar is None else self.mcnemar) < 0.05


def compare_paired(a: Mapping[str, float], b: Mapping[str, float], *, draws: int = 10_000, seed: int = 0) -> Comparison:
    """Whether run b differs from run a, item by item. Exact where that takes no more than `draws` permutations.

    Args:
        a, b: item id -> score.

    Raises:
        ValueError: the items are not the same, or there are none.
    """
    if set(a) != set(b) or not a:
        only = sorted(set(a) ^ set(b))
        raise ValueError(
            f"{len(a)} and {len(b)} items, {len(only)} in one only ({only[:3]}): compare runs of the same items"
        )
    items = sorted(a)
    differences = [b[i] - a[i] for i in items]
    mean, n = fmean(differences), len(items)
    error = stderr(differences)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    binary = all(v in (0, 1) for run in (a, b) for v in run.values())
    return Comparison(
        n, fmean(a.values()), fmean(b.values()), mean, error, mean - 1.96 * error, mean + 1.96 * error,
        _permutation(differences, draws, seed), mcnemar(better, worse) if binary else None, better, worse,
    )  # fmt: skip


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p of so uneven a split of the items that changed, were both ways equally likely."""
    n, few = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)


def _permutation(differences: Sequence[float], draws: int, seed: int) -> float:
    """Two-sided p of the sum of differences under random signs."""
    moved = [d for d in differences if d]
    seen, slack = abs(math.fsum(moved)), 1e-12
    if len(moved) <= 30 and 2 ** len(moved) <= draws:
        sums = [0.0]
        for d in moved:
            sums = [s + sign * d for s in sums for sign in (1, -1)]
        return sum(abs(s) >= seen - slack for s in sums) / len(sums)
    rng = random.Random(seed)
    above = sum(abs(math.fsum(d if rng.random() < 0.5 else -d for d in moved)) >= seen - slack for _ in range(draws))
    return (above + 1) / (draws + 1)
