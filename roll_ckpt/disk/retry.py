"""Reads that are tried again: a network file system may refuse a read now and grant it a second later."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

_PERMANENT = (  # another try would only repeat these errors
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    *(errno.EACCES, errno.EPERM, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP),
)
Read = TypeVar("Read")


class ReadRetries:
    """A budget of about two seconds, shared by all reads of one job, in which failed reads are tried again."""

    pauses_s = (0.05, 0.15, 0.3, 0.6, 0.9)

    def __init__(self) -> None:
        self._left = list(self.pauses_s)

    def run(self, read: Callable[[], Read]) -> Read:
        """What `read` returns.

        An OSError that may pass is tried again after a pause; raised is a permanent one (such as ENOENT or EACCES), or
        the last one when the budget is used up.
        """
        while True:
            try:
                return read()
            except OSError as error:
                if error.errno is None or error.errno in _PERMANENT or not self._left:
                    raise
            time.sleep(self._left.pop(0))
