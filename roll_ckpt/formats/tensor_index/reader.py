"""Reads tensor indexes; see `tensor_format`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from roll_ckpt.errors import Damaged
from roll_ckpt.formats.tensor_index import checks
from roll_ckpt.formats.tensor_index.layout import (
    COUNTS,
    LARGEST,
    LONGEST_HEADER,
    MAGIC,
    MOST_KINDS,
    REPLICA,
    SECTIONS,
    START,
    STRIDED,
    VERSION,
    Column,
    head,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of the box `offsets`, `lengths` of a tensor of shape `shape`, row by row.

    They lie one after another from byte `offset` of `file` on, `nbytes` in all; with `strides`, which are in elements,
    they are the whole box and lie apart.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    start: int
    stop: int
    file: str
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    replica: bool = False


class TensorIndex:
    """An index that was read: a sequence of `Piece`s, in the order of the file.

    `columns` are the sections by their names in the format, for whoever needs many pieces at once.
    """

    def __init__(
        self, columns: Mapping[str, Column], roles: tuple[str, ...], dtypes: tuple[tuple[str, int], ...]
    ) -> None:
        self.columns = columns
        self.roles = roles
        self.dtypes = dtypes
        self.files = _texts(columns, "file")
        ranks, boxed = columns["region_rank"].astype(np.int64), columns["region_boxed"].astype(np.int64)
        self._dims_end = np.cumsum(ranks * (1 + 2 * boxed))
        strided = (columns["piece_flags"] & STRIDED) > 0
        self._strides_end = np.cumsum(np.where(strided, ranks[columns["piece_region"]], 0))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return _texts(self.columns, "name")

    @cached_property
    def _regions(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, name in enumerate(self.columns["region_name"].tolist()):
            found.setdefault(self.names[name], []).append(number)
        return found

    @cached_property
    def _pieces_of_regions(self) -> tuple[Column, Column]:
        order = np.argsort(self.columns["piece_region"], kind="stable")
        return order, self.columns["piece_region"][order]

    def __len__(self) -> int:
        return len(self.columns["piece_region"])

    def __iter__(self) -> Iterator[Piece]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> Piece:
        told = {name: int(self.columns[f"piece_{name}"][place]) for name in _OF_A_PIECE}
        region = told["region"]
        shape, offsets, lengths = self._box(region)
        dtype, itemsize = self.dtypes[told["dtype"]]
        strides, nbytes = None, told["count"] * itemsize
        if told["flags"] & STRIDED:
            end = int(self._strides_end[place])
            strides = tuple(self.columns["strides"][end - len(shape) : end].tolist())
            nbytes = itemsize * (1 + sum((length - 1) * step for length, step in zip(lengths, strides, strict=True)))
        return Piece(
            name=self.names[self.columns["region_name"][region]],
            role=self.roles[told["role"]],
            dtype=dtype,
            shape=shape,
            offsets=offsets,
            lengths=lengths,
            start=told["start"],
            stop=told["start"] + told["count"],
            file=self.files[told["file"]],
            offset=told["offset"],
            nbytes=nbytes,
            strides=strides,
            replica=bool(told["flags"] & REPLICA),
        )

    def _box(self, region: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        rank, boxed = int(self.columns["region_rank"][region]), bool(self.columns["region_boxed"][region])
        end = int(self._dims_end[region])
        dims = tuple(self.columns["dims"][end - rank * (3 if boxed else 1) : end].tolist())
        return (dims[:rank], dims[rank : 2 * rank], dims[2 * rank :]) if boxed else (dims, (0,) * rank, dims)

    def find(self, name: str, role: str) -> list[Piece]:
        """The pieces of one tensor of the model in one role, replicas too."""
        order, regions = self._pieces_of_regions
        found = []
        for region in self._regions.get(name, ()):
            low, high = np.searchsorted(regions, [region, region + 1])
            found += [piece for piece in map(self.__getitem__, order[low:high].tolist()) if piece.role == role]
        return found

    @cached_property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Names, dtypes and shapes of the model that the rank had, in its order."""
        columns = self.columns
        ends = np.cumsum(columns["parameter_rank"].astype(np.int64)).tolist()
        dims = columns["parameter_dims"].tolist()
        rows = zip(columns["parameter_name"].tolist(), columns["parameter_dtype"].tolist(), ends, strict=True)
        found, at = {}, 0
        for name, dtype, end in rows:
            found[self.names[name]] = {"dtype": self.dtypes[dtype][0], "shape": dims[at:end]}
            at = end
        return found


