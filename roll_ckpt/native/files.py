"""The native half: staging arena, copies, digests, direct I/O. Sole importer of the extension; no torch.

Every call that waits lets other Python threads run and still answers to Ctrl-C. Arenas, movers and transfers
belong to the process that made them; a forked child that calls one gets a RuntimeError. A failed operation on
a file is an OSError (of the subclass that fits errno) with errno and path, and the offset in the text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from roll_ckpt.errors import Damaged
from roll_ckpt.native.extension import Buffer, Digest, _native

if TYPE_CHECKING:
    from _typeshed import StrOrBytesPath


def read_file(
    path: StrOrBytesPath,
    nbytes: int,
    block_bytes: int,
    crcs: Sequence[int] | None = None,
    *,
    threads: int = 4,
    direct: bool = True,
) -> Buffer:
    """Reads a whole file with `threads` reads in flight into memory of its own (page-aligned, huge pages).

    Every block is checked against `crcs` as it lands. Damaged names the path and the block whose CRC differs,
    or the size if it is not `nbytes`; OSError if the file cannot be read.
    """
    try:
        return _native.read_file(
            os.fsencode(path), nbytes, block_bytes, None if crcs is None else list(crcs), threads, direct
        )
    except _native.DamagedFile as error:
        raise Damaged(str(error)) from None


def digest_file(path: StrOrBytesPath, block_bytes: int, *, threads: int = 4, direct: bool = True) -> Digest:
    """The CRC-32 of each block of the file as it is now. OSError: unreadable; Damaged: it shrinks."""
    try:
        return _native.digest_file(os.fsencode(path), block_bytes, threads, direct)
    except _native.DamagedFile as error:
        raise Damaged(str(error)) from None
