"""A reader of checkpoints that knows nothing but the tensor index, written from its description: open, seek, read.

Imports nothing of roll_ckpt, so that what it rebuilds rests on what stands in `formats/tensor_format.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {
    **dict.fromkeys(["name_end", "dims", "piece_offset", "piece_start", "piece_count"], "<i8"),
    **dict.fromkeys(["strides", "parameter_dims", "file_end"], "<i8"),
    **dict.fromkeys(["region_name", "piece_region", "piece_file", "parameter_name"], "<i4"),
}
SECTIONS = (
    *(("name_end", "names"), ("region_name", "regions"), ("region_rank", "regions"), ("region_boxed", "regions")),
    *(("dims", "dims"), ("piece_region", "pieces"), ("piece_file", "pieces"), ("piece_role", "pieces")),
    *(("piece_dtype", "pieces"), ("piece_flags", "pieces"), ("piece_offset", "pieces"), ("piece_start", "pieces")),
    *(("piece_count", "pieces"), ("strides", "strides"), ("parameter_name", "parameters")),
    *(("parameter_dtype", "parameters"), ("parameter_rank", "parameters"), ("parameter_dims", "parameter_dims")),
    *(("name_bytes", "name_bytes"), ("file_end", "files"), ("file_bytes", "file_bytes")),
)


@dataclass(frozen=True)
class Part:
    """A piece, and how to read it."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    box: tuple[slice, ...]
    start: int
    stop: int
    replica: bool
    path: Path
    offset: int
    itemsize: int
    strides: tuple[int, ...] | None

    def words(self) -> np.ndarray[Any, Any]:
        """Its elements, as unsigned integers of their width."""
        lengths = [one.stop - one.start for one in self.box]
        count = self.stop - self.start
        if self.strides is not None:
            count = 1 + sum((length - 1) * step for length, step in zip(lengths, self.strides, strict=True))
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(count * self.itemsize)
        found = np.frombuffer(data, f"<u{self.itemsize}", count)
        if self.strides is None:
            return found
        steps = [step * self.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(found, lengths, steps).reshape(-1)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Header and sections of an index."""
    data = path.read_bytes()
    assert data[:8] == b"RCTENSOR" and int.from_bytes(data[8:12], "little") == 1
    at = 16 + int.from_bytes(data[12:16], "little")
    header = json.loads(data[16:at])
    sections = {}
    for name, counted in SECTIONS:
        count = header["counts"][counted]
        sections[name] = np.frombuffer(data, WIDTHS.get(name, "u1"), count, at)
        at += -(-sections[name].nbytes // 8) * 8
    assert at == len(data)
    return header, sections


def texts(sections: dict[str, Any], kind: str) -> list[str]:
    ends = [0, *sections[f"{kind}_end"].tolist()]
    data = sections[f"{kind}_bytes"].tobytes()
    return [data[low:high].decode() for low, high in itertools.pairwise(ends)]


def parts(unit: Path, index: Path) -> Iterator[Part]:
    """The pieces that one index of a checkpoint tells of."""
    header, sections = read(index)
    names, files = texts(sections, "name"), texts(sections, "file")
    dims, strides = sections["dims"].tolist(), sections["strides"].tolist()
    regions = []
    for name, rank, boxed in zip(
        *(sections[f"region_{kind}"].tolist() for kind in ("name", "rank", "boxed")), strict=True
    ):
        taken, dims = dims[: rank * (1 + 2 * boxed)], dims[rank * (1 + 2 * boxed) :]
        shape, offsets, lengths = taken[:rank], taken[rank : 2 * rank] or [0] * rank, taken[2 * rank :] or taken[:rank]
        regions.append(
            (names[name], tuple(shape), tuple(map(slice, offsets, map(sum, zip(offsets, lengths, strict=True)))))
        )
    columns = ("region", "file", "role", "dtype", "flags", "offset", "start", "count")
    for region, file, role, dtype, flags, offset, start, count in zip(
        *(sections[f"piece_{kind}"].tolist() for kind in columns), strict=True
    ):
        name, shape, box = regions[region]
        steps = None
        if flags & 2:
            steps, strides = tuple(strides[: len(shape)]), strides[len(shape) :]
        kind, itemsize = header["dtypes"][dtype]
        told = (name, header["roles"][role], kind, shape, box, start, start + count, bool(flags & 1))
        yield Part(*told, unit / files[file], offset, itemsize, steps)


@dataclass
class Whole:
    """A tensor of the model as it is being put together."""

    dtype: str
    words: np.ndarray[Any, Any]
    times: np.ndarray[Any, Any]
    """How often each element was found."""


def rebuilt(unit: Path, cluster: str) -> dict[tuple[str, str], Whole]:
    """Every tensor of the model in every role but `other`, put together from the indexes of all ranks.

    Each element was found once, and what replicas hold is the same.
    """
    found: dict[tuple[str, str], Whole] = {}
    told = [part for index in sorted(unit.glob(f"tensors/{cluster}.*.index")) for part in parts(unit, index)]
    mine = [part for part in told if part.role != "other"]
    for part in (part for part in mine if not part.replica):
        whole = found.setdefault(
            (part.name, part.role),
            Whole(part.dtype, np.zeros(part.shape, f"u{part.itemsize}"), np.zeros(part.shape, np.uint8)),
        )
        assert whole.words.shape == part.shape and whole.dtype == part.dtype, part
        put(whole.words, part, part.words())
        put(whole.times, part, taken(whole.times, part) + 1)
    for (name, role), whole in found.items():
        assert (whole.times == 1).all(), f"{name} ({role}): found {sorted({*whole.times.flat})} times"
    for part in (part for part in mine if part.replica and (part.name, part.role) in found):
        assert np.array_equal(taken(found[part.name, part.role].words, part), part.words()), part
    return found


def taken(whole: np.ndarray[Any, Any], part: Part) -> np.ndarray[Any, Any]:
    """The elements of `part` in the whole tensor."""
    return whole[part.box].reshape(-1)[part.start : part.stop]


def put(whole: np.ndarray[Any, Any], part: Part, words: np.ndarray[Any, Any]) -> None:
    inside = whole[part.box].reshape(-1).copy()
    inside[part.start : part.stop] = words
    whole[part.box] = inside.reshape(whole[part.box].shape)
