"""What a pickle is about to hash: looked at first, because a few bytes of a stranger can hold hashing up for ever.

Python hashes nested tuples by nested calls, and follows every reference anew: 150,000 levels overflow the stack of
the process, and 60 levels of pairs of one and the same tuple last until the end of the world.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from typing import Any

_DEEPEST = 64
_USUAL = 10_000
_PLAIN = frozenset([int, str, bool, float, bytes, type(None)])

HASHING = (pickle.SETITEM, pickle.SETITEMS, pickle.REDUCE, pickle.ADDITEMS, pickle.FROZENSET)
"""Opcodes that hash what lies on the stack, or call what may."""


class Watch:
    """Counts what is hashed while one pickle of `nbytes` bytes is read."""

    def __init__(self, nbytes: int) -> None:
        self._left = 16 * nbytes + _USUAL

    def check(self, opcode: bytes, stack: list[Any]) -> None:
        """Refuse what `opcode` would hash of `stack`.

        Raises:
            UnpicklingError: it is nested too deeply, or refers to itself too often.
        """
        hashed: Iterable[Any] = ()
        if opcode == pickle.SETITEM:
            hashed = stack[-2:-1]
        elif opcode == pickle.SETITEMS:
            hashed = stack[::2]
        elif opcode == pickle.REDUCE:
            hashed = stack[-1:]
        else:
            hashed = stack
        depth, level = 0, [inner for value in hashed if (inner := _inside(value))]
        while level:
            depth += 1
            self._left -= sum(map(len, level))
            if depth > _DEEPEST or self._left < 0:
                raise pickle.UnpicklingError("it nests keys more deeply, or repeats them more often, than any state")
            level = [inner for values in level for value in values if (inner := _inside(value))]


def _inside(value: Any) -> Any:
    """What is hashed with a value, None for nothing; that of a list is, if a function makes keys of it."""
    kind = type(value)
    if kind in _PLAIN:
        return None
    if kind is tuple or kind is list or issubclass(kind, tuple):
        return value
    return list(vars(value).values()) if hasattr(kind, "__dataclass_fields__") else None


class WatchedPickle:
    """A file with a pickle, for an unpickler that reads its opcodes one by one and keeps what it made in `stack`."""

    def __init__(self, data: bytes | memoryview) -> None:
        file, watch = io.BytesIO(data), Watch(len(data))
        take, hashing = file.read, frozenset(HASHING)

        def read(nbytes: int) -> bytes:
            data = take(nbytes)
            if data in hashing:  # a number that looks like one does no harm
                watch.check(data, self.unpickler.stack)
            return data

        self.read, self.readline = read, file.readline
        self.unpickler: Any = None
