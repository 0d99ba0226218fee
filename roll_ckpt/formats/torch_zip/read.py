"""Reading a file of `torch.save` (torch's own or ours): its zip directory, and its state as views of the bytes.

Every offset and size is checked before it is used, and the pickle runs no code. Format: torch/serialization.py.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from roll_ckpt.errors import Damaged, RollCkptError, UnsupportedError
from roll_ckpt.formats.torch_zip.archive import ZIP64_LIMIT
from roll_ckpt.formats.torch_zip.making import Unsupported
from roll_ckpt.formats.torch_zip.safe_pickle import Unloadable, setting, unloadable
from roll_ckpt.formats.torch_zip.unpickler import Unpickler, named


def parse(buffer: Any, path: str, map_location: Any = "cpu", allow: Iterable[Any] = ()) -> Any:
    """Rebuild the state from the bytes of a file; tensors on the CPU are views of `buffer`.

    `buffer` is writable memory (buffer protocol) that holds the whole file; `path` names that file in messages.
    `map_location` is that of torch.load. No code of the file runs, except that of the objects in `allow`, which are
    trusted; `unpickler` says what is taken besides.

    Raises:
        Damaged: neither torch nor this layout writes such an archive or pickle; the message names the file.
        UnsupportedError: the pickle holds objects that are not allowed; the message names file, entry, objects, and the
            setting that allows them.
    """
    view = memoryview(buffer).cast("B")
    records = read_directory(view, path)
    if "byteorder" in records and bytes(_slice(view, records["byteorder"])) != sys.byteorder.encode():
        raise Damaged(f"{path}: written on a machine of the other byte order; load it there and save it anew")
    if "data.pkl" not in records:
        raise Damaged(f"{path}: refused to load: it has no data.pkl")
    storages = _Storages(buffer, path, records, torch.serialization._get_restore_location(map_location))
    data, allowed = bytes(_slice(view, records["data.pkl"])), named(allow)
    try:
        with torch.sparse.check_sparse_tensor_invariants():
            state = Unpickler(data, storages.load, allowed, len(view)).load()
            torch._utils._validate_loaded_sparse_tensors()
            return state
    except Damaged:
        raise
    except Unsupported as problem:
        raise _refusal(path, problem, data, allowed) from problem
    except Exception as problem:  # bytes that no pickler wrote can raise anything
        raise Damaged(f"{path}: refused to load: {type(problem).__name__}: {problem}") from problem
    finally:
        torch._utils._sparse_tensors_to_validate.clear()


def _refusal(path: str, problem: Unsupported, data: bytes, allowed: Mapping[str, Any]) -> RollCkptError:
    """The error for a pickle of which a load has refused `problem`: Damaged if it could not be loaded anyway."""
    try:
        found = unloadable(data, allowed)
    except Exception as damage:  # bytes that no pickler wrote can raise anything
        return Damaged(f"{path}: refused to load: it refers to {problem.what}, and {type(damage).__name__}: {damage}")
    if not found:
        found = {"": Unloadable([problem.what], []) if problem.is_name else Unloadable([], [problem.what])}
    entries = "; ".join(f"{f'its entry {key!r}' if key else 'it'} holds {told}" for key, told in found.items())
    advice = ""
    if allow := setting(found.values()):
        advice += f"; a load runs no code of a file. If you trust this one, set {allow}"
    if any(told.reasons for told in found.values()):
        advice += (
            "; no setting allows all of that. If you trust the file, load it with torch.load(weights_only=False), and "
            "save plain values and tensors in place of that"
        )
    return UnsupportedError(f"{path}: {entries}, which a safe load refuses{advice}")


@dataclass
class _Storages:
    """The storages of an archive as views of `buffer`, each created when the pickle first refers to it."""

    buffer: Any
    path: str
    records: dict[str, tuple[int, int]]
    restore: Callable[[torch.UntypedStorage, Any], Any]
    """Moves a storage that was saved on a device to where `map_location` says."""
    _by_key: dict[str, Any] = field(default_factory=dict)

    def load(self, persistent_id: Any) -> Any:
        """The storage that a persistent id stands for."""
        if type(persistent_id) is not tuple or len(persistent_id) != 5 or persistent_id[0] != "storage":
            raise Damaged(f"{self.path}: it refers to something else than a storage")
        _, kind, key, location, numel = persistent_id
        if type(key) is not str or type(location) is not str or type(numel) is not int:
            raise Damaged(f"{self.path}: a storage has no name, place or size")
        if key not in self._by_key:
            if kind is torch.UntypedStorage:
                dtype = torch.uint8
            elif isinstance(kind, torch.serialization.StorageType):
                dtype = kind.dtype
            else:
                raise Damaged(f"{self.path}: storage {key} is of no kind of storage")
            start, nbytes = self.records[f"data/{key}"]
            needed = numel * dtype.itemsize
            if nbytes != needed:
                raise Damaged(f"{self.path}: storage {key} has {nbytes} bytes, its tensors need {needed}")
            raw = torch.UntypedStorage(0)
            if nbytes:
                raw = torch.frombuffer(self.buffer, dtype=torch.uint8, count=nbytes, offset=start).untyped_storage()
            restored = self.restore(raw, location)
            self._by_key[key] = torch.storage.TypedStorage(wrap_storage=restored, dtype=dtype, _internal=True)
        return self._by_key[key]


def _slice(view: memoryview, record: tuple[int, int]) -> memoryview:
    return view[record[0] : record[0] + record[1]]


def read_directory(view: memoryview, path: str) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of each record, by its name without the archive's folder.

    Raises:
        Damaged: torch does not write such an archive: records are compressed, overlap, share a name (torch's own reader
            ignores case), or reach past the end of the file.
    """
    tail_at = max(0, len(view) - (1 << 16))
    end = bytes(view[tail_at:]).rfind(b"PK\x05\x06")
    if end < 0 or tail_at + end + 22 != len(view):
        raise Damaged(f"{path}: no zip directory at its end; the file is truncated or not a checkpoint")
    try:
        entries = list(_directory_entries(view, tail_at + end, path))
    except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as problem:
        raise Damaged(f"{path}: its zip directory cannot be read: {problem}") from problem
    if len({name.partition("/")[2].lower() for name, *_ in entries}) < len(entries):
        raise Damaged(f"{path}: two of its records have one name")
    end_before = 0
    for name, header_at, start, nbytes in sorted(entries, key=lambda entry: entry[1]):
        if header_at < end_before:
            raise Damaged(f"{path}: record {name} overlaps another one")
        end_before = start + nbytes
    return {name.partition("/")[2]: (start, nbytes) for name, _, start, nbytes in entries}


