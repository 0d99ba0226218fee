"""Ranges: parts of the files of a committed checkpoint, each block checked against its digest as it is read."""

from __future__ import annotations

from pathlib import Path

from roll_ckpt.load.checkpoint import Blocks, OpenedCheckpoint, as_unreadable


class Ranges:
    """Reads ranges of bytes; keeps one block, so ranges in the order of a file read each block once. One thread."""

    def __init__(self, opened: OpenedCheckpoint) -> None:
        self._opened = opened
        self._blocks: Blocks | None = None
        self._index = -1
        self._block = bytearray()

    def read(self, relative: str, start: int, stop: int) -> bytearray:
        """Bytes `start` (inclusive) to `stop` (exclusive) of a file, by its path below the checkpoint. Blocks.

        Raises:
            Damaged: the file is not listed or ends before `stop`, or a block is not as it was written.
            Unreadable: the disk returns an error.
        """
        path = self._opened.directory / relative
        blocks = self._blocks_of(path)
        found = bytearray(stop - start)
        at = start
        while at < stop:
            index, skip = divmod(at, blocks.block_bytes)
            self._fill(blocks, index)
            part = memoryview(self._block)[skip : skip + stop - at]
            found[at - start : at - start + len(part)] = part
            at += len(part)
        return found

    def _blocks_of(self, path: Path) -> Blocks:
        if self._blocks is None or self._blocks.path != path:
            self._blocks, self._index = self._opened.blocks(path), -1
        return self._blocks

    def _fill(self, blocks: Blocks, index: int) -> None:
        if index == self._index:
            return
        self._index, self._block = -1, bytearray(blocks.length(index))
        with as_unreadable(blocks.path):
            blocks.read(index, memoryview(self._block))
        self._index = index
