"""One checkpoint into another: dtype, FP8, fused experts, size of shards, GGUF. A shard of memory, whatever the model's size.

Shards are written beside the target and noted in progress.json with their checksums; cut off and started again with the same
source and form, a conversion goes on behind the last whole one. The folder appears at the end, whole. FP8 codes and scales that
stay FP8 are copied bit for bit. Does not: build a model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv3.model import folder as disk
from dsv3.model.census import Piece
from dsv3.model.config import ModelConfig
from dsv3.model.fit import plan_load
from dsv3.model.headers import INDEX_FILE
from dsv3.model.shards import (
    CHECKSUMS_FILE,
    DEFAULT_SHARD_BYTES,
    Form,
    Progress,
    Unit,
    Value,
    cut,
    file_names,
    units,
    write_index,
    write_shard,
)
from dsv3.model.source import DTYPES, Source, place
from dsv3.model.weights import config_of, rank_of, write_config

_PROGRESS_FILE = "progress.json"


def convert(
    source: str | Path,
    target: str | Path,
    form: Form,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint `source` anew in another form; tokenizer and other small files come along.

    Args:
        source: a folder, or a .gguf file (which has no MTP layers).
        form: dtype (None: as it is) and whether experts are fused; see model/shards.py.
        verify: compare the source's files with its checksums first, where it has any.
        progress: called with (bytes done, bytes in all) after each shard.

    Raises:
        ValueError: the source is damaged or does not fit its config; the target exists and may not be replaced; it is the source.
        OSError: the disk is full; finished shards are kept for the next try.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if source == target:
        raise ValueError(f"{target} is the source itself: choose another folder")
    with _open(source, verify) as opened:
        shards = cut(units(opened.config, form, opened.held), shard_bytes)
        disk.restore_interrupted(target)
        disk.check_target(target, overwrite)
        temp, _ = disk.siblings(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        noted = _begin(temp, _plan_of(opened, form, shard_bytes))
        needed = sum(unit.size for shard in shards for unit in shard)
        try:
            _write(opened, shards, temp, noted, needed, progress)
            write_index(temp, shards, noted["files"], noted["tensors"])
            for name, content in opened.beside.items():
                disk.write_synced(temp / name, content)
            write_config(temp, opened.config, max((u.dtype for s in shards for u in s), key=rank_of))
            (temp / _PROGRESS_FILE).unlink()
            disk.sync(temp)
            disk.swap(temp, target)
        except OSError as error:
            if disk.is_disk_full(error):
                kept = f"{len(noted['files'])} finished shards are kept: the same command goes on"
                disk.raise_disk_full(target, needed, kept)
            raise
    return target


def to_gguf(
    source: str | Path, path: str | Path, kind: str = "bf16", *, verify: bool = True, progress: Progress | None = None
) -> None:
    """Write the checkpoint `source` as one GGUF file for llama.cpp, its MTP layers left out; see model/gguf.py.

    Raises:
        ValueError: the source is damaged, the file exists, the gguf package is missing.
    """
    from dsv3.model.gguf import write_gguf

    with _open(Path(source).resolve(), verify) as opened:
        text = opened.beside.get("tokenizer.json")
        write_gguf(
            opened.config, opened.read, text.decode() if text else None, Path(path).resolve(), kind=kind, progress=progress
        )  # fmt: skip


class _Opened(NamedTuple):
    """A checkpoint to read from, of either format."""

    config: ModelConfig
    held: Callable[[Piece], torch.dtype]
    read: Callable[[Piece], Value]
    beside: Mapping[str, bytes]  # small files that come along
    identity: list[Any]  # names the source and its state


@contextmanager
def _open(source: Path, verify: bool) -> Iterator[_Opened]:
    if source.suffix == ".gguf":
        from dsv3.model.gguf import GgufSource

        file = GgufSource(source)
        beside = {"tokenizer.json": file.tokenizer_json.encode()} if file.tokenizer_json else {}
        identity = [str(source), source.stat().st_size, source.stat().st_mtime_ns]
        yield _Opened(file.config, lambda piece: torch.bfloat16, file.read, beside, identity)
        return
    config = config_of(source)
    headers, _ = plan_load(source, config, verify)
    files = sorted({stored.file for stored in headers.values()})
    sizes = [(file, (source / file).stat().st_size, (source / file).stat().st_mtime_ns) for file in files]
    with Source(source, headers) as values:
        yield _Opened(
            config,
            lambda piece: DTYPES[headers[place(headers, piece)[0]].dtype],
            values.read,
            {path.name: path.read_bytes() for path in _small_files(source)},
            [str(source), sizes],
        )


def _write(
    opened: _Opened, shards: list[list[Unit]], temp: Path, noted: dict[str, Any], needed: int, progress: Progress | None
) -> None:
    """The shards that are not there yet."""
    done = 0
    for name, shard in zip(file_names(len(shards)), shards):
        path = temp / name
        if not (name in noted["files"] and path.exists() and disk.sha256(path) == noted["files"][name]):
            disk.check_space(path, sum(unit.size for unit in shard))
            noted["files"][name], digests = write_shard(path, shard, opened.read)
            noted["tensors"] |= digests
            disk.write_synced(temp / f".{_PROGRESS_FILE}", disk.as_json(noted))
            (temp / f".{_PROGRESS_FILE}").replace(temp / _PROGRESS_FILE)
        done += sum(unit.size for unit in shard)
        if progress is not None:
            progress(done, needed)


def _begin(temp: Path, plan: str) -> dict[str, Any]:
    """What an earlier try of the same conversion has finished; any other leftover is removed."""
    try:
        noted = json.loads((temp / _PROGRESS_FILE).read_text())
        if noted["plan"] == plan:
            return noted
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    return {"plan": plan, "files": {}, "tensors": {}}


def _plan_of(opened: _Opened, form: Form, shard_bytes: int) -> str:
    """Names this very conversion: files by size and time, so that a changed source starts anew."""
    said = json.dumps([opened.identity, opened.config.to_hf(), str(form), shard_bytes], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _small_files(source: Path) -> list[Path]:
    """What lies beside the weights: tokenizer, chat template, licence; not the source's own index, checksums or code."""
    written = {"config.json", INDEX_FILE, CHECKSUMS_FILE, "training.json"}
    return [
        path for path in sorted(source.iterdir())
        if path.is_file() and path.name not in written and path.suffix not in (".safetensors", ".py", ".bin", ".gguf")
        and not path.name.startswith(".") and path.stat().st_size < 1 << 28
    ]  # fmt: skip
