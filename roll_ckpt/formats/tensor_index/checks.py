"""What is refused in a tensor index that is read: every number that is out of its range; see `tensor_format`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from roll_ckpt.errors import Damaged
from roll_ckpt.formats.tensor_index.layout import LARGEST, MOST_DIMENSIONS, REPLICA, STRIDED, Column


def check(columns: Mapping[str, Column], header: Mapping[str, Any], where: object) -> None:
    def refuse(bad: Column, problem: str) -> None:
        if bad.any():
            raise Damaged(f"{where}: {problem} (number {int(np.argmax(bad))})")

    for kind, what in (("name", "a name"), ("file", "a path")):
        _check_texts(columns[f"{kind}_end"], columns[f"{kind}_bytes"], what, where)
    counts = header["counts"]
    limits = {
        "region_name": counts["names"],
        "parameter_name": counts["names"],
        "piece_region": counts["regions"],
        "piece_file": counts["files"],
        "piece_role": len(header["roles"]),
        "piece_dtype": len(header["dtypes"]),
        "parameter_dtype": len(header["dtypes"]),
        "region_rank": MOST_DIMENSIONS + 1,
        "parameter_rank": MOST_DIMENSIONS + 1,
        "region_boxed": 2,
        "piece_flags": (REPLICA | STRIDED) + 1,
    }
    for name, limit in limits.items():
        refuse((columns[name] < 0) | (columns[name] >= limit), f"{name} is out of its range")
    for name in ("dims", "parameter_dims", "strides", "piece_offset"):
        refuse((columns[name] < 0) | (columns[name] >= LARGEST), f"{name} is negative, or too large")
    if int(columns["parameter_rank"].astype(np.int64).sum()) != counts["parameter_dims"]:
        raise Damaged(f"{where}: the shapes of its parameters have another number of dimensions")
    _check_pieces(columns, _region_numels(columns, refuse, where), refuse, where)


def _check_texts(ends: Column, data: Column, what: str, where: object) -> None:
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
    last = int(ends[-1]) if len(ends) else 0
    if (starts > ends).any() or (ends < 0).any() or last != len(data):
        raise Damaged(f"{where}: {what} ends before it begins, or beyond the last one")
    inside = starts[starts < ends]
    try:
        data.tobytes().decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"{where}: {what} is no UTF-8: {error}") from error
    if ((data[inside] & 0xC0) == 0x80).any():  # a byte that continues a character
        raise Damaged(f"{where}: {what} begins in the middle of a character")


Refuse = Callable[[Column, str], None]


def _region_numels(columns: Mapping[str, Column], refuse: Refuse, where: object) -> Column:
    """The number of elements of each region, once its box is known to lie in its tensor."""
    ranks, boxed = columns["region_rank"].astype(np.int64), columns["region_boxed"].astype(np.int64)
    ends = np.cumsum(ranks * (1 + 2 * boxed))
    if (int(ends[-1]) if len(ends) else 0) != len(columns["dims"]):
        raise Damaged(f"{where}: its regions have another number of dimensions")
    numels = np.ones(len(ranks), np.int64)
    for rank, box in {*zip(ranks.tolist(), boxed.tolist(), strict=True)}:
        mine = np.flatnonzero((ranks == rank) & (boxed == box))
        width = rank * (1 + 2 * box)
        dims = columns["dims"][(ends[mine] - width)[:, None] + np.arange(width)]
        lengths = dims[:, -rank:] if rank else dims
        if box:
            beyond = dims[:, rank : 2 * rank] > dims[:, :rank] - lengths
            refuse(_spread(mine, beyond.any(axis=1), len(ranks)), "a region lies beyond its tensor")
        too_large = np.prod(dims[:, :rank].astype(np.float64), axis=1) >= LARGEST
        refuse(_spread(mine, too_large, len(ranks)), "a tensor is too large")
        numels[mine] = np.prod(lengths, axis=1, dtype=np.int64)
    return numels


def _spread(places: Column, values: Column, length: int) -> Column:
    spread = np.zeros(length, bool)
    spread[places] = values
    return spread


def _check_pieces(columns: Mapping[str, Column], numels: Column, refuse: Refuse, where: object) -> None:
    numel, start, count = numels[columns["piece_region"]], columns["piece_start"], columns["piece_count"]
    refuse(
        (start < 0) | (count < 1) | (start > numel) | (count > numel - np.minimum(start, numel)),
        "a piece lies beyond its region, or is empty",
    )
    strided = (columns["piece_flags"] & STRIDED) > 0
    refuse(strided & ((start != 0) | (count != numel)), "a strided piece is not all of its region")
    wanted = columns["region_rank"].astype(np.int64)[columns["piece_region"][strided]].sum()
    if int(wanted) != len(columns["strides"]):
        raise Damaged(f"{where}: its strided pieces have another number of strides")
