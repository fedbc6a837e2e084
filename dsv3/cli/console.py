"""What the verbs share: tables, bars, and how a path becomes a checkpoint or a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from dsv3.data.shards import Progress, Shards
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.model.config import ModelConfig
    from dsv3.parallel.degrees import ParallelConfig
    from dsv3.parallel.mesh import Mesh
    from dsv3.recipes.corpus import Texts


@contextmanager
def document_bars(texts: Texts) -> Iterator[Progress]:
    """A bar a source while documents become tokens."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        tasks = {name: bars.add_task(f"    {name}", total=len(part)) for name, part in texts.train.items()}
        yield lambda source, documents, tokens: bars.update(tasks[source], completed=documents)


@contextmanager
def bytes_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Bytes of a checkpoint as they pass, with rate and ETA; gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def together(degrees: ParallelConfig, model: ModelConfig, device: str) -> Iterator[Mesh | None]:
    """The mesh of the processes that torchrun started, for as long as they work; None for one alone.

    Raises:
        ValueError: the degrees ask for more processes than there are, or do not fit.
    """
    from dsv3.parallel.mesh import Mesh, join, launched, part

    processes = launched()
    degrees.check(model, processes)
    if processes == 1:
        yield None
        return
    join(device.partition(":")[0])
    try:
        yield Mesh(degrees, model, device.partition(":")[0])
    finally:
        part()


def open_sides(folder: Path) -> tuple[Shards, Shards | None]:
    """What `dsv3 data` wrote: the part to train on, and what it held out, if anything."""
    from dsv3.data.shards import open_shards

    held = folder / "held_out"
    return open_shards(folder / "train"), open_shards(held) if held.exists() else None


def open_tokenizer(spec: str) -> Tokenizer:
    from dsv3.data.tokenizer import Tokenizer

    return Tokenizer.official() if spec == "official" else Tokenizer.from_file(Path(spec))


def checkpoint_of(path: Path, *, gguf: bool = False) -> Path:
    """The path itself; of a run folder its finished model, or else its newest checkpoint."""
    if path.suffix == ".gguf" and path.is_file() and not gguf:
        raise ValueError(f"{path} is a GGUF file: make a folder of it first, `dsv3 convert {path} {path.stem}/`")
    if (path / "final" / "config.json").is_file():
        return path / "final"
    if (path / "checkpoints").is_dir():
        from dsv3.train.checkpoint import latest_checkpoint

        newest = latest_checkpoint(path)
        if newest is None:
            raise ValueError(f"{path} holds no finished checkpoint yet: train longer, or give a checkpoint folder")
        return newest
    return path


def table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    made = Table(*columns, title=title, title_justify="left", show_header=any(columns))
    return made


def print_table(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    from rich.console import Console

    shown = table(title, ("", ""))
    for name, value in rows:
        shown.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(shown)
