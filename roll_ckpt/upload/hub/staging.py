"""The staging directory of a pull, which one process at a time owns."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from roll_ckpt import names
from roll_ckpt.disk import locks, tree, writes
from roll_ckpt.disk.locks import Lock
from roll_ckpt.upload.hub.lock_file import make_lock_file

log = logging.getLogger("roll_ckpt")

_POLL_S = 0.2


@contextmanager
def locked(staging: Path) -> Iterator[None]:
    """Own the staging directory inside the block. It is made if it is missing; blocks while another process owns it.

    Where the file system has no locks, several processes may be inside at once.
    """
    warned = False
    while (lock := _lock(staging)) is False:
        if not warned:
            log.warning("%s: another process is pulling the same checkpoint; waiting for it", staging)
        warned = True
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _lock(staging: Path) -> Lock | Literal[False] | None:
    """A lock; False if another process has it or is removing the directory; None if the file system has no locks."""
    make_real_dir(staging)
    path = staging / names.PULL_LOCK
    try:
        make_lock_file(path)
        lock = locks.try_lock(path, exclusive=True)
    except FileNotFoundError as error:
        log.debug("%s: another process has just removed it: %s", staging, error)
        return False
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise
        return None
    if lock is None:
        return False
    if not locks.same_file(lock, path):
        lock.release()
        return False
    return lock


def make_real_dir(path: Path) -> None:
    """Make a directory. A symbolic link of that name is removed, so that nothing is written where it leads."""
    if tree.exists(path) and not tree.is_real_dir(path):
        writes.discard_file(path)
    writes.make_dir(path)
