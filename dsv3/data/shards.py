"""Packed token shards: each source of a mixture is one memory-mapped stream of documents, written once.

Format: a folder of `SOURCE.bin` (all documents end to end, each between BOS and EOS, little-endian uint16 when the
vocabulary has at most 65,536 ids, else uint32), `SOURCE.offsets.npy` (int64, where each document starts) and `index.json`:

    version, dtype, tokenizer fingerprint, settings (fim_rate, split_rate, seed),
    sources: name -> weight, tokens, documents, bytes (UTF-8, of the original text), sha256,
             offsets_sha256, offsets_size (bytes of the file)
    fingerprint: SHA-256 of all the rest, hence of every token

Two things happen to a document before it is packed (DeepSeek-V3 report section 4.1), both decided by a generator that
depends on (seed, source name, document's number) alone:

    fill in the middle, in the order PSM, with probability fim_rate, cut at two random characters:
        <bos> <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>
    each combined punctuation-and-newline token is split in two with probability split_rate (the report's proportion is
    unpublished), so that a prompt that ends at such a boundary is nothing new to the model.

Protocol: everything is written and synced in a hidden sibling folder that is renamed into place at the end.
Does not: read files of text or remove duplicates (data/corpus.py), or choose an order of rows (data/loader.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from dsv3.data.tokenizer import Tokenizer

VERSION = 1
INDEX = "index.json"
_BLOCK = 1 << 24
"""Bytes copied at once."""
_CHUNK = 256
"""Documents a call of encode_batch: enough to keep its threads busy, little enough to hold in memory."""

Progress = Callable[[str, int, int], None]
"""Called after each chunk with a source's name and its documents and tokens so far."""


@dataclass(frozen=True)
class ShardSource:
    """One stream: `tokens` (N,) uint16 or uint32 memory map, `offsets` (documents,) int64 document starts."""

    name: str
    weight: float
    tokens: np.ndarray
    offsets: np.ndarray
    text_bytes: int
    """UTF-8 bytes of the original documents."""


@dataclass(frozen=True)
class Shards:
    """An opened folder of shards. Its fingerprint names every token, weight and setting in it."""

    folder: Path
    sources: tuple[ShardSource, ...]
    fingerprint: str
    tokenizer_fingerprint: str

    @property
    def total_tokens(self) -> int:
        return sum(len(source.tokens) for source in self.sources)


