"""FileImage: where every byte of a file comes from.

A layout makes one from a state; after that, code only moves bytes. This module does not know torch: a source is a
range of memory with an owner that keeps it alive. Extents and CRC patches are tables of integers, which the extension
takes as they are, so that a file of thousands of tensors costs nothing to hand over.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from roll_ckpt.formats.tensor_index.meanings import FileTensors
from roll_ckpt.native.image import Lifetime

HOST = -1


@dataclass(frozen=True, slots=True)
class Memory:
    """`nbytes` bytes at `address`, on the host or on CUDA device `device`; valid as long as `owner` lives.

    On a device, the bytes are those after all work queued on `stream` (a `cudaStream_t`) so far.
    """

    address: int
    nbytes: int
    owner: Any = field(repr=False)
    device: int = HOST
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of the file from `offset` on, and the source that they come from.

    `lifetime` says how long the source stays unchanged; False is Lifetime.UNTIL_SAVE_RETURNS, True UNTIL_FENCE.
    """

    offset: int
    source: bytes | Memory
    lifetime: Lifetime | bool = False

    @property
    def nbytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.nbytes


def _shifted(numbers: array[int], by: int) -> array[int]:
    return array("q", [number + by for number in numbers])


@dataclass(slots=True)
class Extents:
    """The extents of a file, in order and without overlap; gaps between them are zero bytes.

    A row of `rows` is offset, address, bytes, lifetime, device; `owners` has one entry for each row. With address 0 the
    owner is a `bytes` object and the source itself; its lifetime counts as UNTIL_FENCE.
    """

    rows: array[int] = field(default_factory=lambda: array("q"))
    owners: list[Any] = field(default_factory=list)
    streams: dict[int, int] = field(default_factory=dict)
    """For each CUDA device, the stream whose queued work the copies wait for."""

    WIDTH = 5

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> Extents:
        table = cls()
        for extent in extents:
            table.add(extent.offset, extent.source, extent.lifetime)
        return table

    def add(self, offset: int, source: bytes | Memory, lifetime: Lifetime | bool = False) -> int:
        """Append an extent; returns its row number."""
        self.rows.extend((offset, 0, 0, True, HOST))
        self.owners.append(None)
        self.put(len(self.owners) - 1, source, lifetime)
        return len(self.owners) - 1

    def put(self, place: int, source: bytes | Memory, lifetime: Lifetime | bool = False) -> None:
        """Replace the source of the extent in row `place`; its offset stays."""
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
        """Append all extents of `other`, each `by` bytes further back in the file."""
        rows = other.rows[:]
        rows[0 :: self.WIDTH] = _shifted(rows[0 :: self.WIDTH], by)
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
    """The parts of a file that are computed from the CRC-32s of its own records, as three tables.

    records: (start, bytes) of each record, in file order and disjoint.
    crcs: (number of the record, file offset behind it of its CRC-32 as a little-endian 32-bit integer).
    serials: (file offset of twenty decimal digits, first, count): they combine the CRC-32s of `count` records from
        number `first` on, see `serial_fold` in csrc/image.h.
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
        """Append all rows of `other`, each `by` bytes further back in the file."""
        first = len(self)
        records, crcs, serials = other.records[:], other.crcs[:], other.serials[:]
        records[0::2] = _shifted(records[0::2], by)
        crcs[0::2], crcs[1::2] = _shifted(crcs[0::2], first), _shifted(crcs[1::2], by)
        serials[0::3], serials[1::3] = _shifted(serials[0::3], by), _shifted(serials[1::3], first)
        self.records += records
        self.crcs += crcs
        self.serials += serials


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """One tensor in a file: its name in the state, its dtype and shape, and where its bytes lie in the file.

    With `strides`, in elements, it does not lie row by row; its bytes are those from its first to its last element.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FileImage:
    """A whole file: its size, the sources of its bytes, its CRC patches and its tensors."""

    nbytes: int
    extents: Extents = field(default_factory=Extents)
    crc_patches: CrcPatches = field(default_factory=CrcPatches)
    pieces: tuple[TensorPiece, ...] = ()
    tensors: FileTensors | None = None
    """What the pieces are of the model, where a backend knows; the same object at every save of one structure."""
    watched: dict[Lifetime | bool, list[Any]] = field(default_factory=dict)
    """The tensors in sources that are copied after the save has returned, by how long they are to stay unchanged. Their
    version counters tell of a change."""

    @classmethod
    def of_bytes(cls, data: bytes) -> FileImage:
        """The image of a file that holds exactly `data`."""
        return cls(len(data), Extents.of([Extent(0, data)] if data else []))
