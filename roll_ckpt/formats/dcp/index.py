"""The index (`.metadata`) of a `torch_dist` directory, read without running code of the file.

torch's `FileSystemReader` unpickles the index and each pickled object without any restriction. Call `read` and
`check_objects` before stock code loads such a directory: what they accept, it loads without running anything else.

Format: torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from roll_ckpt import names
from roll_ckpt.disk import reads, tree
from roll_ckpt.errors import Damaged, NotFound, UnsupportedError
from roll_ckpt.formats.torch_zip.hash_guard import HashGuard
from roll_ckpt.formats.torch_zip.making import Unsupported
from roll_ckpt.formats.torch_zip.read import parse

INDEX = ".metadata"


def _enum_member(kind: object, name: object) -> enum.Enum:
    """`getattr` for members of enumerations only: Python 3.11.0 to 3.11.3 pickle them as such a call."""
    if not (
        isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(name, str) and name in kind.__members__
    ):
        raise pickle.UnpicklingError("it looks up an attribute that is no member of an enumeration")
    return kind[name]


@dataclasses.dataclass
class _MegatronIndex(Metadata):
    """How Megatron-core 0.15 extends the index; later versions have a class of that name that only takes attributes."""

    mcore_data: Any = None


@dataclasses.dataclass(frozen=True)
class _MegatronPlan(planner.SavePlan):
    """How Megatron-core 0.14 and 0.15 extend a plan, of which an index may keep those of all ranks."""

    mcore_data: Any = None


_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"

_MODULES = {module.__name__: module for module in (metadata, planner, filesystem)}
_PLAIN = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # only looks a layout up by its name
    ("pathlib", "PosixPath"): Path,
    ("pathlib._local", "PosixPath"): Path,  # Python 3.13
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("builtins", "getattr"): _enum_member,
    (_MEGATRON, "MCoreMetadata"): _MegatronIndex,
    (_MEGATRON, "MCoreSavePlan"): _MegatronPlan,
}


Read = Callable[[Path, int, int], bytes]
"""Reads so many bytes of a file from an offset on, or to its end if they are -1."""


def read_unchecked(path: Path, offset: int = 0, nbytes: int = -1) -> bytes:
    """The `Read` for files that have no digests."""
    return reads.read_range(path, offset, nbytes) if nbytes >= 0 else reads.read_bytes(path, reads.OBJECT_BYTES)


def read(directory: Path, allow: Iterable[type] = (), read: Read = read_unchecked) -> Metadata:
    """The index of `directory`. Beside torch's own records it may hold objects of the classes in `allow`.

    Raises:
        NotFound: the directory has no index.
        Damaged: the index is truncated, or refers to files outside of `directory` or to bytes beyond their ends.
        UnsupportedError: it names classes that no index needs. None of its code has run.
    """
    path = directory / INDEX
    if not tree.exists(path):
        raise NotFound(f"{directory}: no complete checkpoint: it has no {INDEX}")
    try:
        index = _Unpickler(read(path, 0, -1), allow).load()
    except Unsupported as problem:
        raise UnsupportedError(
            f"{path}: it names {problem.what}, which no index needs; if you trust the file, set load.allow: "
            f"[{problem.what}]"
        ) from problem
    except Damaged:
        raise
    except pickle.UnpicklingError as problem:
        raise Damaged(f"{path}: refused: {problem}") from problem
    except Exception as problem:  # unpickling damaged bytes can raise anything
        raise Damaged(
            f"{path}: cannot be read, it is truncated or damaged: {type(problem).__name__}: {problem}"
        ) from problem
    if not isinstance(index, Metadata) or not all(
        isinstance(getattr(index, part, None), dict) for part in ("state_dict_metadata", "storage_data")
    ):
        raise Damaged(f"{path}: holds {type(index).__name__}, which is no index of a checkpoint")
    try:
        _check_tables(path, index)
    except (AttributeError, TypeError) as problem:  # pickle creates records without calling their constructors
        raise Damaged(f"{path}: a record in it is incomplete: {problem}") from problem
    _check_places(directory, index)
    return index


_STOCK: dict[int, Any] = pickle._Unpickler.dispatch
_NOT_IN_AN_INDEX = (
    *(pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.DICT),
)
"""Opcodes that no index needs; some allocate memory by nothing but a number in the file."""

_HASHED = {
    pickle.REDUCE: slice(-1, None),
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(None, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}
"""Which values on the stack an opcode hashes, or hands to a call that may."""


def _load_hashing(opcode: bytes, unpickler: _Unpickler) -> None:
    unpickler.check_hashed(opcode)
    _STOCK[opcode[0]](unpickler)


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python, because the one in C has no hook before it sets attributes."""

    stack: list[Any]
    memo: dict[int, Any]

    def __init__(self, data: bytes, allow: Iterable[type]) -> None:
        super().__init__(io.BytesIO(data))
        self._nbytes = len(data)
        self._hash_guard = HashGuard(len(data))
        self._allow = {(kind.__module__, kind.__qualname__): kind for kind in allow}

    def find_class(self, module: str, name: str) -> Any:
        allowed = _PLAIN.get((module, name)) or self._allow.get((module, name))
        if allowed is not None:
            return allowed
        if module == "torch" and isinstance(
            getattr(torch, name, None), torch.dtype | torch.layout | torch.memory_format
        ):
            return getattr(torch, name)
        kind = getattr(_MODULES.get(module), name, None)
        if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, enum.Enum)):
            return kind
        raise Unsupported(f"{module}.{name}", is_name=True)

    def load_build(self) -> None:
        """Set attributes of a record. Setting those of a class, a function or a member of an enumeration is refused,
        because it would change this process."""
        kind = type(self.stack[-2])
        if not dataclasses.is_dataclass(kind) and kind not in self._allow.values():
            raise pickle.UnpicklingError(f"it sets attributes of {self.stack[-2]!r}, which is not a record of an index")
        _STOCK[pickle.BUILD[0]](self)

    def load_put(self) -> None:
        """Store an object in the memo. A number beyond the file's length is refused, because the unpickler in C, which
        stock code uses, would allocate memory for all numbers below it."""
        _STOCK[pickle.LONG_BINPUT[0]](self)
        if next(reversed(self.memo)) > self._nbytes:  # the newest key
            raise pickle.UnpicklingError("it numbers an object beyond its own length")

    def check_hashed(self, opcode: bytes) -> None:
        """Check the values that an opcode is about to hash; see HashGuard.check."""
        self._hash_guard.check(self.stack[_HASHED[opcode]])

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: load for code, load in _STOCK.items() if bytes([code]) not in (*_NOT_IN_AN_INDEX, pickle.PUT)},
        pickle.BUILD[0]: load_build,
        pickle.LONG_BINPUT[0]: load_put,
        **{opcode[0]: partial(_load_hashing, opcode) for opcode in _HASHED},
    }


