"""Shards to batches: a deterministic order of rows that any rank, at any time, computes alike.

A row is T + 1 + M consecutive tokens of one source's packed stream (M extra ones for multi-token prediction). Row i
of a source starts at token i T, so the main targets of consecutive rows neither overlap nor leave gaps (a tail shorter
than a row is never read). Documents are packed without regard to rows and attention across them is not masked by
default, as in the DeepSeek-V3 report (section 4.1); `doc_ids` is there for those who mask.

Which source global row g comes from: the quota method (Balinski and Young 1975). Of the sources with fewer than
w (g + 1) rows so far, the one with the largest w / (rows + 1) is next, so after any number of rows each source is less
than one row away from its share w. Exact in integers. Which row of it: the source's counter walks a permutation drawn
from (seed, source, epoch), a fresh one each epoch.

The state is the counters. Batch sizes may change between calls and ranks between runs: rows are numbered globally.
Does not: prefetch, move anything to a device, or mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.data.shards import Shards, ShardSource
from dsv3.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """B rows of T + M positions each, all int64. The main loss uses [:, :T]."""

    tokens: Tensor
    targets: Tensor
    """tokens shifted by one."""
    positions: Tensor
    """0 .. T + M - 1."""
    doc_ids: Tensor
    """Number of the document in its source that each token is of; equal within a row means same document."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """T is `seq_len`, M is `extra_tokens` (the model's MTP depth)."""

    seq_len: int
    extra_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.extra_tokens < 0 or self.seed < 0:
            raise ValueError(
                f"seq_len {self.seq_len} must be at least 1, "
                f"extra_tokens {self.extra_tokens} and seed {self.seed} at least 0"
            )


class Loader:
    """Batches of a mixture without end, for rank `rank` of `world`.

    Raises:
        ValueError: a source is smaller than one row, or rank is not below world.
    """

    def __init__(self, shards: Shards, config: LoaderConfig, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} must be from 0 to world - 1 = {world - 1}")
        self.shards, self.config, self.rank, self.world = shards, config, rank, world
        self._sizes = [_row_count(source, config.seq_len, config.extra_tokens) for source in shards.sources]
        for source, size in zip(shards.sources, self._sizes, strict=True):
            if size == 0:
                raise ValueError(
                    f"source {source.name!r} has {len(source.tokens):,} tokens, one row needs "
                    f"{config.seq_len + 1 + config.extra_tokens:,}: use a shorter seq_len or more text"
                )
        self._weights = _integer_weights([source.weight for source in shards.sources])
        self._counts = [0] * len(shards.sources)
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}
        self._kept: Callable[[int], range] | None = None

    def keep(self, rows: Callable[[int], range]) -> None:
        """Read from now on, of a batch of so many rows, only these; the others are zeros, which take neither time nor memory. For
        one of many processes that see each batch whole and train on a part of it."""
        self._kept = rows

    def next_batch(self, rows: int) -> Batch:
        """The next `rows` rows of the global order, or rather this rank's share of them, rows / world.

        Raises:
            ValueError: rows is not a positive multiple of world.
        """
        if rows < 1 or rows % self.world:
            raise ValueError(
                f"a batch of {rows} rows does not divide over world {self.world}: use a multiple of {self.world}"
            )
        share = rows // self.world
        mine = range(self.rank * share, (self.rank + 1) * share)
        kept = mine if self._kept is None else self._kept(rows)
        picks: list[tuple[ShardSource, int] | None] = []
        for number in range(rows):
            source = self._next_source()
            count = self._counts[source]
            self._counts[source] += 1
            if number in mine:
                picks.append((self.shards.sources[source], self._row(source, count)) if number in kept else None)
        return _gather(picks, self.config.seq_len, self.config.extra_tokens)

    def check_batch(self, rows: int) -> None:
        """Refuse a corpus that does not fill one batch of `rows` global rows.

        Raises:
            ValueError: with both numbers.
        """
        if (total := sum(self._sizes)) < rows:
            raise ValueError(
                f"the corpus has {total:,} rows of {self.config.seq_len} tokens, a batch needs {rows:,}: "
                "use a smaller batch, a shorter seq_len or more text"
            )

    @property
    def epoch(self) -> dict[str, float]:
        """How often each source has been seen: 0.5 is half of it, 2 is twice all of it."""
        names = [source.name for source in self.shards.sources]
        return {name: count / size for name, count, size in zip(names, self._counts, self._sizes, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, the same on every rank: rows drawn so far by all ranks, the same per source, and what from."""
        names = [source.name for source in self.shards.sources]
        return {
            "rows": sum(self._counts),
            "counters": dict(zip(names, self._counts, strict=True)),
            "shards": self.shards.fingerprint,
            "config": asdict(self.config),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; rank and world may differ from then.

        Raises:
            ValueError: the state is of other shards or another config; both are shown, and nothing is changed.
        """
        own = self.state_dict()
        if state["shards"] != own["shards"]:
            raise ValueError(
                f"the state is of shards {state['shards']:.12}, these are {own['shards']:.12}: "
                "resume with the shards the run was started with, or start a new run"
            )
        if state["config"] != own["config"]:
            raise ValueError(
                f"the state is of loader config {state['config']}, this one is {own['config']}: "
                "resume with the same values, or start a new run"
            )
        counters = state["counters"]
        if set(counters) != set(own["counters"]) or sum(counters.values()) != state["rows"]:
            raise ValueError(
                f"the state counts {counters} in {state['rows']} rows of sources {list(own['counters'])}: damaged"
            )
        self._counts = [counters[source.name] for source in self.shards.sources]

    def _next_source(self) -> int:
        total, drawn = sum(self._weights), sum(self._counts) + 1
        best = -1
        for source, (weight, count) in enumerate(zip(self._weights, self._counts, strict=True)):
            if count * total >= weight * drawn:
                continue
            # weight / (count + 1) > the best one's, without a division; a tie goes to the earlier source.
            if best < 0 or weight * (self._counts[best] + 1) > self._weights[best] * (count + 1):
                best = source
        return best

    def _row(self, source: int, count: int) -> int:
        epoch, index = divmod(count, self._sizes[source])
        cached = self._permutations.get(source)
        if cached is None or cached[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.config.seed, source, epoch]))
            cached = self._permutations[source] = (epoch, generator.permutation(self._sizes[source]))
        return int(cached[1][index])


