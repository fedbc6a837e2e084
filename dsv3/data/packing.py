"""Samples to batches: several conversations a row, none of which sees another, in an order that resumes anywhere.

    epoch   every source gives its share of the samples, each from where it stopped in its own permutation; all are shuffled
            and laid into rows, first fit: into the oldest open row that has room (of at most OPEN that are open)
    row     sample | sample | ... | padding,   T positions, and M more of padding for the MTP layers' last inputs

A sample of n tokens takes n - 1 positions: its last token is a target only. So no position's target lies in another sample,
and depth k's at position i, the target of position i + k, counts where both positions are of one sample.

Positions run on through a row and do not begin anew with a sample. Attention sees rotary positions only by their difference,
within a sample the same either way, and the mask hides all else: the results are equal but for rounding (tested).

The row's number says everything: epoch and rows are functions of (seed, epoch) and the samples. A batch of the run's end may
have fewer rows. Does not: read or render (data/conversations.py), or divide rows over processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.data.conversations import Samples

OPEN = 256  # rows that may still take a sample
PADDING = -1  # doc_id of no sample


@dataclass(frozen=True)
class PackedBatch:
    """B rows of T + M positions. Where nothing is to be learnt, targets mean nothing."""

    tokens: Tensor  # int64
    targets: Tensor  # int64
    doc_ids: Tensor  # int64; equal within a row means same sample, PADDING none
    learn: Tensor  # bool: the target is trained

    def valid(self, depth: int, length: int) -> Tensor:
        """(B, length) boolean: positions whose target at MTP depth k (0: the main model) is trained."""
        same = self.doc_ids[:, depth : depth + length] == self.doc_ids[:, :length]
        return self.learn[:, depth : depth + length] & same


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """T is `seq_len`, M is `extra_tokens` (the model's MTP depth)."""

    seq_len: int
    extra_tokens: int = 0
    epochs: int = 2
    seed: int = 0
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.epochs < 1 or self.extra_tokens < 0 or self.seed < 0:
            raise ValueError(
                f"seq_len {self.seq_len} and epochs {self.epochs} must be at least 1, "
                f"extra_tokens {self.extra_tokens} and seed {self.seed} at least 0"
            )


Pick = tuple[int, int]  # source, sample


class PackedLoader:
    """Rows of `epochs` epochs, then no more. `rows_of(epoch)` plans one; `total_rows` is of the whole run.

    Raises:
        ValueError: no samples, or one longer than a row.
    """

    def __init__(self, sources: Sequence[Samples], config: PackingConfig) -> None:
        self.sources, self.config = [s for s in sources if len(s)], config
        if not self.sources:
            raise ValueError("there are no samples to pack: give conversations")
        longest = max(int(source.lengths.max()) for source in self.sources)
        if longest - 1 > config.seq_len:
            raise ValueError(f"a sample has {longest} tokens, a row takes {config.seq_len + 1}: leave it out")
        self.quotas = _quotas(self.sources)
        self.total_rows = 0
        self._ends: list[int] = []  # row number at which each epoch ends
        self._row = 0
        self._plan: tuple[int, list[list[Pick]]] = (-1, [])
        for epoch in range(config.epochs):
            self.total_rows += len(self.rows_of(epoch))
            self._ends.append(self.total_rows)
        every = " ".join(source.fingerprint for source in self.sources)
        self.fingerprint = sha256(every.encode()).hexdigest()

    def rows_of(self, epoch: int) -> list[list[Pick]]:
        """The samples of each row of an epoch; a function of (seed, epoch) alone."""
        if self._plan[0] != epoch:
            self._plan = epoch, list(_first_fit(self._order(epoch), self.sources, self.config.seq_len))
        return self._plan[1]

    def next_batch(self, rows: int) -> PackedBatch:
        """The next rows, as many as there still are.

        Raises:
            ValueError: rows is below 1, or the last epoch is over.
        """
        if rows < 1 or self._row >= self.total_rows:
            raise ValueError(f"row {self._row} of {self.total_rows}: {rows} more were asked for")
        numbers = range(self._row, min(self._row + rows, self.total_rows))
        picks = []
        for number in numbers:
            epoch = next(e for e, end in enumerate(self._ends) if number < end)
            picks.append(self.rows_of(epoch)[number - (self._ends[epoch - 1] if epoch else 0)])
        self._row = numbers.stop
        return pack(picks, self.sources, self.config)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: rows drawn so far, and what from."""
        return {"rows": self._row, "samples": self.fingerprint, "config": asdict(self.config)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state is of other samples or another config; both are shown, and nothing is changed.
        """
        own = self.state_dict()
        for key, what in (("samples", "conversations"), ("config", "packing config")):
            if state.get(key) != own[key]:
                raise ValueError(
                    f"the state is of {what} {state.get(key)!s:.200}, these are {own[key]!s:.200}: resume with what "
                    "the run was started with, or start a new run"
                )
        if not 0 <= state["rows"] <= self.total_rows:
            raise ValueError(f"the state is at row {state['rows']} of {self.total_rows}: damaged")
        self._row = state["rows"]

    def summary(self) -> list[str]:
        """What an epoch holds, a line a source and one for the rows."""
        said = []
        for source, quota in zip(self.sources, self.quotas, strict=True):
            weight = "" if source.weight is None else f", weight {source.weight:g}: {quota:,} an epoch"
            said.append(
                f"{source.name}: {len(source):,} samples, {len(source.ids):,} tokens, {int(source.learn.sum()):,} learnt{weight}"
            )
        rows, lengths = self.rows_of(0), [source.lengths for source in self.sources]
        taken = sum(int(lengths[s][i]) - 1 for row in rows for s, i in row)
        said.append(
            f"{len(rows):,} rows an epoch, {sum(map(len, rows)) / len(rows):.1f} samples a row, "
            f"{taken / (len(rows) * self.config.seq_len):.1%} filled"
        )
        return said

    def first_row(self, most: int) -> tuple[list[int], list[bool]]:
        """ids and mask of the first row's samples, as many as there are within `most` tokens, but one: to be looked at."""
        ids, mask = list[int](), list[bool]()
        for source, index in self.rows_of(0)[0]:
            start, end = self.sources[source].offsets[index : index + 2]
            if ids and len(ids) + end - start > most:
                break
            ids += self.sources[source].ids[start:end].tolist()
            mask += self.sources[source].learn[start:end].tolist()
        return ids, mask

    def _order(self, epoch: int) -> list[Pick]:
        """The epoch's samples, shuffled. A source goes through its permutations without regard to epochs."""
        picks: list[Pick] = []
        for source, (samples, quota) in enumerate(zip(self.sources, self.quotas, strict=True)):
            count, end, size = epoch * quota, (epoch + 1) * quota, len(samples)
            while count < end:
                turn, index = divmod(count, size)
                generator = np.random.Generator(np.random.PCG64([self.config.seed, 0, source, turn]))
                taken = generator.permutation(size)[index : index + end - count].tolist()
                picks += [(source, sample) for sample in taken]
                count += len(taken)
        shuffle = np.random.Generator(np.random.PCG64([self.config.seed, 1, epoch])).permutation(len(picks))
        return [picks[i] for i in shuffle]


def held_out_batches(
    sources: Sequence[Samples], config: PackingConfig, *, rows: int, max_rows: int
) -> list[PackedBatch]:
    """Up to max_rows packed rows of the samples, `rows` a batch; without samples none."""
    sources = [source for source in sources if len(source)]
    if not sources:
        return []
    order = [(s, i) for s, samples in enumerate(sources) for i in range(len(samples))]
    shuffle = np.random.Generator(np.random.PCG64(config.seed)).permutation(
        len(order)
    )  # so that each source is among the first
    picks = list(_first_fit([order[i] for i in shuffle], sources, config.seq_len))[:max_rows]
    return [pack(picks[at : at + rows], sources, config) for at in range(0, len(picks), rows)]


def pack(picks: Sequence[Sequence[Pick]], sources: Sequence[Samples], config: PackingConfig) -> PackedBatch:
    """A batch of the rows given."""
    shape = len(picks), config.seq_len + config.extra_tokens
    tokens, targets = np.full(shape, config.pad_id, np.int64), np.full(shape, config.pad_id, np.int64)
    doc_ids, learn = np.full(shape, PADDING, np.int64), np.zeros(shape, np.bool_)
    for row, samples in enumerate(picks):
        at = 0
        for number, (source, index) in enumerate(samples):
            start, end = sources[source].offsets[index : index + 2]
            ids, mask = sources[source].ids[start:end], sources[source].learn[start:end]
            place = slice(at, at + len(ids) - 1)
            tokens[row, place], targets[row, place] = ids[:-1], ids[1:]
            doc_ids[row, place], learn[row, place] = number, mask[1:]
            at = place.stop
    return PackedBatch(*(torch.from_numpy(part) for part in (tokens, targets, doc_ids, learn)))


def _first_fit(order: Sequence[Pick], sources: Sequence[Samples], seq_len: int) -> Iterator[list[Pick]]:
    """Rows of picks. When OPEN rows are open and none has room, the fullest is closed."""
    lengths = [source.lengths for source in sources]
    rows: list[list[Pick]] = []
    room = np.zeros(0, dtype=np.int64)
    for source, index in order:
        size = int(lengths[source][index]) - 1
        fits = np.flatnonzero(room >= size)
        if len(fits):
            at = int(fits[0])
        else:
            if len(rows) == OPEN:
                fullest = int(room.argmin())
                yield rows.pop(fullest)
                room = np.delete(room, fullest)
            at = len(rows)
            rows.append([])
            room = np.append(room, seq_len)
        rows[at].append((source, index))
        room[at] -= size
    yield from rows


def _quotas(sources: Sequence[Samples]) -> list[int]:
    """Samples of each source in an epoch: all of them; or with weights as many in all, shared out by largest remainders."""
    sizes = [len(source) for source in sources]
    if sources[0].weight is None:
        return sizes
    weights = [source.weight or 0.0 for source in sources]
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for i in by_rest[: sum(sizes) - sum(quotas)]:
        quotas[i] += 1
    return [max(1, quota) for quota in quotas]
