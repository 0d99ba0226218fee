"""Where a weights-only load finds the weights: whole tensors, the tensor index, or the shards in ZeRO-3's files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from roll_ckpt.backends.deepspeed.saved import Files, Load
from roll_ckpt.errors import Damaged
from roll_ckpt.formats.tensor_index.cover import check_cover
from roll_ckpt.formats.tensor_index.meanings import MASTER, PARAMETER
from roll_ckpt.formats.tensor_index.reader import Piece, TensorIndex
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.ranges import Ranges

_AT_ONCE_BYTES = 64 << 20  # of a piece, so that a large parameter is never in memory twice

Shapes = dict[str, dict[str, Any]]
"""Name of a parameter -> {"shape": list of int}, as `load.compare` takes it."""
Wanted = Mapping[str, tuple[int, int]]
"""Name of a parameter -> its elements, counted row by row: the first, and the one after the last."""
Fragment = tuple[str, int, torch.Tensor]
"""Name of a parameter, its first element in the fragment, and the values from there on."""


class Source(Protocol):
    """The weights in one checkpoint."""

    def shapes(self) -> Shapes:
        """The parameters that it holds."""
        ...

    def fragments(self, wanted: Wanted) -> Iterator[Fragment]:
        """All of `wanted` that it holds, once, in flat fragments on the CPU. This rank alone; blocks.

        Raises:
            Damaged, Unreadable: a file is not as it was written, or cannot be read.
        """
        ...


@dataclass(frozen=True)
class Whole:
    """Whole tensors, as the model states have them below ZeRO-3."""

    tensors: Mapping[str, Any]

    def shapes(self) -> Shapes:
        return {
            name: {"shape": list(tensor.shape)}
            for name, tensor in self.tensors.items()
            if isinstance(tensor, torch.Tensor)
        }

    def fragments(self, wanted: Wanted) -> Iterator[Fragment]:
        for name, (first, last) in wanted.items():
            if name in self.tensors:
                yield name, first, self.tensors[name].reshape(-1)[first:last]


@dataclass(frozen=True)
class Indexed:
    """ZeRO-3's shards by the tensor index: reads only the blocks that hold what is wanted."""

    opened: OpenedCheckpoint
    pieces: Mapping[str, Sequence[Piece]]

    def shapes(self) -> Shapes:
        return {name: {"shape": list(pieces[0].shape)} for name, pieces in self.pieces.items()}

    def fragments(self, wanted: Wanted) -> Iterator[Fragment]:
        parts = []
        for name, (first, last) in wanted.items():
            for piece in self.pieces.get(name, ()):
                low, high = max(first, piece.start), min(last, piece.stop)
                if low < high:
                    parts.append((piece, low, high))
        parts.sort(key=lambda part: (part[0].file, part[0].offset + part[1]))
        ranges = Ranges(self.opened)
        for piece, low, high in parts:
            dtype = getattr(torch, piece.dtype)
            most = _AT_ONCE_BYTES // dtype.itemsize
            for at in range(low, high, most):
                until = min(high, at + most)
                start, stop = (piece.offset + (place - piece.start) * dtype.itemsize for place in (at, until))
                yield piece.name, at, torch.frombuffer(ranges.read(piece.file, start, stop), dtype=dtype)


def indexed(opened: OpenedCheckpoint, cluster: str, world_size: int) -> Indexed | None:
    """The weights of `cluster`, by the indexes of the `world_size` ranks that saved it; None if these do not tell.

    Raises:
        Damaged, Unreadable: an index is not as it was written, or cannot be read.
    """
    indexes = []
    for rank in range(world_size):
        index = opened.tensor_index(cluster, rank)
        if index is None:
            return None
        indexes.append(index)
    found: dict[str, list[Piece]] = {}
    for name in indexes[0].parameters:
        pieces = _pieces(indexes, name)
        if any(piece.strides is not None or piece.lengths != piece.shape for piece in pieces):
            return None
        if pieces:
            check_cover(pieces, opened.directory)
            found[name] = pieces
    return Indexed(opened, found) if found else None


def _pieces(indexes: Sequence[TensorIndex], name: str) -> list[Piece]:
    """All of a parameter, from the most precise that there is."""
    for role in (MASTER, PARAMETER):
        pieces = [piece for index in indexes for piece in index.find(name, role) if not piece.replica]
        if pieces:
            return pieces
    return []


@dataclass(frozen=True)
class Sharded:
    """ZeRO-3's shards by the order in which DeepSpeed lays them out; reads one whole file after the other.

    Each parameter is cut by itself into equal shares, the last ones padded. `model` are the model states of any rank.
    """

    files: Files
    model: Mapping[str, Any]
    mp_rank: int
    load: Load

    @property
    def world_size(self) -> int:
        return int(self.model["dp_world_size"])

    def shapes(self) -> Shapes:
        trained = {name: shape for group in self.model["param_shapes"] for name, shape in group.items()}
        frozen = self.model.get("frozen_param_shapes") or {}
        kept = self.model.get("frozen_param_fragments") or {}
        there = trained | {name: shape for name, shape in frozen.items() if name in kept}
        return {name: {"shape": list(shape)} for name, shape in there.items()}

    def fragments(self, wanted: Wanted) -> Iterator[Fragment]:
        for rank in range(self.world_size):
            for name, flat, at, count in self._shards(rank):
                first = rank * count
                low, high = max(first, wanted.get(name, (0, 0))[0]), min(first + count, wanted.get(name, (0, 0))[1])
                if low < high:
                    yield name, low, flat[at + low - first : at + high - first]

    def check(self, rank: int) -> None:
        """Refuse files of `rank`, one that saved, whose shards are not those of `shapes`. This rank alone; blocks.

        Raises:
            Damaged: a file is missing, cannot be loaded, or holds fewer elements.
        """
        for name, flat, at, count in self._shards(rank):
            if at + count > flat.numel():
                raise Damaged(f"{self.files.directory}: the files of data parallel rank {rank} lack a share of {name}")

    def _shards(self, rank: int) -> Iterator[tuple[str, torch.Tensor, int, int]]:
        """Of each parameter: a flat tensor, where in it the share of `rank` lies, and its elements."""
        path = self.files.partition(rank, self.mp_rank)
        try:
            groups = self.load(path)["optimizer_state_dict"]["fp32_flat_groups"]
            for shapes, flat in zip(self.model["param_shapes"], groups, strict=True):
                at = 0
                for name, shape in shapes.items():
                    count = -(-math.prod(shape) // self.world_size)
                    yield name, flat, at, count
                    at += count
            yield from self._frozen(rank)
        except (KeyError, TypeError, ValueError) as problem:
            raise Damaged(f"{path}: these are no optimizer states of ZeRO-3: {problem!r}") from problem

    def _frozen(self, rank: int) -> Iterator[tuple[str, torch.Tensor, int, int]]:
        frozen: Mapping[str, torch.Tensor] = self.model.get("frozen_param_fragments") or {}
        if frozen:
            path = self._model_file(rank)
            if not path.name.startswith(f"zero_pp_rank_{rank}_"):
                raise Damaged(f"{self.files.directory}: the model states of data parallel rank {rank} are missing")
            for name, shard in (self.load(path).get("frozen_param_fragments") or {}).items():
                yield name, shard.reshape(-1), 0, shard.numel()

    def _model_file(self, rank: int) -> Path:
        return self.files.model(rank, self.mp_rank)
