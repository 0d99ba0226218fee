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

import torch
from megatron.core.dist_checkpointing.strategies import torch as stock
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from roll_ckpt.backends.megatron.facts import COMMON
from roll_ckpt.errors import Damaged
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


class _CheckedCommon(TorchCommonLoadStrategy):  # type: ignore[misc]
    """Megatron's strategy for the common state, which otherwise opens the file by itself."""

    def __init__(self, checkpoint: OpenedCheckpoint) -> None:
        super().__init__()
        self._checkpoint = checkpoint

    def load_common(self, checkpoint_dir: str | os.PathLike[str]) -> Any:
        with _open(self._checkpoint, Path(checkpoint_dir) / COMMON) as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)


@contextmanager
def checked(checkpoint: OpenedCheckpoint) -> Iterator[TorchCommonLoadStrategy]:
    """Inside the block, Megatron's load strategies read the files of `checkpoint` through us. This process alone.

    Yields the strategy for the common state, to be passed to `dist_checkpointing.load`: no patch reaches how
    Megatron's own opens that file.

    Raises:
        Damaged: the bytes have changed since they were verified; what was loaded by then stays loaded.
    """

    def reader(directory: str | os.PathLike[str], cache_metadata: bool = False) -> CachedMetadataFileSystemReader:
        checked_reader = CachedMetadataFileSystemReader(directory)
        checked_reader.fs = _CheckedFiles(checkpoint)
        return checked_reader

    stock_reader = stock._get_filesystem_reader
    stock._get_filesystem_reader = reader
    try:
        yield _CheckedCommon(checkpoint)
    except CheckpointException as problem:  # DCP raises it on every rank; it is no subclass of Exception
        for cause, _ in problem.failures.values():
            if isinstance(cause, Damaged):
                raise Damaged(str(cause)) from problem
        raise
    finally:
        stock._get_filesystem_reader = stock_reader
