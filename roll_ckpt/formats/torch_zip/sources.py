"""The tensors and storages of a state as sources of a file: their memory, names, and the pieces that are written.

A piece is a run of bytes of one storage that the saved tensors show. It becomes one record of the archive; bytes of a
storage that no tensor shows, such as the rest of a flat buffer, are not written.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from roll_ckpt.errors import SaveFailed
from roll_ckpt.formats.image import Memory
from roll_ckpt.formats.torch_zip.skeleton import NO_TENSORS, Marked, skeleton_of
from roll_ckpt.native.image import Lifetime

LifetimeOf = Callable[[torch.UntypedStorage], Lifetime | bool]
"""Tells how long the memory of a storage stays unchanged; False is UNTIL_SAVE_RETURNS, True UNTIL_FENCE."""


@dataclass(eq=False)
class Piece:
    """Bytes `start` to `stop` of one storage, which become one record of the archive.

    `key` is the storage's name in the archive, and `offset` the file offset of its first byte, once they are known.
    """

    start: int
    stop: int
    dtype: torch.dtype | None = None
    key: str | None = None
    offset: int = 0

    def claim(self, dtype: torch.dtype) -> None:
        """Record the dtype of a tensor in this piece. All must have one dtype, because readers cache storages by key.

        Raises:
            SaveFailed: two tensors view the same memory as different dtypes; `torch.save` refuses that, too.
        """
        if self.dtype not in (None, dtype):
            raise SaveFailed(
                f"two tensors of the state view the same data as different types, {self.dtype} and {dtype}; "
                "the file format cannot hold that: clone one of them"
            )
        self.dtype = dtype


def source_of(tensor: torch.Tensor, nbytes: int, lifetime_of: LifetimeOf) -> tuple[Memory, Lifetime | bool]:
    """The memory of a contiguous tensor of `nbytes` bytes, and how long it stays unchanged.

    Raises:
        SaveFailed: the storage is smaller than the tensor: its memory was freed.
    """
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr()
    if start + nbytes > storage.nbytes():
        raise freed(tensor, start + nbytes, storage)
    return memory_of(storage, start, start + nbytes), lifetime_of(storage)


def freed(tensor: torch.Tensor, needed: int, storage: torch.UntypedStorage) -> SaveFailed:
    """The error for a tensor that needs more bytes than its storage has."""
    return SaveFailed(
        f"a tensor of shape {list(tensor.shape)} needs {needed} bytes of a storage that has {storage.nbytes()}: its "
        "memory was freed. Save it while it is gathered"
    )


def memory_of(storage: torch.UntypedStorage, start: int, stop: int) -> Memory:
    """Bytes `start` to `stop` of a storage; a copy if the storage is neither on the CPU nor on a CUDA device."""
    device = storage.device
    if device.type not in ("cpu", "cuda"):
        storage = storage.cpu()
    address, nbytes = storage.data_ptr() + start, stop - start
    if device.type != "cuda":
        return Memory(address, nbytes, storage)
    stream = torch.cuda.current_stream(device).cuda_stream
    return Memory(address, nbytes, storage, device.index or 0, stream)


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that a strided tensor spans, as (first, last plus one)."""
    itemsize = tensor.element_size()
    start = int(tensor.storage_offset()) * itemsize
    if tensor.numel() == 0:
        return start, start
    last: int = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * itemsize


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge spans that overlap; spans that only touch stay apart."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(set(spans)):
        if merged and (start < merged[-1][1] or start == merged[-1][0]):
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def untyped(obj: Marked) -> torch.UntypedStorage:
    """The storage of a tensor or typed storage; an untyped storage itself."""
    if isinstance(obj, torch.Tensor):
        return obj.untyped_storage()
    return obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj


def named_tensors(state: object) -> list[tuple[str, torch.Tensor]]:
    """The tensors in the dicts, lists and tuples of a state, each with the path of keys to it, joined by dots."""
    named: list[tuple[str, torch.Tensor]] = []
    open_containers: set[int] = set()

    def walk(value: object, name: str) -> None:
        items: Iterable[tuple[object, object]]
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        elif isinstance(value, torch.Tensor):
            named.append((name, value))
            return
        else:
            return
        if id(value) in open_containers:  # a container that holds itself
            return
        open_containers.add(id(value))
        prefix = name + "." if name else ""
        for key, inner in items:
            if type(inner) not in NO_TENSORS:
                walk(inner, f"{prefix}{key}")
        open_containers.discard(id(value))

    walk(state, "")
    return named


