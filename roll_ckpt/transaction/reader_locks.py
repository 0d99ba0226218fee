"""A lease on a committed checkpoint: what somebody reads is not pruned under them.

A reader holds a shared POSIX lock on votes/expected.json, the pruner an exclusive one while it renames the
checkpoint away. It spares a reader an error and nothing more: bytes are checked by their digests anyway, and
where a file system has no locks readers of other processes are not seen.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from roll_ckpt import names
from roll_ckpt.disk import locks, tree
from roll_ckpt.disk.locks import Lock
from roll_ckpt.errors import Damaged, NotFound

_here: Counter[Path] = Counter()
_guard = threading.Lock()


def _forget_in_child() -> None:
    global _guard
    _guard = threading.Lock()  # another thread may have held it just then
    _here.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def reading(unit: Path) -> Iterator[None]:
    """Keep `unit` from being pruned inside the block. While it lasts, nobody in this process may open
    votes/expected.json but through disk.py: closing it would drop the lock.

    NotFound if it is not there or is being removed. A checkpoint whose record cannot be locked is not kept.
    """
    key = unit.resolve()
    lock = _lock(unit, exclusive=False)
    if lock is False:
        raise NotFound(f"{unit}: it is being removed or replaced just now; look for the newest checkpoint again")
    with _guard:
        _here[key] += 1
    try:
        yield
    finally:
        with _guard:
            _here[key] -= 1
            if _here[key] <= 0:  # less in a child that was forked inside the block
                del _here[key]
        if lock is not None:
            lock.release()


@contextmanager
def removing(unit: Path) -> Iterator[bool]:
    """Whether `unit` may be renamed away inside the block: False while anybody reads it."""
    with _guard:
        read_here = _here[unit.resolve()] > 0
    lock = False if read_here else _lock(unit, exclusive=True)
    try:
        yield lock is not False
    finally:
        if isinstance(lock, Lock):
            lock.release()


def is_being_read(unit: Path) -> bool:
    """Whether this process, or another one of this host, is inside `reading(unit)`."""
    with _guard:
        if _here[unit.resolve()]:
            return True
    try:
        return locks.is_locked(unit / names.EXPECTED)
    except OSError:
        return False


def _lock(unit: Path, *, exclusive: bool) -> Lock | Literal[False] | None:
    """A lock, False if somebody else's forbids it, None if there can be none: the file system has no locks, or the
    record is damaged, which whoever reads the checkpoint is told when its bytes are checked."""
    path = unit / names.EXPECTED
    try:
        lock = locks.try_lock(path, exclusive=exclusive)
    except (FileNotFoundError, NotADirectoryError):
        if exclusive or tree.exists(unit / names.MANIFEST):
            return None
        raise NotFound(f"{unit}: no checkpoint of roll_ckpt is there") from None
    except (Damaged, OSError):
        return None
    if lock is None:
        return False
    if not locks.same_file(lock, path):
        lock.release()
        return False
    return lock
