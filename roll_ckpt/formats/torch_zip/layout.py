"""The layout of `torch.save` files: the bytes that it would write for a state, described without copying a tensor.

The format is that of `torch.serialization`: a zip of stored records, `data.pkl` by pickle protocol 2, storages as
persistent ids. Four things differ from a stock file, none visible to a reader:

- large records start at multiples of 4096, so that direct I/O and views are aligned;
- a storage holds only the bytes that the saved tensors show, never the rest of a flat buffer;
- zeros may follow the pickle in its record, so that it can grow without moving the tensors;
- `.format_version` is missing, because it promises offsets that follow from a constant alignment.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from roll_ckpt.formats.image import Extents, FileImage, Memory, TensorPiece
from roll_ckpt.formats.torch_zip.archive import Archive
from roll_ckpt.formats.torch_zip.safe_pickle import Unloadable, unsafe_parts
from roll_ckpt.formats.torch_zip.skeleton import (
    MEMO_RESERVED,
    Fragments,
    MemoFull,
    Skeleton,
    skeleton_of,
    splice,
)
from roll_ckpt.formats.torch_zip.sources import (
    CPU,
    DEVICE,
    LifetimeOf,
    Piece,
    Pieces,
    Signature,
    is_indexed,
    location_of,
    memory_of,
    named_tensors,
    piece_at,
    pieces_of,
    signature_of,
    span_of,
    tensor_names,
)
from roll_ckpt.formats.torch_zip.unsavable import named
from roll_ckpt.native.image import Lifetime

log = logging.getLogger("roll_ckpt")


def lay_out(
    state: object, archive: str, lifetime_of: LifetimeOf = lambda storage: False, *, at_least: int = 0, root: str = ""
) -> FileImage:
    """Describe the file that holds `state`, without copying a tensor.

    Python objects are pickled now, on the calling thread; tensors are only referred to. `archive` is the folder inside
    the zip (`torch.save` uses the stem of the file name). `lifetime_of` tells how long the memory of each storage stays
    unchanged. A file shorter than `at_least` bytes gets zeros before its directory, where no reader looks.

    Raises:
        SaveFailed: something in it cannot be pickled, a tensor's memory was freed, or two tensors view the same memory
            as different dtypes. The message begins with `root` and the keys that lead there.
    """
    try:
        return _lay_out_anew(state, skeleton_of(state), archive, lifetime_of, at_least=at_least)[1]
    except Exception as problem:
        raise named(state, problem, root, _attempt) from problem


def _attempt(state: object) -> None:
    _lay_out_anew(state, skeleton_of(state), "state", lambda storage: False)


class Layouts:
    """Lays out the same few files at every save.

    A file whose structure has not changed keeps its offsets: only its pickle and its addresses are computed anew. Holds
    no tensor between saves. Use it on one thread.
    """

    def __init__(self, allow: Iterable[Any] = ()) -> None:
        self._allow = list(allow)
        self._layouts: dict[str, _FileLayout] = {}
        self._kinds: dict[str, frozenset[Any]] = {}

    def lay_out(
        self, name: str, state: object, archive: str, lifetime_of: LifetimeOf, root: str = ""
    ) -> tuple[FileImage, dict[str, Unloadable]]:
        """The file called `name`, as the function `lay_out` describes it, and the `unsafe_parts` of its state.

        The unsafe parts are looked for only if the state holds other kinds of objects than at the last save of `name`;
        otherwise they are {}.

        Raises:
            SaveFailed: as for the function `lay_out`.
        """
        try:
            skeleton, image = self._laid_out(name, state, archive, lifetime_of)
        except Exception as problem:
            raise named(state, problem, root, _attempt) from problem
        unsafe: dict[str, Unloadable] = {}
        if self._kinds.get(name) != skeleton.kinds:
            self._kinds[name] = skeleton.kinds
            unsafe = unsafe_parts(state, self._allow)
        return image, unsafe

    def _laid_out(self, name: str, state: object, archive: str, lifetime_of: LifetimeOf) -> tuple[Skeleton, FileImage]:
        layout = self._layouts.get(name)
        skeleton = skeleton_of(state, layout.skeleton.reserved if layout else MEMO_RESERVED)
        image = None
        if layout is not None and layout.archive == archive:
            layout, image = layout.refill(state, skeleton, lifetime_of)
        if layout is None or image is None:
            layout, image = _lay_out_anew(state, skeleton, archive, lifetime_of, room=len(skeleton.data) // 16 + 1024)
        self._layouts[name] = layout
        return skeleton, image


@dataclass(frozen=True)
class _FileLayout:
    """The layout of one file, which later saves of the same structure reuse: all but its pickle and its tensors."""

    archive: str
    skeleton: Skeleton  # without the objects that its marks stand for
    signature: Signature
    fragments: list[bytes]
    image: FileImage  # without memory
    pickle_at: int
    pickle_bytes: int
    holes: list[
        tuple[int, int, int, int]
    ]  # row of the extents, number of the storage, its first and last-plus-one byte
    storage_bytes: list[int]  # that the tensors need, for each storage
    names: list[tuple[Any, ...]]

    def refill(
        self, state: object, skeleton: Skeleton, lifetime_of: LifetimeOf
    ) -> tuple[_FileLayout | None, FileImage | None]:
        """The layout and the image of a state that fits this layout; (None, None) if it does not fit."""
        signature, storages = signature_of(skeleton.marked)
        if signature != self.signature or len(skeleton.data) > self.pickle_bytes:
            return None, None
        layout = self
        if skeleton.data != self.skeleton.data:
            if tensor_names(state) != self.names:
                return None, None
            pickled = splice(skeleton.data, self.fragments)
            if len(pickled) > self.pickle_bytes:
                return None, None
            extents = self.image.extents.copy()
            extents.put(0, _replaced(extents.owners[0], self.pickle_at, pickled.ljust(self.pickle_bytes, b"\0")))
            layout = replace(self, skeleton=_without_objects(skeleton), image=replace(self.image, extents=extents))
        if any(storage.nbytes() < needed for storage, needed in zip(storages, self.storage_bytes, strict=True)):
            return None, None
        return layout, layout.fill(skeleton, storages, lifetime_of)

    def fill(self, skeleton: Skeleton, storages: list[torch.UntypedStorage], lifetime_of: LifetimeOf) -> FileImage:
        """The image of the file whose tensors are those of `skeleton`, and lie in `storages`."""
        extents = self.image.extents.copy()
        rows, owners, width = extents.rows, extents.owners, Extents.WIDTH
        bases = [storage.data_ptr() for storage in storages]
        lifetimes = [lifetime_of(storage) for storage in storages]
        watched = self._watched(skeleton, lifetimes, lifetime_of)
        if any(row[DEVICE] != CPU for row in self.signature if len(row) > 1):
            for place, number, start, stop in self.holes:
                extents.put(place, memory_of(storages[number], start, stop), lifetimes[number])
            return replace(self.image, extents=extents, watched=watched)
        for place, number, start, _ in self.holes:
            at = place * width
            rows[at + 1] = bases[number] + start
            rows[at + 3] = lifetimes[number]
            owners[place] = storages[number]
        return replace(self.image, extents=extents, watched=watched)

    def _watched(
        self, skeleton: Skeleton, lifetimes: list[Lifetime | bool], lifetime_of: LifetimeOf
    ) -> dict[Lifetime | bool, list[Any]]:
        """`FileImage.watched` for the objects of `skeleton`, whose storages have `lifetimes`."""
        watched: dict[Lifetime | bool, list[Any]] = {
            lifetime: [
                obj
                for obj, row in zip(skeleton.marked, self.signature, strict=True)
                if len(row) > 1 and lifetimes[row[0]] == lifetime and isinstance(obj, torch.Tensor)
            ]
            for lifetime in set(lifetimes)
            if lifetime
        }
        for tensor in skeleton.wrapped if watched else ():
            if is_indexed(tensor) and (lifetime := lifetime_of(tensor.untyped_storage())):
                watched.setdefault(lifetime, []).append(tensor)
        return watched


def _without_objects(skeleton: Skeleton) -> Skeleton:
    return replace(skeleton, marked=(), wrapped=())


def _replaced(data: bytes, at: int, new: bytes) -> bytes:
    return b"".join((data[:at], new, data[at + len(new) :]))


def _lay_out_anew(
    state: object, skeleton: Skeleton, archive: str, lifetime_of: LifetimeOf, *, at_least: int = 0, room: int = 0
) -> tuple[_FileLayout, FileImage]:
    """Lay a state out; its pickle can grow by `room` bytes before the file must be laid out anew."""
    signature, storages = signature_of(skeleton.marked)
    pieces = pieces_of(skeleton.marked, storages)
    try:
        fragments, used = _fragments(skeleton, signature, storages, pieces)
    except MemoFull as full:
        log.debug("%s: pickled again with more: %s", archive, full)
        wider = skeleton_of(state, 2 * skeleton.reserved + len(skeleton.marked))
        return _lay_out_anew(state, wider, archive, lifetime_of, at_least=at_least, room=room)
    pickled = splice(skeleton.data, fragments)
    file = Archive(archive)
    pickle_at = file.add("data.pkl", pickled.ljust(len(pickled) + room, b"\0"))
    file.add("byteorder", sys.byteorder.encode())
    holes = []
    for key, (number, piece) in enumerate(used):
        nbytes = piece.stop - piece.start
        piece.offset = file.add(f"data/{key}", Memory(0, nbytes, None) if nbytes else b"")
        if nbytes:
            holes.append((len(file.extents) - 1, number, piece.start, piece.stop))
    file.add("version", b"3\n")
    file.add_serialization_id()
    nbytes = file.close(at_least)
    image = FileImage(nbytes, file.extents, file.crc_patches, tuple(_index(state, storages, pieces)))
    layout = _FileLayout(
        archive,
        _without_objects(skeleton),
        signature,
        fragments,
        image,
        pickle_at,
        len(pickled) + room,
        holes,
        [max((piece.stop for piece in of_storage), default=0) for of_storage in pieces],
        tensor_names(state),
    )
    return layout, layout.fill(skeleton, storages, lifetime_of)


def _fragments(
    skeleton: Skeleton, signature: Signature, storages: list[torch.UntypedStorage], pieces: Pieces
) -> tuple[list[bytes], list[tuple[int, Piece]]]:
    """The fragment that replaces each mark; and the pieces in file order, each with the number of its storage."""
    opcodes = Fragments(skeleton.reserved)
    repeated = {row[0] for row in signature if len(row) == 1}
    locations = [location_of(storage) for storage in storages]
    used: list[tuple[int, Piece]] = []
    empty: dict[tuple[Piece, torch.dtype], Piece] = {}
    fragments = []
    for place, (obj, row) in enumerate(zip(skeleton.marked, signature, strict=True)):
        if len(row) == 1:
            assert isinstance(obj, torch.Tensor)
            fragments.append(opcodes.same(obj))
            continue
        number = row[0]
        piece = piece_at(pieces[number], span_of(obj)[0] if isinstance(obj, torch.Tensor) else 0)
        if piece.start == piece.stop and piece.dtype not in (None, dtype := getattr(obj, "dtype", torch.uint8)):
            piece = empty.setdefault((piece, dtype), Piece(piece.start, piece.stop))  # no bytes: one for each dtype
        if piece.key is None:
            piece.key = str(len(used))
            used.append((number, piece))
        nbytes, location = piece.stop - piece.start, locations[number]
        if isinstance(obj, torch.Tensor):
            piece.claim(obj.dtype)
            offset = int(obj.storage_offset()) - piece.start // obj.element_size()
            storage = opcodes.storage_of(obj.dtype, piece.key, location, nbytes)
            fragments.append(opcodes.tensor(obj, storage, offset, again=place in repeated))
        elif isinstance(obj, torch.storage.TypedStorage):
            piece.claim(obj.dtype)
            kind = obj._pickle_storage_type()
            fragments.append(opcodes.storage("torch", kind, piece.key, location, obj._size()))
        else:
            piece.claim(torch.uint8)
            fragments.append(opcodes.storage("torch.storage", "UntypedStorage", piece.key, location, nbytes))
    return fragments, used


def _index(state: object, storages: list[torch.UntypedStorage], pieces: Pieces) -> Iterator[TensorPiece]:
    """The tensors of the state by name; the pieces must have their offsets."""
    numbers = {storage._cdata: number for number, storage in enumerate(storages)}
    for name, tensor in named_tensors(state):
        number = numbers.get(tensor.untyped_storage()._cdata) if is_indexed(tensor) else None
        if number is None:  # it is pickled as something else
            continue
        start, stop = span_of(tensor)
        piece = piece_at(pieces[number], start)
        offset = piece.offset + start - piece.start
        dtype = str(tensor.dtype).removeprefix("torch.")
        strides = None if tensor.is_contiguous() else tuple(tensor.stride())
        yield TensorPiece(name, dtype, tuple(tensor.shape), offset, stop - start, strides)
