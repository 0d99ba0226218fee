"""What exists once in a process: pending saves, claims, the staging arena, locks. One registry holds all of it.

Each kind of thing is a *part*: a class without arguments, made when it is first asked for. A forked child starts with
an empty registry, so nothing of the parent's is waited for, released or shut down there. A test can put a registry of
its own in force and throw it away.
"""

from __future__ import annotations

import atexit
import enum
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar


class Exit(enum.IntEnum):
    """The order in which parts are left when the interpreter exits."""

    UPLOADS = 0
    """Uploads that wait for the Hub are told to stop: they go on at the next start."""
    SAVES = 1
    """Pending saves and background work are waited for."""
    CLAIMS = 2
    """Output directories are released, so that another run may claim them at once."""
    THREADS = 3
    """Native threads end, before the memory that they read is torn down."""


Part = TypeVar("Part")


class Process:
    """The parts of one process. Any thread may ask for a part."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._parts: dict[type, Any] = {}

    def part(self, kind: type[Part]) -> Part:
        """The one `kind` of this process, made at the first call.

        A kind that has an attribute `exit` (an `Exit`) also has a method `leave()`, called at the interpreter's exit.
        """
        with self._lock:
            if kind not in self._parts:
                self._parts[kind] = kind()
                if hasattr(kind, "exit"):
                    _leave_at_exit()
            made: Part = self._parts[kind]
        return made

    def leave(self) -> None:
        """Leave every part in the order of `Exit`. Blocks as long as the parts do; idempotent."""
        with self._lock:
            parts = [part for part in self._parts.values() if hasattr(part, "exit")]
        for part in sorted(parts, key=lambda part: part.exit):
            part.leave()


_current = Process()


def current() -> Process:
    """The registry in force."""
    return _current


def part(kind: type[Part]) -> Part:
    """The one `kind` of the registry in force."""
    return _current.part(kind)


@contextmanager
def installed(registry: Process) -> Iterator[Process]:
    """Put `registry` in force inside the block, then leave its parts. Other threads see it, too."""
    global _current
    kept, _current = _current, registry
    try:
        yield registry
    finally:
        registry.leave()
        _current = kept


def _start_anew() -> None:
    global _current
    _current = Process()


os.register_at_fork(after_in_child=_start_anew)


@functools.cache
def _leave_at_exit() -> None:
    """Register the one handler at exit, not before it is needed: handlers run in the opposite order."""
    atexit.register(lambda: _current.leave())