def tensor_names(state: object) -> list[tuple[Any, ...]]:
    """Which name has which tensor: equal for two states whose files have the same index of tensors."""
    named = named_tensors(state)
    numbers: dict[int, int] = {}
    return [
        (name, tensor.dtype, tensor.shape, tensor.storage_offset(), numbers.setdefault(_identity(tensor), len(numbers)))
        for name, tensor in named
        if is_indexed(tensor)
    ]


def is_indexed(tensor: torch.Tensor) -> bool:
    """Whether the elements of a tensor lie in its storage as they are, by its strides."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not (
        tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.is_meta
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.is_nested
    )


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """About how many bytes `torch.save` writes for `tensors` of any kind; raises for none. No collective."""
    known: dict[int, int] = {}
    others = 0
    for tensor in tensors:
        try:
            address, nbytes = tensor.data_ptr(), tensor.nbytes
            usual = address != 0 and tensor.is_contiguous()
        except Exception:  # a sparse tensor has no memory of its own, and a subclass may raise anything
            usual = False
        if usual:
            known[address] = max(nbytes, known.get(address, 0))
        else:
            others += _pickled_bytes(tensor)
    return sum(known.values()) + others


def _pickled_bytes(value: object) -> int:
    try:
        marked = skeleton_of(value).marked
    except Exception:  # it cannot be saved, which whoever lays it out will say
        return 0
    spans = (span_of(obj) if isinstance(obj, torch.Tensor) else (0, obj.nbytes()) for obj in marked)
    return sum(stop - start for start, stop in spans)


def _identity(tensor: torch.Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity


Signature = list[tuple[Any, ...]]
"""For each marked object of a state, what the structure of the file takes from it; see `signature_of`."""
DEVICE, CPU = -1, torch.device("cpu")


def signature_of(marked: Iterable[Marked]) -> tuple[Signature, list[torch.UntypedStorage]]:
    """What the structure of a file takes from its tensors and storages; and their storages, each once.

    An object that occurs again has a row of one number, the place where it stood first. Other rows begin with the
    number of the storage and end (at DEVICE) with the device.
    """
    signature: Signature = []
    storages: list[torch.UntypedStorage] = []
    numbers: dict[int, int] = {}
    first: dict[int, int] = {}
    for place, obj in enumerate(marked):
        storage = untyped(obj)
        identity = storage._cdata
        number = numbers.setdefault(identity, len(storages))
        if number == len(storages):
            storages.append(storage)
        if not isinstance(obj, torch.Tensor):
            signature.append((number, storage.nbytes(), getattr(obj, "dtype", None), storage.device))
        elif (earlier := first.setdefault(id(obj), place)) < place:
            signature.append((earlier,))
        else:
            signature.append(
                (number, obj.dtype, obj.shape, obj.stride(), obj.storage_offset(), obj.requires_grad, obj.device)
            )
    return signature, storages


Pieces = list[list[Piece]]
"""For each storage of a state its pieces, in order."""


def pieces_of(marked: Iterable[Marked], storages: list[torch.UntypedStorage]) -> Pieces:
    """The pieces of each storage, cut to what its tensors show.

    Tensors that overlap in one storage share a piece, so that they share memory after loading; tensors that only touch
    get pieces of their own.

    Raises:
        SaveFailed: the memory of a tensor was freed.
    """
    spans: dict[int, list[tuple[int, int]]] = {storage._cdata: [] for storage in storages}
    for obj in marked:
        storage = untyped(obj)
        span = span_of(obj) if isinstance(obj, torch.Tensor) else (0, storage.nbytes())
        if span[1] > storage.nbytes():
            assert isinstance(obj, torch.Tensor)
            raise freed(obj, span[1], storage)
        spans[storage._cdata].append(span)
    return [[Piece(start, stop) for start, stop in _merge(spans[storage._cdata])] for storage in storages]


def piece_at(pieces: list[Piece], start: int) -> Piece:
    """The piece of one storage that holds its byte `start`."""
    return pieces[bisect.bisect_right(pieces, start, key=lambda piece: piece.start) - 1]


def location_of(storage: torch.UntypedStorage) -> str:
    """What `torch.save` records as the device of a storage, such as "cpu" or "cuda:0"."""
    return "cpu" if storage.device.type == "cpu" else torch.serialization.location_tag(storage)
