"""The prefix cache's second tier: pages of 64 tokens on disk, which survive a restart.

    FOLDER/IDENTITY/ab/abcd....page     key in hexadecimal; checksum, then latents and state as bytes

A key is a hash of the tokens, of all before them and of the owner's salt, so owners never find each other's pages. The
identity is the caller's: it names whatever decides what a page holds (weights, config, dtype). Files appear whole; one whose
checksum is wrong is deleted and its page computed anew. Beyond the given size the longest unused go. A write that fails, or a file
that cannot be removed, is counted, and the engine goes on without it. Writing happens on a thread of its own, from a copy;
reading is awaited: the step needs the page.
Source: DeepSeek's context caching on disk (units of 64 tokens).
Does not: share a folder between running servers; each needs its own.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections import OrderedDict
from pathlib import Path

import torch

from dsv3.infer.pages import PageStore

_SUFFIX, _SUM = ".page", 16
_WAITING = 256  # pages that wait to be written; more are dropped


class DiskTier:
    """
    Args:
        folder: where; made if missing, readable by its owner alone.
        identity: names what the pages belong to. gigabytes: most that it holds (10^9 bytes); pages of other identities count too.

    Attributes:
        hits, misses, written, failed: pages, since the start.

    Raises:
        ValueError: no room for anything. OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, identity: str, gigabytes: float) -> None:
        if not gigabytes > 0:
            raise ValueError(f"a disk cache of {gigabytes} GB holds nothing: give more, or none")
        self.folder, self.limit = Path(folder), int(gigabytes * 1e9)
        self._own = self.folder / hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        self._own.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self.hits = self.misses = self.written = self.failed = 0
        self._lock = threading.Lock()
        self._sizes: OrderedDict[Path, int] = OrderedDict()  # longest unused first
        self._bytes = 0
        self._survey()
        self._queue: queue.Queue[tuple[Path, bytes] | None] = queue.Queue(_WAITING)
        self._writer = threading.Thread(target=self._write_all, name="dsv3-disk-tier", daemon=True)
        self._writer.start()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._bytes

    def fetch(self, key: bytes, store: PageStore, page: int) -> bool:
        """Fill the page with what is kept under the key. False: nothing whole is."""
        path = self._path(key)
        with self._lock:
            known = path in self._sizes
            if known:
                self._sizes.move_to_end(path)
        content = self._read(path, _page_bytes(store)) if known else None
        if content is None:
            self.misses += 1
            return False
        latents, state = store.read(page)
        raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        split = latents.numel() * latents.element_size()
        store.write(page, raw[:split].view(latents.dtype).view(latents.shape), raw[split:].view(state.dtype))
        self.hits += 1
        return True

    def keep(self, key: bytes, store: PageStore, page: int) -> None:
        """Write the page behind the caller's back, unless it is there."""
        path = self._path(key)
        with self._lock:
            if path in self._sizes:
                self._sizes.move_to_end(path)
                return
        content = b"".join(_bytes_of(part) for part in store.read(page))
        try:
            self._queue.put_nowait((path, content))
        except queue.Full:
            self.failed += 1

    def flush(self) -> None:
        """Wait until all that was kept is written."""
        self._queue.join()

    def close(self) -> None:
        """Write the rest and end the thread."""
        self._queue.put(None)
        self._writer.join()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._own / name[:2] / (name + _SUFFIX)

    def _survey(self) -> None:
        """Find what is there, oldest use first, and clear what a kill has left half written."""
        found = []
        for path in self.folder.rglob("*"):
            if path.suffix == _SUFFIX:
                stat = path.stat()
                found.append((stat.st_mtime_ns, path, stat.st_size))
            elif path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)
        for _, path, size in sorted(found):
            self._sizes[path] = size
            self._bytes += size
        self._shrink()

    def _read(self, path: Path, size: int) -> bytes | None:
        try:
            raw = path.read_bytes()
            os.utime(path)  # the order of use survives a restart
        except OSError:
            raw = b""
        content = raw[_SUM:]
        if len(content) == size and _checksum(path, content) == raw[:_SUM]:
            return content
        self._forget(path)
        return None

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
                self.written += 1
            except Exception:  # whatever it is: without this thread nothing would be kept any more
                self.failed += 1
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, path: Path, content: bytes) -> None:
        if _SUM + len(content) > self.limit or path in self._sizes:
            return
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_bytes(_checksum(path, content) + content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with self._lock:
            self._sizes[path] = _SUM + len(content)
            self._bytes += _SUM + len(content)
        self._shrink()

    def _shrink(self) -> None:
        while (oldest := self._oldest()) is not None:
            self._forget(oldest)

    def _oldest(self) -> Path | None:
        """The longest unused, if there are too many."""
        with self._lock:
            return next(iter(self._sizes), None) if self._bytes > self.limit else None

    def _forget(self, path: Path) -> None:
        with self._lock:
            self._bytes -= self._sizes.pop(path, 0)
        try:
            path.unlink(missing_ok=True)
        except OSError:
            self.failed += 1


def _checksum(path: Path, content: bytes) -> bytes:
    """Of a page under its own name: a file put in another's place is no match."""
    return hashlib.blake2b(path.name.encode() + content, digest_size=_SUM).digest()


def _page_bytes(store: PageStore) -> int:
    return sum(part.numel() * part.element_size() for part in store.read(0))


def _bytes_of(part: torch.Tensor) -> bytes:
    return part.contiguous().cpu().view(torch.uint8).numpy().tobytes()
