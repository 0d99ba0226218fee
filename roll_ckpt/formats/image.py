"""FileImage: where every byte of a file comes from.

A layout makes one from a state; after that, code only moves bytes. No torch here: a source is a piece of
memory with an owner that keeps it alive. What a file of thousands of tensors needs is kept in tables of integers,
as the extension takes them, so that handing them on costs nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from roll_ckpt.native.image import Lifetime

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
    """Bytes of the file from `offset` on, from a source that is `stable` so long; True is until the next fence."""

    offset: int
    source: bytes | Memory
    lifetime: Lifetime | bool = False

    @property
    def nbytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.nbytes


def _moved(numbers: array[int], by: int) -> array[int]:
    return array("q", [number + by for number in numbers])


@dataclass(slots=True)
class Extents:
    """The extents of a file, in order and without overlap; gaps between them are zero bytes.

    A row of the table is offset, address, bytes, stable, device; with address 0 its owner is `bytes` and the source
    itself, which never changes and counts as stable.
    """

    rows: array[int] = field(default_factory=lambda: array("q"))
    owners: list[Any] = field(default_factory=list)
    streams: dict[int, int] = field(default_factory=dict)
    """For each CUDA device the stream whose work the copies wait for."""

    WIDTH = 5

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> Extents:
        made = cls()
        for extent in extents:
            made.add(extent.offset, extent.source, extent.lifetime)
        return made

    def add(self, offset: int, source: bytes | Memory, lifetime: Lifetime | bool = False) -> int:
        """Append an extent; returns its place."""
        self.rows.extend((offset, 0, 0, True, HOST))
        self.owners.append(None)
        self.put(len(self.owners) - 1, source, lifetime)
        return len(self.owners) - 1

    def put(self, place: int, source: bytes | Memory, lifetime: Lifetime | bool = False) -> None:
        """Let the extent at `place` come from `source`."""
        at = place * self.WIDTH
        if isinstance(source, bytes):
            self.rows[at + 1 : at + 5] = array("q", (0, len(source), True, HOST))
            self.owners[place] = source
            return
        self.rows[at + 1 : at + 5] = array("q", (source.address, source.nbytes, lifetime, source.device))
        self.owners[place] = source.owner
        if source.device != HOST:
            self.streams[source.device] = source.stream

    def copy(self) -> Extents:
        return Extents(self.rows[:], self.owners[:], dict(self.streams))

    def extend(self, other: Extents, by: int) -> None:
        """Append all extents of `other`, `by` bytes further on."""
        rows = other.rows[:]
        rows[0 :: self.WIDTH] = _moved(rows[0 :: self.WIDTH], by)
        self.rows += rows
        self.owners += other.owners
        self.streams |= other.streams

    def __len__(self) -> int:
        return len(self.owners)

    def __iter__(self) -> Iterator[Extent]:
        for place, owner in enumerate(self.owners):
            at = place * self.WIDTH
            offset, address, nbytes, lifetime, device = self.rows[at : at + self.WIDTH]
            if address:
                memory = Memory(address, nbytes, owner, device, self.streams.get(device, 0))
                yield Extent(offset, memory, Lifetime(lifetime))
            else:
                yield Extent(offset, owner, Lifetime(lifetime))


@dataclass(slots=True)
class CrcPatches:
    """What a file holds that follows from the CRC-32s of its own records.

    records: start, bytes of each, in order and disjoint. crcs: the record, and an offset behind it where its CRC-32
    stands as a little-endian 32-bit integer. serials: an offset where twenty decimal digits combine the CRC-32s of
    records `first` to `first + count`, then first and count.
    """

    records: array[int] = field(default_factory=lambda: array("q"))
    crcs: array[int] = field(default_factory=lambda: array("q"))
    serials: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.records) // 2

    def record(self, start: int, nbytes: int) -> int:
        """Append a record; returns its number."""
        self.records.extend((start, nbytes))
        return len(self) - 1

    def extend(self, other: CrcPatches, by: int) -> None:
        """Append all of `other`, `by` bytes further on."""
        first = len(self)
        records, crcs, serials = other.records[:], other.crcs[:], other.serials[:]
        records[0::2] = _moved(records[0::2], by)
        crcs[0::2], crcs[1::2] = _moved(crcs[0::2], first), _moved(crcs[1::2], by)
        serials[0::3], serials[1::3] = _moved(serials[0::3], by), _moved(serials[1::3], first)
        self.records += records
        self.crcs += crcs
        self.serials += serials


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
    """A whole file."""

    nbytes: int
    extents: Extents = field(default_factory=Extents)
    crc_patches: CrcPatches = field(default_factory=CrcPatches)
    pieces: tuple[TensorPiece, ...] = ()

    @classmethod
    def of_bytes(cls, data: bytes) -> FileImage:
        """The image of a file that is just these bytes."""
        return cls(len(data), Extents.of([Extent(0, data)] if data else []))