def write_shards(
    documents: Mapping[str, Iterable[str]],
    weights: Mapping[str, float],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    fim_rate: float = 0.1,
    split_rate: float = 0.1,
    seed: int = 0,
    first: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Shards:
    """Tokenise and pack every source (name -> texts) into `folder`, which must not exist yet; it appears whole or not.

    Args:
        weights: name -> share of the mixture in rows, of any sum.
        first: name -> number of the source's first document here, where this is a later part of it (`join_shards`).
        fim_rate: probability that a document is rearranged to fill in the middle.
        split_rate: probability that one combined punctuation-and-newline token is split.

    Raises:
        ValueError: nothing to write, a source without documents, names that do not match, a rate or weight out of
            range, a tokenizer without FIM tokens at fim_rate > 0, or `folder` exists.
        OSError: writing failed, such as on a full disk; names the folder and the free bytes.
    """
    packer = _Packer(tokenizer, fim_rate=fim_rate, split_rate=split_rate, seed=seed)
    _check_sources(documents, weights)
    numbers = first or {}
    head = {
        "version": VERSION,
        "dtype": packer.dtype.str,
        "tokenizer": tokenizer.fingerprint,
        "settings": {"fim_rate": fim_rate, "split_rate": split_rate, "seed": seed},
    }

    def write(temp: Path) -> dict[str, Any]:
        return {
            name: {
                "weight": float(weights[name]),
                **_write_source(temp, name, texts, numbers.get(name, 0), packer, progress),
            }
            for name, texts in documents.items()
        }

    return _write_whole(Path(folder).absolute(), head, write)


def join_shards(parts: Sequence[str | Path], weights: Mapping[str, float], folder: str | Path) -> Shards:
    """Shards written in parts, by several processes, end to end: what one `write_shards` of all texts in that order would
    have written, byte for byte, if each part got the right `first`.

    Args:
        parts: folders in order, of one tokenizer and the same settings; each may lack sources.
        weights: name -> share of the mixture; its order is that of the sources.

    Raises:
        ValueError: no parts, parts of other settings, a source without weight or a weight without source, a damaged part.
        OSError: as `write_shards`.
    """
    indices = [_read_index(Path(part)) for part in parts]
    if not indices:
        raise ValueError("there are no parts to join: give the folders that write_shards wrote")
    head = {key: indices[0][key] for key in ("version", "dtype", "tokenizer", "settings")}
    for part, index in zip(parts, indices, strict=True):
        if (other := {key: index[key] for key in head}) != head:
            raise ValueError(
                f"{part} was written with {other}, {parts[0]} with {head}: write the parts with one setting"
            )
    found = {name: () for index in indices for name in index["sources"]}
    _check_sources(found, weights)

    def write(temp: Path) -> dict[str, Any]:
        return {
            name: {"weight": float(weights[name]), **_join_source(temp, name, [Path(part) for part in parts], indices)}
            for name in weights
        }

    return _write_whole(Path(folder).absolute(), head, write)


def _write_whole(target: Path, head: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> Shards:
    """Let `write` fill a hidden folder and tell its sources, then rename the folder to `target`."""
    if target.exists():
        raise ValueError(f"{target} exists: remove it or name another folder for the shards")
    temp = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        for left in target.parent.glob(f".{target.name}.*.tmp"):
            if left == temp or not _runs(left.name.split(".")[-2]):  # a killed writer's
                shutil.rmtree(left, ignore_errors=True)
        temp.mkdir(parents=True)
        index: dict[str, Any] = {**head, "sources": write(temp)}
        index["fingerprint"] = _fingerprint(index)
        with open(temp / INDEX, "wb") as file:
            file.write(json.dumps(index, indent=2).encode())
            _sync(file)
        _sync_folder(temp)
        os.replace(temp, target)
        _sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if isinstance(error, OSError):
            message = (
                f"writing shards to {target} failed ({error.strerror or error}); {_free_bytes(target):,} bytes free"
            )
            raise OSError(error.errno, f"{message}: free some space or name another folder") from error
        raise
    return open_shards(target)


def open_shards(folder: str | Path, verify: bool = False) -> Shards:
    """Memory-map the shards in `folder`, checking sizes against the index; `verify` hashes every token again.

    Raises:
        ValueError: no shards here, an index that was tampered with, a truncated or changed file.
    """
    target = Path(folder)
    index = _read_index(target)
    dtype = np.dtype(index["dtype"])
    sources = []
    for name, entry in index["sources"].items():
        tokens_path, offsets_path = _paths(target, name)
        _check_size(tokens_path, entry["tokens"] * dtype.itemsize)
        _check_size(offsets_path, entry["offsets_size"])
        if verify:
            _check_hash(tokens_path, entry["sha256"])
            _check_hash(offsets_path, entry["offsets_sha256"])
        tokens = np.memmap(tokens_path, dtype=dtype, mode="r")
        sources.append(ShardSource(name, entry["weight"], tokens, np.load(offsets_path), entry["bytes"]))
    return Shards(target, tuple(sources), index["fingerprint"], index["tokenizer"])


class _Packer:
    """Texts to the token arrays of documents, with FIM and token splitting."""

    def __init__(self, tokenizer: Tokenizer, *, fim_rate: float, split_rate: float, seed: int) -> None:
        for name, rate in (("fim_rate", fim_rate), ("split_rate", split_rate)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} {rate} must be between 0 and 1")
        if seed < 0:
            raise ValueError(f"seed {seed} must not be negative: give 0 or more")
        if tokenizer.eos_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sentence token to close documents with: use V3's or train one"
            )
        fim = (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id)
        if fim_rate and None in fim:
            raise ValueError(f"fim_rate {fim_rate} needs the tokenizer's FIM tokens, it has {fim}: set fim_rate to 0")
        self.tokenizer, self.fim = tokenizer, fim
        self.fim_rate, self.split_rate, self.seed = fim_rate, split_rate, seed
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.split_table = np.full((tokenizer.vocab_size, 2), -1, dtype=np.int64)
        for token, halves in tokenizer.newline_splits().items():
            self.split_table[token] = halves

    def pack(self, source: str, first: int, texts: list[str]) -> list[np.ndarray]:
        """Token arrays, BOS and EOS included, of documents number first, first + 1, ... of the source."""
        generators = [self._generator(source, first + i) for i in range(len(texts))]
        parts = [self._cut(text, generator) for text, generator in zip(texts, generators, strict=True)]
        encoded = iter(self.tokenizer.encode_batch([piece for pieces in parts for piece in pieces]))
        packed = []
        for pieces, generator in zip(parts, generators, strict=True):
            ids = self._join([next(encoded) for _ in pieces])
            if ids.max() >= self.tokenizer.vocab_size:
                raise ValueError(
                    f"token id {ids.max()} is outside the tokenizer's vocab_size {self.tokenizer.vocab_size}"
                )
            packed.append(self._split(ids, generator).astype(self.dtype))
        return packed

    def _generator(self, source: str, number: int) -> np.random.Generator:
        # The name is hashed, not numbered: adding a source leaves the documents of the others as they were.
        key = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "little")
        return np.random.Generator(np.random.PCG64([self.seed, key, number]))

    def _cut(self, text: str, generator: np.random.Generator) -> tuple[str, ...]:
        """(text,), or (prefix, suffix, middle) where the document is to be filled in the middle."""
        if generator.random() >= self.fim_rate or not text:
            return (text,)
        start, end = sorted(generator.integers(0, len(text) + 1, size=2).tolist())
        return text[:start], text[end:], text[start:end]

    def _join(self, pieces: list[list[int]]) -> np.ndarray:
        if len(pieces) == 1:
            ids = pieces[0]
        else:
            (begin, hole, end), (prefix, suffix, middle) = self.fim, pieces
            ids = [begin, *prefix, hole, *suffix, end, *middle]
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]  # what generation starts from
        return np.array([*bos, *ids, self.tokenizer.eos_id], dtype=np.int64)

    def _split(self, ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        found = np.flatnonzero(self.split_table[ids, 0] >= 0)
        chosen = found[generator.random(len(found)) < self.split_rate]
        copies = np.ones(len(ids), dtype=np.int64)
        copies[chosen] = 2
        split = np.repeat(ids, copies)
        at = (np.cumsum(copies) - copies)[chosen]
        split[at], split[at + 1] = self.split_table[ids[chosen], 0], self.split_table[ids[chosen], 1]
        return split


def _runs(pid: str) -> bool:
    """Whether a process of this number lives (or something we cannot read: better left alone)."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError, OverflowError):
        return True
    return True


def _write_source(
    folder: Path, name: str, texts: Iterable[str], first: int, packer: _Packer, progress: Progress | None
) -> dict[str, int | str]:
    tokens_path, offsets_path = _paths(folder, name)
    offsets, position, text_bytes, hasher = array("q"), 0, 0, hashlib.sha256()
    with open(tokens_path, "wb") as file:
        for chunk in _chunks(texts):
            packed = packer.pack(name, first + len(offsets), chunk)
            text_bytes += sum(len(text.encode()) for text in chunk)
            for ids in packed:
                offsets.append(position)
                position += len(ids)
            data = np.concatenate(packed).tobytes()
            hasher.update(data)
            file.write(data)
            if progress is not None:
                progress(name, len(offsets), position)
        _sync(file)
    if not offsets:
        raise ValueError(f"source {name!r} has no documents: give it some text or leave it out of the mixture")
    return _close_source(offsets_path, np.array(offsets, dtype="<i8"), position, text_bytes, hasher.hexdigest())


def _join_source(
    folder: Path, name: str, parts: Sequence[Path], indices: Sequence[Mapping[str, Any]]
) -> dict[str, int | str]:
    tokens_path, offsets_path = _paths(folder, name)
    offsets, position, text_bytes, hasher = [], 0, 0, hashlib.sha256()
    with open(tokens_path, "wb") as file:
        for part, index in zip(parts, indices, strict=True):
            entry = index["sources"].get(name)
            if entry is None:
                continue
            part_tokens, part_offsets = _paths(part, name)
            _check_size(part_tokens, entry["tokens"] * np.dtype(index["dtype"]).itemsize)
            piece = hashlib.sha256()
            with open(part_tokens, "rb") as source:
                while data := source.read(_BLOCK):
                    piece.update(data)
                    hasher.update(data)
                    file.write(data)
            if piece.hexdigest() != entry["sha256"]:
                raise ValueError(f"{part_tokens} is not what its index says: remove {part} and write this part again")
            _check_hash(part_offsets, entry["offsets_sha256"])
            offsets.append(np.load(part_offsets) + position)
            position += entry["tokens"]
            text_bytes += entry["bytes"]
        _sync(file)
    return _close_source(offsets_path, np.concatenate(offsets), position, text_bytes, hasher.hexdigest())


def _close_source(
    offsets_path: Path, offsets: np.ndarray, tokens: int, text_bytes: int, digest: str
) -> dict[str, int | str]:
    """Write the offsets; the source's entry of the index."""
    with open(offsets_path, "wb") as file:
        np.save(file, offsets)
        _sync(file)
    return {
        "tokens": tokens,
        "documents": len(offsets),
        "bytes": text_bytes,
        "sha256": digest,
        "offsets_sha256": _hash(offsets_path),
        "offsets_size": offsets_path.stat().st_size,
    }


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _check_sources(documents: Mapping[str, Iterable[str]], weights: Mapping[str, float]) -> None:
    if not documents:
        raise ValueError("the corpus is empty: give at least one source of text")
    if set(documents) != set(weights):
        raise ValueError(f"sources {sorted(documents)} and weights {sorted(weights)} differ: give each source a weight")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"weight {weight} of source {name!r} must be positive and finite: leave it out of the mixture"
            )
        _check_name(name)


