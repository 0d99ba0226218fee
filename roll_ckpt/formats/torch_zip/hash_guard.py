"""What a pickle is about to hash: looked at first, because a few bytes of a stranger can hold hashing up for ever.

Python hashes nested tuples by nested calls, and follows every reference anew: 150,000 levels overflow the stack of
the process, and 60 levels of pairs of one and the same tuple last until the end of the world.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterable
from typing import Any

_DEEPEST = 64
_USUAL = 100_000
_PLAIN = frozenset([int, str, bool, float, bytes, type(None)])
_BY_IDENTITY: tuple[Any, ...] = (object.__hash__, None)
HASHING = (pickle.SETITEM, pickle.SETITEMS, pickle.REDUCE, pickle.ADDITEMS, pickle.FROZENSET)
"""Opcodes that hash what lies on the stack, or call what may."""
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_ARGUMENTS = {
    op.code.encode("latin-1"): (_LENGTHS.get(op.arg.n, op.arg.n), op.arg.n in _LENGTHS)
    for op in pickletools.opcodes
    if op.arg and op.arg.n != pickletools.UP_TO_NEWLINE  # lines are not read by `read`
}
"""How many bytes follow an opcode, and whether they are the length of more."""


class HashGuard:
    """Counts what is hashed while one pickle of `nbytes` bytes is read."""

    def __init__(self, nbytes: int) -> None:
        self._left = 16 * nbytes + _USUAL

    def check(self, opcode: bytes, stack: list[Any]) -> None:
        """Refuse what `opcode` would hash of `stack`.

        Raises:
            UnpicklingError: it is nested too deeply, or refers to itself too often.
        """
        if opcode == pickle.REDUCE:
            self._count(stack[-1:], 1)
        elif opcode == pickle.SETITEM:
            self._count(stack[-2:-1], 1)
        elif opcode == pickle.SETITEMS:
            self._count(stack[::2], 1)
        elif opcode != pickle.BUILD:
            self._count(stack, 1)
        elif not hasattr(stack[-2], "__setstate__"):  # torch takes attributes from pairs, too; a pickler writes a dict
            self._count(stack[-1:], 1)

    def _count(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if type(value) not in _PLAIN and (inner := _inside(value)):
                self._left -= len(inner)
                if depth > _DEEPEST or self._left < 0:
                    raise pickle.UnpicklingError(
                        "it nests keys more deeply, or repeats them more often, than any state"
                    )
                self._count(inner, depth + 1)


def _inside(value: Any) -> Any:
    """What is hashed with a value, None for nothing; that of a list is, if a function makes keys of it."""
    kind = type(value)
    if kind is tuple or kind is list or issubclass(kind, tuple):
        return value
    fields = getattr(kind, "__dataclass_fields__", None)
    if fields is None or kind.__hash__ in _BY_IDENTITY:
        return None
    return [getattr(value, name, None) for name in fields]  # one with slots has no vars


class GuardedPickle:
    """A file with a pickle, for an unpickler that reads its opcodes one by one and keeps what it made in `stack`."""

    def __init__(self, data: bytes | memoryview) -> None:
        pickled, watch, hashing, arguments = bytes(data), HashGuard(len(data)), {*HASHING, pickle.BUILD}, _ARGUMENTS
        at = argument_end = 0

        def read(nbytes: int) -> bytes:
            nonlocal at, argument_end
            start = at
            at += nbytes
            taken = pickled[start:at]
            if start < argument_end:  # no opcode, though any number or text may look like one
                return taken
            if taken in arguments:
                size, length = arguments[taken]
                argument_end = at + size
                if length:
                    argument_end += int.from_bytes(pickled[at:argument_end], "little")
            elif taken in hashing:
                watch.check(taken, self.unpickler.stack)
            return taken

        def readline() -> bytes:
            nonlocal at
            start, at = at, (pickled.find(b"\n", at) + 1) or len(pickled)
            return pickled[start:at]

        self.read, self.readline = read, readline
        self.unpickler: Any = None
