"""The `torch_zip` layout: the bytes that `torch.save` would write, and views of the bytes it wrote.

The format is that of `torch.serialization` (zip, stored records, `data.pkl` by pickle protocol 2 with storages
as persistent ids). Four things differ from a stock file, none visible to a reader: large records start at
multiples of 4096, so that direct I/O and views are aligned; a storage holds only the bytes that the saved
tensors show, never the rest of a flat buffer; zeros may follow the pickle in its record, so that it may grow; and
`.format_version` is left out, because it promises offsets that follow from a constant alignment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from roll_ckpt.formats.image import Extents, FileImage, Memory, TensorPiece
from roll_ckpt.formats.torch_zip.archive import Archive
from roll_ckpt.formats.torch_zip.safe_pickle import unsafe_parts
from roll_ckpt.formats.torch_zip.skeleton import (
    MEMO_RESERVED,
    Fragments,
    MemoFull,
    Skeleton,
    is_plain,
    skeleton_of,
    splice,
)
from roll_ckpt.formats.torch_zip.sources import (
    CPU,
    DEVICE,
    LifetimeOf,
    Piece,
    Runs,
    Signature,
    location_of,
    look_at,
    memory_of,
    named_tensors,
    piece_of,
    runs_of,
    span_of,
    tensor_names,
)


def lay_out(
    state: object, archive: str, lifetime_of: LifetimeOf = lambda storage: False, *, at_least: int = 0
) -> FileImage:
    """Describe the file that holds `state`, without copying a tensor.

    Python objects are pickled now, on the calling thread; tensors are only referred to. `archive` is the
    folder inside the zip (stock uses the file's stem). Extents of storages for which `stable` is true may be
    copied until the next fence, all others before the caller goes on. A file shorter than `at_least` bytes
    gets zeros before its directory, where no reader looks.

    Raises:
        SaveFailed: a tensor's memory was freed, or two view the same data as different types.
    """
    return _laid_out(state, skeleton_of(state), archive, lifetime_of, at_least=at_least)[1]


class Layouts:
    """Lays out the same few files at every save: one whose structure did not change keeps its offsets, and only its
    pickle and its addresses are made anew. Holds no tensor."""

    def __init__(self, allow: Iterable[Any] = ()) -> None:
        self._allow = list(allow)
        self._plans: dict[str, _KeptLayout] = {}
        self._kinds: dict[str, frozenset[Any]] = {}

    def lay_out(
        self, name: str, state: object, archive: str, lifetime_of: LifetimeOf
    ) -> tuple[FileImage, dict[str, list[str]]]:
        """The file called `name`, as the function `lay_out` describes it; and what `unsafe_parts` says of its state
        when that holds other kinds of objects than at its last save."""
        plan = self._plans.get(name)
        skeleton = skeleton_of(state, plan.skeleton.reserved if plan else MEMO_RESERVED)
        image = None
        if plan is not None and plan.archive == archive:
            plan, image = plan.refilled(state, skeleton, lifetime_of)
        if plan is None or image is None:
            plan, image = _laid_out(state, skeleton, archive, lifetime_of, room=len(skeleton.data) // 16 + 1024)
        self._plans[name] = plan
        unsafe: dict[str, list[str]] = {}
        if self._kinds.get(name) != skeleton.kinds:
            self._kinds[name] = skeleton.kinds
            unsafe = unsafe_parts(state, self._allow)
        return image, unsafe


@dataclass(frozen=True)
class _KeptLayout:
    """The layout of one file: every byte of it but the pickle and the tensors."""

    archive: str
    skeleton: Skeleton  # without what its marks stand for
    signature: Signature
    fragments: list[bytes]
    image: FileImage  # without memory
    pickle_at: int
    pickle_bytes: int
    holes: list[tuple[int, int, int, int]]  # place in the extents, number of the storage, first and last-plus-one byte
    needed: list[int]  # bytes of each storage
    names: list[tuple[Any, ...]]

    def refilled(
        self, state: object, skeleton: Skeleton, lifetime_of: LifetimeOf
    ) -> tuple[_KeptLayout | None, FileImage | None]:
        """The plan and the image for a state that fits this plan; None and None for any other."""
        signature, storages = look_at(skeleton.marked)
        if signature != self.signature or len(skeleton.data) > self.pickle_bytes:
            return None, None
        plan = self
        if skeleton.data != self.skeleton.data:
            if tensor_names(state) != self.names:
                return None, None
            pickled = splice(skeleton.data, self.fragments)
            if len(pickled) > self.pickle_bytes:
                return None, None
            extents = self.image.extents.copy()
            extents.put(0, _replaced(extents.owners[0], self.pickle_at, pickled.ljust(self.pickle_bytes, b"\0")))
            plan = replace(self, skeleton=replace(skeleton, marked=()), image=replace(self.image, extents=extents))
        if any(storage.nbytes() < needed for storage, needed in zip(storages, self.needed, strict=True)):
            return None, None
        return plan, plan.fill(storages, lifetime_of)

    def fill(self, storages: list[torch.UntypedStorage], lifetime_of: LifetimeOf) -> FileImage:
        """The image of the file whose tensors lie in `storages`."""
        extents = self.image.extents.copy()
        rows, owners, width = extents.rows, extents.owners, Extents.WIDTH
        bases = [storage.data_ptr() for storage in storages]
        steady = [lifetime_of(storage) for storage in storages]
        if any(row[DEVICE] != CPU for row in self.signature if len(row) > 1):
            for place, number, start, stop in self.holes:
                extents.put(place, memory_of(storages[number], start, stop), steady[number])
            return replace(self.image, extents=extents)
        for place, number, start, _ in self.holes:
            at = place * width
            rows[at + 1] = bases[number] + start
            rows[at + 3] = steady[number]
            owners[place] = storages[number]
        return replace(self.image, extents=extents)


def _replaced(data: bytes, at: int, new: bytes) -> bytes:
    return b"".join((data[:at], new, data[at + len(new) :]))


def _laid_out(
    state: object, skeleton: Skeleton, archive: str, lifetime_of: LifetimeOf, *, at_least: int = 0, room: int = 0
) -> tuple[_KeptLayout, FileImage]:
    """Lay a state out; its pickle may grow by `room` bytes before the file must be laid out anew."""
    signature, storages = look_at(skeleton.marked)
    runs = runs_of(skeleton.marked, storages)
    try:
        fragments, used = _fragments(skeleton, signature, storages, runs)
    except MemoFull:
        wider = skeleton_of(state, 2 * skeleton.reserved + len(skeleton.marked))
        return _laid_out(state, wider, archive, lifetime_of, at_least=at_least, room=room)
    pickled = splice(skeleton.data, fragments)
    written = Archive(archive)
    pickle_at = written.add("data.pkl", pickled.ljust(len(pickled) + room, b"\0"))
    written.add("byteorder", sys.byteorder.encode())
    holes = []
    for key, (number, piece) in enumerate(used):
        nbytes = piece.stop - piece.start
        piece.offset = written.add(f"data/{key}", Memory(0, nbytes, None) if nbytes else b"")
        if nbytes:
            holes.append((len(written.extents) - 1, number, piece.start, piece.stop))
    written.add("version", b"3\n")
    written.add_serialization_id()
    nbytes = written.close(at_least)
    pieces = tuple(_index(state, storages, runs))
    image = FileImage(nbytes, written.extents, written.crc_patches, pieces)
    plan = _KeptLayout(
        archive,
        replace(skeleton, marked=()),
        signature,
        fragments,
        image,
        pickle_at,
        len(pickled) + room,
        holes,
        [max((piece.stop for piece in pieces_of), default=0) for pieces_of in runs],
        tensor_names(state),
    )
    return plan, plan.fill(storages, lifetime_of)


def _fragments(
    skeleton: Skeleton, signature: Signature, storages: list[torch.UntypedStorage], runs: Runs
) -> tuple[list[bytes], list[tuple[int, Piece]]]:
    """What stands in the place of each mark; and the pieces with the numbers of their storages, in file order."""
    written = Fragments(skeleton.reserved)
    repeated = {row[0] for row in signature if len(row) == 1}
    locations = [location_of(storage) for storage in storages]
    used: list[tuple[int, Piece]] = []
    fragments = []
    for place, (obj, row) in enumerate(zip(skeleton.marked, signature, strict=True)):
        if len(row) == 1:
            assert isinstance(obj, torch.Tensor)
            fragments.append(written.same(obj))
            continue
        number = row[0]
        piece = piece_of(runs[number], span_of(obj)[0] if isinstance(obj, torch.Tensor) else 0)
        if piece.key is None:
            piece.key = str(len(used))
            used.append((number, piece))
        nbytes, location = piece.stop - piece.start, locations[number]
        if isinstance(obj, torch.Tensor):
            piece.claim(obj.dtype)
            offset = int(obj.storage_offset()) - piece.start // obj.element_size()
            storage = written.storage_of(obj.dtype, piece.key, location, nbytes)
            fragments.append(written.tensor(obj, storage, offset, again=place in repeated))
        elif isinstance(obj, torch.storage.TypedStorage):
            piece.claim(obj.dtype)
            kind = obj._pickle_storage_type()
            fragments.append(written.storage("torch", kind, piece.key, location, obj._size()))
        else:
            piece.claim(torch.uint8)
            fragments.append(written.storage("torch.storage", "UntypedStorage", piece.key, location, nbytes))
    return fragments, used


def _index(state: object, storages: list[torch.UntypedStorage], runs: Runs) -> Iterator[TensorPiece]:
    """The tensors of the state by name, once the pieces have their offsets."""
    numbers = {storage._cdata: number for number, storage in enumerate(storages)}
    for name, tensor in named_tensors(state):
        if not (type(tensor) is torch.nn.Parameter or is_plain(tensor)):
            continue
        start, stop = span_of(tensor)
        piece = piece_of(runs[numbers[tensor.untyped_storage()._cdata]], start)
        where = piece.offset + start - piece.start
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield TensorPiece(name, dtype, tuple(tensor.shape), where, stop - start)
