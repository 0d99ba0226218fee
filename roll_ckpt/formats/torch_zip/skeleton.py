"""The skeleton of a state: its pickle, with a mark in the place of every tensor and storage.

The skeleton depends on the Python objects of a state and is pickled anew at every save. The opcodes that replace a
mark (a fragment) depend only on the dtype, shape and place in the file of a tensor, and are reused at the next save.
`splice` joins the two: the result is what `torch.save` would pickle, except for the numbering of the memo.
"""

from __future__ import annotations

import io
import os
import pickle
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from roll_ckpt.errors import SaveFailed

Marked: TypeAlias = "torch.Tensor | torch.UntypedStorage | torch.storage.TypedStorage"
_Tensor, _STRIDED = torch.Tensor, torch.strided  # module globals, because each save looks them up thousands of times
NO_TENSORS = frozenset([int, float, str, bool, bytes, type(None)])
_PLAIN = NO_TENSORS | {tuple, list, dict}
"""The types of most objects that a pickler asks about; random states alone are thousands of numbers."""
_MARK = int.from_bytes(os.urandom(15) + b"\x5a", "little")  # random, so that no state holds this number
_MARK_OPCODES = b"\x8a\x10" + _MARK.to_bytes(16, "little") + b"Q"  # LONG1, BINPERSID
MEMO_RESERVED = 64
"""The number of memo entries that fragments may use by default."""


def is_plain(obj: object) -> bool:
    """Whether `torch.save` pickles `obj` as a tensor of dtype, shape, strides and a storage, and nothing else."""
    return type(obj) is _Tensor and not (
        obj.__dict__  # torch pickles a tensor with attributes in another way
        or obj.layout is not _STRIDED
        or obj.is_quantized
        or obj.is_meta
        or obj.is_conj()
        or obj.is_neg()
        or obj.is_nested
    )


@dataclass(frozen=True)
class Skeleton:
    """A pickle (protocol 2) with marks, the objects that its marks stand for in order, and the kinds of all others.

    `wrapped` are the tensors that pickle themselves around such an object, as a Parameter does around its `data`.

    The first `reserved` entries of the memo are left to the fragments. Loading two states with equal `kinds` needs the
    same names, except for objects that pickle themselves as a name.
    """

    data: bytes
    marked: tuple[Marked, ...]
    kinds: frozenset[Any]
    reserved: int
    wrapped: tuple[torch.Tensor, ...] = ()


def skeleton_of(state: object, reserved: int = MEMO_RESERVED) -> Skeleton:
    """Pickle `state` on the calling thread, without reading a tensor."""
    buffer = io.BytesIO()
    walker = _Walker(buffer)
    walker.dump([[] for _ in range(reserved)])  # occupies the first entries of the memo
    buffer.seek(0)
    buffer.truncate()
    walker.dump(state)
    return Skeleton(buffer.getvalue(), tuple(walker.marked), frozenset(walker.kinds), reserved, tuple(walker.wrapped))


def walk(state: object, skipped: Callable[[object], bool]) -> Skeleton:
    """What `skeleton_of` returns, but for objects that are `skipped`: a mark that stands for nothing replaces them."""
    buffer = io.BytesIO()
    walker = _Skipping(buffer)
    walker.skipped = skipped
    walker.dump(state)
    return Skeleton(buffer.getvalue(), tuple(walker.marked), frozenset(walker.kinds), 0)


def splice(data: bytes, fragments: Sequence[bytes]) -> bytes:
    """The pickle `data` of a skeleton, with `fragments` in the places of its marks."""
    parts = data.split(_MARK_OPCODES)
    spliced = [b""] * (len(parts) + len(fragments))
    spliced[::2], spliced[1::2] = parts, fragments
    return b"".join(spliced)


