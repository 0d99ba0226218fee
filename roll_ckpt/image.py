"""FileImage: where every byte of a file comes from.

A layout makes one from a state; after that, code only moves bytes. No torch here: a source is a piece of
memory with an owner that keeps it alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HOST = -1


@dataclass(frozen=True, slots=True)
class Memory:
    """`nbytes` bytes at `address`, on the host or on CUDA device `device`; alive as long as `owner` is.

    On a device, the bytes are what `stream` (a `cudaStream_t`) has written once it gets to this point.
    """

    address: int
    nbytes: int
    owner: Any = field(repr=False)
    device: int = HOST
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of the file from `offset` on. `stable`: the source does not change before the next fence."""

    offset: int
    source: bytes | Memory
    stable: bool = False

    @property
    def nbytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.nbytes


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes `start` to `start + nbytes` of the file, whose CRC-32 stands in the file at `crc_at`, as
    little-endian 32-bit integers."""

    start: int
    nbytes: int
    crc_at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Serial:
    """Twenty decimal digits at `offset` that combine the CRC-32s of records `first` to `first + count`."""

    offset: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """One tensor in a file: its name in the state, dtype and shape, and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileImage:
    """A whole file. Extents are ordered and do not overlap; gaps between them are zero bytes."""

    nbytes: int
    extents: tuple[Extent, ...]
    records: tuple[Record, ...] = ()
    serials: tuple[Serial, ...] = ()
    pieces: tuple[TensorPiece, ...] = ()

    @classmethod
    def of_bytes(cls, data: bytes) -> FileImage:
        """The image of a file that is just these bytes."""
        return cls(len(data), (Extent(0, data),) if data else ())
