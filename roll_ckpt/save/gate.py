"""One save begins, or one checkpoint is loaded, at a time in a process: the gate that every entry passes.

From the beginning of a save until its staging has ended, and during a load, other threads wait at the gate, the same
thread is refused by name, and Python's signal handlers are put off: one that saves and exits then finds a save that is
staged, and makes its own after it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from roll_ckpt import process
from roll_ckpt.errors import SaveFailed
from roll_ckpt.ranks.group import RankGroup

log = logging.getLogger("roll_ckpt")


class Gate:
    """The part of the `process` registry that one thread passes at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant: a thread that holds it must be refused, not wait for itself
        self._inside = ""

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """See `entered`."""
        put_off = _PutOff()
        try:
            with self._lock:
                yield from self._inside_of(what, put_off)
        finally:
            put_off.deliver()

    def _inside_of(self, what: str, put_off: _PutOff) -> Iterator[None]:
        if self._inside:
            raise SaveFailed(
                f"{what}: refused, because this thread is inside of {self._inside}; nothing was written or loaded. A "
                "callback called it: state_dict, client_state, save_pretrained, or a hook of the framework. Call it "
                "after the outer call has returned"
            )
        try:
            put_off.begin()
            self._inside = what
            yield
        finally:
            self._inside = ""
            put_off.end()


@contextmanager
def entered(ranks: RankGroup, what: str, timeout_s: float) -> Iterator[None]:
    """Pass the gate for the call `what`, such as "save checkpoint-10 to /runs/a", and begin that call on `ranks`.

    Every rank calls. Blocks while another thread is inside, which is from the beginning of a save until its staging has
    ended. On the main thread, the handlers that Python code has installed for signals run when the block has been left,
    in the order in which the signals came; a KeyboardInterrupt by Python's own handler comes at once, as ever. What a
    handler raises, such as SystemExit, is raised here.

    Raises:
        SaveFailed: this thread is inside already. The other ranks are not told, for they refuse it too.
    """
    with process.part(Gate).held(what), ranks.call(what, timeout_s):
        yield


@contextmanager
def signals_put_off() -> Iterator[None]:
    """Run Python's signal handlers after the block, in which a handler that saves would find a half changed state."""
    put_off = _PutOff()
    try:
        put_off.begin()
        yield
    finally:
        put_off.end()
        put_off.deliver()


class _PutOff:
    """The signal handlers of Python code, put off for a while. Does nothing but on the main thread."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[tuple[int, FrameType | None]] = []
        self._over = False

    def begin(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            owner = getattr(handler, "__self__", None)
            ours = isinstance(owner, _PutOff) and not owner._over
            if callable(handler) and handler is not signal.default_int_handler and not ours:
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._over or os.getpid() != self._pid:  # a forked child has no gate that it is in
            self._handlers[number](number, frame)
        else:
            self._came.append((number, frame))

    def end(self) -> None:
        """Install the handlers again, except where somebody has installed another one meanwhile."""
        self._over = True
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)

    def deliver(self) -> None:
        """Call the handlers of the signals that came, in their order. What one raises is raised."""
        while self._came:
            number, frame = self._came.pop(0)
            log.info("signal %d came during a save or load; its handler runs now", number)
            try:
                self._handlers[number](number, frame)
            except BaseException:
                for later, _ in self._came:
                    signal.raise_signal(later)
                raise
