"""The `dcp` layout: a `.distcp` file of torch.distributed.checkpoint, as Megatron-core writes it too.

Such a file is a row of items, each by itself what `torch.save` would write; `.metadata`, beside the files, says
at which offset each item begins and how long it is. Items may have gaps: large ones begin
at multiples of 4096, so that their records are aligned for direct I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from roll_ckpt.formats.image import CrcPatches, Extents, FileImage, Memory, TensorPiece
from roll_ckpt.formats.torch_zip import layout, sources

ARCHIVE = "archive"
"""What torch.save calls an archive that it writes to a stream."""
_LARGE = 64 << 10
_LARGE_ALIGNMENT = 4096
_SMALL_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Span:
    """Where an item lies: `offset` and `length` of DCP's `_StorageInfo`, in bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def lay_out(
    items: Iterable[tuple[str, torch.Tensor | bytes]], lifetime_of: sources.LifetimeOf = lambda storage: False
) -> tuple[FileImage, tuple[Span, ...]]:
    """Describe the file that holds `items`, without copying a tensor, and tell where each item lies in it.

    Names are for the index of tensors only, the file does not hold them. Bytes are taken as they are: they were
    serialized before. `stable` is as in `torch_zip.lay_out`.
    """
    parts: list[tuple[Span, FileImage]] = []
    end = 0
    for name, value in items:
        image = _item(name, value, lifetime_of)
        span = place(end, image.nbytes)
        parts.append((span, image))
        end = span.end
    return join(parts), tuple(span for span, _ in parts)


def place(end: int, nbytes: int) -> Span:
    """Where the next item of a file goes whose last one ends at `end`."""
    return Span(end + -end % (_LARGE_ALIGNMENT if nbytes >= _LARGE else _SMALL_ALIGNMENT), nbytes)


def join(parts: Iterable[tuple[Span, FileImage]]) -> FileImage:
    """The file that holds `parts`, each at its span; spans ascend, and may be longer than what lies in them."""
    extents, crc_patches = Extents(), CrcPatches()
    pieces: list[TensorPiece] = []
    end = 0
    for span, image in parts:
        extents.extend(image.extents, by=span.offset)
        crc_patches.extend(image.crc_patches, by=span.offset)
        pieces += (
            [replace(piece, offset=span.offset + piece.offset) for piece in image.pieces]
            if span.offset
            else image.pieces
        )
        end = span.end
    return FileImage(end, extents, crc_patches, tuple(pieces))


def _item(name: str, value: torch.Tensor | bytes, lifetime_of: sources.LifetimeOf) -> FileImage:
    if isinstance(value, bytes):
        return FileImage.of_bytes(value)
    image = layout.lay_out(value, ARCHIVE, lifetime_of)
    return replace(image, pieces=tuple(replace(piece, name=name) for piece in image.pieces))


@dataclass(frozen=True)
class FileTemplate:
    """A file of tensors without their memory: laid out once, filled at each save of the same dtypes and shapes.

    Made by `form`; holds no tensor.
    """

    image: FileImage
    _holes: tuple[tuple[int, int], ...]  # place in the extents, bytes

    def fill(self, tensors: Iterable[torch.Tensor], lifetime_of: sources.LifetimeOf) -> FileImage:
        """What `lay_out` would return for `tensors`, which are those of `form` in its order, made contiguous.

        Raises:
            ValueError: a tensor of another size.
        """
        extents = self.image.extents.copy()
        holes = iter(self._holes)
        for tensor in tensors:
            nbytes = tensor.nbytes
            if not nbytes:
                continue
            place, wanted = next(holes)
            if nbytes != wanted:
                raise ValueError(f"a tensor has {nbytes} bytes, its place in the file {wanted}")
            source, steady = sources.source_of(tensor.contiguous(), nbytes, lifetime_of)
            extents.put(place, source, steady)
        return replace(self.image, extents=extents)


def template(items: Iterable[tuple[str, torch.Tensor]]) -> tuple[FileTemplate, tuple[Span, ...]]:
    """Lay `items` out, contiguous plain tensors, as a form; and tell where each lies."""
    image, spans = lay_out(items)
    holes = []
    for place, extent in enumerate(image.extents):
        if isinstance(extent.source, Memory):
            holes.append((place, extent.nbytes))
            image.extents.put(place, b"")
    return FileTemplate(image, tuple(holes)), spans
