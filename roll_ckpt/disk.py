"""The Python half of the seam to the disk: nothing else in roll_ckpt, but csrc/file, touches it.

A test sets `observer` to record every mutating operation, to fail it, or to kill the process before it, and
`listener` to stop at the named points of a save. Both are None in production.

POSIX record locks belong to (process, file): closing ANY descriptor of a file drops this process's lock on
it. So a file that this process has locked is never opened again here; its one descriptor serves every read.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from . import names
from .errors import Damaged

observer: Callable[[str, tuple[str, ...]], None] | None = None
listener: Callable[[str, dict[str, object]], None] | None = None

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_REMOVALS = 20
_RECORD_BYTES = 256 << 20
_LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    *(errno.EACCES, errno.EPERM, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP),
)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
OBJECT_BYTES = 4 << 30
"""A limit for `read_bytes` of what is no record of ours: pickles, and the state of a pipeline."""


class NotDurable(OSError):
    """A directory's fsync failed. Its entries are there to be seen, and may be lost all the same; asking again would
    only hide that, since the file system tells it once."""


def reach(point: str, **where: object) -> None:
    """Tell the listener, if there is one, that a save has come to a named point."""
    if listener is not None:
        listener(point, where)


def _about(operation: str, *paths: Path) -> None:
    if observer is not None:
        observer(operation, tuple(str(path) for path in paths))


# --- writing ------------------------------------------------------------------------------------------------


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
    _about("create", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def append(path: Path) -> int:
    """A descriptor that writes at the end of a file, made if it is missing; a symbolic link is not followed."""
    _about("append", path)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: bytes | memoryview, path: Path) -> None:
    """Write all of `data`, however short the single writes are."""
    _about("write", path)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def fsync(descriptor: int, path: Path) -> None:
    """Make the file's bytes durable."""
    _about("fsync", path)
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
        _about("fsync_dir", path)
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
    _about("link", source, target)
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
    _about("rename", source, target)
    os.rename(source, target)


def exchange(a: Path, b: Path) -> None:
    """Swap two names in one step. OSError with EINVAL, ENOSYS or ENOTSUP where the file system cannot."""
    _about("exchange", a, b)
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, "this C library has no renameat2", str(a))
    if function(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))


def make_dir(path: Path) -> bool:
    """Make one directory, whose parent must exist. False if it was there. Not durable by itself."""
    _about("mkdir", path)
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


# --- removing -----------------------------------------------------------------------------------------------


def remove_file(path: Path) -> None:
    """unlink(2)."""
    _about("unlink", path)
    os.unlink(path)


def discard_file(path: Path) -> None:
    """unlink(2) of a file that may be gone."""
    with suppress(FileNotFoundError):
        remove_file(path)


def remove_dir(path: Path) -> None:
    """rmdir(2)."""
    _about("rmdir", path)
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


# --- looking ------------------------------------------------------------------------------------------------

Found = TypeVar("Found")


class Patience:
    """About two seconds, in all, for which reads are tried again that a disk refuses and may soon grant."""

    pauses_s = (0.05, 0.15, 0.3, 0.6, 0.9)

    def __init__(self) -> None:
        self._left = list(self.pauses_s)

    def again(self, read: Callable[[], Found]) -> Found:
        """What `read` returns; the OSError that it raises still when patience has ended."""
        while True:
            try:
                return read()
            except OSError as error:
                if error.errno is None or error.errno in _LASTING or not self._left:
                    raise
            time.sleep(self._left.pop(0))


def read_bytes(path: Path, limit: int = _RECORD_BYTES) -> bytes:
    """All bytes of a regular file; Damaged if it is a symbolic link or anything else, or longer than `limit`, which
    no record of ours is: a sparse file of a stranger would fill the memory."""
    with _reader(path) as descriptor:
        nbytes = os.fstat(descriptor).st_size
        if nbytes > limit:
            raise Damaged(f"{path}: it has {nbytes} bytes, more than the {limit} that such a file may have")
        return _pread(descriptor, nbytes, 0)


def read_range(path: Path, offset: int, nbytes: int) -> bytes:
    """`nbytes` bytes of a regular file from `offset` on; fewer at its end. Damaged as for read_bytes."""
    with _reader(path) as descriptor:
        return _pread(descriptor, nbytes, offset)


def read_into(path: Path, offset: int, target: memoryview) -> int:
    """Fill `target` from a regular file from `offset` on; how many bytes there were. Damaged as for read_bytes."""
    done = 0
    with _reader(path) as descriptor:
        while done < len(target) and (count := os.preadv(descriptor, [target[done:]], offset + done)):
            done += count
    return done


