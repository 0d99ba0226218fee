"""Version counters of the tensors that a save copies late: they tell of a change before the copy.

torch counts the changes in place of a tensor in `tensor._version`, which views and `detach()` share; `tensor.data`
does not. docs/fence.md lists which changes count. This module needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from roll_ckpt.formats.image import Extents, FileImage
from roll_ckpt.native.image import Lifetime


@dataclass
class SourceVersions:
    """The counters of some tensors as they were at construction. Holds the tensors; any thread may ask, one at a time.

    `staying` are sources that the owner may lay aside while they are read, such as offloaded state: a tensor of them
    has changed only if it still shows the storage that it showed then.
    """

    tensors: list[Any]
    staying: bool = False
    _versions: list[int | None] = field(init=False)
    _storages: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._versions = _versions_of(self.tensors)
        self._storages = [storage_of(tensor) for tensor in self.tensors] if self.staying else []

    def changed(self) -> list[Any]:
        """The tensors that were changed since."""
        now = _versions_of(self.tensors)
        if now == self._versions:
            return []
        return [
            tensor
            for place, tensor in enumerate(self.tensors)
            if now[place] != self._versions[place]
            and not (self.staying and storage_of(tensor) != self._storages[place])
        ]


def _versions_of(tensors: list[Any]) -> list[int | None]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # inference tensors have no counter
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def storage_of(tensor: Any) -> int:
    """The storage of a tensor, as its `_cdata`."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def late_storages(image: FileImage) -> set[int]:
    """The storages, each as its `_cdata`, that are read after the save has returned."""
    lifetimes = image.extents.rows[3 :: Extents.WIDTH]
    return {
        owner._cdata
        for owner, lifetime in zip(image.extents.owners, lifetimes, strict=True)
        if lifetime != Lifetime.UNTIL_SAVE_RETURNS and hasattr(owner, "_cdata")
    }


def names_in(image: FileImage, tensors: Iterable[Any]) -> tuple[list[str], int, int]:
    """The names of what `image` takes from the memory of `tensors`, and the first and last-plus-one byte in the file.

    A tensor whose memory was replaced has no name any more.
    """
    names: dict[str, None] = {}
    spans: list[tuple[int, int]] = []
    for tensor in tensors:
        start = tensor.data_ptr()
        for first, last in _file_spans(image.extents, start, start + tensor.nbytes):
            spans.append((first, last))
            for piece in image.pieces:
                if piece.offset < last and first < piece.offset + piece.nbytes:
                    names[piece.name] = None
    return list(names), min((first for first, _ in spans), default=0), max((last for _, last in spans), default=0)


def _file_spans(extents: Extents, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the bytes of memory from `start` to `end` go in the file."""
    rows = extents.rows
    for at in range(0, len(rows), Extents.WIDTH):
        offset, address, nbytes = rows[at : at + 3]
        first, last = max(start, address), min(end, address + nbytes)
        if address and first < last:
            yield offset + first - address, offset + last - address
