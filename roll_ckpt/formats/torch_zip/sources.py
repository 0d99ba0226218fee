"""The `torch_zip` layout: the bytes that `torch.save` would write, and views of the bytes it wrote.

The format is that of `torch.serialization` (zip, stored records, `data.pkl` by pickle protocol 2 with storages
as persistent ids). Four things differ from a stock file, none visible to a reader: large records start at
multiples of 4096, so that direct I/O and views are aligned; a storage holds only the bytes that the saved
tensors show, never the rest of a flat buffer; zeros may follow the pickle in its record, so that it may grow; and
`.format_version` is left out, because it promises offsets that follow from a constant alignment.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from roll_ckpt.errors import SaveFailed
from roll_ckpt.formats.image import Memory
from roll_ckpt.formats.torch_zip.skeleton import NO_TENSORS, Marked, is_plain
from roll_ckpt.native.image import Lifetime

LifetimeOf = Callable[[torch.UntypedStorage], Lifetime | bool]


@dataclass(eq=False)
class Piece:
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
            raise SaveFailed(
                f"two tensors of the state view the same data as different types, {self.dtype} and {dtype}; "
                "the file format cannot hold that: clone one of them"
            )
        self.dtype = dtype


def source_of(tensor: torch.Tensor, nbytes: int, lifetime_of: LifetimeOf) -> tuple[Memory, Lifetime | bool]:
    """The memory of a contiguous tensor of `nbytes` bytes, and how long it is stable.

    Raises:
        SaveFailed: its memory was freed.
    """
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr()
    if start + nbytes > storage.nbytes():
        raise freed(tensor, start + nbytes, storage)
    return memory_of(storage, start, start + nbytes), lifetime_of(storage)


def freed(tensor: torch.Tensor, needed: int, storage: torch.UntypedStorage) -> SaveFailed:
    return SaveFailed(
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


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
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


def untyped(obj: Marked) -> torch.UntypedStorage:
    if isinstance(obj, torch.Tensor):
        return obj.untyped_storage()
    return obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj


def named_tensors(state: object) -> list[tuple[str, torch.Tensor]]:
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


def tensor_names(state: object) -> list[tuple[Any, ...]]:
    """Which name has which tensor, as far as the index of a file tells them apart."""
    named = named_tensors(state)
    numbers: dict[int, int] = {}
    return [
        (name, tensor.dtype, tensor.shape, tensor.storage_offset(), numbers.setdefault(_identity(tensor), len(numbers)))
        for name, tensor in named
        if type(tensor) is torch.nn.Parameter or is_plain(tensor)
    ]


def _identity(tensor: torch.Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity


Signature = list[tuple[Any, ...]]
DEVICE, CPU = -1, torch.device("cpu")


def look_at(marked: Iterable[Marked]) -> tuple[Signature, list[torch.UntypedStorage]]:
    """All that a file's structure has from its tensors and storages; and their storages, each once."""
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
        elif (before := first.setdefault(id(obj), place)) < place:
            signature.append((before,))
        else:
            signature.append(
                (number, obj.dtype, obj.shape, obj.stride(), obj.storage_offset(), obj.requires_grad, obj.device)
            )
    return signature, storages


Runs = list[list[Piece]]


def runs_of(marked: Iterable[Marked], storages: list[torch.UntypedStorage]) -> Runs:
    """The pieces of each storage, cut to what its tensors show.

    Tensors that overlap in one storage share a piece, as they must to share memory after loading; neighbours
    that do not overlap get pieces of their own.
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


def piece_of(runs: list[Piece], start: int) -> Piece:
    return runs[bisect.bisect_right(runs, start, key=lambda piece: piece.start) - 1]


def location_of(storage: torch.UntypedStorage) -> str:
    return "cpu" if storage.device.type == "cpu" else torch.serialization.location_tag(storage)
