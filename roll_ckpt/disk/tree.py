"""Which files and directories exist, of what kind and size; nothing here opens a file or changes the disk.

A path that cannot be examined (EACCES, EIO) is not taken for missing: the OSError is raised.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from roll_ckpt.disk.missing import not_found_ok
from roll_ckpt.errors import Damaged

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def list_dir(path: Path) -> list[str]:
    """The sorted entries of a directory, [] if it does not exist. NotADirectoryError if it is a file."""
    entries: list[str] = []
    with not_found_ok():
        entries = sorted(os.listdir(path))
    return entries


def exists(path: Path) -> bool:
    """Whether the name exists; a dangling symbolic link does."""
    return _mode(os.lstat, path) is not None


def is_dir(path: Path) -> bool:
    """Whether the path is a directory, or a symbolic link to one."""
    return stat.S_ISDIR(_mode(os.stat, path) or 0)


def is_real_dir(path: Path) -> bool:
    """Whether the path is a directory itself, not a symbolic link."""
    return stat.S_ISDIR(_mode(os.lstat, path) or 0)


def is_link(path: Path) -> bool:
    """Whether the path is a symbolic link."""
    return stat.S_ISLNK(_mode(os.lstat, path) or 0)


def is_file(path: Path, *, follow: bool = False) -> bool:
    """Whether the path is a regular file itself, or with `follow` also a symbolic link to one."""
    return stat.S_ISREG(_mode(os.stat if follow else os.lstat, path) or 0)


def _mode(stat_call: Callable[[Path], os.stat_result], path: Path) -> int | None:
    try:
        return stat_call(path).st_mode
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        return None


def file_bytes(path: Path, *, follow: bool = False) -> int:
    """The size of a regular file in bytes; with `follow`, a link may lead to it. Damaged if it is anything else."""
    status = os.stat(path) if follow else os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path}: not a regular file")
    return status.st_size


def free_bytes(path: Path) -> int:
    """The bytes that this user can still write to the file system of the nearest existing parent directory.

    sys.maxsize if the file system reports no sizes.
    """
    while not is_dir(path) and path.parent != path:
        path = path.parent
    usage = shutil.disk_usage(path)
    return usage.free if usage.total else sys.maxsize  # ramfs and some FUSE file systems report 0 of 0


def walk(root: Path) -> Iterator[str]:
    """The POSIX paths, relative to `root`, of all regular files below it. Damaged at a link or special file."""
    for path, is_regular in walk_all(root):
        if not is_regular:
            raise Damaged(f"{root / path}: a symbolic link or special file, which no checkpoint holds")
        yield path


def walk_all(root: Path) -> Iterator[tuple[str, bool]]:
    """Like walk, but yields every entry that is not a directory, each with whether it is a regular file."""
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
