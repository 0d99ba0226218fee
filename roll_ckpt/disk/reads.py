"""Reading files. A file that this process has locked is read through the descriptor of its lock (see `locks`).

Special files are refused as Damaged. Symbolic links are followed, because a download may leave links into a cache; the
digests decide whether the bytes are those of the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roll_ckpt.disk.locks import close_unlocked, held_at, lock_table, open_regular
from roll_ckpt.disk.missing import not_found_ok
from roll_ckpt.errors import Damaged

_RECORD_BYTES = 256 << 20
OBJECT_BYTES = 4 << 30
"""The `limit` of `read_bytes` for files that are not records: pickles, and the state of a pipeline."""


def read_bytes(path: Path, limit: int = _RECORD_BYTES) -> bytes:
    """All bytes of a regular file.

    Raises:
        Damaged: the path is not a regular file, or the file is longer than `limit` bytes; a sparse file from a stranger
            could fill the memory.
        OSError: the file cannot be read.
    """
    with _reader(path) as descriptor:
        nbytes = os.fstat(descriptor).st_size
        if nbytes > limit:
            raise Damaged(f"{path}: it has {nbytes} bytes, more than the {limit} that such a file may have")
        return _pread(descriptor, nbytes, 0)


def read_range(path: Path, offset: int, nbytes: int) -> bytes:
    """`nbytes` bytes of a regular file from `offset` on, fewer at its end. Damaged if it is not a regular file."""
    with _reader(path) as descriptor:
        return _pread(descriptor, nbytes, offset)


def read_into(path: Path, offset: int, target: memoryview) -> int:
    """Fill `target` with bytes of a regular file from `offset` on; returns how many there were. Damaged if it is not a
    regular file."""
    done = 0
    with _reader(path) as descriptor:
        while done < len(target) and (count := os.preadv(descriptor, [target[done:]], offset + done)):
            done += count
    return done


def read_text_or_none(path: Path) -> str | None:
    """The text of a regular file, None if it does not exist. Damaged if it is not UTF-8, or as for read_bytes."""
    data = None
    with not_found_ok():
        data = read_bytes(path)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"{path}: not UTF-8 text") from error


def boot_id() -> str:
    """The kernel's identifier of this boot of this host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def read_blocks(path: Path, block_bytes: int) -> Iterator[bytes]:
    """The bytes of a regular file in blocks of `block_bytes`, the last one shorter; no block for an empty file."""
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
            descriptor = open_regular(path, follow=True)
    try:
        yield descriptor
    finally:
        with lock_table().guard:
            if held is not None:
                held.drop()
            else:
                close_unlocked(descriptor)


def mtime_ns(path: Path) -> int:
    """The file's modification time in nanoseconds, as its server knows it now."""
    with _reader(path) as descriptor:  # an open asks the NFS server; stat may answer from the client's cache
        return os.fstat(descriptor).st_mtime_ns
