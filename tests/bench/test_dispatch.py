"""The dispatch bench counts what a plain loop counts."""

import pytest

from bench.dispatch import NODES, RANKS, routings, volume


def test_rows_and_bytes_that_leave_a_node_are_those_of_a_plain_loop():
    indices = routings(200)["even"]
    found, tokens = volume(indices), indices.tolist()
    assert max(len({e // 32 for e in token}) for token in tokens) == 4
    nodes = [sum(len({e // 32 for e in token} - {home}) for home in range(NODES)) / NODES for token in tokens]
    rows = [sum(e // 32 != home for e in token for home in range(NODES)) / NODES for token in tokens]
    assert found["rows, two"] == pytest.approx(sum(nodes) / len(tokens))
    assert found["rows, one"] == pytest.approx(sum(rows) / len(tokens))
    ranks = [len({e // (256 // RANKS) for e in token}) for token in tokens]
    assert found["the same, once a rank"] == pytest.approx(sum(ranks) / len(tokens))
    crossing = (
        2 * (7168 + 56 * 4) + 2 * 7168 * 2 + 8 * 12
    )  # codes and scales, bfloat16, names and weights and their gradients
    assert found["KiB, two"] == pytest.approx(found["rows, two"] * crossing / 1024)
