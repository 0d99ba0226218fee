"""Let calls that change the disk fail in this process, Python's and the extension's alike.

The process must have been started with tests/faults.cpp in LD_PRELOAD; forked children keep the rules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

SHORT, HANG = 0, -1
"""In place of an errno: a write writes half; a call waits until `clear`, then goes on (minus an errno: then fails)."""
ROOM = "create write truncate allocate mkdir"
"""The operations that a full disk refuses."""


class Call(NamedTuple):
    operation: str
    code: int
    inode: int
    path: str


def rule(operations: str, path: object, code: int, *, skip: int = 0, times: int = 1) -> None:
    """Of these operations on paths that hold `path`, `skip` go through, then `times` (-1: all) meet `code`."""
    ctypes.CDLL(None).faults_rule(operations.encode(), str(path).encode(), skip, times, code)


def struck() -> int:
    """How many calls the rules have struck."""
    count: int = ctypes.CDLL(None).faults_struck()
    return count


def clear() -> int:
    """Forget all rules; how many calls they have struck."""
    count = struck()
    ctypes.CDLL(None).faults_clear()
    return count


def log(path: object) -> None:
    """Keep a log of the calls on paths that hold `path`, from here on."""
    ctypes.CDLL(None).faults_log(str(path).encode())


def logged() -> list[Call]:
    """What was logged so far, in order."""
    shim = ctypes.CDLL(None)
    shim.faults_text.restype = ctypes.c_void_p
    nbytes = ctypes.c_size_t()
    text = ctypes.string_at(shim.faults_text(ctypes.byref(nbytes)), nbytes.value).decode()
    lines = (line.split(" ", 3) for line in text.splitlines())
    return [Call(operation, int(code), int(inode), path) for operation, code, inode, path in lines]


def synced_again(calls: Iterable[Call]) -> tuple[list[Call], set[int]]:
    """The fsyncs that succeeded on a file after one had failed there; and the inodes that are left of such files."""
    failed: dict[int, str] = {}
    again = []
    for call in calls:
        if call.operation == "unlink" and not call.code:  # the next file may get its inode
            failed = {inode: path for inode, path in failed.items() if path != call.path}
        elif call.operation == "fsync" and call.code:
            failed[call.inode] = call.path
        elif call.operation == "fsync" and call.inode in failed:
            again.append(call)
    return again, set(failed)


@contextmanager
def jumping_clock(seconds: int) -> Iterator[None]:
    """Whoever looks at the wall clock sees it a multiple of that in the past or the future, each time another."""
    shim = ctypes.CDLL(None)
    shim.faults_clock(ctypes.c_long(seconds))
    try:
        yield
    finally:
        shim.faults_clock(ctypes.c_long(0))
