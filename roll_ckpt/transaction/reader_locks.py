"""Reader locks: a checkpoint that is being read is not pruned.

A reader holds a shared POSIX lock on votes/expected.json; the pruner takes an exclusive one while it renames the
checkpoint away. The locks spare a reader an error and nothing more: its bytes are checked against their digests anyway.
Where a file system has no locks, the readers of other processes are not seen.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from roll_ckpt import names, process
from roll_ckpt.disk import locks, tree
from roll_ckpt.disk.locks import Lock
from roll_ckpt.errors import Damaged, NotFound

log = logging.getLogger("roll_ckpt")


class Readers:
    """How many readers each checkpoint has in this process."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.counts: Counter[Path] = Counter()


@contextmanager
def reading(checkpoint_dir: Path) -> Iterator[None]:
    """Hold a reader lock: no process prunes the checkpoint inside the block. Any rank and thread may use it.

    Does not wait for other processes. Inside the block, this process must open votes/expected.json only through
    disk/: closing any other descriptor of the file drops the POSIX lock.

    NotFound if the checkpoint does not exist or is being removed. Where votes/expected.json cannot be locked, the
    checkpoint is protected from this process only.
    """
    key = checkpoint_dir.resolve()
    lock = _lock(checkpoint_dir, exclusive=False)
    if lock is False:
        raise NotFound(
            f"{checkpoint_dir}: another process is removing or replacing it; look for the newest checkpoint again"
        )
    readers = process.part(Readers)
    with readers.guard:
        readers.counts[key] += 1
    try:
        yield
    finally:
        readers = process.part(Readers)  # a child forked inside the block has a registry of its own
        with readers.guard:
            readers.counts[key] -= 1
            if readers.counts[key] <= 0:
                del readers.counts[key]
        if lock is not None:
            lock.release()


@contextmanager
def removing(checkpoint_dir: Path) -> Iterator[bool]:
    """Whether the checkpoint may be renamed away inside the block: False while a process reads it. Does not wait."""
    lock = False if _has_reader_here(checkpoint_dir) else _lock(checkpoint_dir, exclusive=True)
    try:
        yield lock is not False
    finally:
        if isinstance(lock, Lock):
            lock.release()


def is_being_read(checkpoint_dir: Path) -> bool:
    """Whether this process, or another one of this host, is inside `reading(checkpoint_dir)`.

    False where the disk does not tell; `removing` asks again before a checkpoint goes.
    """
    if _has_reader_here(checkpoint_dir):
        return True
    try:
        return locks.is_locked(checkpoint_dir / names.EXPECTED)
    except OSError as error:
        log.debug("%s: whether another process reads it is not known: %s", checkpoint_dir, error)
        return False


def _has_reader_here(checkpoint_dir: Path) -> bool:
    readers = process.part(Readers)
    with readers.guard:
        return readers.counts[checkpoint_dir.resolve()] > 0


def _lock(checkpoint_dir: Path, *, exclusive: bool) -> Lock | Literal[False] | None:
    """The lock; False if another process's lock forbids it; None if votes/expected.json cannot be locked.

    It cannot where the file system has no locks, or where it is missing or damaged; a reader learns of damage when the
    bytes are checked. NotFound if a reader asks and there is no checkpoint.
    """
    path = checkpoint_dir / names.EXPECTED
    try:
        lock = locks.try_lock(path, exclusive=exclusive)
    except (FileNotFoundError, NotADirectoryError):
        if exclusive or tree.exists(checkpoint_dir / names.MANIFEST):
            return None
        raise NotFound(f"{checkpoint_dir}: no checkpoint of roll_ckpt is there") from None
    except (Damaged, OSError) as error:
        log.debug("%s: it cannot be locked: %s", checkpoint_dir, error)
        return None
    if lock is None:
        return False
    if not locks.same_file(lock, path):
        lock.release()
        return False
    return lock
