"""The `torch_zip` layout: the bytes that `torch.save` would write, and views of the bytes it wrote.

The format is that of `torch.serialization` (zip, stored records, `data.pkl` by pickle protocol 2 with storages
as persistent ids). Four things differ from a stock file, none visible to a reader: large records start at
multiples of 4096, so that direct I/O and views are aligned; a storage holds only the bytes that the saved
tensors show, never the rest of a flat buffer; zeros may follow the pickle in its record, so that it may grow; and
`.format_version` is left out, because it promises offsets that follow from a constant alignment.
"""

from __future__ import annotations

import bisect
import enum
import io
import pickle
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import _weights_only_unpickler as safe_pickle

from roll_ckpt import errors
from roll_ckpt.image import Extents, FileImage, Memory, TensorPiece, Until
from roll_ckpt.layout.archive import ZIP64_LIMIT, Archive
from roll_ckpt.layout.skeleton import (
    MEMO_RESERVED,
    NO_TENSORS,
    Fragments,
    Marked,
    MemoFull,
    Skeleton,
    is_plain,
    skeleton_of,
    splice,
)
from roll_ckpt.layout.watched import WatchedPickle

Stable = Callable[[torch.UntypedStorage], Until | bool]


def lay_out(state: object, archive: str, stable: Stable = lambda storage: False, *, at_least: int = 0) -> FileImage:
    """Describe the file that holds `state`, without copying a tensor.

    Python objects are pickled now, on the calling thread; tensors are only referred to. `archive` is the
    folder inside the zip (stock uses the file's stem). Extents of storages for which `stable` is true may be
    copied until the next fence, all others before the caller goes on. A file shorter than `at_least` bytes
    gets zeros before its directory, where no reader looks.

    Raises:
        SaveFailed: a tensor's memory was freed, or two view the same data as different types.
    """
    return _planned(state, skeleton_of(state), archive, stable, at_least=at_least)[1]


