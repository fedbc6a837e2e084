"""The verb `data`: text to packed token shards; a corpus in memory from flags, or one at scale from a TOML file.

Without --config everything is read into memory and exact duplicates go: right for what one machine trains on in a day.
With --config the text goes through dsv3.data.pipeline: filters, near-duplicates, decontamination, personal data, on any number
of machines. Keys of the file are BuildConfig's fields; [sources.NAME] has paths and weight, [recall] NAME = "seeds.jsonl".
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dsv3.cli.console import document_bars, open_tokenizer, print_table, table

if TYPE_CHECKING:
    from dsv3.data.pipeline import BuildConfig

_PYTHON = ("python:code", "python:english")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Turn text into packed token shards: read folders, .txt, .md, source code, .jsonl(.gz,.zst), .parquet; drop exact
    duplicates; hold 2% out; fill-in-the-middle at rate 0.1. Example:
        dsv3 data --data code=0.6:src/ --data maths=0.4:gsm8k.jsonl --tokenizer tok/ --out shards/

    More text than fits into memory, or text that nobody has looked at (needs: pip install 'dsv3[data]'):
        dsv3 data --config corpus.toml --out corpus/ --workers 8

    This way it also identifies languages, drops bad, near-duplicate and evaluation text, replaces personal data, parts code and
    maths from prose, and tells what became of every document. The same command goes on after a kill. A corpus.toml:
        tokenizer = "tok/"              # or "official"; paths are relative to this file
        against = ["gsm8k/test.jsonl"]  # evaluation sets that no document may share 13 words with
        languages = ["en", "zh"]        # others go; code stays
        [sources.web]
        paths = ["pages/"]
        weight = 0.7
        [sources.maths]
        paths = ["gsm8k/train.jsonl"]
        weight = 0.3
        [recall]                        # text like these seeds becomes a part of the mixture of its own
        physics = "seeds.jsonl"

    Other keys and their defaults: ngram = 13, least_confidence = 0.3 (of the language), language_model (fastText's file),
    recall_threshold = 0.5, least_words = 50, held_out = 0.02, fim_rate = 0.1, split_rate = 0.1, seed = 0, task_mb = 256."""

    out: Path
    """Folder for train/ and held_out/; with --config also report.json, and work/ (may be deleted when done)."""
    tokenizer: str | None = None
    """A folder with tokenizer.json, or `official`."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATH or NAME=WEIGHT:PATH[,PATH]; repeat for a mixture. None: the Python standard library."""
    fim_rate: float | None = None
    """None: 0.1."""
    seed: int | None = None
    """None: 0."""
    config: Path | None = None
    """A corpus at scale, by this TOML file; the flags below say where it runs, and change no byte of the result."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """Processes of this machine, actors of Ray, or job arrays of Slurm (submitted; the same command tells how far it is)."""
    workers: int = 1
    """Tasks at once; a core and about 1 GB each."""
    memory_gb: float = 2
    """Of a task (ray, slurm)."""
    ray_address: str | None = None
    """`auto` joins the cluster this machine belongs to. None: a Ray of this machine."""
    partition: str = "cpu"
    """Slurm's."""
    time: str = "24:00:00"
    """Slurm's limit of a stage."""
    activate: str | None = None
    """Command with which a Slurm job finds dsv3. None: activate this virtual environment."""


_WHERE = ("executor", "workers", "memory_gb", "ray_address", "partition", "time", "activate")
_WHAT = ("tokenizer", "data", "fim_rate", "seed")


def data(verb: Data) -> None:
    ours, others = (_WHAT, _WHERE) if verb.config is None else (_WHERE, _WHAT)
    defaults = {field.name: field.default for field in dataclasses.fields(verb)}
    if given := [name for name in others if getattr(verb, name) != defaults[name]]:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{flags}: without --config, only {_flags(ours)} are of use" if verb.config is None
                         else f"{flags}: with --config these belong in {verb.config}")  # fmt: skip
    if verb.config is None:
        _small(verb)
    else:
        _at_scale(verb, verb.config)


