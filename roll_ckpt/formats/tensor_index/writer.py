"""Writes tensor indexes; see `tensor_format`."""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from roll_ckpt.formats.tensor_index.layout import (
    MOST_DIMENSIONS,
    MOST_KINDS,
    OF_FILES,
    REPLICA,
    SECTIONS,
    STRIDED,
    Column,
    Parameters,
    head,
    packed,
)
from roll_ckpt.formats.tensor_index.meanings import OTHER, FileTensors, Region, Runs, Stored, Told, whole


def _integers() -> array[int]:
    return array("q")


@dataclass
class _Rows:
    """The pieces of one file; numbers of regions, roles and dtypes are those of the `Indexer`."""

    region: array[int] = field(default_factory=_integers)
    role: array[int] = field(default_factory=_integers)
    dtype: array[int] = field(default_factory=_integers)
    flags: array[int] = field(default_factory=_integers)
    offset: array[int] = field(default_factory=_integers)
    start: array[int] = field(default_factory=_integers)
    count: array[int] = field(default_factory=_integers)
    strides: array[int] = field(default_factory=_integers)

    def one(self, numbers: tuple[int, int, int], flags: int, offset: int, start: int, count: int) -> None:
        self.region.append(numbers[0])
        self.role.append(numbers[1])
        self.dtype.append(numbers[2])
        self.flags.append(flags)
        self.offset.append(offset)
        self.start.append(start)
        self.count.append(count)

    def many(self, regions: array[int], role: int, dtype: int, runs: Runs, offset: int, itemsize: int) -> None:
        offsets = np.frombuffer(runs.at, np.int64) * itemsize + offset
        self.region += regions
        self.role += array("q", [role]) * len(runs)
        self.dtype += array("q", [dtype]) * len(runs)
        self.flags += array("q", runs.replica)
        self.offset.frombytes(offsets.tobytes())
        self.start += runs.start
        self.count += runs.count


@dataclass(frozen=True)
class _Kept:
    files: tuple[FileTensors, ...]
    rows: tuple[_Rows, ...]
    parameters: Parameters
    header: Mapping[str, Any]
    body: bytes


_KINDS = ("region", "role", "dtype", "flags", "offset", "start", "count")


