"""Values of a checkpoint's tensors, read piece by piece and by several threads: bytes go from the file into their place.

Nothing is mapped, so resident memory is what was asked for. A piece is found split, as published, or inside the fused experts
of transformers 5 (`mlp.experts.gate_up_proj` [E, 2I, D], `down_proj` [E, D, I]); FP8 weights come as codes with their scales.
Source: spec 2. Does not: check names and shapes against a config (weights.py).
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dsv3.kernels.quant import Fp8, dequantize_blocks
from dsv3.model.census import SCALE, Piece, scale_of
from dsv3.model.headers import ITEM_BYTES, Stored

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
_CHUNK = 1 << 24

Index = tuple[int | slice, ...]


def place(headers: Mapping[str, Stored], piece: Piece) -> tuple[str, Index]:
    """The tensor on disk that holds a piece, and the part of it: its own, or the fused tensor's."""
    if piece.disk not in headers and ".mlp.experts." in piece.memory and piece.memory in headers:
        return piece.memory, piece.index
    return piece.disk, ()


class Source:
    """The open files of a checkpoint. Safe to read from several threads."""

    def __init__(self, folder: Path, headers: Mapping[str, Stored]) -> None:
        self.folder, self.headers = folder, headers
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, piece: Piece) -> Tensor | Fp8:
        """A piece as stored: a tensor, or FP8 codes with their scales."""
        name, index = place(self.headers, piece)
        stored = self.headers[name]
        values = self._tensor(name, index, piece.shape)
        if stored.dtype != "F8_E4M3":
            return values
        scale = scale_of(piece)
        own, part = (scale.disk, ()) if not index else (name + SCALE, scale.index)
        return Fp8(values, self._tensor(own, part, scale.shape))

    def read_into(self, piece: Piece, target: Tensor) -> bool:
        """The bytes of a piece straight into `target`, if they are of its dtype and it lies in one stretch of CPU memory."""
        name, index = place(self.headers, piece)
        fits = target.device.type == "cpu" and target.is_contiguous()
        if not fits or DTYPES.get(self.headers[name].dtype) != target.dtype or target.dtype == torch.float8_e4m3fn:
            return False
        self._fill(name, index, target)
        return True

    def digest(self, name: str) -> str:
        """sha256 of a tensor's bytes on disk."""
        stored, done = self.headers[name], 0
        size, sha, file = stored_bytes(stored), hashlib.sha256(), self._open(stored.file)
        while done < size:
            part = os.pread(file, min(_CHUNK, size - done), stored.start + done)
            if not part:
                raise ValueError(
                    f"{self.folder / stored.file}: {name} ends after {done} of {size} bytes: fetch it again"
                )
            sha.update(part)
            done += len(part)
        return sha.hexdigest()

    def _tensor(self, name: str, index: Index, shape: tuple[int, ...]) -> Tensor:
        values = torch.empty(shape, dtype=DTYPES[self.headers[name].dtype])
        self._fill(name, index, values)
        return values

    def _fill(self, name: str, index: Index, target: Tensor) -> None:
        stored = self.headers[name]
        start = stored.start + _offset(stored.shape, index) * ITEM_BYTES[stored.dtype]
        view, file, done = target.view(-1).view(torch.uint8).numpy().data, self._open(stored.file), 0
        while done < len(view):
            got = os.preadv(file, [view[done : done + (1 << 30)]], start + done)
            if not got:
                raise ValueError(
                    f"{self.folder / stored.file}: {name} ends after {done} of {len(view)} bytes: fetch that file again"
                )
            done += got

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._files[file]

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def as_float(value: Tensor | Fp8, dtype: torch.dtype) -> Tensor:
    """A piece in a floating dtype. FP8 means its bfloat16 value (spec 2.3), whatever it then becomes."""
    return dequantize_blocks(*value).to(dtype) if isinstance(value, Fp8) else value.to(dtype)


def stored_bytes(stored: Stored) -> int:
    return math.prod(stored.shape) * ITEM_BYTES[stored.dtype]


def in_parallel(
    jobs: list[Callable[[], int]], progress: Callable[[int, int], None] | None, total: int, done: int = 0
) -> int:
    """Run jobs on a few threads; each returns the bytes it has done, `done` are done already -> all done. The first error stops
    the rest and is raised."""
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, as_completed, wait

    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1)) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                done += future.result()
                if progress is not None:
                    progress(done, total)
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures, return_when=FIRST_EXCEPTION)
            raise
    return done


def _offset(shape: tuple[int, ...], index: Index) -> int:
    """How many values lie before a part that is whole in all dimensions behind its index."""
    before = 0
    for depth, at in enumerate(index):
        first = at.start if isinstance(at, slice) else at
        before += first * math.prod(shape[depth + 1 :])
    return before
