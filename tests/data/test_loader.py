"""Loader: exact rows, exact mixture, every row once an epoch, resume and rank split to the bit, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.loader import Batch, Loader, LoaderConfig, byte_lengths, count_bytes, held_out_batches
from dsv3.data.shards import Shards, ShardSource


def make_shards(sizes: list[int], weights: list[float] | None = None, fingerprint: str = "print") -> Shards:
    """Source s holds the tokens 1000 s, 1000 s + 1, ..., in documents of seven: a token tells where it is from."""
    weights = weights or [1.0] * len(sizes)
    sources = tuple(
        ShardSource(f"s{s}", weight, np.arange(size, dtype=np.uint16) + 1000 * s, np.arange(0, size, 7), size)
        for s, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    )
    return Shards(Path("nowhere"), sources, fingerprint, "tokenizer")


def joined(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in batches])


def origins(tokens: torch.Tensor, seq_len: int) -> list[tuple[int, int]]:
    """(source, row) of each row of a batch made from `make_shards`."""
    return [(first // 1000, first % 1000 // seq_len) for first in tokens[:, 0].tolist()]


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "positions", "doc_ids")
    )


@settings(max_examples=40, deadline=None)
@given(seq_len=st.integers(1, 20), extra=st.integers(0, 3), size=st.integers(30, 200), rows=st.integers(1, 9))
def test_rows_are_exact_slices_of_the_stream(seq_len: int, extra: int, size: int, rows: int) -> None:
    loader = Loader(make_shards([size, 50]), LoaderConfig(seq_len=seq_len, extra_tokens=extra))
    batch = loader.next_batch(rows)
    length = seq_len + extra
    for name in ("tokens", "targets", "positions", "doc_ids"):
        tensor = getattr(batch, name)
        assert tensor.shape == (rows, length)
        assert tensor.dtype == torch.int64
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert torch.equal(batch.tokens, batch.tokens[:, :1] + torch.arange(length))
    assert torch.equal(batch.positions, torch.arange(length).expand(rows, length))
    assert torch.equal(batch.doc_ids, batch.tokens % 1000 // 7)
    assert (batch.tokens[:, 0] % 1000 % seq_len == 0).all()


def test_rows_that_are_not_kept_are_zeros_and_change_no_other() -> None:
    whole, part = (Loader(make_shards([90, 80]), LoaderConfig(seq_len=5, extra_tokens=1)) for _ in range(2))
    part.keep(lambda rows: range(rows // 2, rows))
    for rows in (4, 6):
        every, mine = whole.next_batch(rows), part.next_batch(rows)
        for name in ("tokens", "targets", "doc_ids"):
            assert torch.equal(getattr(mine, name)[rows // 2 :], getattr(every, name)[rows // 2 :])
            assert not getattr(mine, name)[: rows // 2].any()
    assert whole.state_dict() == part.state_dict()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9), sizes=st.lists(st.integers(12, 90), min_size=1, max_size=3), data=st.data())
def test_every_epoch_visits_each_row_of_a_source_once(seed: int, sizes: list[int], data: st.DataObject) -> None:
    seq_len, extra = 5, 2
    loader = Loader(make_shards(sizes), LoaderConfig(seq_len=seq_len, extra_tokens=extra, seed=seed))
    counts = [(size - 1 - extra) // seq_len for size in sizes]
    total = 2 * max(counts) * len(sizes)
    batches = []
    while sum(len(b.tokens) for b in batches) < total:
        batches.append(loader.next_batch(data.draw(st.integers(1, 7))))
    seen: list[list[int]] = [[] for _ in sizes]
    for source, row in origins(joined(batches), seq_len):
        seen[source].append(row)
    for rows, count in zip(seen, counts, strict=True):
        for start in range(0, len(rows) - count + 1, count):
            assert sorted(rows[start : start + count]) == list(range(count))
    assert loader.epoch == {
        f"s{s}": len(rows) / count for s, (rows, count) in enumerate(zip(seen, counts, strict=True))
    }


def test_epochs_seeds_and_sources_are_shuffled_differently() -> None:
    def order(seed: int) -> list[int]:
        tokens = Loader(make_shards([501]), LoaderConfig(seq_len=5, seed=seed)).next_batch(200).tokens
        return [row for _, row in origins(tokens, 5)]

    first = order(0)
    assert first[:100] != first[100:]
    assert first[:100] != sorted(first[:100])
    assert order(1) != first
    assert order(0) == first


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), rows=st.integers(1, 120))
def test_mixture_is_within_one_row_of_its_weights_at_every_row(weights: list[float], rows: int) -> None:
    loader = Loader(make_shards([40] * len(weights), weights), LoaderConfig(seq_len=4))
    tokens = loader.next_batch(rows).tokens
    counts = np.zeros(len(weights))
    shares = np.array(weights) / sum(weights)
    for number, (source, _) in enumerate(origins(tokens, 4), start=1):
        counts[source] += 1
        assert (np.abs(counts - shares * number) < 1 + 1e-9).all()


@settings(max_examples=30, deadline=None)
@given(
    before=st.lists(st.integers(1, 9), max_size=8),
    after=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 5),
)
def test_resuming_anywhere_equals_never_stopping(before: list[int], after: list[int], seed: int) -> None:
    shards, config = make_shards([40, 93], [0.3, 0.7]), LoaderConfig(seq_len=6, extra_tokens=1, seed=seed)
    loader = Loader(shards, config)
    for rows in before:
        loader.next_batch(rows)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["rows"] == sum(before)
    resumed = Loader(shards, config)
    resumed.next_batch(3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert all(same(loader.next_batch(rows), resumed.next_batch(rows)) for rows in after)
    # The order of rows does not depend on how they are cut into batches either.
    whole = Loader(shards, config).next_batch(sum(before) + sum(after))
    resumed.load_state_dict(state)
    assert torch.equal(whole.tokens[sum(before) :], resumed.next_batch(sum(after)).tokens)


@settings(max_examples=20, deadline=None)
@given(world=st.integers(1, 4), shares=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_ranks_together_are_one_loader(world: int, shares: list[int]) -> None:
    shards, config = make_shards([60, 80], [1, 2]), LoaderConfig(seq_len=5, extra_tokens=1, seed=3)
    ranks = [Loader(shards, config, rank, world) for rank in range(world)]
    single = Loader(shards, config)
    for share in shares:
        parts = [loader.next_batch(share * world) for loader in ranks]
        assert all(len(part.tokens) == share for part in parts)
        whole = single.next_batch(share * world)
        assert torch.equal(joined(parts), whole.tokens)
        assert torch.equal(torch.cat([part.doc_ids for part in parts]), whole.doc_ids)
        assert all(loader.state_dict() == single.state_dict() for loader in ranks)


def test_foreign_or_damaged_state_is_refused_and_changes_nothing() -> None:
    shards, config = make_shards([60]), LoaderConfig(seq_len=5)
    state = Loader(shards, config).state_dict()
    loader = Loader(shards, config)
    loader.next_batch(2)
    own = loader.state_dict()
    with pytest.raises(ValueError, match=r"shards other, these are print"):
        loader.load_state_dict({**state, "shards": "other"})
    with pytest.raises(ValueError, match=r"'seq_len': 6.*'seq_len': 5"):
        loader.load_state_dict({**state, "config": {**state["config"], "seq_len": 6}})
    with pytest.raises(ValueError, match="damaged"):
        loader.load_state_dict({**state, "rows": 7})
    assert loader.state_dict() == own


def test_too_little_text_is_refused_with_both_sizes() -> None:
    config = LoaderConfig(seq_len=8, extra_tokens=2)
    Loader(make_shards([11]), config).check_batch(1)
    with pytest.raises(ValueError, match=r"'s1' has 10 tokens, one row needs 11: use a shorter seq_len or more text"):
        Loader(make_shards([11, 10]), config)
    with pytest.raises(ValueError, match=r"has 3 rows of 8 tokens, a batch needs 4"):
        Loader(make_shards([11, 19]), config).check_batch(4)


def test_bad_arguments_are_refused() -> None:
    shards, config = make_shards([60]), LoaderConfig(seq_len=5)
    with pytest.raises(ValueError, match="3 rows does not divide over world 2"):
        Loader(shards, config, 0, 2).next_batch(3)
    with pytest.raises(ValueError, match="0 rows"):
        Loader(shards, config).next_batch(0)
    with pytest.raises(ValueError, match="rank 2"):
        Loader(shards, config, 2, 2)
    with pytest.raises(ValueError, match="seq_len 0"):
        LoaderConfig(seq_len=0)


def test_held_out_rows_come_once_each_in_order() -> None:
    shards = make_shards([33, 4, 26])
    batches = list(held_out_batches(shards, seq_len=5, extra_tokens=1, rows=4))
    assert [len(batch.tokens) for batch in batches] == [4, 4, 2]
    assert origins(joined(batches), 5) == [(0, row) for row in range(6)] + [(2, row) for row in range(4)]
    some = list(held_out_batches(shards, seq_len=5, extra_tokens=1, rows=4, max_rows=5))
    assert origins(joined(some), 5) == [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2)]
    with pytest.raises(ValueError, match=r"\[33, 4, 26\] tokens, one row needs 41"):
        held_out_batches(shards, seq_len=40, extra_tokens=0, rows=4)
    with pytest.raises(ValueError, match="rows 0"):
        held_out_batches(shards, seq_len=5, extra_tokens=0, rows=0)


def test_bytes_of_targets() -> None:
    class Fake:
        vocab_size = 6

        def is_special(self, token: int) -> bool:
            return token in (1, 4, 5)

        def token_bytes(self, token: int) -> bytes:
            return [b"", b"<eos>", "é".encode(), b"abc", b"<fim>", b"<end>"][token]

    lengths = byte_lengths(Fake())
    assert lengths.tolist() == [0, 0, 2, 3, 0, 0]
    assert lengths.dtype == torch.int64
    assert count_bytes(torch.tensor([[2, 3, 1], [3, 4, 0]]), lengths) == 8
