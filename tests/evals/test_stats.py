"""Errors and tests against cases worked by hand and against brute force."""

import itertools
import math
import random

import pytest

from dsv3.evals.stats import compare_paired, mcnemar, pass_at_k, stderr


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, c in itertools.product(range(1, 7), range(7)):
        if c > n:
            continue
        for k in range(1, n + 1):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))
    with pytest.raises(ValueError, match="k is 3 with 2 samples"):
        pass_at_k(2, 1, 3)


def test_stderr_is_that_of_a_mean():
    values = [0.0, 1, 1, 0, 1]
    assert stderr(values) == pytest.approx(math.sqrt(0.3 / 5))  # sample variance 0.3
    assert math.isnan(stderr([1.0]))
    # Twins say nothing new: each value twice, clustered, has the error of once.
    assert stderr([v for v in values for _ in range(2)], [i for i in range(5) for _ in range(2)]) == pytest.approx(
        stderr(values)
    )
    with pytest.raises(ValueError, match="2 values and 1 clusters"):
        stderr([0, 1], ["a"])


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096)


def test_a_paired_comparison_finds_what_is_there_and_not_what_is_not():
    rng = random.Random(0)
    base = {str(i): float(rng.random() < 0.5) for i in range(300)}
    same = compare_paired(base, dict(base))
    assert (same.difference, same.p, same.mcnemar, same.significant) == (0, 1, 1, False)
    up = base | {str(i): 1.0 for i in range(60)}
    told = compare_paired(base, up)
    assert told.difference == pytest.approx(told.b - told.a)
    assert told.significant
    assert told.p < 0.001
    assert told.low > 0
    assert (told.worse, told.better) == (0, sum(up[i] != base[i] for i in base))
    shuffled = {i: float(rng.random() < 0.5) for i in base}
    assert not compare_paired(base, shuffled).significant
    with pytest.raises(ValueError, match="300 and 1 items"):
        compare_paired(base, {"x": 1.0})


def test_permutations_are_exact_where_few():
    a, b = {"x": 0.0, "y": 0.0, "z": 0.5}, {"x": 1.0, "y": 0.5, "z": 0.5}
    told = compare_paired(a, b)
    assert told.p == pytest.approx(2 / 4)
    assert told.mcnemar is None


def test_null_p_values_are_uniform_enough():
    """Under no difference, p < 0.1 comes at most about as often as it says."""
    rng, low = random.Random(1), 0
    for _ in range(200):
        a = {str(i): float(rng.random() < 0.5) for i in range(40)}
        b = {str(i): float(rng.random() < 0.5) for i in range(40)}
        low += compare_paired(a, b, draws=200).p < 0.1
    assert low < 40  # 20 expected, standard deviation 4.2
