"""Hooks by which tests observe, fail and stop what the product does to the disk. Both are None in production.

A test sets `observer` to record every mutating operation, to fail it, or to kill the process before it, and `listener`
to stop at the named points of a save.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

observer: Callable[[str, tuple[str, ...]], None] | None = None
listener: Callable[[str, dict[str, object]], None] | None = None


def failpoint(point: str, **where: object) -> None:
    """Tell the listener, if there is one, that a save has reached a named point."""
    if listener is not None:
        listener(point, where)


def announce(operation: str, *paths: Path) -> None:
    """Tell the observer, if there is one, that a mutating operation is about to be tried on `paths`."""
    if observer is not None:
        observer(operation, tuple(str(path) for path in paths))
