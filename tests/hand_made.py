"""Images that tests build by hand, extent by extent; the product builds whole tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from roll_ckpt.native.extension import address_of
from roll_ckpt.native.image import Lifetime, NativeImage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class HandMadeImage(NativeImage):
    """A `NativeImage` with methods to build it, in file order (patches in any order).

    Addresses are plain numbers: who gives one keeps its memory alive. What `add_bytes` received is kept here.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self._kept: list[Any] = []

    def add(self, offset: int, address: int, nbytes: int, *, lazy: Lifetime | bool = False, device: int = -1) -> None:
        """File bytes [offset, offset + nbytes) come from `address` of the host, or of CUDA device `device`.

        A lazy extent may be copied after save() returned; any other is copied before. One that is lazy
        `Lifetime.UNTIL_WRITTEN` is borrowed: host memory that may be read until wait_released.
        """
        self._extents.extend((offset, address, nbytes, lazy, device))

    def add_many(self, rows: Iterable[tuple[int, int, int, int, int]]) -> None:
        """Many extents at once: (offset, address, nbytes, lazy, device), device -1 for the host."""
        for row in rows:
            self._extents.extend(row)

    def add_bytes(self, offset: int, data: ReadableBuffer) -> None:
        """The file holds the bytes of a contiguous buffer at `offset`; an eager extent."""
        address, nbytes = address_of(data)
        if nbytes:
            self._kept.append(data)
            self.add(offset, address, nbytes)

    def record(self, start: int, nbytes: int) -> int:
        """A range whose CRC-32 the file itself will hold; returns its index. In order, disjoint."""
        self._records.extend((start, nbytes))
        return len(self._records) // 2 - 1

    def crc_at(self, record: int, offset: int) -> None:
        """The four bytes at `offset`, behind the record, become its CRC-32, little-endian."""
        self._patches.extend((record, offset))

    def serial_at(self, offset: int, first_record: int, n_records: int) -> None:
        """The 20 bytes at `offset` become a zero-padded decimal number made of these records' CRCs.

        The number starts at 0; each CRC in order makes it n ^ (crc + 0x9e3779b9 + (n << 6) + (n >> 2)) modulo
        2**64. Over all records so far it is the second half of torch's `.data/serialization_id`. A record may
        hold a serial: its CRC is then that of the final bytes.
        """
        self._serials.extend((offset, first_record, n_records))

    def stream(self, device: int, stream: int) -> None:
        """Copies from `device` wait for what this CUDA stream (a cudaStream_t as a number; 0 is the default
        stream) was given before save was called."""
        self._streams[device] = stream