def _flags(names: tuple[str, ...]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _small(verb: Data) -> None:
    from dsv3.data.corpus import standard_library
    from dsv3.recipes.corpus import build_shards, parse_sources, read_texts

    if verb.tokenizer is None:
        raise ValueError("--tokenizer is missing: give a folder with tokenizer.json (dsv3 tokenizer), or official")
    texts = read_texts(parse_sources(verb.data) or standard_library())
    print("\n".join(texts.report.lines()))
    tokenizer = open_tokenizer(verb.tokenizer)
    rate, seed = 0.1 if verb.fim_rate is None else verb.fim_rate, verb.seed or 0
    with document_bars(texts) as progress:
        train, held_out = build_shards(texts, tokenizer, verb.out, fim_rate=rate, seed=seed, progress=progress)
    rows = [
        (s.name, f"{len(s.tokens):,} tokens, {len(s.offsets):,} documents, weight {s.weight:g}") for s in train.sources
    ]
    rows.append(("held out", f"{held_out.total_tokens:,} tokens" if held_out else "none"))
    print_table(f"shards in {verb.out}, fingerprint {train.fingerprint[:12]}", rows)


# -- at scale ----------------------------------------------------------------------------------------------------------


def read_config(path: Path) -> BuildConfig:
    """The BuildConfig of a TOML file; paths are relative to the file's folder.

    Raises:
        ValueError: no such file, no TOML, an unknown key, or a value of another type than the field's.
    """
    from dsv3.data.corpus import Source
    from dsv3.data.pipeline import BuildConfig

    if not path.is_file():
        raise ValueError(f"{path} is no file: give a TOML file, of which `dsv3 data --help` shows an example")
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML ({error}): `dsv3 data --help` shows an example") from None
    known = {field.name: field for field in dataclasses.fields(BuildConfig)}
    if unknown := told.keys() - known.keys():
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known are {', '.join(known)}")
    if missing := {"sources", "tokenizer"} - told.keys():
        raise ValueError(f"{path}: {' and '.join(sorted(missing))} must be given: `dsv3 data --help` shows an example")

    def at(value: str) -> str:
        return value if value in _PYTHON else str(path.parent / value)

    def take(holder: Mapping[str, Any], key: str, kind: Any, example: str) -> Any:
        value = holder[key]
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
            raise ValueError(f"{path}: {key} = {value!r} is of another kind than expected: write it as {example}")
        return value

    sources = []
    for name, entry in take(told, "sources", dict, '[sources.NAME], paths = ["pages/"]').items():
        if not isinstance(entry, dict) or not {"paths"} <= entry.keys() <= {"paths", "weight"}:
            raise ValueError(f"{path}: [sources.{name}] must have paths and may have weight: it is {entry!r}")
        paths = tuple(at(value) for value in take(entry, "paths", list, 'paths = ["pages/"]'))
        weight = float(take({"weight": 1.0, **entry}, "weight", (int, float), "weight = 0.5"))
        sources.append(Source(name=name, paths=paths, weight=weight))
    fields: dict[str, Any] = {"sources": tuple(sources)}
    for key in told.keys() - {"sources"}:
        default = known[key].default
        if key == "tokenizer":
            tokenizer = take(told, key, str, '"tok/"')
            fields[key] = tokenizer if tokenizer == "official" else at(tokenizer)
        elif key == "language_model":
            fields[key] = Path(at(take(told, key, str, '"lid.176.bin"')))
        elif key == "against":
            fields[key] = tuple(Path(at(value)) for value in take(told, key, list, '["gsm8k/test.jsonl"]'))
        elif key == "languages":
            fields[key] = tuple(take(told, key, list, '["en", "zh"]'))
        elif key == "recall":
            seeds = take(told, key, dict, '[recall], physics = "seeds.jsonl"')
            fields[key] = tuple((name, Path(at(take(seeds, name, str, '"seeds.jsonl"')))) for name in seeds)
        else:
            fields[key] = take(told, key, int if isinstance(default, int) else (int, float), repr(default))
    return BuildConfig(**fields)


def _at_scale(verb: Data, path: Path) -> None:
    try:
        from dsv3.data.machines import Machines
        from dsv3.data.pipeline import build, progress
    except ImportError as error:
        raise ValueError(f"--config needs datatrove ({error}): pip install 'dsv3[data]'") from None
    config = read_config(path)
    where = {name: getattr(verb, name) for name in _WHERE if getattr(verb, name) is not None}
    machines = Machines(**where)
    try:
        with _stage_bars(lambda: progress(verb.out)) if machines.executor != "slurm" else _nothing() as say:
            report = build(config, verb.out, machines, say)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if report is None:
        print_table("tasks done", [(name, f"{done:,} of {of:,}") for name, done, of in progress(verb.out)])
        return
    _print_report(verb.out, report)


@contextmanager
def _nothing() -> Iterator[Callable[[str], None]]:
    yield print


@contextmanager
def _stage_bars(read: Callable[[], list[tuple[str, int, int]]]) -> Iterator[Callable[[str], None]]:
    """A bar a stage, from the marks on the disk, in a terminal; what the build says, as lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("    {task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bars = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    tasks: dict[str, Any] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for name, done, of in read():
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=of, start=False)
                if done and not bars.tasks[tasks[name]].started:
                    bars.start_task(tasks[name])
                bars.update(tasks[name], completed=done)

    with bars:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield bars.console.print
        finally:
            over.set()
            watcher.join()


def _print_report(out: Path, report: Mapping[str, Any]) -> None:
    from rich.console import Console

    from dsv3.data import ledger

    documents = report["documents"]
    title = f"{documents['read']:,} documents read, {documents['packed']:,} packed; rates are those of one core"
    shown = table(title, ("step", "documents", "dropped", "why", "documents/s", "MB/s", "tokens/s"))
    for row in ledger.table(report):
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    parts = table(f"shards in {out}", ("side", "part", "tokens", "documents", "weight"))
    for side, made in report["shards"].items():
        for name, source in made["sources"].items():
            count = report["parts"][side][name]
            parts.add_row(side, name, f"{source['tokens']:,}", f"{count:,}", f"{source['weight']:.3g}")
    console.print(parts)
    replaced = ", ".join(f"{count:,} of kind {kind}" for kind, count in report["replaced"].items()) or "none"
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report["files_left_out"].items()) or "none"
    print(f"personal data replaced: {replaced}\nfiles that no reader takes: {left_out}")
    print(f"examples of what was dropped: {out / 'report.json'}; all of it: {out / 'work' / 'dropped'}")
