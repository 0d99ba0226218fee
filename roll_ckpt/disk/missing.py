"""What to do about a file or directory that is not there: names for the two usual answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Read = TypeVar("Read")


@contextmanager
def missing_ok() -> Iterator[None]:
    """Inside the block, a path that is not there, or has a file where a directory should be, ends the block quietly."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        return


def if_there(read: Callable[[], Read]) -> Read | None:
    """What `read` returns; None if the file or directory that it asks for is not there."""
    try:
        return read()
    except (FileNotFoundError, NotADirectoryError):
        return None
