"""One run, one folder: a lock that a run holds while it trains.

RUN/.lock is locked by the process that writes, and let go of when that process ends, however it does; those that it starts do
not hold it. Does not: guard against another machine where the file system of the network knows no locks (it says so then).
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dsv3.parallel.workers import Workers

LOCK = ".lock"
_LOG = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path, workers: Workers) -> Iterator[None]:
    """No other run writes into the folder meanwhile. All workers call it.

    Raises:
        ValueError: another does; on every process.
    """
    refused = None
    with ExitStack() as stack:
        if workers.leads:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / LOCK).open("a"))
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                refused = f"another process trains into {folder}: let it end or stop it, or give another folder"
            except OSError as error:
                _LOG.warning("%s cannot be locked (%s): see that no other run writes there", folder, error)
        if refused := workers.leading(refused):
            raise ValueError(refused)
        yield
