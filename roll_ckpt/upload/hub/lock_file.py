"""The empty files that pushes and pulls lock, so that only one process works in a directory at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from roll_ckpt.disk import writes


def make_lock_file(path: Path) -> None:
    """Make an empty file, unless it exists.

    An existing one is not opened: closing it would drop the lock that this process may have on it.
    """
    with suppress(FileExistsError):
        os.close(writes.create(path))
