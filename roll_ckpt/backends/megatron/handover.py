"""What crosses to the process in which a queue runs its requests: a small wait for the threads of the training process.

Megatron's queues run a request in a forked child or in a worker that they have spawned, to which they pickle it. Our
bytes are moved by native threads of the training process, so all that another process can do is to wait for them. The
wait only keeps the queue from finishing too early, which would hold up training: what has become of the files, the
training process knows. Importing this module needs neither torch nor Megatron-core.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
from typing import Any

_numbers = itertools.count(1)


class Handover:
    """Ends when this process says so by `end`, or when it dies; every process that has a copy can wait for that.

    The training process makes it, and pickles it or forks; any thread calls. Another process waits for a lock on a file
    in memory, which the kernel releases when the training process closes the file or is gone.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._ended: threading.Event | None = threading.Event()
        self._descriptor = os.memfd_create(f"roll_ckpt save {next(_numbers)} of process {self._pid}")
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        self._file = os.readlink(self._path())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ended": None}

    @property
    def ended(self) -> bool:
        """Whether `end` was called. In the process that made it alone."""
        return self._ended is not None and self._ended.is_set()

    def end(self) -> None:
        """Let all who wait go on. In the process that made it alone, once."""
        assert self._ended is not None
        self._ended.set()
        os.close(self._descriptor)

    def wait(self) -> None:
        """Block until `end` was called, or the process that made this is gone. In any process; raises nothing."""
        if os.getpid() == self._pid and self._ended is not None:
            self._ended.wait()
            return
        try:
            if os.readlink(self._path()) == self._file:  # else it has ended, and the number is that of another file
                with open(self._path(), "rb", buffering=0) as file:
                    fcntl.lockf(file, fcntl.LOCK_SH)
        except OSError:
            return  # it has ended, or that process is gone

    def _path(self) -> str:
        return f"/proc/{self._pid}/fd/{self._descriptor}"


def wait(handover: Handover) -> None:
    """The function of a request: see `Handover.wait`."""
    handover.wait()