def held_out_batches(
    shards: Shards, *, seq_len: int, extra_tokens: int, rows: int, max_rows: int | None = None
) -> Iterator[Batch]:
    """Every row of every source once, in order, `rows` at a time (the last batch may be smaller).

    Args:
        max_rows: take only so many, spread evenly over all of them, so that each source keeps its share.

    Raises:
        ValueError: no source has a single row (one that is too short beside others adds none), or rows is below 1.
    """
    config = LoaderConfig(seq_len=seq_len, extra_tokens=extra_tokens)
    if rows < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"rows {rows} and max_rows {max_rows} must be at least 1")
    sizes = [_row_count(source, seq_len, extra_tokens) for source in shards.sources]
    if not any(sizes):
        raise ValueError(
            f"held-out sources have {[len(source.tokens) for source in shards.sources]} tokens, one row needs "
            f"{config.seq_len + 1 + config.extra_tokens}: use a shorter seq_len or hold more text out"
        )
    total = sum(sizes)
    taken = total if max_rows is None else min(max_rows, total)
    every = [(source, row) for source, size in zip(shards.sources, sizes, strict=True) for row in range(size)]
    picks = [every[i * total // taken] for i in range(taken)]
    return (_gather(picks[i : i + rows], seq_len, extra_tokens) for i in range(0, taken, rows))


def byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """(vocab_size,) int64: UTF-8 bytes each token stands for, 0 for special tokens, which are no text."""
    lengths = [
        0 if tokenizer.is_special(token) else len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)
    ]
    return torch.tensor(lengths, dtype=torch.int64)


def count_bytes(targets: Tensor, byte_lengths: Tensor) -> int:
    """Bytes of text that the evaluated targets (any shape, int64) stand for: the denominator of bits per byte."""
    return int(byte_lengths.to(targets.device)[targets].sum())


def _row_count(source: ShardSource, seq_len: int, extra_tokens: int) -> int:
    return max(0, (len(source.tokens) - 1 - extra_tokens) // seq_len)


def _integer_weights(weights: list[float]) -> list[int]:
    """Integers in the proportion of the weights, read as their shortest decimals: 0.1 is a tenth, not a float."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * common) for weight in exact]


def _gather(picks: Sequence[tuple[ShardSource, int] | None], seq_len: int, extra_tokens: int) -> Batch:
    """A row a pick; None is a row of zeros."""
    length = seq_len + extra_tokens
    tokens, targets, doc_ids = (np.zeros((len(picks), length), dtype=np.int64) for _ in range(3))
    for i, pick in enumerate(picks):
        if pick is None:
            continue
        source, row = pick
        start = row * seq_len
        read = source.tokens[start : start + length + 1]
        tokens[i], targets[i] = read[:-1], read[1:]
        doc_ids[i] = np.searchsorted(source.offsets, np.arange(start, start + length), side="right") - 1
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.arange(length).expand(len(picks), length),
        doc_ids=torch.from_numpy(doc_ids),
    )
