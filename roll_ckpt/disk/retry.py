"""The Python half of the seam to the disk: nothing else in roll_ckpt, but csrc/file, touches it.

A test sets `observer` to record every mutating operation, to fail it, or to kill the process before it, and
`listener` to stop at the named points of a save. Both are None in production.

POSIX record locks belong to (process, file): closing ANY descriptor of a file drops this process's lock on
it. So a file that this process has locked is never opened again here; its one descriptor serves every read.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

_LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    *(errno.EACCES, errno.EPERM, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP),
)
Found = TypeVar("Found")


class ReadRetries:
    """About two seconds, in all, for which reads are tried again that a disk refuses and may soon grant."""

    pauses_s = (0.05, 0.15, 0.3, 0.6, 0.9)

    def __init__(self) -> None:
        self._left = list(self.pauses_s)

    def run(self, read: Callable[[], Found]) -> Found:
        """What `read` returns; the OSError that it raises still when patience has ended."""
        while True:
            try:
                return read()
            except OSError as error:
                if error.errno is None or error.errno in _LASTING or not self._left:
                    raise
            time.sleep(self._left.pop(0))