def _check_tables(path: Path, index: Metadata) -> None:
    for key, kind in index.state_dict_metadata.items():
        if not isinstance(key, str):
            raise Damaged(f"{path}: it describes an object without a name")
        if not isinstance(kind, BytesStorageMetadata) and not _is_tensor(kind):
            raise Damaged(f"{path}: {key}: neither an object nor a tensor whose parts lie within its shape")
    keys: Iterable[Any] = index.storage_data  # torch annotates narrower types, but the file may hold anything
    if not all(isinstance(key, MetadataIndex) and isinstance(key.fqn, str) for key in keys):
        raise Damaged(f"{path}: it holds the place of an object without a name")


def _is_tensor(kind: object) -> bool:
    """Whether `kind` describes a tensor and its parts, all of which lie within its shape."""
    return (
        isinstance(kind, TensorStorageMetadata)
        and isinstance(kind.properties, TensorProperties)
        and isinstance(kind.properties.dtype, torch.dtype)
        and isinstance(kind.size, torch.Size)
        and isinstance(kind.chunks, list)
        and all(isinstance(chunk, ChunkStorageMetadata) and _is_within(chunk, kind.size) for chunk in kind.chunks)
    )


def _is_within(chunk: Any, size: torch.Size) -> bool:
    if not isinstance(chunk.offsets, torch.Size) or not isinstance(chunk.sizes, torch.Size):
        return False
    return len(chunk.offsets) == len(chunk.sizes) == len(size) and all(
        0 <= first <= first + count <= whole
        for first, count, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
    )


def _check_places(directory: Path, index: Metadata) -> None:
    sizes: dict[str, int] = {}
    for key, place in index.storage_data.items():
        where = f"{directory / INDEX}: {getattr(key, 'fqn', key)}"
        try:
            file, offset, length = names.check_relative(place.relative_path), place.offset, place.length
            if "/" in file:
                raise ValueError("its file lies in another directory")
            if not isinstance(offset, int) or not isinstance(length, int):
                raise ValueError("offset or length is not an integer")
        except (AttributeError, TypeError, ValueError) as problem:
            raise Damaged(f"{where}: its place is refused: {problem}") from problem
        if file not in sizes:
            if not tree.is_file(directory / file, follow=True):
                raise Damaged(f"{where}: its file {file} does not exist or is no regular file")
            sizes[file] = tree.file_bytes(directory / file, follow=True)
        if not 0 <= offset <= offset + length <= sizes[file]:
            raise Damaged(f"{where}: lies beyond the end of {file}, which was cut off")


def check_objects(
    directory: Path,
    index: Metadata,
    allow: Iterable[Any] = (),
    read: Read = read_unchecked,
    *,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Parse each `parts`-th pickled object of `directory`, from number `part` on, as `torch_zip.read.parse` does.

    With `parts` ranks, each checks its own `part`. What is taken, stock code loads without running anything else.

    Raises:
        Damaged: an object cannot be parsed, or has no place in any file; the message names it.
        UnsupportedError: an object holds what is not allowed; the message names both. No code of it has run.
    """
    keys = sorted(key for key, kind in index.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata))
    allow = list(allow)
    for key in keys[part::parts]:
        read_object(directory, index, key, allow, read)


def read_object(
    directory: Path, index: Metadata, key: str, allow: Iterable[Any] = (), read: Read = read_unchecked
) -> Any:
    """The pickled object `key` of `directory`; see `check_objects` for the errors."""
    place = index.storage_data.get(MetadataIndex(key))
    if place is None:
        raise Damaged(f"{directory / INDEX}: {key}: it has no place in any file")
    data = read(directory / place.relative_path, place.offset, place.length)
    return parse(bytearray(data), f"{directory / place.relative_path}: the object {key}", allow=allow)


def read_file(path: Path, allow: Iterable[Any] = (), read: Read = read_unchecked) -> Any:
    """The state in the torch file `path`, parsed as `check_objects` parses objects.

    Raises:
        Damaged: it is no file of torch. UnsupportedError: it holds what is not allowed. No code of it has run.
        OSError: the file cannot be read.
    """
    return parse(bytearray(read(path, 0, -1)), str(path), allow=allow)