def _directory_entries(view: memoryview, end: int, path: str) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset of the header, offset of the first byte, and size of each record."""
    count, _, at = struct.unpack_from("<H2I", view, end + 10)
    if end >= 20 and bytes(view[end - 20 : end - 16]) == b"PK\x06\x07":
        (zip64_end,) = struct.unpack_from("<Q", view, end - 12)
        count, _, at = struct.unpack_from("<3Q", view, zip64_end + 32)
    for _ in range(count):
        if bytes(view[at : at + 4]) != b"PK\x01\x02":
            raise Damaged(f"{path}: its zip directory is broken at byte {at}")
        (method,) = struct.unpack_from("<H", view, at + 10)
        stored, nbytes, name_len, extra_len, comment_len = struct.unpack_from("<2I3H", view, at + 20)
        (header_at,) = struct.unpack_from("<I", view, at + 42)
        name = bytes(view[at + 46 : at + 46 + name_len]).decode()
        extra = bytes(view[at + 46 + name_len : at + 46 + name_len + extra_len])
        zip64_values = _zip64_values(extra)
        nbytes = zip64_values.pop(0) if nbytes == ZIP64_LIMIT else nbytes
        stored = zip64_values.pop(0) if stored == ZIP64_LIMIT else stored
        header_at = zip64_values.pop(0) if header_at == ZIP64_LIMIT else header_at
        if method != 0 or stored != nbytes:
            raise Damaged(f"{path}: record {name} is compressed; torch never writes that")
        if bytes(view[header_at : header_at + 4]) != b"PK\x03\x04":
            raise Damaged(f"{path}: record {name} has no header at byte {header_at}")
        local_name, local_extra = struct.unpack_from("<2H", view, header_at + 26)
        start = header_at + 30 + local_name + local_extra
        if start + nbytes > len(view):
            raise Damaged(f"{path}: record {name} reaches past the end of the file")
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
