"""The Python half of the seam to the disk: nothing else in roll_ckpt, but csrc/file, touches it.

A test sets `observer` to record every mutating operation, to fail it, or to kill the process before it, and
`listener` to stop at the named points of a save. Both are None in production.

POSIX record locks belong to (process, file): closing ANY descriptor of a file drops this process's lock on
it. So a file that this process has locked is never opened again here; its one descriptor serves every read.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk.failpoints import announce
from roll_ckpt.disk.tree import is_dir, is_real_dir, list_dir
from roll_ckpt.errors import Damaged

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_REMOVALS = 20


class NotDurable(OSError):
    """A directory's fsync failed. Its entries are there to be seen, and may be lost all the same; asking again would
    only hide that, since the file system tells it once."""


def write_durable(path: Path, data: bytes, *, scratch: Path | None = None) -> None:
    """Put `data` under `path`, whole or not at all, replacing what is there; durable on return.

    The temporary file is made in `scratch`, a directory of the same file system, else beside `path`.
    """
    temporary = _prepare(path, data, scratch)
    prepared = os.lstat(temporary)
    try:
        rename(temporary, path)
    except OSError as error:
        if error.errno != errno.ENOENT or not _is_now(path, prepared):
            discard_file(temporary)
            raise
    fsync_dir(path.parent)


def _is_now(path: Path, prepared: os.stat_result) -> bool:
    """Whether `path` is that very file: a rename that NFS retransmitted answers ENOENT although the first one did it.

    The directory is listed, since a name that was looked up before and missing may be believed missing still.
    """
    if path.name not in list_dir(path.parent):
        return False
    with suppress(FileNotFoundError):
        return os.path.samestat(prepared, os.lstat(path))
    return False


def link_durable(path: Path, data: bytes, *, scratch: Path | None = None) -> bool:
    """Put `data` under `path` unless something is there already; durable on return. True if it was us."""
    temporary = _prepare(path, data, scratch)
    try:
        first = link(temporary, path)
    finally:
        discard_file(temporary)
    fsync_dir(path.parent)
    return first


def _prepare(path: Path, data: bytes, scratch: Path | None) -> Path:
    temporary = (scratch or path.parent) / names.temporary_file(path.name)
    descriptor = create(temporary)
    try:
        try:
            write_all(descriptor, data, temporary)
            fsync(descriptor, temporary)
        finally:
            os.close(descriptor)
    except OSError:
        # Pages whose fsync failed are never synced again: this file goes, a later try writes a new one.
        discard_file(temporary)
        raise
    return temporary


def create(path: Path) -> int:
    """A descriptor of a new file, which must not exist."""
    announce("create", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def append(path: Path) -> int:
    """A descriptor that writes at the end of a file, made if it is missing; a symbolic link is not followed."""
    announce("append", path)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: bytes | memoryview, path: Path) -> None:
    """Write all of `data`, however short the single writes are."""
    announce("write", path)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def fsync(descriptor: int, path: Path) -> None:
    """Make the file's bytes durable."""
    announce("fsync", path)
    os.fsync(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of a file that somebody else wrote durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fsync(descriptor, path)
    finally:
        os.close(descriptor)


def fsync_dir(path: Path) -> bool:
    """Make the entries of a directory durable. False where the file system cannot: a weaker guarantee.

    NotDurable if it fails.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        announce("fsync_dir", path)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise NotDurable(error.errno, error.strerror, str(path)) from error
        return False
    finally:
        os.close(descriptor)
    return True


def link(source: Path, target: Path) -> bool:
    """Give `source` the second name `target`. False if `target` exists and is another file."""
    announce("link", source, target)
    try:
        os.link(source, target)
    except FileExistsError:
        # A link that NFS retransmitted answers EEXIST although the first one made it.
        with suppress(FileNotFoundError):
            return os.path.samestat(os.lstat(source), os.lstat(target))
        return False
    return True


def rename(source: Path, target: Path) -> None:
    """rename(2), with its own answers. Not durable until fsync_dir of the parents."""
    announce("rename", source, target)
    os.rename(source, target)


def exchange(a: Path, b: Path) -> None:
    """Swap two names in one step. OSError with EINVAL, ENOSYS or ENOTSUP where the file system cannot."""
    announce("exchange", a, b)
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, "this C library has no renameat2", str(a))
    if function(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))


def swap(new: Path, target: Path, step_aside: Callable[[], None]) -> None:
    """Put `new` in the place of `target`, which comes to lie where `new` was.

    Where the file system cannot exchange two names, `step_aside` moves `target` away first.
    """
    try:
        exchange(new, target)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        step_aside()
        rename(new, target)


def make_dir(path: Path) -> bool:
    """Make one directory, whose parent must exist. False if it was there. Not durable by itself."""
    announce("mkdir", path)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not is_dir(path):
            raise
        return False
    return True


def make_dirs(path: Path, *, durable: bool = True) -> None:
    """Make a directory and its missing parents; if `durable`, each new entry is on disk on return.

    FileNotFoundError below an attempt's directory that is gone: a late writer must not bring back what was
    thrown away. Only commit.begin makes that directory.
    """
    if is_dir(path):
        return
    if names.parse_attempt_dir(path.name) is not None:
        raise FileNotFoundError(errno.ENOENT, "the attempt to save was abandoned", str(path))
    if path.parent != path:
        make_dirs(path.parent, durable=durable)
    make_dir(path)
    if durable:
        fsync_dir(path.parent)


def make_own_dir(path: Path) -> None:
    """make_dirs for a directory of our own. Damaged if it is a symbolic link: nothing is written where that leads."""
    make_dirs(path)
    if not is_real_dir(path):
        raise Damaged(f"{path}: a symbolic link and no directory; remove it")


def remove_file(path: Path) -> None:
    """unlink(2)."""
    announce("unlink", path)
    os.unlink(path)


def discard_file(path: Path) -> None:
    """unlink(2) of a file that may be gone."""
    with suppress(FileNotFoundError):
        remove_file(path)


def remove_dir(path: Path) -> None:
    """rmdir(2)."""
    announce("rmdir", path)
    os.rmdir(path)


def remove_tree(path: Path) -> None:
    """Remove a directory (or file, or link, but nothing that it leads to) and all below.

    What somebody else removes at the same time is fine, and what they still put there goes too: a process that was
    on its way into a directory when that was renamed arrives in it all the same.
    """
    pending, left = [path], _REMOVALS
    while pending:
        folder = pending[-1]
        below = _folders_left(folder)
        if below:
            pending += below  # a stack and no recursion: a stranger's folders may be nested more deeply than calls
            continue
        try:
            if below is not None:
                remove_dir(folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            left -= 1
            if error.errno != errno.ENOTEMPTY or not left:
                raise
            continue
        pending.pop()


def _folders_left(path: Path) -> list[Path] | None:
    """The directories in a directory, once everything else in it is removed; None if it is none any more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        discard_file(path)
        return None
    try:
        with os.scandir(descriptor) as entries:
            below = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries)
    finally:
        os.close(descriptor)
    for name, is_directory in below:
        if not is_directory:
            discard_file(path / name)
    return [path / name for name, is_directory in below if is_directory]


def touch(path: Path, *, at_ns: int | None = None) -> None:
    """Set a file's times: to now, by the file system's clock, or to `at_ns`."""
    if at_ns is None:
        os.utime(path)
    else:
        os.utime(path, ns=(at_ns, at_ns))
