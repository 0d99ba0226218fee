"""The registry of what exists once in a process: pending saves, claims, the staging arena, locks.

Each of these is a *part*: an instance of a class whose constructor takes no arguments, made on first use. A forked
child starts with an empty registry, so it does not wait for, release or shut down anything of its parent. A test can
install a registry of its own and throw it away.
"""

from __future__ import annotations

import atexit
import enum
import functools
import multiprocessing.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar


class Exit(enum.IntEnum):
    """When the interpreter exits, the parts leave in this order."""

    UPLOADS = 0
    """Stop uploads to the Hub; they continue at the next start."""
    SAVES = 1
    """Wait for pending saves and background work."""
    CLAIMS = 2
    """Release output directories, so that another run may claim them at once."""
    THREADS = 3
    """End native threads before the memory that they read is freed."""


Part = TypeVar("Part")


class Process:
    """The parts of one process. Any thread may ask for a part."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._parts: dict[type, Any] = {}

    def part(self, kind: type[Part]) -> Part:
        """The one instance of `kind` in this process, made on the first call.

        If `kind` has an attribute `exit` (an `Exit`), its method `leave()` is called when the interpreter exits.
        """
        with self._lock:
            if kind not in self._parts:
                self._parts[kind] = kind()
                if hasattr(kind, "exit"):
                    _leave_at_exit()
            instance: Part = self._parts[kind]
        return instance

    def leave(self) -> None:
        """Call `leave()` of every part in the order of `Exit`. Blocks until all have returned; may be called again."""
        with self._lock:
            parts = [part for part in self._parts.values() if hasattr(part, "exit")]
        for part in sorted(parts, key=lambda part: part.exit):
            part.leave()


_current = Process()


def current() -> Process:
    """The installed registry."""
    return _current


def part(kind: type[Part]) -> Part:
    """The one instance of `kind` in the installed registry."""
    return _current.part(kind)


@contextmanager
def installed(registry: Process) -> Iterator[Process]:
    """Install `registry` inside the block, for all threads, and call `leave()` of its parts at the end."""
    global _current
    previous, _current = _current, registry
    try:
        yield registry
    finally:
        registry.leave()
        _current = previous


def _clear_in_child() -> None:
    global _current
    _current = Process()
    _leave_at_exit.cache_clear()


os.register_at_fork(after_in_child=_clear_in_child)


@functools.cache
def _leave_at_exit() -> None:
    """Register the one handler, as late as possible: handlers run last in, first out, so it then runs early.

    A child that multiprocessing forks ends without atexit handlers (Lib/multiprocessing/popen_fork.py), but it runs
    multiprocessing's own finalizers. Where both run, the second does nothing.
    """
    leave = functools.cache(lambda: _current.leave())
    atexit.register(leave)
    multiprocessing.util.Finalize(None, leave, exitpriority=0)
