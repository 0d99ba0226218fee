"""What the tensors in a file hold of the model: runs of elements of parameters, told by whoever laid the file out.

A stored tensor may be a parameter, a part of one, or a flat buffer that holds parts of many. A backend says which by
`Meanings`; `tensor_index` writes it down. No numpy and no torch here.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

PARAMETER, MASTER, OTHER = "parameter", "master", "other"
"""Roles. State that an optimizer keeps for each element has its key there as its role: `exp_avg`, `exp_avg_sq`."""

_COUNTER = "step"  # has the shape of a parameter where that has no dimensions, and is state of none
_SPARE = "_offload_buffer"  # how DeepSpeed ends the keys of host buffers that wait for the next offload


class Stored(Protocol):
    """A tensor in a file: `image.TensorPiece`."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def strides(self) -> tuple[int, ...] | None: ...


@dataclass(frozen=True, slots=True)
class Region:
    """A box of a tensor of the whole model: the first element and the extent in each of its dimensions.

    Without `offsets` and `lengths` it is all of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None

    @classmethod
    def box(cls, name: str, shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> Region:
        """The same record for the same elements: a box that is all of the tensor needs no offsets."""
        if tuple(lengths) == tuple(shape):
            return cls(name, tuple(shape))
        return cls(name, tuple(shape), tuple(offsets), tuple(lengths))

    @property
    def extent(self) -> tuple[int, ...]:
        return self.shape if self.lengths is None else self.lengths

    @property
    def numel(self) -> int:
        return math.prod(self.extent)


@dataclass(frozen=True, slots=True)
class Run:
    """From element `at` of a stored tensor on, `count` elements of `region` from its element `start` on, row by row.

    `replica`: what this rank holds other ranks hold, too, and one of them has it as no replica.
    """

    at: int
    region: Region
    start: int
    count: int
    replica: bool = False


def whole(region: Region, replica: bool = False) -> tuple[Run, ...]:
    """A stored tensor that is `region`."""
    return (Run(0, region, 0, region.numel, replica),)


def cut(runs: Iterable[Run], first: int, last: int, at: int) -> list[Run]:
    """What elements `first` to `last` of a tensor of these runs are, stored from element `at` on."""
    found = []
    for run in runs:
        low, high = max(first, run.at), min(last, run.at + run.count)
        if low < high:
            moved = run.start + low - run.at
            found.append(Run(at + low - first, run.region, moved, high - low, run.replica))
    return found


@dataclass(frozen=True, eq=False)
class Runs:
    """All runs of one stored tensor, in columns; what lies between them is padding."""

    regions: tuple[Region, ...]
    at: array[int]
    start: array[int]
    count: array[int]
    replica: array[int]

    @classmethod
    def of(cls, runs: Iterable[Run]) -> Runs:
        """Runs ascend in `at` and do not overlap."""
        rows = list(runs)
        return cls(
            tuple(run.region for run in rows),
            array("q", [run.at for run in rows]),
            array("q", [run.start for run in rows]),
            array("q", [run.count for run in rows]),
            array("b", [run.replica for run in rows]),
        )

    def __len__(self) -> int:
        return len(self.regions)

    def fit(self, stored: Stored) -> bool:
        """Whether a stored tensor can be these runs: one whole region in its own shape, but for dimensions of 1 before
        it, or a flat tensor of enough elements, row by row, with or without dimensions of 1 before it."""
        if not self.regions:
            return False
        region, leading = self.regions[0], len(self.regions[0].extent) - len(stored.shape)
        if (1,) * leading + stored.shape == region.extent and (not leading or stored.strides is None):
            return len(self) == 1 and self.count[0] == region.numel and not self.at[0]
        flat = len(stored.shape) > 0 and set(stored.shape[:-1]) <= {1} and stored.strides is None
        return flat and self.at[-1] + self.count[-1] <= stored.shape[-1]


Told = tuple[str, Runs]
"""A role, and runs."""


class Meanings(Protocol):
    """What the tensors of a file are."""

    def of(self, place: int, stored: Stored) -> Told | None:
        """Of the tensor at `place`; None if nothing is known of it."""
        ...


@dataclass(frozen=True, eq=False)
class ByName:
    """By the names of tensors in their file.

    named: single tensors. states: all tensors with one value for each element in a dict of an optimizer's state, by the
    name of that dict; their keys in it are their roles.
    """

    named: Mapping[str, Told] = field(default_factory=dict)
    states: Mapping[str, Runs] = field(default_factory=dict)

    def of(self, place: int, stored: Stored) -> Told | None:
        known = self.named.get(stored.name)
        if known is None:
            holder, _, key = stored.name.rpartition(".")
            runs = self.states.get(holder)
            if runs is None or key == _COUNTER or key.endswith(_SPARE):
                return None
            known = key, runs
        return known if known[1].fit(stored) else None


@dataclass(frozen=True, eq=False)
class InOrder:
    """By their order in the file."""

    told: tuple[Told, ...]

    def of(self, place: int, stored: Stored) -> Told | None:
        known = self.told[place]
        return known if known[1].fit(stored) else None


UNKNOWN: Meanings = ByName()


@dataclass(frozen=True)
class FileTensors:
    """The tensors in a file and what they are; two are equal only under the same `Meanings` object."""

    tensors: tuple[Stored, ...]
    meanings: Meanings = UNKNOWN
