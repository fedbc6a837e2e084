"""One checkpoint into another: dtype, FP8, fused experts, size of shards. A shard of memory, whatever the model's size.

Shards are written beside the target and noted in progress.json with their checksums; cut off and started again with the same
source and form, a conversion goes on behind the last whole one. The folder appears at the end, whole. FP8 codes and scales that
stay FP8 are copied bit for bit. Does not: build a model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from dsv3.model import folder as disk
from dsv3.model.config import ModelConfig
from dsv3.model.headers import INDEX_FILE, Stored
from dsv3.model.shards import (
    CHECKSUMS_FILE,
    DEFAULT_SHARD_BYTES,
    Form,
    Progress,
    Unit,
    cut,
    file_names,
    units,
    write_index,
    write_shard,
)
from dsv3.model.source import DTYPES, Source, place
from dsv3.model.weights import config_of, plan_load, write_config

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
    config = config_of(source)
    headers, _ = plan_load(source, config, verify)
    shards = cut(units(config, form, lambda piece: DTYPES[headers[place(headers, piece)[0]].dtype]), shard_bytes)
    disk.restore_interrupted(target)
    disk.check_target(target, overwrite)
    temp, _ = disk.siblings(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    noted = _begin(temp, _plan_of(source, headers, config, form, shard_bytes))
    needed = sum(unit.size for shard in shards for unit in shard)
    try:
        _write(source, headers, shards, temp, noted, needed, progress)
        write_index(temp, shards, noted["files"], noted["tensors"])
        for path in _small_files(source):
            disk.write_synced(temp / path.name, path.read_bytes())
        write_config(temp, config, max((u.dtype for s in shards for u in s), key=lambda dtype: dtype.itemsize == 1))
        (temp / _PROGRESS_FILE).unlink()
        disk.sync(temp)
        disk.swap(temp, target)
    except OSError as error:
        if disk.is_disk_full(error):
            disk.raise_disk_full(
                target, needed, f"{len(noted['files'])} finished shards are kept: the same command goes on"
            )
        raise
    return target


def _write(
    source: Path, headers: dict[str, Stored], shards: list[list[Unit]], temp: Path, noted: dict[str, Any], needed: int,
    progress: Progress | None,
) -> None:  # fmt: skip
    """The shards that are not there yet."""
    done = 0
    with Source(source, headers) as values:
        for name, shard in zip(file_names(len(shards)), shards):
            path = temp / name
            if not (name in noted["files"] and path.exists() and disk.sha256(path) == noted["files"][name]):
                disk.check_space(temp, sum(unit.size for unit in shard))
                noted["files"][name], digests = write_shard(path, shard, partial(Source.read, values))
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


def _plan_of(source: Path, headers: dict[str, Stored], config: ModelConfig, form: Form, shard_bytes: int) -> str:
    """Names this very conversion: files by size and time, so that a changed source starts anew."""
    files = sorted({stored.file for stored in headers.values()})
    sizes = [(file, (source / file).stat().st_size, (source / file).stat().st_mtime_ns) for file in files]
    said = json.dumps([str(source), sizes, config.to_hf(), str(form), shard_bytes], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _small_files(source: Path) -> list[Path]:
    """What lies beside the weights: tokenizer, chat template, licence; not the source's own index, checksums or code."""
    written = {"config.json", INDEX_FILE, CHECKSUMS_FILE}
    return [
        path for path in sorted(source.iterdir())
        if path.is_file() and path.name not in written and path.suffix not in (".safetensors", ".py", ".bin", ".gguf")
        and not path.name.startswith(".") and path.stat().st_size < 1 << 28
    ]  # fmt: skip