class Layouts:
    """Lays out the same few files at every save: one whose structure did not change keeps its offsets, and only its
    pickle and its addresses are made anew. Holds no tensor."""

    def __init__(self, allow: Iterable[Any] = ()) -> None:
        self._allow = list(allow)
        self._plans: dict[str, _Plan] = {}
        self._kinds: dict[str, frozenset[Any]] = {}

    def lay_out(self, name: str, state: object, archive: str, stable: Stable) -> tuple[FileImage, dict[str, list[str]]]:
        """The file called `name`, as the function `lay_out` describes it; and what `unsafe_parts` says of its state
        when that holds other kinds of objects than at its last save."""
        plan = self._plans.get(name)
        skeleton = skeleton_of(state, plan.skeleton.reserved if plan else MEMO_RESERVED)
        image = None
        if plan is not None and plan.archive == archive:
            plan, image = plan.refilled(state, skeleton, stable)
        if plan is None or image is None:
            plan, image = _planned(state, skeleton, archive, stable, room=len(skeleton.data) // 16 + 1024)
        self._plans[name] = plan
        unsafe: dict[str, list[str]] = {}
        if self._kinds.get(name) != skeleton.kinds:
            self._kinds[name] = skeleton.kinds
            unsafe = unsafe_parts(state, self._allow)
        return image, unsafe


def enum_member(kind: object, name: object) -> enum.Enum:
    """`getattr` for members of enumerations and nothing else: Python 3.11.0 to 3.11.3 pickle them by it."""
    if not (
        isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(name, str) and name in kind.__members__
    ):
        raise pickle.UnpicklingError("it looks up what is no member of an enumeration")
    return kind[name]


ENUM_MEMBERS = (enum_member, "builtins.getattr")
"""For torch's list of safe globals; the enumeration itself must be there, too."""


def unsafe_parts(state: object, allow: Iterable[Any] = ()) -> dict[str, list[str]]:
    """What `weights_only=True` would refuse to load back: for each top-level key of `state`, the qualified
    names that its pickle holds beyond torch's list and `allow`."""
    with torch.serialization.safe_globals(list(allow)):
        allowed = {*safe_pickle._get_allowed_globals(), *safe_pickle._get_user_allowed_globals()}
    if _globals_of(state) <= allowed:
        return {}
    parts = state.items() if isinstance(state, dict) else [("", state)]
    unsafe = {str(key): sorted(_globals_of(value) - allowed) for key, value in parts}
    return {key: found for key, found in unsafe.items() if found}


def _globals_of(state: object) -> set[str]:
    try:
        return {str(name) for name in safe_pickle.get_globals_in_pkl(io.BytesIO(skeleton_of(state).data))}
    except pickle.UnpicklingError as problem:
        return {str(problem)}


# --- tensors -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Piece:
    """A run of bytes of one storage that becomes one record of the archive."""

    start: int
    stop: int
    dtype: torch.dtype | None = None
    key: str | None = None
    offset: int = 0

    def claim(self, dtype: torch.dtype) -> None:
        """One piece has one dtype: readers cache storages by key.

        Raises:
            SaveFailed: as stock does, for two views of one memory as different types.
        """
        if self.dtype not in (None, dtype):
            raise errors.SaveFailed(
                f"two tensors of the state view the same data as different types, {self.dtype} and {dtype}; "
                "the file format cannot hold that: clone one of them"
            )
        self.dtype = dtype


def source_of(tensor: torch.Tensor, nbytes: int, stable: Stable) -> tuple[Memory, Until | bool]:
    """The memory of a contiguous tensor of `nbytes` bytes, and how long it is stable.

    Raises:
        SaveFailed: its memory was freed.
    """
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr()
    if start + nbytes > storage.nbytes():
        raise _freed(tensor, start + nbytes, storage)
    return memory_of(storage, start, start + nbytes), stable(storage)


def _freed(tensor: torch.Tensor, needed: int, storage: torch.UntypedStorage) -> errors.SaveFailed:
    return errors.SaveFailed(
        f"a tensor of shape {list(tensor.shape)} needs {needed} bytes of a storage that has {storage.nbytes()}: its "
        "memory was freed. Save it while it is gathered"
    )


def memory_of(storage: torch.UntypedStorage, start: int, stop: int) -> Memory:
    """Bytes `start` to `stop` of a storage; of one that is neither on the CPU nor on a CUDA device, a copy."""
    device = storage.device
    if device.type not in ("cpu", "cuda"):
        storage = storage.cpu()
    address, nbytes = storage.data_ptr() + start, stop - start
    if device.type != "cuda":
        return Memory(address, nbytes, storage)
    stream = torch.cuda.current_stream(device).cuda_stream
    return Memory(address, nbytes, storage, device.index or 0, stream)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last-plus-one byte of its storage that a strided tensor shows."""
    itemsize = tensor.element_size()
    start = int(tensor.storage_offset()) * itemsize
    if tensor.numel() == 0:
        return start, start
    last: int = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * itemsize


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Unite spans that overlap; spans that only touch stay apart."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(set(spans)):
        if merged and (start < merged[-1][1] or start == merged[-1][0]):
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _untyped(obj: Marked) -> torch.UntypedStorage:
    if isinstance(obj, torch.Tensor):
        return obj.untyped_storage()
    return obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj


def _named_tensors(state: object) -> list[tuple[str, torch.Tensor]]:
    """The tensors in the dicts, lists and tuples of a state, by the path of keys to each."""
    found: list[tuple[str, torch.Tensor]] = []
    inside: set[int] = set()

    def walk(value: object, name: str) -> None:
        items: Iterable[tuple[object, object]]
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        elif isinstance(value, torch.Tensor):
            found.append((name, value))
            return
        else:
            return
        if id(value) in inside:  # a container that holds itself
            return
        inside.add(id(value))
        before = name + "." if name else ""
        for key, inner in items:
            if type(inner) not in NO_TENSORS:
                walk(inner, f"{before}{key}")
        inside.discard(id(value))

    walk(state, "")
    return found


def _names(state: object) -> list[tuple[Any, ...]]:
    """Which name has which tensor, as far as the index of a file tells them apart."""
    named = _named_tensors(state)
    numbers: dict[int, int] = {}
    return [
        (name, tensor.dtype, tensor.shape, tensor.storage_offset(), numbers.setdefault(_identity(tensor), len(numbers)))
        for name, tensor in named
        if type(tensor) is torch.nn.Parameter or is_plain(tensor)
    ]


def _identity(tensor: torch.Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity


# --- plans -----------------------------------------------------------------------------------------------------

_Signature = list[tuple[Any, ...]]
_DEVICE, _CPU = -1, torch.device("cpu")


def _look_at(marked: Iterable[Marked]) -> tuple[_Signature, list[torch.UntypedStorage]]:
    """All that a file's structure has from its tensors and storages; and their storages, each once."""
    signature: _Signature = []
    storages: list[torch.UntypedStorage] = []
    numbers: dict[int, int] = {}
    first: dict[int, int] = {}
    for place, obj in enumerate(marked):
        storage = _untyped(obj)
        identity = storage._cdata
        number = numbers.setdefault(identity, len(storages))
        if number == len(storages):
            storages.append(storage)
        if not isinstance(obj, torch.Tensor):
            signature.append((number, storage.nbytes(), getattr(obj, "dtype", None), storage.device))
        elif (before := first.setdefault(id(obj), place)) < place:
            signature.append((before,))
        else:
            signature.append(
                (number, obj.dtype, obj.shape, obj.stride(), obj.storage_offset(), obj.requires_grad, obj.device)
            )
    return signature, storages


@dataclass(frozen=True)
class _Plan:
    """The layout of one file: every byte of it but the pickle and the tensors."""

    archive: str
    skeleton: Skeleton  # without what its marks stand for
    signature: _Signature
    fragments: list[bytes]
    image: FileImage  # without memory
    pickle_at: int
    pickle_bytes: int
    holes: list[tuple[int, int, int, int]]  # place in the extents, number of the storage, first and last-plus-one byte
    needed: list[int]  # bytes of each storage
    names: list[tuple[Any, ...]]

    def refilled(self, state: object, skeleton: Skeleton, stable: Stable) -> tuple[_Plan | None, FileImage | None]:
        """The plan and the image for a state that fits this plan; None and None for any other."""
        signature, storages = _look_at(skeleton.marked)
        if signature != self.signature or len(skeleton.data) > self.pickle_bytes:
            return None, None
        plan = self
        if skeleton.data != self.skeleton.data:
            if _names(state) != self.names:
                return None, None
            pickled = splice(skeleton.data, self.fragments)
            if len(pickled) > self.pickle_bytes:
                return None, None
            extents = self.image.extents.copy()
            extents.put(0, _replaced(extents.owners[0], self.pickle_at, pickled.ljust(self.pickle_bytes, b"\0")))
            plan = replace(self, skeleton=replace(skeleton, marked=()), image=replace(self.image, extents=extents))
        if any(storage.nbytes() < needed for storage, needed in zip(storages, self.needed, strict=True)):
            return None, None
        return plan, plan.fill(storages, stable)

    def fill(self, storages: list[torch.UntypedStorage], stable: Stable) -> FileImage:
        """The image of the file whose tensors lie in `storages`."""
        extents = self.image.extents.copy()
        rows, owners, width = extents.rows, extents.owners, Extents.WIDTH
        bases = [storage.data_ptr() for storage in storages]
        steady = [stable(storage) for storage in storages]
        if any(row[_DEVICE] != _CPU for row in self.signature if len(row) > 1):
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


def _planned(
    state: object, skeleton: Skeleton, archive: str, stable: Stable, *, at_least: int = 0, room: int = 0
) -> tuple[_Plan, FileImage]:
    """Lay a state out; its pickle may grow by `room` bytes before the file must be laid out anew."""
    signature, storages = _look_at(skeleton.marked)
    runs = _runs(skeleton.marked, storages)
    try:
        fragments, used = _fragments(skeleton, signature, storages, runs)
    except MemoFull:
        wider = skeleton_of(state, 2 * skeleton.reserved + len(skeleton.marked))
        return _planned(state, wider, archive, stable, at_least=at_least, room=room)
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
    image = FileImage(nbytes, written.extents, written.seals, pieces)
    plan = _Plan(
        archive,
        replace(skeleton, marked=()),
        signature,
        fragments,
        image,
        pickle_at,
        len(pickled) + room,
        holes,
        [max((piece.stop for piece in pieces_of), default=0) for pieces_of in runs],
        _names(state),
    )
    return plan, plan.fill(storages, stable)


_Runs = list[list[_Piece]]


def _runs(marked: Iterable[Marked], storages: list[torch.UntypedStorage]) -> _Runs:
    """The pieces of each storage, cut to what its tensors show.

    Tensors that overlap in one storage share a piece, as they must to share memory after loading; neighbours
    that do not overlap get pieces of their own.
    """
    spans: dict[int, list[tuple[int, int]]] = {storage._cdata: [] for storage in storages}
    for obj in marked:
        storage = _untyped(obj)
        span = _span(obj) if isinstance(obj, torch.Tensor) else (0, storage.nbytes())
        if span[1] > storage.nbytes():
            assert isinstance(obj, torch.Tensor)
            raise _freed(obj, span[1], storage)
        spans[storage._cdata].append(span)
    return [[_Piece(start, stop) for start, stop in _merge(spans[storage._cdata])] for storage in storages]


def _piece_of(runs: list[_Piece], start: int) -> _Piece:
    return runs[bisect.bisect_right(runs, start, key=lambda piece: piece.start) - 1]


def _fragments(
    skeleton: Skeleton, signature: _Signature, storages: list[torch.UntypedStorage], runs: _Runs
) -> tuple[list[bytes], list[tuple[int, _Piece]]]:
    """What stands in the place of each mark; and the pieces with the numbers of their storages, in file order."""
    written = Fragments(skeleton.reserved)
    repeated = {row[0] for row in signature if len(row) == 1}
    locations = [_location(storage) for storage in storages]
    used: list[tuple[int, _Piece]] = []
    fragments = []
    for place, (obj, row) in enumerate(zip(skeleton.marked, signature, strict=True)):
        if len(row) == 1:
            assert isinstance(obj, torch.Tensor)
            fragments.append(written.same(obj))
            continue
        number = row[0]
        piece = _piece_of(runs[number], _span(obj)[0] if isinstance(obj, torch.Tensor) else 0)
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


def _location(storage: torch.UntypedStorage) -> str:
    return "cpu" if storage.device.type == "cpu" else torch.serialization.location_tag(storage)


def _index(state: object, storages: list[torch.UntypedStorage], runs: _Runs) -> Iterator[TensorPiece]:
    """The tensors of the state by name, once the pieces have their offsets."""
    numbers = {storage._cdata: number for number, storage in enumerate(storages)}
    for name, tensor in _named_tensors(state):
        if not (type(tensor) is torch.nn.Parameter or is_plain(tensor)):
            continue
        start, stop = _span(tensor)
        piece = _piece_of(runs[numbers[tensor.untyped_storage()._cdata]], start)
        where = piece.offset + start - piece.start
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield TensorPiece(name, dtype, tuple(tensor.shape), where, stop - start)


# --- reading -------------------------------------------------------------------------------------------------


def parse(buffer: Any, path: str, map_location: Any = "cpu", allow: Iterable[Any] = ()) -> Any:
    """Rebuild the state from the file's bytes; its tensors are views of `buffer` on the CPU.

    `buffer` is writable memory with the buffer protocol that holds the whole file `path`. Runs no code:
    `data.pkl` goes through torch's `weights_only` unpickler, extended by the objects in `allow`.

    Raises:
        Damaged: the archive or its pickle is not one that torch or this layout writes, or holds a name
            outside the allowlist; the message names both.
    """
    view = memoryview(buffer).cast("B")
    records = read_directory(view, path)
    if "byteorder" in records and bytes(_slice(view, records["byteorder"])) != sys.byteorder.encode():
        raise errors.Damaged(f"{path}: written on a machine of other byte order; convert it there")
    restore = torch.serialization._get_restore_location(map_location)
    storages: dict[str, Any] = {}

    def storage_of(persistent_id: tuple[Any, ...]) -> Any:
        _, kind, key, location, numel = persistent_id
        if not isinstance(key, str):
            raise errors.Damaged(f"{path}: a storage has no name")
        if key not in storages:
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            start, nbytes = records[f"data/{key}"]
            if nbytes != numel * dtype.itemsize:
                raise errors.Damaged(f"{path}: storage {key} has {nbytes} bytes, its tensors need {numel}")
            raw = torch.UntypedStorage(0)
            if nbytes:
                raw = torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=start).untyped_storage()
            stored = restore(raw, location)
            storages[key] = torch.storage.TypedStorage(wrap_storage=stored, dtype=dtype, _internal=True)
        return storages[key]

    try:
        with safe_loads(allow):
            data_pkl = WatchedPickle(_slice(view, records["data.pkl"]))
            data_pkl.unpickler = unpickler = safe_pickle.Unpickler(data_pkl, encoding="utf-8")
            setattr(unpickler, "persistent_load", storage_of)  # noqa: B010 (torch sets it the same way)
            state = unpickler.load()
            torch._utils._validate_loaded_sparse_tensors()
            return state
    except errors.Damaged:
        raise
    except Exception as problem:  # on bytes that no pickler wrote, torch's unpickler can raise anything
        raise errors.Damaged(
            f"{path}: refused to load: {problem}. If you trust the file, add the name it needs to load.allow"
        ) from problem


