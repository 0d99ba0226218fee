"""The `torch_zip` layout: the bytes that `torch.save` would write, and views of the bytes it wrote.

The format is that of `torch.serialization` (zip, stored records, `data.pkl` by pickle protocol 2 with storages
as persistent ids). Three things differ from a stock file, none visible to a reader: large records start at
multiples of 4096, so that direct I/O and views are aligned; a storage holds only the bytes that the saved
tensors show, never the rest of a flat buffer; `.format_version` is left out, because it promises offsets that
follow from a constant alignment.
"""

from __future__ import annotations

import enum
import io
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import _weights_only_unpickler as safe_pickle

from roll_ckpt import errors
from roll_ckpt.image import Extent, FileImage, Memory, Record, Serial, TensorPiece

Stable = Callable[[torch.UntypedStorage], bool]

_LARGE = 64 << 10
_LARGE_ALIGNMENT = 4096
_SMALL_ALIGNMENT = 64
_UTF8_AND_DESCRIPTOR = 0x0808
_UTF8 = 0x0800
_ZIP64_LIMIT = 0xFFFFFFFF
_NO_TENSORS = frozenset([int, float, str, bool, bytes, type(None), tuple, list, dict])
"""Most of what a pickler asks about; random states are thousands of numbers."""
_NO_HOOKS: OrderedDict[Any, Any] = OrderedDict()
_NEW_DTYPES = frozenset(torch.storage._new_dtypes())
_STORAGE_NAMES: dict[torch.dtype, str] = dict(torch.storage._dtype_to_storage_type_map())


def lay_out(state: object, archive: str, stable: Stable = lambda storage: False, *, at_least: int = 0) -> FileImage:
    """Describe the file that holds `state`, without copying a tensor.

    Python objects are pickled now, on the calling thread; tensors are only referred to. `archive` is the
    folder inside the zip (stock uses the file's stem). Extents of storages for which `stable` is true may be
    copied until the next fence, all others before the caller goes on. A file shorter than `at_least` bytes
    gets zeros before its directory, where no reader looks.
    """
    pieces = _StoragePieces(stable)
    data_pkl = pieces.pickle(state)
    archive_writer = _Archive(archive)
    archive_writer.add("data.pkl", data_pkl)
    archive_writer.add("byteorder", sys.byteorder.encode())
    for key, piece in enumerate(pieces.used):
        piece.offset = archive_writer.add(f"data/{key}", piece.memory(), piece.stable)
    archive_writer.add("version", b"3\n")
    archive_writer.add_serialization_id()
    return archive_writer.close(pieces.index(state), at_least)


def enum_member(kind: object, name: object) -> enum.Enum:
    """`getattr` for members of enumerations and nothing else: Python 3.11.0 to 3.11.3 pickle them by it."""
    if not (
        isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(name, str) and name in kind.__members__
    ):
        raise pickle.UnpicklingError("it looks up what is no member of an enumeration")
    return kind[name]


ENUM_MEMBERS = (enum_member, "builtins.getattr")
"""For torch's list of safe globals; the enumeration itself must be there, too."""


def unsafe_parts(state: object, image: FileImage, allow: Iterable[Any] = ()) -> dict[str, list[str]]:
    """What `weights_only=True` would refuse to load back: for each top-level key of `state`, the qualified
    names that its pickle holds beyond torch's list and `allow`. `image` is what `lay_out(state)` returned."""
    with torch.serialization.safe_globals(list(allow)):
        allowed = {*safe_pickle._get_allowed_globals(), *safe_pickle._get_user_allowed_globals()}
    start, nbytes = image.records[0].start, image.records[0].nbytes
    head = image.extents[0].source
    assert isinstance(head, bytes), "data.pkl is the first record, and plain bytes"
    if _globals_of(head[start : start + nbytes]) <= allowed:
        return {}
    parts = state.items() if isinstance(state, dict) else [("", state)]
    found = {}
    for key, value in parts:
        unsafe = _globals_of(_StoragePieces(lambda storage: False).pickle(value)) - allowed
        if unsafe:
            found[str(key)] = sorted(unsafe)
    return found


