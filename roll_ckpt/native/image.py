"""NativeImage: what one file will hold, as the tables of integers that the extension takes.

`formats.image` describes files in the terms of the layouts and ends in these tables.
"""

from __future__ import annotations

import enum
from array import array
from typing import Any

from roll_ckpt.native.extension import _native


class Lifetime(enum.IntEnum):
    """How long the memory of a source stays allocated and unchanged. The extension uses the same numbers."""

    UNTIL_SAVE_RETURNS = 0
    UNTIL_FENCE = 1
    UNTIL_WRITTEN = 2
    """Borrowed host memory: until its file is written, or until a fence is told that its owner will change."""


class NativeImage:
    """What one file will hold: its size, and where each of its bytes comes from. Bytes that no extent covers are zero.

    Make one with `of` and pass it to Mover.save. The image keeps its owners alive; addresses are plain numbers, and
    the caller keeps their memory in place and unchanged for as long as Mover.save says.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._extents = array("q")
        self._records = array("q")
        self._patches = array("q")
        self._serials = array("q")
        self._streams: dict[int, int] = {}
        self._owners: list[Any] = []

    @classmethod
    def of(
        cls,
        nbytes: int,
        extents: array[int],
        owners: list[Any],
        records: array[int],
        patches: array[int],
        serials: array[int],
        streams: dict[int, int],
    ) -> NativeImage:
        """The image of a file of `nbytes` bytes from whole tables, which stay the caller's and must not change.

        `formats.image` describes the tables: `extents`, `owners` and `streams` are those of `Extents`, the others those
        of `CrcPatches`.
        """
        image = cls(nbytes)
        image._extents, image._owners, image._streams = extents, owners, streams
        image._records, image._patches, image._serials = records, patches, serials
        return image

    def _freeze(self) -> _native.Image:
        return _native.Image(
            self.nbytes, self._extents, self._owners, self._records, self._patches, self._serials, self._streams
        )