class _Walker(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.marked: list[Marked] = []
        self.wrapped: list[torch.Tensor] = []
        self.kinds: set[Any] = set()

    def persistent_id(self, obj: object) -> Any:
        kind = type(obj)
        if kind in _PLAIN:
            return None
        if kind is _Tensor and is_plain(obj):
            self.marked.append(obj)  # type: ignore[arg-type]
            return _MARK
        if isinstance(obj, torch.UntypedStorage | torch.storage.TypedStorage):
            self.marked.append(obj)
            return _MARK
        if isinstance(obj, _Tensor):
            self.wrapped.append(obj)
        is_name = isinstance(obj, type | types.FunctionType | types.BuiltinFunctionType | torch.dtype)
        self.kinds.add(obj if is_name else kind)
        return None


class _Skipping(_Walker):
    skipped: Callable[[object], bool]

    def persistent_id(self, obj: object) -> Any:
        return _MARK if self.skipped(obj) else super().persistent_id(obj)


_GET, _LONG_GET, _PUT, _LONG_PUT = b"h", b"j", b"q", b"r"
_NEW_DTYPES = frozenset(torch.storage._new_dtypes())
_STORAGE_NAMES: dict[torch.dtype, str] = dict(torch.storage._dtype_to_storage_type_map())


def check_dtype(dtype: torch.dtype) -> None:
    """SaveFailed if no file of `torch.save` can hold tensors of `dtype`: it has no name for their storage."""
    if dtype not in _NEW_DTYPES and dtype not in _STORAGE_NAMES:
        raise SaveFailed(f"a tensor of {dtype} cannot be saved, by torch.save neither; save `tensor.view(torch.uint8)`")


class MemoFull(Exception):
    """The fragments of a state need more memo entries than its skeleton reserves."""


@dataclass
class Fragments:
    """Writes the opcodes that replace marks, in the order of the marks: later ones refer to the memo of earlier ones.

    Every method may raise MemoFull.
    """

    reserved: int
    _memo: dict[object, int] = field(default_factory=dict)

    def tensor(self, tensor: torch.Tensor, storage: bytes, offset: int, *, again: bool) -> bytes:
        """The opcodes of what `Tensor.__reduce_ex__` returns for a plain tensor.

        `storage` is the fragment of its storage, `offset` its first element in that. `again`: the same object occurs
        in the state once more, see `same`.
        """
        is_new = tensor.dtype in _NEW_DTYPES
        rebuild = b"ctorch._utils\n_rebuild_tensor_v3\n" if is_new else b"ctorch._utils\n_rebuild_tensor_v2\n"
        opcodes = b"".join(
            [
                *(self._once(rebuild), b"(", storage, _integer(offset)),
                *(_tuple(tensor.size()), _tuple(tensor.stride()), b"\x88" if tensor.requires_grad else b"\x89"),
                *(self._once(b"ccollections\nOrderedDict\n"), b")R"),
                *([self._once(_named(torch, str(tensor.dtype).removeprefix("torch.")))] if is_new else []),
                b"tR",
            ]
        )
        return opcodes + self._put(id(tensor)) if again else opcodes

    def storage_of(self, dtype: torch.dtype, key: str, location: str, nbytes: int) -> bytes:
        """The persistent id of a tensor's storage of `nbytes` bytes."""
        if dtype in _NEW_DTYPES:
            return self.storage("torch.storage", "UntypedStorage", key, location, nbytes)
        check_dtype(dtype)
        return self.storage("torch", _STORAGE_NAMES[dtype], key, location, nbytes // dtype.itemsize)

    def storage(self, module: str, kind: str, key: str, location: str, numel: int) -> bytes:
        """The persistent id that `torch.save` gives a storage of `numel` elements."""
        return b"".join(
            [
                *(b"(", self._once(_text("storage")), self._once(f"c{module}\n{kind}\n".encode())),
                *(_text(key), self._once(_text(location)), _integer(numel), b"tQ"),
            ]
        )

    def same(self, tensor: torch.Tensor) -> bytes:
        """A reference to a tensor object that was written before, with `again`."""
        return self._get(self._memo[id(tensor)])

    def _once(self, opcodes: bytes) -> bytes:
        if opcodes in self._memo:
            return self._get(self._memo[opcodes])
        return opcodes + self._put(opcodes)

    def _put(self, key: object) -> bytes:
        number = self._memo[key] = len(self._memo)
        if number >= self.reserved:
            raise MemoFull(f"more than the {self.reserved} memo entries that the skeleton reserves")
        return _PUT + bytes([number]) if number < 256 else _LONG_PUT + number.to_bytes(4, "little")

    @staticmethod
    def _get(number: int) -> bytes:
        return _GET + bytes([number]) if number < 256 else _LONG_GET + number.to_bytes(4, "little")


def _named(module: types.ModuleType, name: str) -> bytes:
    return f"c{module.__name__}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _integer(number: int) -> bytes:
    if 0 <= number < 1 << 8:
        return b"K" + number.to_bytes(1, "little")
    if 0 <= number < 1 << 16:
        return b"M" + number.to_bytes(2, "little")
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + number.to_bytes(4, "little", signed=True)
    encoded = pickle.encode_long(number)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _tuple(numbers: Iterable[int]) -> bytes:
    items = [_integer(number) for number in numbers]
    if not items:
        return b")"
    if len(items) <= 3:
        return b"".join(items) + (b"\x85", b"\x86", b"\x87")[len(items) - 1]
    return b"(" + b"".join(items) + b"t"
