"""Record locks on files, and the opening of files so that no lock is lost.

POSIX record locks belong to a process and a file: closing ANY descriptor of a file drops this process's lock on it.
So a file that this process has locked is not opened again; the lock's one descriptor serves every read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from roll_ckpt import process
from roll_ckpt.disk.tree import is_file
from roll_ckpt.disk.writes import create, fsync, write_all
from roll_ckpt.errors import Damaged


def open_regular(path: Path, access: int = os.O_RDONLY) -> int:
    flags = access | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # Without O_NONBLOCK the open of a named pipe waits for ever.
        descriptor = os.open(path, flags | os.O_NONBLOCK)
    except BlockingIOError:
        # Another process has a lease on the file (fcntl(2), F_SETLEASE), and gives it up for an open that waits.
        if not is_file(path):
            raise
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise Damaged(f"{path}: a symbolic link or special file, not a file") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{path}: not a regular file")
    return descriptor


class Lock:
    """A POSIX record lock of this process on one file, until release(). Forked children do not have it."""

    def __init__(self, descriptor: int, exclusive: bool) -> None:
        self.descriptor = descriptor
        self.exclusive = exclusive
        self.users = 1
        self.pid = os.getpid()
        found = os.fstat(descriptor)
        self.key = (found.st_dev, found.st_ino)

    def drop(self) -> None:
        """One user less; the last one closes the descriptor, and with it the lock. Call under the table's guard."""
        self.users -= 1
        if not self.users:
            del lock_table().held[self.key]
            os.close(self.descriptor)
            _close_parked(self.key)

    def release(self) -> None:
        """Give the lock back. In a forked child, which never had it, nothing happens."""
        if self.pid == os.getpid():
            with lock_table().guard:
                self.drop()


_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class LockTable:
    """The files that this process has locked, by device and inode.

    `guard` is held while a file is opened or closed, so that no descriptor of a file that another thread has locked
    meanwhile is closed. `parked` are descriptors that must stay open until the lock on their file is released.
    """

    def __init__(self) -> None:
        self.guard = threading.RLock()
        self.held: dict[tuple[int, int], Lock] = {}
        self.parked: dict[tuple[int, int], list[int]] = {}


def lock_table() -> LockTable:
    """The table of this process; a forked child, which has no locks, has an empty one."""
    return process.part(LockTable)


def held_at(path: Path) -> Lock | None:
    if not lock_table().held:
        return None
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.stat(path)
        return lock_table().held.get((found.st_dev, found.st_ino))
    return None


def close_unlocked(descriptor: int) -> None:
    """Close a descriptor; if the file was locked meanwhile by another thread, park it until the release."""
    found = os.fstat(descriptor)
    key = (found.st_dev, found.st_ino)
    if key in lock_table().held:
        lock_table().parked.setdefault(key, []).append(descriptor)
    else:
        os.close(descriptor)


def _close_parked(key: tuple[int, int]) -> None:
    for descriptor in lock_table().parked.pop(key, []):
        os.close(descriptor)


def lock_new(path: Path, contents: Callable[[bool], bytes]) -> Lock:
    """Make a durable file that this process has locked before anybody can see what is in it.

    `contents` is told whether the lock holds: False where the file system has no locks.
    """
    descriptor = create(path)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locked = False
        write_all(descriptor, contents(locked), path)
        fsync(descriptor, path)
        with lock_table().guard:
            lock = Lock(descriptor, True)
            lock_table().held[lock.key] = lock
        return lock
    except BaseException:
        os.close(descriptor)
        raise


def try_lock(path: Path, *, exclusive: bool) -> Lock | None:
    """Lock an existing file, None if another holder forbids it. Shared locks of one process add up.

    OSError with ENOLCK, ENOSYS or ENOTSUP where the file system has no locks; Damaged as for read_bytes.
    """
    with lock_table().guard:
        held = held_at(path)
        if held is not None:
            if exclusive or held.exclusive:
                return None
            held.users += 1
            return held
        descriptor = open_regular(path, os.O_RDWR if exclusive else os.O_RDONLY)
        try:
            fcntl.lockf(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return None
            raise
        lock = Lock(descriptor, exclusive)
        lock_table().held[lock.key] = lock
        return lock


def is_locked(path: Path) -> bool:
    """Whether any process of this host, this one included, has a lock on the file; nobody has one on anything else."""
    with lock_table().guard:
        if held_at(path) is not None:
            return True
        try:
            descriptor = open_regular(path)
        except Damaged:
            return False
        try:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
            return bool(answer[0] != fcntl.F_UNLCK)
        finally:
            close_unlocked(descriptor)


def is_held(path: Path) -> bool:
    """Whether this process has the file locked, so that nobody here may open and close it."""
    with lock_table().guard:
        return held_at(path) is not None


def same_file(lock: Lock, path: Path) -> bool:
    """Whether `path` still names the locked file."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.lstat(path)
        return (found.st_dev, found.st_ino) == lock.key
    return False