@contextmanager
def safe_loads(allow: Iterable[Any]) -> Iterator[None]:
    """Inside the block, torch's `weights_only` loads take the objects in `allow`, too, and look into sparse tensors:
    unless asked to, torch believes indices that lead out of memory."""
    with torch.serialization.safe_globals(list(allow)), torch.sparse.check_sparse_tensor_invariants():
        yield


def _slice(view: memoryview, record: tuple[int, int]) -> memoryview:
    return view[record[0] : record[0] + record[1]]


def read_directory(view: memoryview, path: str) -> dict[str, tuple[int, int]]:
    """Start and size in bytes of each record, by its name without the archive's folder.

    Raises:
        Damaged: no archive as torch writes it: records are compressed, overlap, have one name (torch's own reader
            tells no upper case from lower case), or reach past the end.
    """
    tail_at = max(0, len(view) - (1 << 16))
    end = bytes(view[tail_at:]).rfind(b"PK\x05\x06")
    if end < 0 or tail_at + end + 22 != len(view):
        raise errors.Damaged(f"{path}: no zip directory at its end; the file is truncated or not a checkpoint")
    try:
        entries = list(_directory_entries(view, tail_at + end, path))
    except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as problem:
        raise errors.Damaged(f"{path}: its zip directory cannot be read: {problem}") from problem
    if len({name.partition("/")[2].lower() for name, *_ in entries}) < len(entries):
        raise errors.Damaged(f"{path}: two of its records have one name")
    end_before = 0
    for name, header_at, start, nbytes in sorted(entries, key=lambda entry: entry[1]):
        if header_at < end_before:
            raise errors.Damaged(f"{path}: record {name} overlaps another one")
        end_before = start + nbytes
    return {name.partition("/")[2]: (start, nbytes) for name, _, start, nbytes in entries}


