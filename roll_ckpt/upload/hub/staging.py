"""Pull: a checkpoint comes from the Hub, complete and checked under its name or not there.

    head → manifest → listing → room → fetch (staging) → fsync → verify → rename

All is read from the one commit that the revision named at first. What comes is trusted in nothing: the manifest's
paths stay below the staging directory, no file gets longer than its receipt, and every byte is read again there
and compared before the checkpoint gets its name. A killed pull leaves the staging directory, and the next one
goes on in it, byte by byte: that is why files come through disk.py and not through the client's downloads, which
begin a file anew and leave the old one.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from roll_ckpt import names
from roll_ckpt.disk import locks, tree, writes
from roll_ckpt.disk.locks import Lock

log = logging.getLogger("roll_ckpt")

_POLL_S = 0.2


@contextmanager
def alone(staging: Path) -> Iterator[None]:
    """Own the staging directory, made if it is missing, inside the block; waits for whoever has it."""
    told = False
    while (lock := _lock(staging)) is False:
        if not told:
            log.warning("%s: another process is pulling that just now; waiting for it", staging)
        told = True
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _lock(staging: Path) -> Lock | Literal[False] | None:
    """A lock, False if another process has it or removes the directory just now, None if there are no locks."""
    make_real_dir(staging)
    path = staging / names.PULL_LOCK
    try:
        with suppress(FileExistsError):
            os.close(writes.create(path))
        lock = locks.try_lock(path, exclusive=True)
    except FileNotFoundError:
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
    """Make a directory; a symbolic link of that name goes, so that nothing is written where it leads."""
    if tree.exists(path) and not tree.is_real_dir(path):
        writes.discard_file(path)
    writes.make_dir(path)
