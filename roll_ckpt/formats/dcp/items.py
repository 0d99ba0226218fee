"""The layout of `.distcp` files of torch.distributed.checkpoint, which Megatron-core writes too.

Such a file is a sequence of items, each of them what `torch.save` would write; `.metadata`, beside the files, has the
offset and length of each item. There may be gaps between items: large ones begin at multiples of 4096, so that their
records are aligned for direct I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from roll_ckpt.formats.image import CrcPatches, Extents, FileImage, Memory, TensorPiece
from roll_ckpt.formats.torch_zip import layout, sources
from roll_ckpt.native.image import Lifetime

ARCHIVE = "archive"
"""The folder in an archive that torch.save writes to a stream."""
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
    """Describe the file that holds `items`, without copying a tensor; returns it and where each item lies in it.

    The names go into the index of tensors only, not into the file. An item of `bytes` was serialized before and is
    written as it is. `lifetime_of` is that of `torch_zip.layout.lay_out`.

    Raises:
        SaveFailed: a tensor's memory was freed.
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
    """Where an item of `nbytes` bytes lies in a file whose items so far end at `end`."""
    return Span(end + -end % (_LARGE_ALIGNMENT if nbytes >= _LARGE else _SMALL_ALIGNMENT), nbytes)


def join(parts: Iterable[tuple[Span, FileImage]]) -> FileImage:
    """The file that holds `parts`, each at its span; spans must ascend, and may be longer than their part."""
    extents, crc_patches = Extents(), CrcPatches()
    pieces: list[TensorPiece] = []
    watched: dict[Lifetime | bool, list[Any]] = {}
    end = 0
    for span, image in parts:
        for lifetime, tensors in image.watched.items():
            watched.setdefault(lifetime, []).extend(tensors)
        extents.extend(image.extents, by=span.offset)
        crc_patches.extend(image.crc_patches, by=span.offset)
        pieces += (
            [replace(piece, offset=span.offset + piece.offset) for piece in image.pieces]
            if span.offset
            else image.pieces
        )
        end = span.end
    return FileImage(end, extents, crc_patches, tuple(pieces), watched=watched)


def _item(name: str, value: torch.Tensor | bytes, lifetime_of: sources.LifetimeOf) -> FileImage:
    if isinstance(value, bytes):
        return FileImage.of_bytes(value)
    image = layout.lay_out(value, ARCHIVE, lifetime_of)
    return replace(image, pieces=tuple(replace(piece, name=name) for piece in image.pieces))


@dataclass(frozen=True)
class FileTemplate:
    """A file of tensors without their memory: laid out once by `template`, filled at each save of the same tensors.

    Holds no tensor.
    """

    image: FileImage
    _holes: tuple[tuple[int, int], ...]  # row of the extents, bytes

    def fill(self, tensors: Iterable[torch.Tensor], lifetime_of: sources.LifetimeOf) -> FileImage:
        """The image that `lay_out` would return for `tensors`: those of `template`, in its order, made contiguous.

        Raises:
            ValueError: a tensor has another size than in `template`.
            SaveFailed: a tensor's memory was freed.
        """
        extents = self.image.extents.copy()
        holes = iter(self._holes)
        watched: dict[Lifetime | bool, list[Any]] = {}
        for tensor in tensors:
            nbytes = tensor.nbytes
            if not nbytes:
                continue
            row, hole_bytes = next(holes)
            if nbytes != hole_bytes:
                raise ValueError(f"a tensor has {nbytes} bytes, its place in the file {hole_bytes}")
            source, lifetime = sources.source_of(tensor.contiguous(), nbytes, lifetime_of)
            extents.put(row, source, lifetime)
            if lifetime:
                watched.setdefault(lifetime, []).append(tensor)
        return replace(self.image, extents=extents, watched=watched)


def template(items: Iterable[tuple[str, torch.Tensor]]) -> tuple[FileTemplate, tuple[Span, ...]]:
    """The template of a file of `items`, which are contiguous plain tensors; and where each item lies in it."""
    image, spans = lay_out(items)
    holes = []
    for row, extent in enumerate(image.extents):
        if isinstance(extent.source, Memory):
            holes.append((row, extent.nbytes))
            image.extents.put(row, b"")
    return FileTemplate(image, tuple(holes)), spans
