"""The Python half of the seam to the disk: nothing else in roll_ckpt, but csrc/file, touches it.

A test sets `observer` to record every mutating operation, to fail it, or to kill the process before it, and
`listener` to stop at the named points of a save. Both are None in production.

POSIX record locks belong to (process, file): closing ANY descriptor of a file drops this process's lock on
it. So a file that this process has locked is never opened again here; its one descriptor serves every read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roll_ckpt.disk.locks import close_unlocked, held_at, lock_table, open_regular
from roll_ckpt.errors import Damaged

_RECORD_BYTES = 256 << 20
OBJECT_BYTES = 4 << 30
"""A limit for `read_bytes` of what is no record of ours: pickles, and the state of a pipeline."""


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
    with lock_table().guard:
        held = held_at(path)
        if held is not None:
            held.users += 1
            descriptor = held.descriptor
        else:
            descriptor = open_regular(path)
    try:
        yield descriptor
    finally:
        with lock_table().guard:
            if held is not None:
                held.drop()
            else:
                close_unlocked(descriptor)


def mtime_ns(path: Path) -> int:
    """The file's modification time as the server has it now."""
    with _reader(path) as descriptor:  # an open asks an NFS server again; a stat may answer from its cache
        return os.fstat(descriptor).st_mtime_ns