def _check_name(name: str) -> None:
    # A name becomes a file's; an index that says "../x" must not lead out of its folder either.
    if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name):
        raise ValueError(f"source name {name!r} cannot name a file: no slashes, no leading dot")


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.bin", folder / f"{name}.offsets.npy"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} holds no shards ({INDEX} is missing): make them with `dsv3 data`")
    try:
        index = json.loads(path.read_bytes())
        version, found = index["version"], index["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): remove the folder and make the shards again") from None
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, this reads {VERSION}: make the shards again")
    if (actual := _fingerprint(index)) != found:
        raise ValueError(
            f"{path} was changed (fingerprint {found!s:.12}, its content {actual:.12}): make the shards again"
        )
    for name in index["sources"]:
        _check_name(name)
    return index


def _fingerprint(index: Mapping[str, Any]) -> str:
    # Not sorted: the order of the sources decides ties in the loader's mixture, so it belongs to the identity.
    content = {key: value for key, value in index.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing ({expected:,} bytes in the index): make the shards again")
    if (actual := path.stat().st_size) != expected:
        raise ValueError(
            f"{path} has {actual:,} bytes, its index says {expected:,}: copy it again or make the shards again"
        )


def _check_hash(path: Path, expected: str) -> None:
    if (actual := _hash(path)) != expected:
        raise ValueError(
            f"{path} has SHA-256 {actual:.12}, its index says {expected:.12}: it was changed, make it again"
        )


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(existing).free
