"""The Python half of the seam to the disk: nothing else in roll_ckpt, but csrc/file, touches it.

A test sets `observer` to record every mutating operation, to fail it, or to kill the process before it, and
`listener` to stop at the named points of a save. Both are None in production.

POSIX record locks belong to (process, file): closing ANY descriptor of a file drops this process's lock on
it. So a file that this process has locked is never opened again here; its one descriptor serves every read.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from roll_ckpt.errors import Damaged

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def list_dir(path: Path) -> list[str]:
    """The sorted entries of a directory, [] if it is not there."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def exists(path: Path) -> bool:
    """Whether the name exists, a dangling symbolic link included. OSError, here and below, if the disk does not tell:
    what cannot be looked at is not taken for missing."""
    return _mode(os.lstat, path) is not None


def is_dir(path: Path) -> bool:
    """Whether it is a directory, or a link to one."""
    return stat.S_ISDIR(_mode(os.stat, path) or 0)


def is_real_dir(path: Path) -> bool:
    """Whether it is a directory and no symbolic link."""
    return stat.S_ISDIR(_mode(os.lstat, path) or 0)


def is_link(path: Path) -> bool:
    """Whether it is a symbolic link."""
    return stat.S_ISLNK(_mode(os.lstat, path) or 0)


def is_file(path: Path) -> bool:
    """Whether it is a regular file and no symbolic link."""
    return stat.S_ISREG(_mode(os.lstat, path) or 0)


def _mode(look: Callable[[Path], os.stat_result], path: Path) -> int | None:
    try:
        return look(path).st_mode
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return None


def file_bytes(path: Path) -> int:
    """The size of a regular file; Damaged if it is a symbolic link or anything else."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path}: not a regular file")
    return found.st_size


def free_bytes(path: Path) -> int:
    """What the file system of the nearest existing parent still lends to this user; plenty if it does not tell."""
    while not is_dir(path) and path.parent != path:
        path = path.parent
    told = shutil.disk_usage(path)
    return told.free if told.total else sys.maxsize  # without sizes: ramfs, some of FUSE


def walk(root: Path) -> Iterator[str]:
    """The POSIX paths, relative to `root`, of all regular files below; Damaged for a link or special file."""
    for path, sound in walk_all(root):
        if not sound:
            raise Damaged(f"{root / path}: a symbolic link or special file, which no checkpoint holds")
        yield path


def walk_all(root: Path) -> Iterator[tuple[str, bool]]:
    """Like walk, but every entry that is no directory, each with whether it is a regular file."""
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            below = sorted(entries, key=lambda entry: entry.name)
        for entry in below:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
            else:
                yield path, entry.is_file(follow_symlinks=False)
