"""The `dcp` layout: a `.distcp` file of torch.distributed.checkpoint, as Megatron-core writes it too.

Such a file is a row of items, each by itself what `torch.save` would write; `.metadata`, beside the files, says
at which offset each item begins and how long it is. Items may have gaps: large ones begin
at multiples of 4096, so that their records are aligned for direct I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from roll_ckpt.image import Extent, FileImage, Record, Serial, TensorPiece
from roll_ckpt.layout import torch_zip

_ARCHIVE = "archive"  # what torch.save calls it when it writes to a stream
_LARGE = 64 << 10
_LARGE_ALIGNMENT = 4096
_SMALL_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Span:
    """Where an item lies: `offset` and `length` of DCP's `_StorageInfo`, in bytes."""

    offset: int
    length: int


def lay_out(
    items: Iterable[tuple[str, torch.Tensor | bytes]], stable: torch_zip.Stable = lambda storage: False
) -> tuple[FileImage, tuple[Span, ...]]:
    """Describe the file that holds `items`, without copying a tensor, and tell where each item lies in it.

    Names are for the index of tensors only, the file does not hold them. Bytes are taken as they are: they were
    serialized before. `stable` is as in `torch_zip.lay_out`.
    """
    extents: list[Extent] = []
    records: list[Record] = []
    serials: list[Serial] = []
    pieces: list[TensorPiece] = []
    spans: list[Span] = []
    end = 0
    for name, value in items:
        image = _item(value, stable)
        base = end + -end % (_LARGE_ALIGNMENT if image.nbytes >= _LARGE else _SMALL_ALIGNMENT)
        first = len(records)
        extents += [replace(extent, offset=base + extent.offset) for extent in image.extents]
        records += [
            Record(base + record.start, record.nbytes, tuple(base + at for at in record.crc_at))
            for record in image.records
        ]
        serials += [
            replace(serial, offset=base + serial.offset, first=first + serial.first) for serial in image.serials
        ]
        pieces += [replace(piece, name=name, offset=base + piece.offset) for piece in image.pieces]
        spans.append(Span(base, image.nbytes))
        end = base + image.nbytes
    return FileImage(end, tuple(extents), tuple(records), tuple(serials), tuple(pieces)), tuple(spans)


def _item(value: torch.Tensor | bytes, stable: torch_zip.Stable) -> FileImage:
    if isinstance(value, bytes):
        return FileImage(len(value), (Extent(0, value),) if value else ())
    return torch_zip.lay_out(value, _ARCHIVE, stable)
