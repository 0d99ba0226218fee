"""Everything that changes the disk: durable files, links, renames, directories, removals.

Order makes a save crash-safe: a file is durable before the name that refers to it. Each function tells `failpoints`
what it is about to do, so that tests can record the operation, fail it, or kill the process before it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk.failpoints import announce
from roll_ckpt.disk.missing import not_found_ok
from roll_ckpt.disk.tree import is_dir, is_real_dir, list_dir
from roll_ckpt.errors import Damaged

log = logging.getLogger("roll_ckpt")

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
_NO_FLAGS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # this file system has no such kind of rename
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
"""What link(2) says where the file system has no hard links: exFAT, SMB, most of FUSE."""
_NAME_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
_REMOVALS = 20  # how often remove_tree empties directories again that others fill meanwhile


class NotDurable(OSError):
    """fsync of a directory failed: its entries are visible, but may not survive a crash.

    The kernel reports such an error once, so a second fsync would falsely succeed.
    """


def write_durable(path: Path, data: bytes, *, scratch: Path | None = None) -> None:
    """Write `data` to `path` atomically, replacing any file there; durable on return.

    The temporary file lies in `scratch`, a directory of the same file system, or else beside `path`.

    Raises:
        NotDurable: the new file is in place, but its directory could not be synced.
        OSError: nothing was replaced.
    """
    temporary = _prepare(path, data, scratch)
    prepared = os.lstat(temporary)
    try:
        rename(temporary, path)
    except OSError as error:
        if error.errno != errno.ENOENT or not _has_become(path, prepared):
            discard_file(temporary)
            raise
    fsync_dir(path.parent)


def _has_become(path: Path, prepared: os.stat_result) -> bool:
    """Whether `path` is the prepared file: a rename that NFS retransmits fails with ENOENT although the first one
    succeeded.

    The directory is listed first, because the client may have cached that the name did not exist.
    """
    if path.name not in list_dir(path.parent):
        return False
    with not_found_ok():
        return os.path.samestat(prepared, os.lstat(path))
    return False


def link_durable(path: Path, data: bytes, *, scratch: Path | None = None) -> bool:
    """Write `data` to `path` unless the path exists; durable on return. True if this call created the file.

    `scratch` and the errors are those of write_durable.
    """
    temporary = _prepare(path, data, scratch)
    try:
        first = give_name(temporary, path, scratch or path.parent)
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
        # After a failed fsync the kernel never writes those pages again: a later try must write a new file.
        discard_file(temporary)
        raise
    return temporary


def create(path: Path) -> int:
    """Create a file, which must not exist, and return its descriptor."""
    announce("create", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def append(path: Path) -> int:
    """A descriptor that appends to a file, which is created if it is missing; a symbolic link is refused."""
    announce("append", path)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: bytes | memoryview, path: Path) -> None:
    """Write all of `data`, in several writes if the kernel takes less at a time."""
    announce("write", path)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def fsync(descriptor: int, path: Path) -> None:
    """Make the file's bytes durable."""
    announce("fsync", path)
    os.fsync(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of an existing file durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fsync(descriptor, path)
    finally:
        os.close(descriptor)


def fsync_dir(path: Path) -> bool:
    """Make the entries of a directory durable. False if the file system cannot fsync a directory.

    Raises:
        NotDurable: the fsync failed.
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
    """Give `source` the second name `target` (link(2)). False if `target` exists and is another file."""
    announce("link", source, target)
    try:
        os.link(source, target)
    except FileExistsError as error:
        log.debug("not linked, unless NFS retransmitted a link that succeeded: %s", error)
        return _are_one_file(source, target)
    return True


def _are_one_file(a: Path, b: Path) -> bool:
    with not_found_ok():
        return os.path.samestat(os.lstat(a), os.lstat(b))
    return False


def give_name(source: Path, target: Path, scratch: Path) -> bool:
    """Give the durable file `source` the name `target` unless another file has it; True if this call did.

    Of several callers at once, in any process, one wins. `source` may keep its own name, or lose it. Tried in turn, on
    file systems that have less and less: link(2); a rename that replaces nothing; directories below `scratch`, which
    all callers for `target` must share, and which must live as long as `target` does.
    """
    try:
        return link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    try:
        return rename_new(source, target)
    except OSError as error:
        if error.errno not in _NO_FLAGS:
            raise
    return _give_name_by_directory(source, target, scratch)


def rename_new(source: Path, target: Path) -> bool:
    """Rename `source` to `target`, replacing nothing. False if `target` exists and is another file.

    OSError with EINVAL, ENOSYS or ENOTSUP where the file system cannot.
    """
    announce("rename_new", source, target)
    prepared = os.lstat(source)
    try:
        _renameat2(source, target, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOENT):
            raise
        if _has_become(target, prepared):
            return True  # it was sent twice, and the first one succeeded
        if error.errno == errno.ENOENT:
            raise
        log.debug("not renamed: %s", error)
        return False
    return True


def _give_name_by_directory(source: Path, target: Path, scratch: Path) -> bool:
    """give_name where there is only rename(2): it never replaces a directory that is not empty.

    So the first directory that gets the name `first_dir` has won, with the file in it. Whoever comes then, the winner
    or a later caller, moves that file to `target`; a second file keeps the directory from becoming empty.
    """
    place = scratch / names.first_dir(target.name)
    own = scratch / names.temporary_file(target.name)
    make_dir(own)
    os.close(create(own / names.HELD))
    rename(source, own / target.name)
    fsync_dir(own)
    prepared = os.lstat(own)
    try:
        rename(own, place)
        first = True
    except OSError as error:
        first = error.errno == errno.ENOENT and _has_become(place, prepared)
        if not first and error.errno not in _NAME_TAKEN:
            rename(own / target.name, source)
            remove_tree(own)
            raise
    if not first:
        remove_tree(own)
    fsync_dir(scratch)  # that there is a winner must not be lost after its file has got the name
    with not_found_ok():
        rename(place / target.name, target)
    return first


def rename(source: Path, target: Path) -> None:
    """rename(2), raising its own errors. Not durable until fsync_dir of both parents."""
    announce("rename", source, target)
    os.rename(source, target)


def exchange(a: Path, b: Path) -> None:
    """Swap two names atomically. OSError with EINVAL, ENOSYS or ENOTSUP where the file system cannot."""
    announce("exchange", a, b)
    _renameat2(a, b, _RENAME_EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, "this C library has no renameat2", str(source))
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))


def swap(new: Path, target: Path, step_aside: Callable[[], None]) -> None:
    """Rename `new` to `target`; what was at `target` is afterwards at `new`.

    Where the file system cannot exchange two names, `step_aside()` moves `target` away first.
    """
    try:
        exchange(new, target)
    except OSError as error:
        if error.errno not in _NO_FLAGS:
            raise
        step_aside()
        rename(new, target)


def make_dir(path: Path) -> bool:
    """Make one directory, whose parent must exist. False if it exists already. Not durable until fsync_dir."""
    announce("mkdir", path)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not is_dir(path):
            raise
        return False
    return True


def make_dirs(path: Path, *, durable: bool = True) -> None:
    """Make a directory and its missing parents. If `durable`, each new entry is durable on return.

    Raises:
        FileNotFoundError: the path lies below an attempt's directory that does not exist. A late writer must not
            recreate what was thrown away; only transaction.attempts makes that directory.
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
    """make_dirs for a directory that only roll_ckpt uses. Damaged if it is a symbolic link, which is not followed."""
    make_dirs(path)
    if not is_real_dir(path):
        raise Damaged(f"{path}: a symbolic link where roll_ckpt needs a directory of its own; remove the link")


def remove_file(path: Path) -> None:
    """unlink(2)."""
    announce("unlink", path)
    os.unlink(path)


def discard_file(path: Path) -> None:
    """unlink(2) of a file that may not exist."""
    with not_found_ok():
        remove_file(path)


def remove_dir(path: Path) -> None:
    """rmdir(2)."""
    announce("rmdir", path)
    os.rmdir(path)


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it; or a file; or a link, but not its target.

    Another process may remove the same entries meanwhile, or add some: entries that appear in a directory after it was
    emptied are removed too, because a process that resolved its path before a rename may still write there.
    """
    pending, retries_left = [path], _REMOVALS
    while pending:
        folder = pending[-1]
        below = _folders_left(folder)
        if below:
            pending += below  # a stack, not recursion: a stranger's directories may be nested deeper than calls may be
            continue
        try:
            if below is not None:
                with not_found_ok():
                    remove_dir(folder)
        except OSError as error:
            retries_left -= 1
            if error.errno != errno.ENOTEMPTY or not retries_left:
                raise
            continue
        pending.pop()


def _folders_left(path: Path) -> list[Path] | None:
    """Remove everything in a directory but its subdirectories, and return those; None if the path is no longer a
    directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        if error.errno != errno.ENOENT:
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
    """Set a file's access and modification times to `at_ns`, or to the present time of the file system's clock."""
    if at_ns is None:
        os.utime(path)
    else:
        os.utime(path, ns=(at_ns, at_ns))