def _globals_of(data_pkl: bytes) -> set[str]:
    try:
        return {str(name) for name in safe_pickle.get_globals_in_pkl(io.BytesIO(data_pkl))}
    except pickle.UnpicklingError as problem:
        return {str(problem)}


# --- tensors -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Piece:
    """A run of bytes of one storage that becomes one record of the archive."""

    storage: torch.UntypedStorage
    start: int
    stop: int
    stable: bool
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

    def memory(self) -> Memory | bytes:
        return memory_of(self.storage, self.start, self.stop) if self.stop > self.start else b""


def extent_of(offset: int, tensor: torch.Tensor, nbytes: int, stable: Stable) -> Extent:
    """The extent at `offset` of the file that holds a contiguous tensor of `nbytes` bytes, and nothing else.

    Raises:
        SaveFailed: its memory was freed.
    """
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr()
    if start + nbytes > storage.nbytes():
        raise _freed(tensor, start + nbytes, storage)
    return Extent(offset, memory_of(storage, start, start + nbytes), stable(storage))


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


@dataclass(frozen=True)
class _StorageStub:
    """Stands for a storage in the pickle: what `persistent_id` turns into stock's tuple."""

    type: type
    piece: _Piece
    location: str
    numel: int


class _StoragePieces:
    """The storages of one state, cut to what its tensors show.

    Tensors that overlap in one storage share a piece, as they must to share memory after loading; neighbours
    that do not overlap get pieces of their own.
    """

    def __init__(self, stable: Stable) -> None:
        self._stable = stable
        self._by_storage: dict[int, list[_Piece]] = {}
        self.used: list[_Piece] = []

    def pickle(self, state: object) -> bytes:
        seen = _Collector()
        seen.dump(state)
        spans: dict[int, tuple[torch.UntypedStorage, list[tuple[int, int]]]] = {}
        for tensor in seen.tensors:
            storage, span = tensor.untyped_storage(), _span(tensor)
            if span[1] > storage.nbytes():
                raise _freed(tensor, span[1], storage)
            spans.setdefault(storage._cdata, (storage, []))[1].append(span)
        for storage in seen.storages:
            spans.setdefault(storage._cdata, (storage, []))[1].append((0, storage.nbytes()))
        for identity, (storage, wanted) in spans.items():
            stable = self._stable(storage)
            runs = _merge(wanted)
            self._by_storage[identity] = [_Piece(storage, start, stop, stable) for start, stop in runs]
        buffer = io.BytesIO()
        _Writer(buffer, self).dump(state)
        return buffer.getvalue()

    def piece_of(self, storage: torch.UntypedStorage, start: int) -> _Piece:
        runs = self._by_storage.get(storage._cdata)
        if runs is None:  # a `__reduce__` made this tensor anew: nobody else will change it
            runs = self._by_storage[storage._cdata] = [_Piece(storage, 0, storage.nbytes(), False)]
        piece = next(p for p in reversed(runs) if p.start <= start)
        if piece.key is None:
            piece.key = str(len(self.used))
            self.used.append(piece)
        return piece

    def reduce(self, tensor: torch.Tensor) -> Any:
        """What `Tensor.__reduce_ex__` returns for a plain tensor, with a stub for its storage."""
        storage = tensor.untyped_storage()
        itemsize = tensor.element_size()
        piece = self.piece_of(storage, _span(tensor)[0])
        piece.claim(tensor.dtype)
        offset = tensor.storage_offset() - piece.start // itemsize
        location = _location(storage)
        new_dtype = tensor.dtype in _NEW_DTYPES
        kind = torch.UntypedStorage if new_dtype else getattr(torch, _storage_name(tensor.dtype))
        size = piece.stop - piece.start
        stub = _StorageStub(kind, piece, location, size if new_dtype else size // itemsize)
        args = (stub, offset, tuple(tensor.size()), tensor.stride(), tensor.requires_grad, _NO_HOOKS)
        if new_dtype:
            return torch._utils._rebuild_tensor_v3, (*args, tensor.dtype)
        return torch._utils._rebuild_tensor_v2, args

    def index(self, state: object) -> Callable[[], tuple[TensorPiece, ...]]:
        """The tensors of the state by name, to be called once the pieces have their offsets."""

        def build() -> tuple[TensorPiece, ...]:
            found = []
            for name, tensor in _named_tensors(state):
                if not (is_plain(tensor) or type(tensor) is torch.nn.Parameter):
                    continue
                start, stop = _span(tensor)
                piece = self.piece_of(tensor.untyped_storage(), start)
                where = piece.offset + start - piece.start
                dtype = str(tensor.dtype).removeprefix("torch.")
                found.append(TensorPiece(name, dtype, tuple(tensor.shape), where, stop - start))
            return tuple(found)

        return build


def is_plain(obj: object) -> bool:
    """Whether `obj` is a tensor that stock pickles as dtype, shape, strides and a storage, and nothing else."""
    return (
        type(obj) is torch.Tensor
        and not obj.__dict__  # stock keeps attributes, in a form of its own
        and obj.layout is torch.strided
        and not obj.is_quantized
        and obj.device.type != "meta"
        and not obj.is_conj()
        and not obj.is_neg()
        and not obj.is_nested
    )


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


def _location(storage: torch.UntypedStorage) -> str:
    return "cpu" if storage.device.type == "cpu" else torch.serialization.location_tag(storage)


def _storage_name(dtype: torch.dtype) -> str:
    return _STORAGE_NAMES[dtype]


def _untyped(obj: object) -> torch.UntypedStorage | None:
    if isinstance(obj, torch.storage.TypedStorage):
        return obj._untyped_storage
    return obj if isinstance(obj, torch.UntypedStorage) else None


class _Discard(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data)


class _Collector(pickle.Pickler):
    """Walks a state as pickling would and keeps the tensors and bare storages that it meets."""

    def __init__(self) -> None:
        super().__init__(_Discard(), protocol=2)
        self.tensors: list[torch.Tensor] = []
        self.storages: list[torch.UntypedStorage] = []

    def persistent_id(self, obj: object) -> Any:
        if type(obj) in _NO_TENSORS:
            return None
        if is_plain(obj):
            assert isinstance(obj, torch.Tensor)
            self.tensors.append(obj)
            return "tensor"
        storage = _untyped(obj)
        if storage is not None:
            self.storages.append(storage)
            return "storage"
        return None


class _Writer(pickle.Pickler):
    """Pickles a state with its storages as stock's persistent ids."""

    def __init__(self, file: io.BytesIO, pieces: _StoragePieces) -> None:
        super().__init__(file, protocol=2)
        self._pieces = pieces

    def reducer_override(self, obj: object) -> Any:
        if is_plain(obj):
            assert isinstance(obj, torch.Tensor)
            return self._pieces.reduce(obj)
        return NotImplemented

    def persistent_id(self, obj: object) -> Any:
        if type(obj) in _NO_TENSORS:
            return None
        if type(obj) is _StorageStub:
            return ("storage", obj.type, obj.piece.key, obj.location, obj.numel)
        storage = _untyped(obj)
        if storage is None:
            return None
        piece = self._pieces.piece_of(storage, 0)
        piece.claim(obj.dtype if isinstance(obj, torch.storage.TypedStorage) else torch.uint8)
        location = _location(storage)
        if isinstance(obj, torch.storage.TypedStorage):
            return ("storage", getattr(torch, obj._pickle_storage_type()), piece.key, location, obj._size())
        return ("storage", torch.UntypedStorage, piece.key, location, storage.nbytes())


def _named_tensors(
    state: object, name: str = "", inside: frozenset[int] = frozenset()
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield name, state
        return
    if id(state) in inside:  # a container that holds itself
        return
    items: Iterable[tuple[object, object]] = ()
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    inside |= {id(state)}
    for key, value in items:
        if isinstance(value, torch.Tensor | dict | list | tuple):
            yield from _named_tensors(value, f"{name}.{key}" if name else str(key), inside)


# --- the archive ---------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    name: bytes
    header_at: int
    nbytes: int
    flags: int
    record: int | None


_END_BYTES = 56 + 20 + 22  # zip64 end record, its locator, end record


def _zip64_extra(entry: _Entry) -> bytes:
    wide = [entry.nbytes, entry.nbytes] if entry.nbytes >= _ZIP64_LIMIT else []
    wide += [entry.header_at] if entry.header_at >= _ZIP64_LIMIT else []
    return struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""


@dataclass
class _Archive:
    """A zip of stored records whose CRCs are filled in by the writer, see `image.Record`."""

    folder: str
    extents: list[Extent] = field(default_factory=list)
    entries: list[_Entry] = field(default_factory=list)
    records: list[tuple[int, int, list[int]]] = field(default_factory=list)
    serial_at: int = 0
    _plain: bytearray = field(default_factory=bytearray)
    _plain_at: int = 0

    @property
    def _end(self) -> int:
        return self._plain_at + len(self._plain)

    def add(self, name: str, source: bytes | Memory, stable: bool = False) -> int:
        """Append one record; return the file offset of its first byte."""
        nbytes = len(source) if isinstance(source, bytes) else source.nbytes
        header_at, encoded = self._end, f"{self.folder}/{name}".encode()
        alignment = _LARGE_ALIGNMENT if nbytes >= _LARGE else _SMALL_ALIGNMENT
        unpadded = header_at + 30 + len(encoded) + 4
        padding = -unpadded % alignment
        flags = _UTF8_AND_DESCRIPTOR if nbytes else _UTF8
        sizes = (0, 0, 0, 0, 0, 0, len(encoded), 4 + padding)
        self._plain += struct.pack("<4s3H2H3I2H", b"PK\x03\x04", 0, flags, *sizes)
        self._plain += encoded + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        start = self._end
        self.entries.append(_Entry(encoded, header_at, nbytes, flags, len(self.records) if nbytes else None))
        if nbytes:
            self._put(source, stable)
            self.records.append((start, nbytes, [self._end + 4]))
            wide = nbytes >= _ZIP64_LIMIT
            self._plain += struct.pack("<4sIQQ" if wide else "<4sIII", b"PK\x07\x08", 0, nbytes, nbytes)
        return start

    def add_serialization_id(self) -> None:
        """Stock's fingerprint of names and contents: 20 digits of each, of our own making."""
        names = 0
        for entry in self.entries:
            for byte in entry.name:
                names = (names ^ byte) * 0x100000001B3 % 2**64  # FNV-1a
        start = self.add(".data/serialization_id", b"%020d%020d" % (names, 0))
        self.serial_at = start + 20

    def close(self, index: Callable[[], tuple[TensorPiece, ...]], at_least: int) -> FileImage:
        tail = sum(46 + len(entry.name) + len(_zip64_extra(entry)) for entry in self.entries) + _END_BYTES
        self._plain += bytes(max(0, at_least - self._end - tail))
        directory_at = self._end
        for entry in self.entries:
            self._add_directory_entry(entry)
        size, count, end_at = self._end - directory_at, len(self.entries), self._end
        self._plain += struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 798, 45, 0, 0, count, count, size, directory_at)
        self._plain += struct.pack("<4sIQI", b"PK\x06\x07", 0, end_at, 1)
        self._plain += struct.pack(
            "<4s4H2IH",
            *(b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF)),
            *(min(size, _ZIP64_LIMIT), min(directory_at, _ZIP64_LIMIT), 0),
        )
        nbytes = self._end
        self._flush()
        records = tuple(Record(start, size, tuple(crc_at)) for start, size, crc_at in self.records)
        serial = Serial(self.serial_at, 0, len(records) - 1)
        return FileImage(nbytes, tuple(self.extents), records, (serial,), index())

    def _add_directory_entry(self, entry: _Entry) -> None:
        large = entry.nbytes >= _ZIP64_LIMIT
        far = entry.header_at >= _ZIP64_LIMIT
        extra = _zip64_extra(entry)
        short = _ZIP64_LIMIT if large else entry.nbytes
        if entry.record is not None:
            self.records[entry.record][2].append(self._end + 16)
        self._plain += struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\x01\x02", 0, 45 if extra else 0, entry.flags, 0, 0, 0),
            *(0, short, short, len(entry.name), len(extra), 0, 0, 0, 0),
            _ZIP64_LIMIT if far else entry.header_at,
        )
        self._plain += entry.name + extra

    def _put(self, source: bytes | Memory, stable: bool) -> None:
        if isinstance(source, bytes):
            self._plain += source
            return
        self._flush()
        self.extents.append(Extent(self._plain_at, source, stable))
        self._plain_at += source.nbytes

    def _flush(self) -> None:
        if self._plain:
            self.extents.append(Extent(self._plain_at, bytes(self._plain)))
            self._plain_at += len(self._plain)
            self._plain.clear()


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
    records = _read_directory(view, path)
    if "byteorder" in records and bytes(_slice(view, records["byteorder"])) != sys.byteorder.encode():
        raise errors.Damaged(f"{path}: written on a machine of other byte order; convert it there")
    restore = torch.serialization._get_restore_location(map_location)
    storages: dict[str, Any] = {}

    def storage_of(persistent_id: tuple[Any, ...]) -> Any:
        _, kind, key, location, numel = persistent_id
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
        with torch.serialization.safe_globals(list(allow)):
            data_pkl = io.BytesIO(_slice(view, records["data.pkl"]))
            unpickler = safe_pickle.Unpickler(data_pkl, encoding="utf-8")
            setattr(unpickler, "persistent_load", storage_of)  # noqa: B010 (torch sets it the same way)
            return unpickler.load()
    except errors.Damaged:
        raise
    except _BROKEN_PICKLE as problem:
        raise errors.Damaged(
            f"{path}: refused to load: {problem}. If you trust the file, add the name it needs to load.allow"
        ) from problem


