"""The tensor index: which elements of which parameter lie where in the files of one rank.

Who reads it needs nothing else: each piece names a tensor of the whole model, its role, the elements of it that the
piece holds, and the bytes that hold them. Format, version 1; all integers little-endian, nothing between the parts:

    8 bytes     b"RCTENSOR"
    uint32      version, 1
    uint32      H, bytes of the header
    H bytes     header: JSON in ASCII without blanks, keys sorted, then blanks up to a multiple of 8 from the start:
                {"counts": {...}, "dtypes": [[name, bytes of an element], ...], "roles": [name, ...]}
    sections    each begins at a multiple of 8, zeros before it; then the file ends. Length: the count times the width.

    section           type    count            what
    name_end          int64   names            where each name ends in `name_bytes`
    region_name       int32   regions          a region is a tensor of the whole model, or a box in it; its name,
    region_rank       uint8   regions          the number of its dimensions,
    region_boxed      uint8   regions          and 1 if it is a box
    dims              int64   dims             of each region in turn: shape; and of a box: offsets, lengths
    piece_region      int32   pieces           a piece holds elements of a region
    piece_file        int32   pieces
    piece_role        uint8   pieces           its place in `roles`
    piece_dtype       uint8   pieces           its place in `dtypes`
    piece_flags       uint8   pieces           1: a replica; 2: strided
    piece_offset      int64   pieces           of its first byte in the file
    piece_start       int64   pieces           the first element that it holds, counted in the region row by row
    piece_count       int64   pieces           how many it holds, one after another
    strides           int64   strides          of each strided piece in turn, in elements, one for each dimension
    parameter_name    int32   parameters       the parameters of the rank's model as it had them, in its order
    parameter_dtype   uint8   parameters
    parameter_rank    uint8   parameters
    parameter_dims    int64   parameter_dims   the shape of each in turn
    name_bytes        uint8   name_bytes       all names, UTF-8
    file_end          int64   files            where each path ends in `file_bytes`
    file_bytes        uint8   file_bytes       paths below the checkpoint's directory, UTF-8

Names: of the role `other` what the file calls it (the path of keys to it); of all other roles the parameter's. Roles:
`parameter` as the model has it; `master` as the optimizer has it, in higher precision; state that the optimizer keeps
for each element under its key there (Adam: `exp_avg`, `exp_avg_sq`); and `other`.

The pieces of one name and role over all ranks, without replicas, hold each element once, and no padding. A replica
repeats what other pieces hold. A strided piece is a whole region whose elements lie apart; its bytes end with its last
element. Tensors without elements have no piece.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

MAGIC, VERSION = b"RCTENSOR", 1
REPLICA, STRIDED = 1, 2

SECTIONS = (
    *(("name_end", "<i8", "names"), ("region_name", "<i4", "regions"), ("region_rank", "|u1", "regions")),
    *(("region_boxed", "|u1", "regions"), ("dims", "<i8", "dims"), ("piece_region", "<i4", "pieces")),
    *(("piece_file", "<i4", "pieces"), ("piece_role", "|u1", "pieces"), ("piece_dtype", "|u1", "pieces")),
    *(("piece_flags", "|u1", "pieces"), ("piece_offset", "<i8", "pieces"), ("piece_start", "<i8", "pieces")),
    *(("piece_count", "<i8", "pieces"), ("strides", "<i8", "strides"), ("parameter_name", "<i4", "parameters")),
    *(("parameter_dtype", "|u1", "parameters"), ("parameter_rank", "|u1", "parameters")),
    *(("parameter_dims", "<i8", "parameter_dims"), ("name_bytes", "|u1", "name_bytes")),
    *(("file_end", "<i8", "files"), ("file_bytes", "|u1", "file_bytes")),
)
OF_FILES = frozenset(["file_end", "file_bytes"])
COUNTS = frozenset(count for _, _, count in SECTIONS)
START = len(MAGIC) + 8
LONGEST_HEADER = 1 << 16
MOST_DIMENSIONS = 64
MOST_KINDS = 255  # of roles, and of dtypes
LARGEST = 1 << 62

Column = npt.NDArray[Any]
Parameters = Mapping[str, Mapping[str, Any]]
"""Name -> {"dtype": str, "shape": list of int}."""


def head(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(START + len(text)) % 8)
    return b"".join((MAGIC, VERSION.to_bytes(4, "little"), len(text).to_bytes(4, "little"), text))


def packed(sections: Mapping[str, Column]) -> bytes:
    parts = []
    for name, kind, _ in SECTIONS:
        if name in sections:
            data = sections[name].astype(kind).tobytes()
            parts += [data, b"\0" * (-len(data) % 8)]
    return b"".join(parts)
