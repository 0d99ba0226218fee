"""POSIX record locks on files, and opening and closing files so that no lock is lost.

A record lock belongs to a process and a file: closing ANY descriptor of the file drops this process's lock on it. So a
file that this process has locked is not opened again; the descriptor of its lock serves every read.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from roll_ckpt import process
from roll_ckpt.disk.missing import if_there
from roll_ckpt.disk.tree import is_file
from roll_ckpt.disk.writes import create, fsync, write_all
from roll_ckpt.errors import Damaged

log = logging.getLogger("roll_ckpt")


def open_regular(path: Path, access: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """A descriptor of a regular file. Damaged if the path is a special file, or, unless `follow`, a symbolic link."""
    flags = access | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        # Without O_NONBLOCK the open of a named pipe would wait forever.
        descriptor = os.open(path, flags | os.O_NONBLOCK)
    except BlockingIOError:
        # Another process holds a lease on the file (fcntl(2), F_SETLEASE); an open that waits makes it give that up.
        if not is_file(path, follow=follow):
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
    """A POSIX record lock of this process on one file, until release(). Forked children do not inherit it."""

    def __init__(self, descriptor: int, exclusive: bool) -> None:
        self.descriptor = descriptor
        self.exclusive = exclusive
        self.users = 1
        self.pid = os.getpid()
        self.key = _key_of(os.fstat(descriptor))

    def drop(self) -> None:
        """Remove one user; the last one closes the descriptor, which ends the lock. The caller holds the guard."""
        self.users -= 1
        if not self.users:
            del lock_table().held[self.key]
            os.close(self.descriptor)
            _close_parked(self.key)

    def release(self) -> None:
        """End this use of the lock. Does nothing in a forked child, which never had the lock."""
        if self.pid == os.getpid():
            with lock_table().guard:
                self.drop()


_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class LockTable:
    """The files that this process has locked, by device and inode.

    Threads hold `guard` while they open or close a file, so that none closes a descriptor of a file that another has
    just locked. `parked` descriptors stay open until the lock on their file is released.
    """

    def __init__(self) -> None:
        self.guard = threading.RLock()
        self.held: dict[tuple[int, int], Lock] = {}
        self.parked: dict[tuple[int, int], list[int]] = {}


def lock_table() -> LockTable:
    """The table of this process. A forked child, which inherits no locks, starts with an empty one."""
    return process.part(LockTable)


def _key_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def held_at(path: Path) -> Lock | None:
    """The lock that this process has on the file at `path`, None if it has none."""
    if not lock_table().held:
        return None
    status = if_there(lambda: os.stat(path))
    return None if status is None else lock_table().held.get(_key_of(status))


def close_unlocked(descriptor: int) -> None:
    """Close a descriptor. If another thread has locked the file meanwhile, the descriptor stays open until that lock is
    released."""
    key = _key_of(os.fstat(descriptor))
    if key in lock_table().held:
        lock_table().parked.setdefault(key, []).append(descriptor)
    else:
        os.close(descriptor)


def _close_parked(key: tuple[int, int]) -> None:
    for descriptor in lock_table().parked.pop(key, []):
        os.close(descriptor)


def lock_new(path: Path, contents: Callable[[bool], bytes]) -> Lock:
    """Create a durable file and lock it exclusively before anything is written into it.

    `contents(locked)` returns the bytes to write; `locked` is False where the file system has no locks. The path must
    not exist.
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
    """Lock an existing file without waiting; None if another lock forbids it.

    Several shared locks of this process on one file are one lock with several users.

    Raises:
        OSError: ENOLCK, ENOSYS or ENOTSUP where the file system has no locks.
        Damaged: the path is not a regular file.
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
    """Whether any process of this host, this one included, has a lock on the file. False if it is no regular file."""
    with lock_table().guard:
        if held_at(path) is not None:
            return True
        try:
            descriptor = open_regular(path)
        except Damaged as error:
            log.debug("no process can have a lock on it: %s", error)
            return False
        try:
            query = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, query))
            return bool(answer[0] != fcntl.F_UNLCK)
        finally:
            close_unlocked(descriptor)


def is_held(path: Path) -> bool:
    """Whether this process has locked the file; if so, no code of this process may open and close it."""
    with lock_table().guard:
        return held_at(path) is not None


def same_file(lock: Lock, path: Path) -> bool:
    """Whether `path` still names the locked file, and not a newer one or none."""
    status = if_there(lambda: os.lstat(path))
    return status is not None and _key_of(status) == lock.key
