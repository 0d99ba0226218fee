"""Megatron's save plan: which of this rank's files holds which part of a state, for all saves of one structure.

Megatron plans who writes what; see `strategy.SaveStrategy.planned_by_stock`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from roll_ckpt.backends.megatron import version
from roll_ckpt.backends.megatron.index import StateIndex
from roll_ckpt.formats.dcp import items as dcp
from roll_ckpt.formats.dcp.items import FileTemplate, Span
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.tensor_index.meanings import FileTensors
from roll_ckpt.formats.torch_zip import layout, sources
from roll_ckpt.formats.torch_zip.skeleton import is_plain


@dataclass(frozen=True)
class PlannedFile:
    """A file of this rank: a template that tensors fill, and behind it a slot for each pickled item."""

    name: str
    template: FileTemplate
    tensors: tuple[int, ...]
    """Indices into `Prepared.parts` of the tensors that fill the template, in its order."""
    objects: tuple[tuple[int, ...], ...]
    """For each pickled item, the indices into `Prepared.parts` of what it holds."""
    slots: tuple[Span, ...]
    index: FileTensors
    """Where in the file each pickled item lies."""

    def image(self, parts: Sequence[Any], objects: Iterator[FileImage], lifetime_of: sources.LifetimeOf) -> FileImage:
        """The file as one save writes it. Takes as many of `objects`, the pickled items, as it has slots."""
        tensors = self.template.fill((parts[index].data for index in self.tensors), lifetime_of)
        slotted = [(slot, next(objects)) for slot in self.slots]
        joined = dcp.join([(Span(0, tensors.nbytes), tensors), *slotted])
        return replace(joined, tensors=self.index)


@dataclass(frozen=True)
class Plan:
    """This rank's share of what Megatron planned in one save, for every later save of the same structure.

    Holds no tensor.
    """

    name: str
    """The path of the checkpoint for which it was planned; the same on every rank."""
    structure: list[Any]
    """`structure_of` each part of the state for which it was planned."""
    files: tuple[PlannedFile, ...]
    metadata: bytes
    """The bytes of `.metadata` on the coordinator, empty on other ranks."""

    @property
    def slots(self) -> list[Span]:
        """The slots of all files, in their order."""
        return [slot for file in self.files for slot in file.slots]

    def pickled(self, parts: Sequence[Any]) -> list[FileImage]:
        """What the slots hold in one save, in their order; larger than its slot is an item that has grown too much."""
        return [
            _pickled([parts[index] for index in indices], slot.length)
            for file in self.files
            for indices, slot in zip(file.objects, file.slots, strict=True)
        ]


def plan_file(
    name: str, items: Sequence[Any], parts: Sequence[Any], index: StateIndex
) -> tuple[PlannedFile, list[WriteResult]]:
    """Lay out one file: `items` are DCP's write items that Megatron planned for it, `parts` are `Prepared.parts`.

    Returns the file, and for each item where it lies, as DCP records it in `.metadata`.
    """
    by_item = _indices_by_item(parts)
    tensors: list[tuple[Any, int]] = []
    objects: list[tuple[Any, tuple[int, ...]]] = []
    for item in items:
        offset = None if item.type is WriteItemType.BYTE_IO else tuple(item.index.offset or ())
        indices = by_item[item.index.fqn, offset]
        if offset is not None and is_plain(parts[indices[0]].data.detach()):
            tensors.append((item, indices[0]))
        else:
            objects.append((item, tuple(indices)))
    template, spans = dcp.template((item.index.fqn, _shaped(parts[place])) for item, place in tensors)
    slots: list[Span] = []
    end = template.image.nbytes
    for _, group in objects:
        slots.append(dcp.place(end, _slot_bytes(_pickled([parts[place] for place in group]).nbytes)))
        end = slots[-1].end
    file_index = FileTensors(template.image.pieces, index.in_order([parts[place] for _, place in tensors]))
    places = tuple(place for _, place in tensors), tuple(group for _, group in objects)
    file = PlannedFile(name, template, *places, tuple(slots), file_index)
    planned = [item for item, _ in (*tensors, *objects)]
    results = [
        WriteResult(item.index, span.length, _StorageInfo(name, span.offset, span.length))
        for item, span in zip(planned, (*spans, *slots), strict=True)
    ]
    return file, results


def _indices_by_item(parts: Sequence[Any]) -> dict[tuple[str, Any], list[int]]:
    """The indices of the parts that this rank writes, by key and offset.

    A key alone does not identify a tensor's part: one rank may write several pieces of a tensor. Objects have None for
    the offset.
    """
    by_item: dict[tuple[str, Any], list[int]] = {}
    for index, part in enumerate(parts):
        if is_main_replica(part.replica_id):  # the strategy has distributed the writing by changing `replica_id`
            if isinstance(part, ShardedObject):
                by_item.setdefault((part.unique_key, None), []).append(index)
            else:
                by_item.setdefault((part.key, _offset(part)), []).append(index)
    return by_item


def _offset(part: Any) -> tuple[int, ...]:
    """The offset of the item that Megatron makes of a tensor's part."""
    elements = version.flattened(part)
    return tuple(part.global_offset) if elements is None else (*part.local_chunk_offset_in_global(), elements.start)