def _directory_entries(view: memoryview, end: int, path: str) -> Iterator[tuple[str, int, int, int]]:
    """Name, place of the header, first byte and size of each record."""
    count, _, at = struct.unpack_from("<H2I", view, end + 10)
    if end >= 20 and bytes(view[end - 20 : end - 16]) == b"PK\x06\x07":
        (wide,) = struct.unpack_from("<Q", view, end - 12)
        count, _, at = struct.unpack_from("<3Q", view, wide + 32)
    for _ in range(count):
        if bytes(view[at : at + 4]) != b"PK\x01\x02":
            raise errors.Damaged(f"{path}: its zip directory is broken at byte {at}")
        (method,) = struct.unpack_from("<H", view, at + 10)
        stored, nbytes, name_len, extra_len, comment_len = struct.unpack_from("<2I3H", view, at + 20)
        (header_at,) = struct.unpack_from("<I", view, at + 42)
        name = bytes(view[at + 46 : at + 46 + name_len]).decode()
        extra = bytes(view[at + 46 + name_len : at + 46 + name_len + extra_len])
        wide_values = _zip64_values(extra)
        nbytes = wide_values.pop(0) if nbytes == ZIP64_LIMIT else nbytes
        stored = wide_values.pop(0) if stored == ZIP64_LIMIT else stored
        header_at = wide_values.pop(0) if header_at == ZIP64_LIMIT else header_at
        if method != 0 or stored != nbytes:
            raise errors.Damaged(f"{path}: record {name} is compressed; torch never writes that")
        if bytes(view[header_at : header_at + 4]) != b"PK\x03\x04":
            raise errors.Damaged(f"{path}: record {name} has no header at byte {header_at}")
        local_name, local_extra = struct.unpack_from("<2H", view, header_at + 26)
        start = header_at + 30 + local_name + local_extra
        if start + nbytes > len(view):
            raise errors.Damaged(f"{path}: record {name} reaches past the end of the file")
        yield name, header_at, start, nbytes
        at += 46 + name_len + extra_len + comment_len


def _zip64_values(extra: bytes) -> list[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            return list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
        at += 4 + size
    return []
