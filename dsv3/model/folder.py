"""A checkpoint folder on disk is never half there: it is written beside its place, synced, and renamed into it.

A save writes `.NAME.saving` beside the target, syncs every file, then renames. Replacing a checkpoint renames the old one to
`.NAME.old`, the new one into place, and deletes the old. A crash between the two renames leaves `.NAME.old`; the next load or
save of the folder renames it back. Two processes must not save to one folder at once. Does not: know what the files hold.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


def siblings(target: Path) -> tuple[Path, Path]:
    """Where a save of the folder is prepared, and where the old one lies while they change places."""
    return target.with_name(f".{target.name}.saving"), target.with_name(f".{target.name}.old")


def restore_interrupted(target: Path) -> None:
    """Undo a swap that a crash cut between its two renames."""
    _, old = siblings(target)
    if old.exists() and not target.exists():
        os.replace(old, target)


def check_target(target: Path, overwrite: bool) -> None:
    """Raises ValueError if the folder must not be written: it exists and may not be replaced, or is no checkpoint."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} exists: choose another folder, or pass overwrite=True to replace it")
    if not (target / "config.json").is_file():
        raise ValueError(
            f"{target} holds no config.json, so it is no checkpoint and is not overwritten: choose another folder"
        )


def check_space(target: Path, needed: int) -> None:
    """Raises OSError (ENOSPC) if the disk is known to be too small."""
    if needed > shutil.disk_usage(target.parent).free:
        raise OSError(errno.ENOSPC, "too little space")


def swap(temp: Path, target: Path) -> None:
    """Put the prepared folder in the target's place."""
    _, old = siblings(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        os.replace(target, old)
        try:
            os.replace(temp, target)
        except BaseException:
            os.replace(old, target)
            raise
    else:
        os.replace(temp, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # What is written in Rust (safetensors, tokenizers) raises its own exceptions, with the number in the text.
    return isinstance(error, Exception) and f"os error {errno.ENOSPC}" in str(error)


def raise_disk_full(target: Path, needed: int, left: str = "Nothing was left behind") -> NoReturn:
    free = shutil.disk_usage(target.parent).free
    raise OSError(
        errno.ENOSPC,
        f"disk full: saving {target} needs {needed} bytes, {free} are free; make room or choose another disk. {left}",
    ) from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
