"""Names for the usual ways to handle a file or directory that does not exist."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import TypeVar

Read = TypeVar("Read")


def missing_ok() -> AbstractContextManager[None, bool]:
    """A block that a FileNotFoundError or NotADirectoryError ends without an error: the path does not exist."""
    return suppress(FileNotFoundError, NotADirectoryError)


def not_found_ok() -> AbstractContextManager[None, bool]:
    """As missing_ok, but a file where a directory should be still raises NotADirectoryError."""
    return suppress(FileNotFoundError)


def if_there(read: Callable[[], Read]) -> Read | None:
    """What `read` returns; None if the file or directory that it reads does not exist."""
    with missing_ok():
        return read()
    return None
