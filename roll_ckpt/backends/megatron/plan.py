"""Who writes what, as stock code planned it, for every later save of the same structure."""

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

from roll_ckpt.formats.dcp import items as dcp
from roll_ckpt.formats.dcp.items import FileTemplate, Span
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.torch_zip import layout, sources
from roll_ckpt.formats.torch_zip.skeleton import is_plain


@dataclass(frozen=True)
class PlannedFile:
    """A file of this rank: a form that tensors fill, and behind it a slot for each pickled object.

    Numbers are places in `Prepared.parts`.
    """

    name: str
    sharding_type: FileTemplate
    tensors: tuple[int, ...]
    objects: tuple[tuple[int, ...], ...]
    slots: tuple[Span, ...]

    def image(self, parts: Sequence[Any], objects: Iterator[FileImage], lifetime_of: sources.LifetimeOf) -> FileImage:
        """The file as it is to be written now; takes its share of `objects`."""
        tensors = self.sharding_type.fill((parts[at].data for at in self.tensors), lifetime_of)
        slotted = [(slot, next(objects)) for slot in self.slots]
        return dcp.join([(Span(0, tensors.nbytes), tensors), *slotted])


@dataclass(frozen=True)
class Plan:
    """Who writes what, as stock code planned it, for every later save of the same structure.

    Each rank holds its own share; all made it in the same save, whose name it bears. Holds no tensor.
    """

    name: str
    structure: list[Any]
    files: tuple[PlannedFile, ...]
    metadata: bytes
    """The bytes of `.metadata`, on the coordinator."""

    @property
    def slots(self) -> list[Span]:
        return [slot for file in self.files for slot in file.slots]

    def pickled(self, parts: Sequence[Any]) -> list[FileImage]:
        """What goes into the slots now; larger than its slot where it has grown too much."""
        return [
            _pickled([parts[at] for at in places], slot.length)
            for file in self.files
            for places, slot in zip(file.objects, file.slots, strict=True)
        ]


def plan_file(name: str, items: Sequence[Any], parts: Sequence[Any]) -> tuple[PlannedFile, list[WriteResult]]:
    """Lay out what stock code wants in one file. Items are told apart by key, and by offset where one rank writes
    several pieces of a tensor."""
    places: dict[tuple[str, Any], list[int]] = {}
    for at, part in enumerate(parts):
        if is_main_replica(part.replica_id):  # as the distribution has left it
            if isinstance(part, ShardedObject):
                places.setdefault((part.unique_key, None), []).append(at)
            else:
                places.setdefault((part.key, tuple(part.global_offset)), []).append(at)
    tensors: list[tuple[Any, int]] = []
    objects: list[tuple[Any, tuple[int, ...]]] = []
    for item in items:
        offset = None if item.type is WriteItemType.BYTE_IO else tuple(item.index.offset or ())
        found = places[item.index.fqn, offset]
        if offset is not None and is_plain(parts[found[0]].data.detach()):
            tensors.append((item, found[0]))
        else:
            objects.append((item, tuple(found)))
    sharding_type, spans = dcp.template((item.index.fqn, _shaped(parts[at])) for item, at in tensors)
    slots: list[Span] = []
    end = sharding_type.image.nbytes
    for _, group in objects:
        slots.append(dcp.place(end, _slot_bytes(_pickled([parts[at] for at in group]).nbytes)))
        end = slots[-1].end
    file = PlannedFile(
        name, sharding_type, tuple(at for _, at in tensors), tuple(found for _, found in objects), tuple(slots)
    )
    planned = [item for item, _ in (*tensors, *objects)]
    results = [
        WriteResult(item.index, span.length, _StorageInfo(name, span.offset, span.length))
        for item, span in zip(planned, (*spans, *slots), strict=True)
    ]
    return file, results


def _shaped(part: Any) -> torch.Tensor:
    """The tensor as stock code stores it: with the axes that the global shape has before it."""
    data: torch.Tensor = part.data.detach().contiguous()
    return data.reshape((1,) * part.prepend_axis_num + tuple(part.local_shape))


def structure_of(part: Any) -> tuple[Any, ...]:
    """Everything about a part of a state that the plan and the layout of its tensor follow from."""
    if isinstance(part, ShardedObject):
        return part.key, part.global_shape, part.global_offset, part.replica_id
    return (
        *(part.key, part.dtype, part.local_shape, part.global_shape, part.global_offset, part.replica_id),
        *(part.axis_fragmentations, part.prepend_axis_num, part.allow_shape_mismatch),
        *(type(part.data), None if part.data is None else part.data.device),
    )


def main_bytes(part: Any) -> int:
    """About what the ranks together write of a part, counted on the rank that Megatron calls its main replica."""
    if not isinstance(part, ShardedTensor) or not is_main_replica(part.replica_id):
        return 0
    nbytes: int = math.prod(part.local_shape) * part.dtype.itemsize
    return nbytes


def _pickled(parts: Sequence[Any], at_least: int = 0) -> FileImage:
    """One item as an archive of its own: a list of objects, as Megatron has them, or a tensor of a class of its own."""
    tensor = isinstance(parts[0], ShardedTensor)
    value = parts[0].data.detach() if tensor else [part.data for part in parts]
    return replace(layout.lay_out(value, dcp.ARCHIVE, at_least=at_least), pieces=())


def _slot_bytes(nbytes: int) -> int:
    """Room for a pickled object, so that it may grow a little before the ranks have to plan again."""
    return (nbytes + nbytes // 4 + 1024) // 64 * 64


def metadata_bytes(metadata: Any, gathered: Sequence[Sequence[WriteResult]]) -> bytes:
    """What stock's writer puts into `.metadata`, less the path and the name of one save."""
    metadata.version = getattr(dcp_filesystem, "CURRENT_DCP_VERSION", None)
    metadata.storage_data = {result.index: result.storage_data for results in gathered for result in results}
    metadata.storage_meta = StorageMeta()
    return pickle.dumps(metadata)
