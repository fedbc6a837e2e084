"""Headers of safetensors checkpoints: every tensor's file, dtype, shape and place, read and checked without touching a weight.

A file is eight bytes of length, that many of JSON, then the tensors' bytes without gaps; a folder holds one such file, or shards
with an index (spec 2.2). Does not: know the architecture (census.py) or read values (source.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ITEM_BYTES: Mapping[str, int] = {
    "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own limit


class Stored(NamedTuple):
    """One tensor of a checkpoint's headers."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its first byte in the file


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name, from headers and index alone; empty if it holds no weights.

    Checked: each file is as long as its header says, every tensor's bytes fit its shape and dtype and lie inside the
    file without gap or overlap, the index and the files agree.

    Raises:
        ValueError: one of these fails; names the file, the tensor and both values.
    """
    index = _read_index(folder)
    if index is None:
        single = folder / SINGLE_FILE
        loose = sorted(path.name for path in folder.glob("*.safetensors"))
        if loose and not single.exists():
            raise ValueError(f"{folder} has weights ({loose[0]}, ...) but no {INDEX_FILE}: copy the index beside them")
        return _read_header(single) if loose else {}
    if (folder / SINGLE_FILE).exists():
        raise ValueError(
            f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}: two checkpoints; delete the one not meant"
        )
    found: dict[str, Stored] = {}
    for file in sorted(set(index.values())):
        for name, stored in _read_header(folder / file).items():
            if index.get(name) != file:
                raise ValueError(
                    f"{folder / file} holds {name}, but {INDEX_FILE} says {index.get(name, 'no file')}: damaged"
                )
            found[name] = stored
    for name, file in index.items():
        if name not in found:
            raise ValueError(
                f"{INDEX_FILE} says {name} is in {folder / file}, but it is not there: fetch that file again"
            )
    return found


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no index ({type(error).__name__}: {error}): it is damaged; fetch it again"
        ) from None
    outside = sorted(file for file in set(names.values()) if Path(file).name != file)
    if outside:
        raise ValueError(f"{path} points to {outside[0]!r}, outside its folder: an index names files beside it only")
    return names


def _read_header(path: Path) -> dict[str, Stored]:
    if not path.exists():
        raise ValueError(f"{path} is missing, though {INDEX_FILE} names it: fetch that file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is truncated: its header takes {length} bytes, the file has {size}: fetch it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged header ({error}): fetch it again") from None
    data, end = size - 8 - length, 0
    found: dict[str, Stored] = {}
    for name, (begin, stop, stored) in sorted(
        ((name, _read_entry(path, 8 + length, name, entry)) for name, entry in entries.items()),
        key=lambda item: item[1][:2],
    ):
        if begin != end:
            raise ValueError(f"{path}: {name} begins at byte {begin}, the tensor before it ends at {end}: damaged")
        if stop > data:
            raise ValueError(
                f"{path}: {name} ends at byte {stop}, the file has {data} of data: truncated; fetch it again"
            )
        found[name], end = stored, stop
    if end != data:
        raise ValueError(f"{path} has {data} bytes of data, its header accounts for {end}: damaged; fetch it again")
    return found


def _read_entry(path: Path, data: int, name: str, entry: Any) -> tuple[int, int, Stored]:
    try:
        dtype, shape, (begin, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
            raise ValueError("negative or not integers")
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: {name} is described as {entry!r}, not dtype, shape, data_offsets: damaged") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{path}: {name} has the unknown dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    if stop - begin != (need := math.prod(shape) * ITEM_BYTES[dtype]):
        raise ValueError(f"{path}: {name} is {dtype} {list(shape)} = {need} bytes, but holds {stop - begin}: damaged")
    return begin, stop, Stored(path.name, dtype, shape, data + begin)
