"""Files as stock's load reads them: through us, so that each block is checked when its bytes are taken.

All bytes were checked before the load; but stock code opens the files again, and what the page cache could not keep
comes from the disk again.
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

_BUFFER_BYTES = 1 << 16  # larger reads go past it


class _CheckedFile(io.RawIOBase):
    """A file of a checkpoint, of which the last block that was read is kept."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._at = 0
        self._kept = memoryview(bytearray(min(blocks.block_bytes, blocks.nbytes)))
        self._kept_index = -1

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
            if index != self._kept_index:
                self._kept_index = -1
                self._blocks.read(index, self._kept[:length])
                self._kept_index = index
            target[:count] = self._kept[start : start + count]
        self._at += count
        return count


def _opened(checkpoint_dir: OpenedCheckpoint, path: str | os.PathLike[str]) -> io.BufferedReader:
    return io.BufferedReader(_CheckedFile(checkpoint_dir.blocks(Path(path))), _BUFFER_BYTES)


class _CheckedFiles(FileSystem):
    def __init__(self, checkpoint_dir: OpenedCheckpoint) -> None:
        super().__init__()
        self._unit = checkpoint_dir

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "rb", f"a load opens {path} with {mode!r}"
        with _opened(self._unit, path) as stream:
            yield stream


class _Common(TorchCommonLoadStrategy):  # type: ignore[misc]
    def __init__(self, checkpoint_dir: OpenedCheckpoint) -> None:
        super().__init__()
        self._unit = checkpoint_dir

    def load_common(self, checkpoint_dir: str | os.PathLike[str]) -> Any:
        with _opened(self._unit, Path(checkpoint_dir) / COMMON) as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)


@contextmanager
def checked(checkpoint_dir: OpenedCheckpoint) -> Iterator[TorchCommonLoadStrategy]:
    """Inside the block stock's strategies read the files of `unit` through us. Yields the one for the common state,
    which stock opens past every seam.

    Raises:
        Damaged: the bytes have changed since they were checked; what was loaded by then stays loaded.
    """

    def reader(directory: str | os.PathLike[str], cache_metadata: bool = False) -> CachedMetadataFileSystemReader:
        made = CachedMetadataFileSystemReader(directory)
        made.fs = _CheckedFiles(checkpoint_dir)
        return made

    kept = stock._get_filesystem_reader
    stock._get_filesystem_reader = reader
    try:
        yield _Common(checkpoint_dir)
    except CheckpointException as problem:  # what a rank raised while it read, on all ranks; no Exception
        for cause, _ in problem.failures.values():
            if isinstance(cause, Damaged):
                raise Damaged(str(cause)) from problem
        raise
    finally:
        stock._get_filesystem_reader = kept
