"""Reading whole files with several reads in flight, and computing or checking the CRC-32 of each block.

Both functions block, let other Python threads run meanwhile, and answer to Ctrl-C. A failed read is an OSError (of the
subclass that fits errno) with errno and path, and the offset in its text.
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
    """Read a whole file of `nbytes` bytes with `threads` reads in flight into new memory (page-aligned, huge pages).

    If `crcs` is given (one CRC-32 for each block of `block_bytes` bytes), each block is checked as it arrives. With
    `direct` the page cache is bypassed where the file system allows it.

    Raises:
        Damaged: the file has another size, or a block another CRC-32; the message names path and block.
        OSError: the file cannot be read.
        ValueError: the number of `crcs` is not the number of blocks.
    """
    try:
        return _native.read_file(
            os.fsencode(path), nbytes, block_bytes, None if crcs is None else list(crcs), threads, direct
        )
    except _native.DamagedFile as error:
        raise Damaged(str(error)) from None


def digest_file(path: StrOrBytesPath, block_bytes: int, *, threads: int = 4, direct: bool = True) -> Digest:
    """The CRC-32 of each block of `block_bytes` bytes of the file as it is now.

    Raises:
        Damaged: the file shrinks while it is read.
        OSError: the file cannot be read.
    """
    try:
        return _native.digest_file(os.fsencode(path), block_bytes, threads, direct)
    except _native.DamagedFile as error:
        raise Damaged(str(error)) from None
