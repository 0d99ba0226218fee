"""A lease on a committed checkpoint: what somebody reads is not pruned under them.

A reader holds a shared POSIX lock on votes/expected.json, the pruner an exclusive one while it renames the
checkpoint away. It spares a reader an error and nothing more: bytes are checked by their digests anyway, and
where a file system has no locks readers of other processes are not seen.
"""

from __future__ import annotations

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


class Readers:
    """How often each checkpoint is being read in this process."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.counts: Counter[Path] = Counter()


@contextmanager
def reading(checkpoint_dir: Path) -> Iterator[None]:
    """Keep `unit` from being pruned inside the block. While it lasts, nobody in this process may open
    votes/expected.json but through disk.py: closing it would drop the lock.

    NotFound if it is not there or is being removed. A checkpoint whose record cannot be locked is not kept.
    """
    key = checkpoint_dir.resolve()
    lock = _lock(checkpoint_dir, exclusive=False)
    if lock is False:
        raise NotFound(
            f"{checkpoint_dir}: it is being removed or replaced just now; look for the newest checkpoint again"
        )
    readers = process.part(Readers)
    with readers.guard:
        readers.counts[key] += 1
    try:
        yield
    finally:
        readers = process.part(Readers)  # another one in a child that was forked inside the block
        with readers.guard:
            readers.counts[key] -= 1
            if readers.counts[key] <= 0:
                del readers.counts[key]
        if lock is not None:
            lock.release()


@contextmanager
def removing(checkpoint_dir: Path) -> Iterator[bool]:
    """Whether `unit` may be renamed away inside the block: False while anybody reads it."""
    read_here = _is_read_here(checkpoint_dir)
    lock = False if read_here else _lock(checkpoint_dir, exclusive=True)
    try:
        yield lock is not False
    finally:
        if isinstance(lock, Lock):
            lock.release()


def is_being_read(checkpoint_dir: Path) -> bool:
    """Whether this process, or another one of this host, is inside `reading(unit)`."""
    if _is_read_here(checkpoint_dir):
        return True
    try:
        return locks.is_locked(checkpoint_dir / names.EXPECTED)
    except OSError:
        return False


def _is_read_here(checkpoint_dir: Path) -> bool:
    readers = process.part(Readers)
    with readers.guard:
        return readers.counts[checkpoint_dir.resolve()] > 0


def _lock(checkpoint_dir: Path, *, exclusive: bool) -> Lock | Literal[False] | None:
    """A lock, False if somebody else's forbids it, None if there can be none: the file system has no locks, or the
    record is damaged, which whoever reads the checkpoint is told when its bytes are checked."""
    path = checkpoint_dir / names.EXPECTED
    try:
        lock = locks.try_lock(path, exclusive=exclusive)
    except (FileNotFoundError, NotADirectoryError):
        if exclusive or tree.exists(checkpoint_dir / names.MANIFEST):
            return None
        raise NotFound(f"{checkpoint_dir}: no checkpoint of roll_ckpt is there") from None
    except (Damaged, OSError):
        return None
    if lock is None:
        return False
    if not locks.same_file(lock, path):
        lock.release()
        return False
    return lock