_BROKEN_PICKLE = (
    *(pickle.UnpicklingError, struct.error, LookupError, EOFError, TypeError, ValueError, AttributeError),
    *(RuntimeError, AssertionError, OverflowError, MemoryError),
)
"""What torch's unpickler raises on bytes that no pickler wrote."""


def _slice(view: memoryview, record: tuple[int, int]) -> memoryview:
    return view[record[0] : record[0] + record[1]]


def _read_directory(view: memoryview, path: str) -> dict[str, tuple[int, int]]:
    """Start and size in bytes of each record, by its name without the archive's folder."""
    tail_at = max(0, len(view) - (1 << 16))
    end = bytes(view[tail_at:]).rfind(b"PK\x05\x06")
    if end < 0 or tail_at + end + 22 != len(view):
        raise errors.Damaged(f"{path}: no zip directory at its end; the file is truncated or not a checkpoint")
    try:
        return dict(_directory_entries(view, tail_at + end, path))
    except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as problem:
        raise errors.Damaged(f"{path}: its zip directory cannot be read: {problem}") from problem


def _directory_entries(view: memoryview, end: int, path: str) -> Iterator[tuple[str, tuple[int, int]]]:
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
        nbytes = wide_values.pop(0) if nbytes == _ZIP64_LIMIT else nbytes
        stored = wide_values.pop(0) if stored == _ZIP64_LIMIT else stored
        header_at = wide_values.pop(0) if header_at == _ZIP64_LIMIT else header_at
        if method != 0 or stored != nbytes:
            raise errors.Damaged(f"{path}: record {name} is compressed; torch never writes that")
        local_name, local_extra = struct.unpack_from("<2H", view, header_at + 26)
        start = header_at + 30 + local_name + local_extra
        if start + nbytes > len(view):
            raise errors.Damaged(f"{path}: record {name} reaches past the end of the file")
        yield name.partition("/")[2], (start, nbytes)
        at += 46 + name_len + extra_len + comment_len


def _zip64_values(extra: bytes) -> list[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            return list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
        at += 4 + size
    return []
