"""Guards unpickling against hash bombs: inspects what a pickle is about to hash before Python hashes it.

Python hashes nested tuples recursively and follows every reference anew: 150,000 levels overflow the stack of the
process, and 60 levels of pairs that both refer to the next level take centuries. A few bytes from a stranger suffice.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

_DEEPEST = 64  # levels of nesting in a key
_ALLOWANCE = 100_000  # values that any pickle may hash, however short it is
PLAIN = frozenset([int, str, bool, float, bytes, type(None)])
"""The types that Python hashes without looking into other objects."""
_BY_IDENTITY: tuple[Any, ...] = (object.__hash__, None)


class HashGuard:
    """Counts the values that are hashed while one pickle of `nbytes` bytes is read."""

    def __init__(self, nbytes: int) -> None:
        self._left = 16 * nbytes + _ALLOWANCE

    def check(self, values: Iterable[Any]) -> None:
        """Check values that are about to be hashed, or handed to a call that may hash them.

        Raises:
            UnpicklingError: they are nested too deeply, or the pickle has hashed too many values.
        """
        self._count(values, 1)

    def _count(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if type(value) not in PLAIN and (parts := _hashed_parts(value)):
                self._left -= len(parts)
                if depth > _DEEPEST or self._left < 0:
                    raise pickle.UnpicklingError(
                        "it nests keys more deeply, or repeats them more often, than any state does"
                    )
                self._count(parts, depth + 1)


def _hashed_parts(value: Any) -> Any:
    """The values that hashing `value` recurses into, or None. Items of a list count: a call may turn them into keys."""
    kind = type(value)
    if kind is tuple or kind is list or issubclass(kind, tuple):
        return value
    fields = getattr(kind, "__dataclass_fields__", None)
    if fields is None or kind.__hash__ in _BY_IDENTITY:
        return None
    return [getattr(value, name, None) for name in fields]  # vars() fails for a class with slots