def _shaped(part: Any) -> torch.Tensor:
    """The tensor in the shape in which Megatron stores it: with the leading axes that only the global shape has.

    In front of the elements of a flattened part stand as many axes as that shape has.
    """
    data: torch.Tensor = part.data.detach().contiguous()
    if version.flattened(part) is not None:
        return data.reshape((1,) * len(part.global_shape) + (-1,))
    return data.reshape((1,) * part.prepend_axis_num + tuple(part.local_shape))


def structure_of(part: Any) -> tuple[Any, ...]:
    """Everything about a part of a state that determines the plan and the layout of its tensor."""
    if isinstance(part, ShardedObject):
        return part.key, part.global_shape, part.global_offset, part.replica_id
    return (
        *(part.key, part.dtype, part.local_shape, part.global_shape, part.global_offset, part.replica_id),
        *(part.axis_fragmentations, part.prepend_axis_num, part.allow_shape_mismatch, version.flattened(part)),
        *(type(part.data), None if part.data is None else part.data.device),
    )


def main_bytes(part: Any) -> int:
    """About how many bytes of a part the job writes, counted on the rank that holds its main replica; 0 elsewhere."""
    if not isinstance(part, ShardedTensor) or not is_main_replica(part.replica_id):
        return 0
    elements = version.flattened(part)
    count: int = math.prod(part.local_shape) if elements is None else elements.stop - elements.start
    return count * int(part.dtype.itemsize)


def _pickled(parts: Sequence[Any], at_least: int = 0) -> FileImage:
    """One pickled item, an archive of at least `at_least` bytes.

    It holds a list of objects, as Megatron's files do, or one tensor that is no plain `torch.Tensor`.
    """
    is_tensor = isinstance(parts[0], ShardedTensor)
    value = parts[0].data.detach() if is_tensor else [part.data for part in parts]
    return replace(layout.lay_out(value, dcp.ARCHIVE, at_least=at_least, root=parts[0].key), pieces=())


def _slot_bytes(nbytes: int) -> int:
    """The size of the slot for a pickled item of `nbytes`: it may grow a little before the ranks must plan again."""
    return (nbytes + nbytes // 4 + 1024) // 64 * 64


def metadata_bytes(metadata: Any, gathered: Sequence[Sequence[WriteResult]]) -> bytes:
    """The bytes that DCP's writer puts into `.metadata`, without the path and the name of one save."""
    metadata.version = getattr(dcp_filesystem, "CURRENT_DCP_VERSION", None)
    metadata.storage_data = {result.index: result.storage_data for results in gathered for result in results}
    metadata.storage_meta = StorageMeta()
    return pickle.dumps(metadata)
