"""The Python half of the seam to the disk: nothing else in roll_ckpt, but csrc/file, touches it.

A test sets `observer` to record every mutating operation, to fail it, or to kill the process before it, and
`listener` to stop at the named points of a save. Both are None in production.

POSIX record locks belong to (process, file): closing ANY descriptor of a file drops this process's lock on
it. So a file that this process has locked is never opened again here; its one descriptor serves every read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

observer: Callable[[str, tuple[str, ...]], None] | None = None
listener: Callable[[str, dict[str, object]], None] | None = None


def failpoint(point: str, **where: object) -> None:
    """Tell the listener, if there is one, that a save has come to a named point."""
    if listener is not None:
        listener(point, where)


def announce(operation: str, *paths: Path) -> None:
    if observer is not None:
        observer(operation, tuple(str(path) for path in paths))
