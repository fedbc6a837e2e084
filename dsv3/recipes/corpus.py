"""Text to shards, as every recipe and `dsv3 data` do it: read, remove duplicates, hold out, train or load a tokenizer, pack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dsv3.data.corpus import ReadReport, Source, deduplicate, is_held_out, read_source
from dsv3.data.shards import Progress, Shards, open_shards, write_shards
from dsv3.data.tokenizer import Tokenizer
from dsv3.train.checkpoint import differences
from dsv3.train.metrics import write_atomic


@dataclass(frozen=True)
class Texts:
    """A corpus in memory: texts per source, the held-out ones apart."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]
    weights: dict[str, float]
    report: ReadReport

    @property
    def characters(self) -> int:
        return sum(len(text) for text in chain.from_iterable(self.train.values()))


def parse_sources(specs: Sequence[str]) -> tuple[Source, ...]:
    """`PATH` or `NAME=WEIGHT:PATH[,PATH]` on a command line; a bare path is a source of its own name and weight 1.

    Raises:
        ValueError: a weight is no number.
    """
    sources = []
    for spec in specs:
        name, separator, rest = spec.partition("=")
        if not separator:
            sources.append(Source(name=Path(spec).stem or "data", paths=(spec,)))
            continue
        weight, _, paths = rest.partition(":")
        try:
            sources.append(Source(name=name, weight=float(weight), paths=tuple(paths.split(","))))
        except ValueError as error:
            raise ValueError(
                f"--data {spec!r}: write PATH, or NAME=WEIGHT:PATH[,PATH] such as maths=0.3:gsm8k.jsonl ({error})"
            ) from None
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"--data names {names} repeat: name them apart as NAME=WEIGHT:PATH")
    return tuple(sources)


def read_texts(sources: Sequence[Source], *, held_out: float = 0.02, max_characters: int | None = None) -> Texts:
    """Read every source, drop exact duplicates, and set `held_out` of the documents apart by their hash.

    Args:
        max_characters: per source, stop reading after so many.

    Raises:
        ValueError: a path is missing or unreadable, or a source has no document left.
    """
    report = ReadReport()
    train: dict[str, list[str]] = {}
    apart: dict[str, list[str]] = {}
    documents = chain.from_iterable(read_source(source, report) for source in sources)
    sizes = dict.fromkeys((source.name for source in sources), 0)
    for document in deduplicate(documents, report):
        if max_characters is not None and sizes[document.source] >= max_characters:
            continue
        sizes[document.source] += len(document.text)
        target = apart if is_held_out(document, held_out) else train
        target.setdefault(document.source, []).append(document.text)
    for source in sources:
        if source.name not in train:
            raise ValueError(
                f"source {source.name!r} ({', '.join(source.paths)}) holds no text to train on: give it more documents"
            )
    return Texts(train, apart, {source.name: source.weight for source in sources}, report)


def build_shards(
    texts: Texts,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    fim_rate: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Shards, Shards | None]:
    """Training shards in folder/train and held-out ones (no FIM, no splitting) in folder/held_out, or those that are there.

    Raises:
        ValueError: the folder holds shards of other texts, weights, tokenizer or settings; the message names what differs.
    """
    identity = {
        "tokenizer": tokenizer.fingerprint,
        "weights": texts.weights,
        "fim_rate": fim_rate,
        "seed": seed,
        "texts": _digest(texts),
    }
    made_of = folder / "corpus.json"
    if made_of.exists():
        changed = differences(json.loads(made_of.read_text(encoding="utf-8")), identity)
        if changed:
            raise ValueError(f"{folder} holds other shards; remove it or name another folder: " + "; ".join(changed))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(made_of, json.dumps(identity, indent=1).encode())
    train = _once(
        folder / "train",
        lambda path: write_shards(
            texts.train, texts.weights, tokenizer, path, fim_rate=fim_rate, seed=seed, progress=progress
        ),
    )
    if not texts.held_out:
        return train, None
    weights = {name: texts.weights[name] for name in texts.held_out}
    return train, _once(
        folder / "held_out",
        lambda path: write_shards(texts.held_out, weights, tokenizer, path, fim_rate=0.0, split_rate=0.0, seed=seed),
    )


def _once(path: Path, build: Callable[[Path], Shards]) -> Shards:
    return open_shards(path) if path.exists() else build(path)


def _digest(texts: Texts) -> str:
    digest = hashlib.sha256()
    for name, part in [*texts.train.items(), *texts.held_out.items()]:
        for text in part:
            digest.update(f"{name}:{len(text)}:".encode())
            digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
