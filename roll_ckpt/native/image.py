"""FileImage: where every byte of a file comes from.

A layout makes one from a state; after that, code only moves bytes. No torch here: a source is a piece of
memory with an owner that keeps it alive. What a file of thousands of tensors needs is kept in tables of integers,
as the extension takes them, so that handing them on costs nothing.
"""

from __future__ import annotations

import enum
from array import array
from typing import TYPE_CHECKING, Any

from roll_ckpt.native.extension import _native

if TYPE_CHECKING:
    pass


class Lifetime(enum.IntEnum):
    """How long a source stays as it is; the numbers are those of the extension."""

    UNTIL_SAVE_RETURNS = 0
    UNTIL_FENCE = 1
    UNTIL_WRITTEN = 2
    """Memory of the host that is leased: until its file is written, or a fence that is told it will change."""


class NativeImage:
    """What one file will hold: its size, and for each byte where it comes from; bytes of no extent are zero.

    Build it with the methods below, in file order (patches in any order), then pass it to Mover.save.
    Addresses are plain numbers: who gives one keeps its memory alive and in place (see Mover.save). What add_bytes or
    `of` was given is kept by the image itself.
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
        """An image of whole tables, which it does not change; see `image.Extents` and `image.Seals`. Keeps `owners`
        alive."""
        made = cls(nbytes)
        made._extents, made._owners, made._streams = extents, owners, streams
        made._records, made._patches, made._serials = records, patches, serials
        return made

    def _freeze(self) -> _native.Image:
        return _native.Image(
            self.nbytes, self._extents, self._owners, self._records, self._patches, self._serials, self._streams
        )
