"""The files of a checkpoint as Megatron's load reads them: through us, so that each block is verified as it is read.

All bytes were verified before the load. But Megatron opens the files again, and what has left the page cache by then
comes from the disk once more.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from roll_ckpt.backends.megatron import version
from roll_ckpt.errors import Damaged
from roll_ckpt.formats.dcp import index as dcp_index
from roll_ckpt.load.checkpoint import Blocks, OpenedCheckpoint

_BUFFER_BYTES = 1 << 16  # larger reads bypass the buffer


class _CheckedFile(io.RawIOBase):
    """A file of a checkpoint, read block by block; each block is verified, and the last one is cached."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._at = 0
        self._cached = memoryview(bytearray(min(blocks.block_bytes, blocks.nbytes)))
        self._cached_index = -1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._blocks.nbytes}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        if self._at >= self._blocks.nbytes:
            return 0
        target = memoryview(buffer).cast("B")
        index, start = divmod(self._at, self._blocks.block_bytes)
        length = self._blocks.length(index)
        count = min(length - start, len(target))
        if count == length:
            self._blocks.read(index, target[:count])
        else:
            if index != self._cached_index:
                self._cached_index = -1
                self._blocks.read(index, self._cached[:length])
                self._cached_index = index
            target[:count] = self._cached[start : start + count]
        self._at += count
        return count


def _open(checkpoint: OpenedCheckpoint, path: str | os.PathLike[str]) -> io.BufferedReader:
    return io.BufferedReader(_CheckedFile(checkpoint.blocks(Path(path))), _BUFFER_BYTES)


def reading(checkpoint: OpenedCheckpoint | None) -> dcp_index.Read:
    """How to read the files of `checkpoint`: each block is verified, Damaged if it differs; unverified for None."""
    if checkpoint is None:
        return dcp_index.read_unchecked
    streams: dict[Path, io.BufferedReader] = {}

    def read(path: Path, offset: int, nbytes: int) -> bytes:
        if path not in streams:
            streams[path] = _open(checkpoint, path)
        streams[path].seek(offset)
        return streams[path].read(nbytes)

    return read


class _CheckedFiles(FileSystem):
    """The file system that DCP's reader opens files through."""

    def __init__(self, checkpoint: OpenedCheckpoint) -> None:
        super().__init__()
        self._checkpoint = checkpoint

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "rb", f"a load opens {path} with {mode!r}"
        with _open(self._checkpoint, path) as stream:
            yield stream


class _Reader(FileSystemReader):
    """DCP's reader of a directory. It reads the index once, though Megatron asks it several times."""

    def __init__(self, directory: str | os.PathLike[str], checkpoint: OpenedCheckpoint) -> None:
        super().__init__(directory)
        self.fs = _CheckedFiles(checkpoint)
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = super().read_metadata(*args, **kwargs)
        return self._index


@contextmanager
def checked(checkpoint: OpenedCheckpoint) -> Iterator[None]:
    """Inside the block, Megatron's load strategies read the files of `checkpoint` through us. This process alone.

    The common state, which Megatron opens by itself, comes from `version.common_state_from`.

    Raises:
        Damaged: the bytes have changed since they were verified; what was loaded by then stays loaded.
    """

    try:
        with version.reads_through(lambda directory: _Reader(directory, checkpoint)):
            yield
    except CheckpointException as problem:  # DCP raises it on every rank; it is no subclass of Exception
        for cause, _ in problem.failures.values():
            if isinstance(cause, Damaged):
                raise Damaged(str(cause)) from problem
        raise
