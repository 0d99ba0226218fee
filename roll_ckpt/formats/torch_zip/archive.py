"""The archive that `torch.save` writes: a zip of stored (uncompressed) records, each aligned, its CRC-32 behind it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from roll_ckpt.formats.image import CrcPatches, Extents, Memory
from roll_ckpt.native.image import Lifetime

_LARGE = 64 << 10
_LARGE_ALIGNMENT = 4096
_SMALL_ALIGNMENT = 64
_UTF8_AND_DESCRIPTOR = 0x0808
_UTF8 = 0x0800
ZIP64_LIMIT = 0xFFFFFFFF


@dataclass
class _Entry:
    name: bytes
    header_at: int
    nbytes: int
    flags: int
    record: int | None


_END_BYTES = 56 + 20 + 22  # zip64 end record, its locator, end record


def _zip64_extra(entry: _Entry) -> bytes:
    values = [entry.nbytes, entry.nbytes] if entry.nbytes >= ZIP64_LIMIT else []
    values += [entry.header_at] if entry.header_at >= ZIP64_LIMIT else []
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


@dataclass
class Archive:
    """A zip of stored records under construction; their CRC-32s are filled in when the file is written, see CrcPatches.

    `folder` is the directory of all records inside the zip.
    """

    folder: str
    extents: Extents = field(default_factory=Extents)
    crc_patches: CrcPatches = field(default_factory=CrcPatches)
    _entries: list[_Entry] = field(default_factory=list)
    _plain: bytearray = field(default_factory=bytearray)
    _plain_at: int = 0

    @property
    def _end(self) -> int:
        return self._plain_at + len(self._plain)

    def add(self, name: str, source: bytes | Memory, lifetime: Lifetime | bool = False) -> int:
        """Append the record `name`; returns the file offset of its first byte. `lifetime` is that of `source`."""
        nbytes = len(source) if isinstance(source, bytes) else source.nbytes
        header_at, encoded = self._end, f"{self.folder}/{name}".encode()
        alignment = _LARGE_ALIGNMENT if nbytes >= _LARGE else _SMALL_ALIGNMENT
        unpadded = header_at + 30 + len(encoded) + 4
        padding = -unpadded % alignment
        flags = _UTF8_AND_DESCRIPTOR if nbytes else _UTF8
        sizes = (0, 0, 0, 0, 0, 0, len(encoded), 4 + padding)
        self._plain += struct.pack("<4s3H2H3I2H", b"PK\x03\x04", 0, flags, *sizes)
        self._plain += encoded + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        start, record = self._end, None
        if nbytes:
            self._put(source, lifetime)
            record = self.crc_patches.record(start, nbytes)
            self.crc_patches.crcs.extend((record, self._end + 4))
            is_zip64 = nbytes >= ZIP64_LIMIT
            self._plain += struct.pack("<4sIQQ" if is_zip64 else "<4sIII", b"PK\x07\x08", 0, nbytes, nbytes)
        self._entries.append(_Entry(encoded, header_at, nbytes, flags, record))
        return start

    def add_serialization_id(self) -> None:
        """Append `.data/serialization_id`: 20 digits computed from the names and 20 from the CRC-32s of all records.

        Stock torch has a record of the same size and purpose; the digits need not agree with it.
        """
        names = 0
        for entry in self._entries:
            for byte in entry.name:
                names = (names ^ byte) * 0x100000001B3 % 2**64  # FNV-1a
        start = self.add(".data/serialization_id", b"%020d%020d" % (names, 0))
        self.crc_patches.serials.extend((start + 20, 0, len(self.crc_patches) - 1))

    def close(self, at_least: int = 0) -> int:
        """Append the directory, which ends the file; returns the size of the file.

        Zeros precede the directory if the file would otherwise be shorter than `at_least` bytes.
        """
        tail = sum(46 + len(entry.name) + len(_zip64_extra(entry)) for entry in self._entries) + _END_BYTES
        self._plain += bytes(max(0, at_least - self._end - tail))
        directory_at = self._end
        for entry in self._entries:
            self._add_directory_entry(entry)
        size, count, end_at = self._end - directory_at, len(self._entries), self._end
        self._plain += struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 798, 45, 0, 0, count, count, size, directory_at)
        self._plain += struct.pack("<4sIQI", b"PK\x06\x07", 0, end_at, 1)
        self._plain += struct.pack(
            "<4s4H2IH",
            *(b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF)),
            *(min(size, ZIP64_LIMIT), min(directory_at, ZIP64_LIMIT), 0),
        )
        nbytes = self._end
        self._flush()
        return nbytes

    def _add_directory_entry(self, entry: _Entry) -> None:
        is_large = entry.nbytes >= ZIP64_LIMIT
        is_far = entry.header_at >= ZIP64_LIMIT
        extra = _zip64_extra(entry)
        short = ZIP64_LIMIT if is_large else entry.nbytes
        if entry.record is not None:
            self.crc_patches.crcs.extend((entry.record, self._end + 16))
        self._plain += struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\x01\x02", 0, 45 if extra else 0, entry.flags, 0, 0, 0),
            *(0, short, short, len(entry.name), len(extra), 0, 0, 0, 0),
            ZIP64_LIMIT if is_far else entry.header_at,
        )
        self._plain += entry.name + extra

    def _put(self, source: bytes | Memory, lifetime: Lifetime | bool) -> None:
        if isinstance(source, bytes):
            self._plain += source
            return
        self._flush()
        self.extents.add(self._plain_at, source, lifetime)
        self._plain_at += source.nbytes

    def _flush(self) -> None:
        if self._plain:
            self.extents.add(self._plain_at, bytes(self._plain))
            self._plain_at += len(self._plain)
            self._plain.clear()