class Indexer:
    """Writes the indexes of one rank of one cluster, save after save: what did not change is not worked out again.

    Threads may call it. Holds no tensor.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: _Kept | None = None
        self._forget()

    def _forget(self) -> None:
        self._regions: dict[Region, int] = {}
        self._roles: dict[str, int] = {}
        self._dtypes: dict[tuple[str, int], int] = {}
        self._numbers: dict[Runs, array[int]] = {}

    def encode(self, files: Sequence[tuple[str, FileTensors]], parameters: Parameters) -> bytes:
        """The index of `files`, by their paths, and of a model of `parameters`; the same bytes for the same arguments.

        Raises:
            ValueError: more than 255 roles or dtypes, or more than 64 dimensions.
        """
        with self._lock:
            told = tuple(tensors for _, tensors in files)
            kept = self._kept
            if kept is None or (kept.files, kept.parameters) != (told, parameters):
                kept = self._kept = self._made(told, parameters)
        tail = _text_sections("file", [path for path, _ in files])
        counts = {**kept.header["counts"], "files": len(files), "file_bytes": len(tail["file_bytes"])}
        return b"".join((head({**kept.header, "counts": counts}), kept.body, packed(tail)))

    def _made(self, files: tuple[FileTensors, ...], parameters: Parameters) -> _Kept:
        rows = self._all_rows(files)
        sections, header = self._sections(rows, parameters)
        if len(self._regions) > 1000 + 2 * len(sections["region_name"]):  # most are of older saves alone
            self._forget()
            self._kept = None
            rows = self._all_rows(files)
        header["counts"] = {count: len(sections[name]) for name, _, count in SECTIONS if name not in OF_FILES}
        return _Kept(files, rows, parameters, header, packed(sections))

    def _all_rows(self, files: tuple[FileTensors, ...]) -> tuple[_Rows, ...]:
        before = [] if self._kept is None else list(zip(self._kept.files, self._kept.rows, strict=True))
        rows = []
        for place, tensors in enumerate(files):
            known = place < len(before) and before[place][0] == tensors
            rows.append(before[place][1] if known else self._rows(tensors))
        return tuple(rows)

    def _rows(self, file: FileTensors) -> _Rows:
        rows = _Rows()
        for place, stored in enumerate(file.tensors):
            if math.prod(stored.shape):
                self._add(rows, stored, file.meanings.of(place, stored))
        return rows

    def _add(self, rows: _Rows, stored: Stored, meaning: Told | None) -> None:
        if meaning is None:
            meaning = OTHER, Runs.of(whole(Region(stored.name, stored.shape)))
        role, runs = self._roles.setdefault(meaning[0], len(self._roles)), meaning[1]
        itemsize = _itemsize(stored)
        dtype = self._dtypes.setdefault((stored.dtype, itemsize), len(self._dtypes))
        if len(runs) > 1:
            if runs not in self._numbers:
                self._numbers[runs] = array("q", [self._number(region) for region in runs.regions])
            rows.many(self._numbers[runs], role, dtype, runs, stored.offset, itemsize)
            return
        flags = REPLICA * runs.replica[0]
        if stored.strides is not None:
            flags |= STRIDED
            rows.strides.extend(stored.strides)
        numbers = self._number(runs.regions[0]), role, dtype
        rows.one(numbers, flags, stored.offset + runs.at[0] * itemsize, runs.start[0], runs.count[0])

    def _number(self, region: Region) -> int:
        return self._regions.setdefault(region, len(self._regions))

    def _sections(self, rows: Sequence[_Rows], parameters: Parameters) -> tuple[dict[str, Column], dict[str, Any]]:
        """All sections but those of the files, with numbers in the order in which they first occur."""
        pieces = {kind: _joined(getattr(part, kind) for part in rows) for kind in _KINDS}
        regions, pieces["region"] = _renumbered(list(self._regions), pieces["region"])
        roles, pieces["role"] = _renumbered(list(self._roles), pieces["role"])
        dtypes, pieces["dtype"] = _renumbered(list(self._dtypes), pieces["dtype"])
        pieces["file"] = np.repeat(np.arange(len(rows)), [len(part.region) for part in rows])
        known, more = {name for name, _ in dtypes}, dict.fromkeys(told["dtype"] for told in parameters.values())
        dtypes += [(name, 0) for name in more if name not in known]  # of parameters that no piece has
        for what, found in (("roles", roles), ("dtypes", dtypes)):
            if len(found) > MOST_KINDS:
                raise ValueError(f"{len(found)} {what} are more than an index can hold, {MOST_KINDS}")
        _mark_repeated(pieces, roles)
        names = list(dict.fromkeys([*(region.name for region in regions), *parameters]))
        numbers = {name: number for number, name in enumerate(names)}
        sections = {
            **_text_sections("name", names),
            **_region_sections(regions, numbers),
            **{f"piece_{kind}": column for kind, column in pieces.items()},
            **_parameter_sections(parameters, numbers, [name for name, _ in dtypes]),
            "strides": _joined(part.strides for part in rows),
        }
        return sections, {"roles": roles, "dtypes": dtypes}


def _itemsize(stored: Stored) -> int:
    """Bytes of an element, from what a tensor takes in its file."""
    if stored.strides is None:
        return stored.nbytes // math.prod(stored.shape)
    steps = zip(stored.shape, stored.strides, strict=True)
    return stored.nbytes // (1 + sum((length - 1) * stride for length, stride in steps))


def _joined(columns: Iterable[array[int]]) -> Column:
    """One column of all; a copy."""
    return np.concatenate([np.empty(0, np.int64), *(np.frombuffer(column, np.int64) for column in columns if column)])


def _renumbered(things: list[Any], column: Column) -> tuple[list[Any], Column]:
    """The things that `column` numbers, each once, in the order in which they first occur; and their numbers now."""
    used, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    return [things[at] for at in used[order]], number[inverse.reshape(-1)] if len(column) else column


def _mark_repeated(pieces: dict[str, Column], roles: Sequence[str]) -> None:
    """What a rank has twice, such as the weights of a layer that stands in two places, is a replica but the first time.

    What has no other role than `other` is left as it is: its names need not tell it apart.
    """
    key = [pieces[kind] for kind in ("start", "count", "role", "region")]
    order = np.lexsort(key)  # stable: the first stays the first
    again = np.ones(max(0, len(order) - 1), bool)
    for column in key:
        ordered = column[order]
        again &= ordered[1:] == ordered[:-1]
    repeated = order[1:][again]
    repeated = repeated[np.array([role != OTHER for role in roles], bool)[pieces["role"][repeated]]]
    pieces["flags"][repeated] |= REPLICA


def _region_sections(regions: Sequence[Region], numbers: Mapping[str, int]) -> dict[str, Column]:
    dims = _integers()
    for region in regions:
        dims.extend(region.shape)
        if region.offsets is not None and region.lengths is not None:
            dims.extend(region.offsets)
            dims.extend(region.lengths)
    ranks = np.array([len(region.shape) for region in regions], np.int64)
    if (ranks > MOST_DIMENSIONS).any():
        raise ValueError(f"a tensor has more dimensions than an index can hold, {MOST_DIMENSIONS}")
    return {
        "region_name": np.array([numbers[region.name] for region in regions], np.int64),
        "region_rank": ranks,
        "region_boxed": np.array([region.offsets is not None for region in regions], np.int64),
        "dims": _joined([dims]),
    }


def _parameter_sections(parameters: Parameters, numbers: Mapping[str, int], dtypes: Sequence[str]) -> dict[str, Column]:
    dims = _integers()
    for told in parameters.values():
        dims.extend(told["shape"])
    return {
        "parameter_name": np.array([numbers[name] for name in parameters], np.int64),
        "parameter_dtype": np.array([dtypes.index(told["dtype"]) for told in parameters.values()], np.int64),
        "parameter_rank": np.array([len(told["shape"]) for told in parameters.values()], np.int64),
        "parameter_dims": _joined([dims]),
    }


def _text_sections(kind: str, texts: Sequence[str]) -> dict[str, Column]:
    spelled = [text.encode(errors="backslashreplace") for text in texts]
    ends = np.cumsum(np.array([len(text) for text in spelled], np.int64))
    return {f"{kind}_end": ends, f"{kind}_bytes": np.frombuffer(b"".join(spelled), np.uint8)}