def read_text_or_none(path: Path) -> str | None:
    """The text of a regular file, None if it is not there. Damaged if it is not UTF-8."""
    try:
        return read_bytes(path).decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise Damaged(f"{path}: not UTF-8 text") from error


def boot_id() -> str:
    """Names this boot of this host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def read_blocks(path: Path, block_bytes: int) -> Iterator[bytes]:
    """The bytes of a regular file in blocks of `block_bytes`, the last shorter; nothing for an empty file."""
    with _reader(path) as descriptor:
        offset = 0
        while block := _pread(descriptor, block_bytes, offset):
            offset += len(block)
            yield block


def _pread(descriptor: int, nbytes: int, offset: int) -> bytes:
    parts = []
    while nbytes and (part := os.pread(descriptor, nbytes, offset)):
        parts.append(part)
        nbytes -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def _reader(path: Path) -> Iterator[int]:
    with _lock_table:
        held = _held_at(path)
        if held is not None:
            held.users += 1
            descriptor = held.descriptor
        else:
            descriptor = _open_regular(path)
    try:
        yield descriptor
    finally:
        with _lock_table:
            if held is not None:
                held.drop()
            else:
                _close_unlocked(descriptor)


def _open_regular(path: Path, access: int = os.O_RDONLY) -> int:
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


# --- times --------------------------------------------------------------------------------------------------


def touch(path: Path, *, at_ns: int | None = None) -> None:
    """Set a file's times: to now, by the file system's clock, or to `at_ns`."""
    if at_ns is None:
        os.utime(path)
    else:
        os.utime(path, ns=(at_ns, at_ns))


def mtime_ns(path: Path) -> int:
    """The file's modification time as the server has it now."""
    with _reader(path) as descriptor:  # an open asks an NFS server again; a stat may answer from its cache
        return os.fstat(descriptor).st_mtime_ns


# --- locks --------------------------------------------------------------------------------------------------


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
        """One user less; the last one closes the descriptor, and with it the lock. Call under _lock_table."""
        self.users -= 1
        if not self.users:
            del _held[self.key]
            os.close(self.descriptor)
            _close_parked(self.key)

    def release(self) -> None:
        """Give the lock back. In a forked child, which never had it, nothing happens."""
        if self.pid == os.getpid():
            with _lock_table:
                self.drop()


_lock_table = threading.RLock()
_held: dict[tuple[int, int], Lock] = {}
_parked: dict[tuple[int, int], list[int]] = {}
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def _forget_in_child() -> None:
    global _lock_table
    _lock_table = threading.RLock()
    _held.clear()
    _parked.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _held_at(path: Path) -> Lock | None:
    if not _held:
        return None
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.stat(path)
        return _held.get((found.st_dev, found.st_ino))
    return None


def _close_unlocked(descriptor: int) -> None:
    """Close a descriptor; if the file was locked meanwhile by another thread, park it until the release."""
    found = os.fstat(descriptor)
    key = (found.st_dev, found.st_ino)
    if key in _held:
        _parked.setdefault(key, []).append(descriptor)
    else:
        os.close(descriptor)


def _close_parked(key: tuple[int, int]) -> None:
    for descriptor in _parked.pop(key, []):
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
        with _lock_table:
            lock = Lock(descriptor, True)
            _held[lock.key] = lock
        return lock
    except BaseException:
        os.close(descriptor)
        raise


def try_lock(path: Path, *, exclusive: bool) -> Lock | None:
    """Lock an existing file, None if another holder forbids it. Shared locks of one process add up.

    OSError with ENOLCK, ENOSYS or ENOTSUP where the file system has no locks; Damaged as for read_bytes.
    """
    with _lock_table:
        held = _held_at(path)
        if held is not None:
            if exclusive or held.exclusive:
                return None
            held.users += 1
            return held
        descriptor = _open_regular(path, os.O_RDWR if exclusive else os.O_RDONLY)
        try:
            fcntl.lockf(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return None
            raise
        lock = Lock(descriptor, exclusive)
        _held[lock.key] = lock
        return lock


def is_locked(path: Path) -> bool:
    """Whether any process of this host, this one included, has a lock on the file; nobody has one on anything else."""
    with _lock_table:
        if _held_at(path) is not None:
            return True
        try:
            descriptor = _open_regular(path)
        except Damaged:
            return False
        try:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
            return bool(answer[0] != fcntl.F_UNLCK)
        finally:
            _close_unlocked(descriptor)


def is_held(path: Path) -> bool:
    """Whether this process has the file locked, so that nobody here may open and close it."""
    with _lock_table:
        return _held_at(path) is not None


def same_file(lock: Lock, path: Path) -> bool:
    """Whether `path` still names the locked file."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.lstat(path)
        return (found.st_dev, found.st_ino) == lock.key
    return False