_OF_A_PIECE = ("region", "file", "role", "dtype", "flags", "offset", "start", "count")


def _texts(columns: Mapping[str, Column], kind: str) -> tuple[str, ...]:
    data, at, found = columns[f"{kind}_bytes"].tobytes(), 0, []
    for end in columns[f"{kind}_end"].tolist():
        found.append(data[at:end].decode())
        at = end
    return tuple(found)


def parse(data: bytes, where: object, sizes: Mapping[str, int] | None = None) -> TensorIndex:
    """The index in `data`. `sizes`: bytes of each file of the checkpoint, by its path.

    Takes memory in proportion to `data`, whatever it says.

    Raises:
        Damaged: names `where` and what is wrong: it is cut off or too long, a number is out of its range, a piece lies
            beyond its tensor or its file.
    """
    header, at = _parse_head(data, where)
    counts = header["counts"]
    columns: dict[str, Column] = {}
    for name, kind, count in SECTIONS:
        nbytes = np.dtype(kind).itemsize * counts[count]
        end = at + nbytes + -nbytes % 8
        if end > len(data):
            raise Damaged(f"{where}: it is cut off in {name}, or counts too much")
        if any(data[at + nbytes : end]):
            raise Damaged(f"{where}: there is something between {name} and what follows")
        columns[name] = np.frombuffer(data, kind, counts[count], at)
        at = end
    if at != len(data):
        raise Damaged(f"{where}: {len(data) - at} bytes too long")
    checks.check(columns, header, where)
    index = TensorIndex(columns, tuple(header["roles"]), tuple((name, size) for name, size in header["dtypes"]))
    _check_files(index, sizes, where)
    return index


def _parse_head(data: bytes, where: object) -> tuple[dict[str, Any], int]:
    if data[: len(MAGIC)] != MAGIC:
        raise Damaged(f"{where}: no tensor index")
    version, length = (int.from_bytes(data[at : at + 4], "little") for at in (len(MAGIC), len(MAGIC) + 4))
    if version != VERSION:
        raise Damaged(f"{where}: version {version} is not {VERSION}; another roll_ckpt wrote it")
    end = START + length
    if length > LONGEST_HEADER or end > len(data):
        raise Damaged(f"{where}: its header is cut off, or too long")
    try:
        header = json.loads(data[START:end])
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where}: its header cannot be read: {error}") from error
    if not _is_header(header) or head(header) != data[:end]:
        raise Damaged(f"{where}: its header is not as it was written")
    return header, end


def _is_header(header: object) -> bool:
    if not isinstance(header, dict) or header.keys() != {"counts", "dtypes", "roles"}:
        return False
    counts, dtypes, roles = header["counts"], header["dtypes"], header["roles"]
    return (
        isinstance(counts, dict)
        and counts.keys() == COUNTS
        and all(type(count) is int and 0 <= count < LARGEST for count in counts.values())
        and all(isinstance(kinds, list) and len(kinds) <= MOST_KINDS for kinds in (dtypes, roles))
        and all(isinstance(role, str) and role for role in roles)
        and all(isinstance(kind, list) and len(kind) == 2 and _is_dtype(*kind) for kind in dtypes)
    )


def _is_dtype(name: object, itemsize: object) -> bool:
    return isinstance(name, str) and type(itemsize) is int and 0 <= itemsize <= 1 << 10


def _check_files(index: TensorIndex, sizes: Mapping[str, int] | None, where: object) -> None:
    columns = index.columns
    itemsizes = np.array([size for _, size in index.dtypes] or [0], np.float64)[columns["piece_dtype"]]
    ends = columns["piece_offset"] + columns["piece_count"] * itemsizes  # as floats: too large stays too large
    for place in np.flatnonzero(columns["piece_flags"] & STRIDED).tolist():
        piece = index[place]
        ends[place] = piece.offset + piece.nbytes
    unknown = [path for path in index.files if sizes is not None and path not in sizes]
    if unknown:
        raise Damaged(f"{where}: it tells of {unknown[0]!r}, which is no file of this checkpoint")
    limits = np.array([LARGEST if sizes is None else sizes[path] for path in index.files], np.float64)
    beyond = ends > limits[columns["piece_file"]]
    if (itemsizes == 0).any() or beyond.any():
        raise Damaged(f"{where}: piece {int(np.argmax((itemsizes == 0) | beyond))} lies beyond the end of its file")
