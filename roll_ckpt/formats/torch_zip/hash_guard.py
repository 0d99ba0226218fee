"""Guards unpickling against hash bombs: inspects what a pickle is about to hash before Python hashes it.

Python hashes nested tuples recursively and follows every reference anew: 150,000 levels overflow the stack of the
process, and 60 levels of pairs that both refer to the next level take centuries. A few bytes from a stranger suffice.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterable
from typing import Any

_DEEPEST = 64  # levels of nesting in a key
_ALLOWANCE = 100_000  # values that any pickle may hash, however short it is
_PLAIN = frozenset([int, str, bool, float, bytes, type(None)])
_BY_IDENTITY: tuple[Any, ...] = (object.__hash__, None)
HASHING = (pickle.SETITEM, pickle.SETITEMS, pickle.REDUCE, pickle.ADDITEMS, pickle.FROZENSET)
"""Opcodes that hash values on the stack, or call something that may."""
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_ARGUMENTS = {
    op.code.encode("latin-1"): (_LENGTHS.get(op.arg.n, op.arg.n), op.arg.n in _LENGTHS)
    for op in pickletools.opcodes
    if op.arg and op.arg.n != pickletools.UP_TO_NEWLINE  # `readline` reads those, not `read`
}
"""For each opcode with an argument: how many bytes follow it, and whether they hold the length of more bytes."""


class HashGuard:
    """Counts the values that are hashed while one pickle of `nbytes` bytes is read."""

    def __init__(self, nbytes: int) -> None:
        self._left = 16 * nbytes + _ALLOWANCE

    def check(self, opcode: bytes, stack: list[Any]) -> None:
        """Check the values on `stack` that `opcode` is about to hash.

        Raises:
            UnpicklingError: they are nested too deeply, or the pickle has hashed too many values.
        """
        if opcode == pickle.REDUCE:
            self._count(stack[-1:], 1)
        elif opcode == pickle.SETITEM:
            self._count(stack[-2:-1], 1)
        elif opcode == pickle.SETITEMS:
            self._count(stack[::2], 1)
        elif opcode != pickle.BUILD:
            self._count(stack, 1)
        elif not hasattr(stack[-2], "__setstate__"):  # torch also builds attributes from pairs, hashing names
            self._count(stack[-1:], 1)

    def _count(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if type(value) not in _PLAIN and (parts := _hashed_parts(value)):
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


class GuardedPickle:
    """A pickle as a file object that checks each opcode for hash bombs before an unpickler gets it.

    `unpickler` must be set before the first read: it reads opcode by opcode and keeps its values in `stack`.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        pickled, guard, hashing, arguments = bytes(data), HashGuard(len(data)), {*HASHING, pickle.BUILD}, _ARGUMENTS
        at = argument_end = 0

        def read(nbytes: int) -> bytes:
            nonlocal at, argument_end
            start = at
            at += nbytes
            taken = pickled[start:at]
            if start < argument_end:  # part of an argument, although it may look like an opcode
                return taken
            if taken in arguments:
                size, length = arguments[taken]
                argument_end = at + size
                if length:
                    argument_end += int.from_bytes(pickled[at:argument_end], "little")
            elif taken in hashing:
                guard.check(taken, self.unpickler.stack)
            return taken

        def readline() -> bytes:
            nonlocal at
            start, at = at, (pickled.find(b"\n", at) + 1) or len(pickled)
            return pickled[start:at]

        self.read, self.readline = read, readline
        self.unpickler: Any = None
