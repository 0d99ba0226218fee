"""The bytes of a tensor index: written, read, and refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import index_reader
import numpy as np
import pytest
import torch

from roll_ckpt.errors import Damaged
from roll_ckpt.formats.image import TensorPiece
from roll_ckpt.formats.tensor_index import cover as tensor_cover
from roll_ckpt.formats.tensor_index import layout as tensor_format
from roll_ckpt.formats.tensor_index import reader as tensor_index
from roll_ckpt.formats.tensor_index.meanings import ByName, FileTensors, InOrder, Region, Run, Runs, cut, whole
from roll_ckpt.formats.tensor_index.reader import Piece
from roll_ckpt.formats.tensor_index.writer import Indexer
from roll_ckpt.formats.torch_zip import layout as torch_zip

WEIGHT, BIAS, SLICE = Region("weight", (4, 6)), Region("bias", (4,)), Region("slice", (8, 6), (4, 0), (4, 6))
FLAT = Runs.of([Run(0, WEIGHT, 10, 14), Run(14, BIAS, 0, 4), Run(20, SLICE, 3, 5, replica=True)])
PARAMETERS = {"weight": {"dtype": "bfloat16", "shape": [4, 6]}, "bias": {"dtype": "bfloat16", "shape": [4]}}


def example() -> list[tuple[str, FileTensors]]:
    """A model's file and an optimizer's, with a padded flat buffer, its state, a counter and a transposed weight."""
    model = (
        TensorPiece("module.weight", "bfloat16", (4, 6), 64, 48),
        TensorPiece("module.bias", "bfloat16", (4,), 128, 8),
        TensorPiece("module.turned", "bfloat16", (2, 3), 192, 12, (1, 2)),
        TensorPiece("module.empty", "bfloat16", (0,), 256, 0),
    )
    named = {"module.weight": ("parameter", Runs.of(whole(WEIGHT))), "module.bias": ("parameter", Runs.of(whole(BIAS)))}
    optimizer = (
        TensorPiece("state.0.step", "float32", (), 0, 4),
        TensorPiece("state.0.exp_avg", "float32", (30,), 64, 120),
        TensorPiece("flat.0", "float32", (25,), 256, 100),
    )
    meanings = ByName({"flat.0": ("master", FLAT)}, {"state.0": FLAT})
    return [("t/model.pt", FileTensors(model, ByName(named))), ("t/optim.pt", FileTensors(optimizer, meanings))]


SIZES = {"t/model.pt": 256, "t/optim.pt": 356}


def encoded() -> bytes:
    return Indexer().encode(example(), PARAMETERS)


def parsed(data: bytes, sizes: dict[str, int] | None = SIZES) -> tensor_index.TensorIndex:
    return tensor_index.parse(data, "the index", sizes)


def told(piece: Piece) -> tuple[Any, ...]:
    return piece.name, piece.role, piece.start, piece.stop, piece.file, piece.offset, piece.nbytes, piece.replica


def test_pieces_are_what_was_told_of_them() -> None:
    index = parsed(encoded())
    assert [told(piece) for piece in index] == [
        ("weight", "parameter", 0, 24, "t/model.pt", 64, 48, False),
        ("bias", "parameter", 0, 4, "t/model.pt", 128, 8, False),
        ("module.turned", "other", 0, 6, "t/model.pt", 192, 12, False),
        ("state.0.step", "other", 0, 1, "t/optim.pt", 0, 4, False),
        ("weight", "exp_avg", 10, 24, "t/optim.pt", 64, 56, False),
        ("bias", "exp_avg", 0, 4, "t/optim.pt", 120, 16, False),
        ("slice", "exp_avg", 3, 8, "t/optim.pt", 144, 20, True),
        ("weight", "master", 10, 24, "t/optim.pt", 256, 56, False),
        ("bias", "master", 0, 4, "t/optim.pt", 312, 16, False),
        ("slice", "master", 3, 8, "t/optim.pt", 336, 20, True),
    ]
    assert index[2].strides == (1, 2) and index[2].shape == (2, 3) and index[2].dtype == "bfloat16"
    assert (index[9].shape, index[9].offsets, index[9].lengths) == ((8, 6), (4, 0), (4, 6))
    assert (index[0].offsets, index[0].lengths, index[0].strides) == ((0, 0), (4, 6), None)
    assert index.parameters == PARAMETERS and list(index.parameters) == list(PARAMETERS)
    assert index.find("weight", "master") == [index[7]] and index.find("weight", "other") == []
    assert index.find("nothing", "master") == []


def test_the_format_is_as_it_is_written_down(tmp_path: Path) -> None:
    """A whole file, byte for byte."""
    data = Indexer().encode([("a.pt", FileTensors((TensorPiece("w", "int8", (2, 3), 8, 6),)))], {})
    header = (
        b'{"counts":{"dims":2,"file_bytes":4,"files":1,"name_bytes":1,"names":1,"parameter_dims":0,"parameters":0,'
        b'"pieces":1,"regions":1,"strides":0},"dtypes":[["int8",1]],"roles":["other"]}'
    )
    header += b" " * (-(16 + len(header)) % 8)
    words = [1, 0, 2, 0, 2, 3, 0, 0, 0, 0, 0, 8, 0, 6]  # name_end, region_*, dims, piece_*
    body = b"".join(word.to_bytes(8, "little") for word in words)
    names = b"w" + bytes(7) + (4).to_bytes(8, "little") + b"a.pt" + bytes(4)
    expected = b"RCTENSOR" + (1).to_bytes(4, "little") + len(header).to_bytes(4, "little") + header + body + names
    assert data == expected
    assert [told(piece) for piece in parsed(data, None)] == [("w", "other", 0, 6, "a.pt", 8, 6, False)]


def test_a_reader_made_from_the_description_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.0.index"
    path.write_bytes(encoded())
    found = [
        (part.name, part.role, part.start, part.stop, str(part.path), part.offset, part.replica)
        for part in index_reader.parts(Path(""), path)
    ]
    assert found == [(*told(piece)[:6], piece.replica) for piece in parsed(encoded())]


# --- writing -------------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_what_was_saved_before() -> None:
    used = Indexer()
    for length in range(3, 900):
        other = TensorPiece(f"replay.{length}", "int64", (length,), 0, 8 * length)
        used.encode([("other.pt", FileTensors((other,))), *example()], {})
    assert used.encode(example(), PARAMETERS) == encoded()
    assert len(used._regions) < 1100  # what older saves had is let go


def test_what_did_not_change_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    indexer, files, asked = Indexer(), example(), []
    monkeypatch.setattr(ByName, "of", lambda self, place, stored: asked.append(stored.name))
    first = indexer.encode(files, PARAMETERS)
    assert len(asked) == 6  # without the empty one
    asked.clear()
    again = indexer.encode([(path.replace("t/", "u/"), tensors) for path, tensors in files], PARAMETERS)
    assert asked == [] and again == first.replace(b"t/", b"u/")
    changed = FileTensors((TensorPiece("replay", "int64", (3,), 0, 24),))
    indexer.encode([*files, ("more.pt", changed)], PARAMETERS)
    assert asked == ["replay"]


def test_what_a_rank_has_twice_is_a_replica_the_second_time() -> None:
    twice = InOrder((("parameter", Runs.of(whole(BIAS))),) * 2 + (("other", Runs.of(whole(BIAS))),) * 2)
    pieces = tuple(TensorPiece("x", "float32", (4,), 16 * at, 16) for at in range(4))
    index = parsed(Indexer().encode([("f", FileTensors(pieces, twice))], {}), None)
    assert [piece.replica for piece in index] == [False, True, False, False]


@pytest.mark.parametrize(
    ("stored", "fits"),
    [
        (TensorPiece("flat.0", "float32", (24,), 0, 96), False),  # the last run ends at 25
        (TensorPiece("flat.0", "float32", (25,), 0, 100), True),
        (TensorPiece("flat.0", "float32", (25,), 0, 196, (2,)), False),
        (TensorPiece("flat.0", "float32", (5, 5), 0, 100), False),
        (TensorPiece("state.0.step", "float32", (25,), 0, 100), False),
        (TensorPiece("state.0.exp_avg_offload_buffer", "float32", (25,), 0, 100), False),
        (TensorPiece("state.1.exp_avg", "float32", (25,), 0, 100), False),
    ],
)
def test_a_meaning_that_does_not_fit_its_tensor_is_not_taken(stored: TensorPiece, fits: bool) -> None:
    meanings = ByName({"flat.0": ("master", FLAT)}, {"state.0": FLAT})
    assert (meanings.of(0, stored) is not None) == fits


def test_a_share_of_a_tensor_is_cut_from_its_runs() -> None:
    runs = [Run(0, WEIGHT, 0, 24), Run(24, SLICE, 0, 24)]
    assert cut(runs, 20, 30, 100) == [Run(100, WEIGHT, 20, 4), Run(104, SLICE, 0, 6)]
    assert cut(runs, 48, 60, 0) == [] and cut(runs, 5, 5, 0) == []


def test_a_name_that_is_no_utf_8_is_spelled() -> None:
    piece = TensorPiece("a\udc80b", "int8", (1,), 0, 1)
    assert [one.name for one in parsed(Indexer().encode([("f", FileTensors((piece,)))], {}), None)] == ["a\\udc80b"]


@pytest.mark.parametrize("what", ["roles", "dtypes", "dimensions"])
def test_more_than_the_format_can_hold_is_refused(what: str) -> None:
    kinds = {
        "roles": [(f"role{at}", "int8", (1,)) for at in range(256)],
        "dtypes": [("other", f"int8_{at}", (1,)) for at in range(256)],
        "dimensions": [("other", "int8", (1,) * 65)],
    }[what]
    pieces = tuple(TensorPiece("x", dtype, shape, 0, 1) for _, dtype, shape in kinds)
    meanings = InOrder(tuple((role, Runs.of(whole(Region("x", shape)))) for role, _, shape in kinds))
    with pytest.raises(ValueError, match=what):
        Indexer().encode([("f", FileTensors(pieces, meanings))], {})


# --- what torch lays out -------------------------------------------------------------------------------------


def laid_out(state: object) -> tuple[TensorPiece, ...]:
    return torch_zip.lay_out(state, "archive").pieces


def test_strides_are_told_of_what_does_not_lie_row_by_row() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    state = {"plain": matrix, "turned": matrix.t(), "skipping": torch.arange(10)[::2], "alike": torch.ones(1).expand(3)}
    assert [(piece.name, piece.strides, piece.nbytes) for piece in laid_out(state)] == [
        ("plain", None, 48),
        ("turned", (1, 4), 48),
        ("skipping", (2,), 72),
        ("alike", (0,), 4),
    ]


def test_a_tensor_with_attributes_is_told_of() -> None:
    tensor = torch.arange(4.0)
    tensor.ds_id = 7  # type: ignore[attr-defined]
    assert [(piece.name, piece.shape, piece.nbytes) for piece in laid_out({"flat": tensor})] == [("flat", (4,), 16)]


def test_a_strided_piece_is_read_by_its_strides(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    (tmp_path / "f").write_bytes(bytes(8) + matrix.tobytes())
    (tmp_path / "tensors").mkdir()
    stored = TensorPiece("x", "float32", (4, 3), 8, 48, (1, 4))
    tensors = FileTensors((stored,), InOrder((("parameter", Runs.of(whole(Region("w", (4, 3))))),)))
    (tmp_path / "tensors" / "model.0.index").write_bytes(Indexer().encode([("f", tensors)], {}))
    found = index_reader.rebuilt(tmp_path, "model")["w", "parameter"]
    assert np.array_equal(found.words.view(np.float32), matrix.T)


# --- refusals ------------------------------------------------------------------------------------------------


def with_header(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = encoded()
    end = 16 + int.from_bytes(data[12:16], "little")
    header = json.loads(data[16:end])
    change(header)
    return tensor_format.head(header) + data[end:]


def in_another_order() -> bytes:
    data = encoded()
    end = 16 + int.from_bytes(data[12:16], "little")
    header = json.loads(data[16:end])
    text = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode()
    return data[:16] + text.ljust(end - 16) + data[end:]


def with_column(name: str, place: int, value: int, mend: Callable[[dict[str, Any]], Any] | None = None) -> bytes:
    data = bytearray(encoded() if mend is None else with_header(mend))
    end = at = 16 + int.from_bytes(data[12:16], "little")
    header = json.loads(data[16:end])
    for section, kind, count in tensor_format.SECTIONS:
        width = np.dtype(kind).itemsize
        if section == name:
            at += place * width
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
            return bytes(data)
        at += -(-header["counts"][count] * width // 8) * 8
    raise AssertionError(name)


def counted(**counts: int) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["counts"].update(counts)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no tensor index"),
    "JSON": (b'{"parameters": {}}', "no tensor index"),
    "another version": (encoded()[:8] + b"\2\0\0\0" + encoded()[12:], "version 2 is not 1"),
    "a header that is cut off": (encoded()[:40], "header is cut off"),
    "a header without end": (encoded()[:12] + b"\xff\xff\xff\xff" + encoded()[16:], "header is cut off, or too long"),
    "a header that is no JSON": (encoded()[:16] + b"x" + encoded()[17:], "header cannot be read"),
    "a header that is deep": (b"RCTENSOR\1\0\0\0" + (60000).to_bytes(4, "little") + b"[" * 60000, "cannot be read"),
    "a header in another order": (in_another_order(), "not as it was written"),
    "an unknown key": (with_header(lambda header: header.update(more=1)), "not as it was written"),
    "a count of words": (with_header(lambda header: header["counts"].update(names="3")), "not as it was written"),
    "a count below none": (with_header(counted(names=-1)), "not as it was written"),
    "roles of numbers": (with_header(lambda header: header.update(roles=[1, 2])), "not as it was written"),
    "a width below none": (with_header(lambda header: header["dtypes"][0].__setitem__(1, -2)), "not as it was written"),
    "more pieces than there are": (with_header(counted(pieces=2**40)), "cut off in piece_region, or counts too much"),
    "more names than there are": (with_header(counted(names=2**61)), "cut off in name_end"),
    "fewer pieces than there are": (with_header(counted(pieces=2)), ""),
    "a cut": (encoded()[:-8], "cut off in file_bytes"),
    "more behind it": (encoded() + bytes(8), "8 bytes too long"),
    "something between columns": (with_column("region_rank", 7, 1), "between region_rank and what follows"),
    "a name that ends before it begins": (with_column("name_end", 1, 2), "a name ends before it begins"),
    "a name beyond the last": (with_column("name_end", 3, 2**40), "a name ends before it begins, or beyond"),
    "a name that is no UTF-8": (with_column("name_bytes", 0, 0xFF), "a name is no UTF-8"),
    "a path that is no UTF-8": (with_column("file_bytes", 0, 0xFF), "a path is no UTF-8"),
    "a path that is no file": (with_column("file_bytes", 0, ord("x")), "'x/model.pt', which is no file"),
    "a region without a name": (with_column("region_name", 0, 99), "region_name is out of its range"),
    "a region of too many dimensions": (with_column("region_rank", 0, 65), "region_rank is out of its range"),
    "a region of other dimensions": (with_column("region_rank", 0, 3), "regions have another number of dimensions"),
    "a half box": (with_column("region_boxed", 0, 2), "region_boxed is out of its range"),
    "a length below none": (with_column("dims", 0, -4), "dims is negative"),
    "a tensor without end": (with_column("dims", 0, 2**61), "a tensor is too large"),
    "a box beyond its tensor": (with_column("dims", 9, 5), "a region lies beyond its tensor"),
    "a piece of no region": (with_column("piece_region", 4, 77), "piece_region is out of its range (number 4)"),
    "a piece of a region before the first": (with_column("piece_region", 4, -1), "piece_region is out of its range"),
    "a piece in no file": (with_column("piece_file", 0, 2), "piece_file is out of its range"),
    "a role that is not there": (with_column("piece_role", 0, 9), "piece_role is out of its range"),
    "a dtype that is not there": (with_column("piece_dtype", 0, 9), "piece_dtype is out of its range"),
    "a flag that is none": (with_column("piece_flags", 0, 4), "piece_flags is out of its range"),
    "a piece before its file": (with_column("piece_offset", 0, -8), "piece_offset is negative"),
    "a piece beyond its file": (with_column("piece_offset", 0, 209), "piece 0 lies beyond the end of its file"),
    "a strided piece beyond its file": (with_column("strides", 1, 99), "piece 2 lies beyond the end of its file"),
    "a piece before its region": (with_column("piece_start", 4, -1), "piece lies beyond its region"),
    "a piece beyond its region": (with_column("piece_start", 4, 11), "piece lies beyond its region"),
    "a piece far beyond its region": (with_column("piece_start", 4, 2**63 - 1), "piece lies beyond its region"),
    "a piece of nothing": (with_column("piece_count", 4, 0), "piece lies beyond its region, or is empty"),
    "a piece without end": (with_column("piece_count", 4, 2**62), "piece lies beyond its region"),
    "a strided part of a region": (with_column("piece_count", 2, 5), "a strided piece is not all of its region"),
    "a strided piece without strides": (with_column("piece_flags", 0, 2), "another number of strides"),
    "a stride below none": (with_column("strides", 0, -1), "strides is negative"),
    "a parameter without a name": (with_column("parameter_name", 0, 50), "parameter_name is out of its range"),
    "a parameter of another shape": (with_column("parameter_rank", 0, 1), "shapes of its parameters"),
    "a shape below none": (with_column("parameter_dims", 0, -1), "parameter_dims is negative"),
    "elements without a width": (with_header(lambda header: header["dtypes"][0].__setitem__(1, 0)), "lies beyond"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_index_is_refused_by_name(name: str) -> None:
    data, problem = HOSTILE[name]
    with pytest.raises(Damaged, match="the index: ") as caught:
        parsed(data)
    assert problem in str(caught.value), str(caught.value)
    assert str(caught.value).isprintable()


def piece(start: int, stop: int, offset: int = 0, rows: int = 4, *, replica: bool = False) -> Piece:
    """Of a tensor of 8 rows of 3: a part of some rows."""
    return Piece("w", "master", "float32", (8, 3), (offset, 0), (rows, 3), start, stop, "f", 0, 4, replica=replica)


COVERS: dict[str, tuple[list[Piece], str]] = {
    "two boxes, one in parts": ([piece(0, 5), piece(5, 12), piece(0, 12, 4)], ""),
    "replicas beside them": ([piece(0, 12), piece(0, 12, 4), piece(3, 9, replica=True)], ""),
    "nothing": ([], "no piece of it"),
    "replicas alone": ([piece(0, 12, replica=True)], "no piece of it"),
    "a hole": ([piece(0, 5), piece(6, 12), piece(0, 12, 4)], "elements 5 to 6 of a box of it are held nowhere"),
    "a hole at the end": ([piece(0, 5), piece(0, 12, 4)], "elements 5 to 12 of a box of it are held nowhere"),
    "one twice": ([piece(0, 5), piece(4, 12), piece(0, 12, 4)], "elements 4 to 5 of a box of it are held twice"),
    "a box that is missing": ([piece(0, 12)], "12 of its elements are held nowhere"),
    "boxes that overlap": ([piece(0, 12), piece(0, 12, 3), piece(0, 3, 7, 1)], "two boxes of it overlap"),
}


@pytest.mark.parametrize("name", COVERS)
def test_pieces_hold_each_element_once(name: str) -> None:
    pieces, problem = COVERS[name]
    if not problem:
        tensor_cover.check_cover(pieces, "here")
        return
    with pytest.raises(Damaged) as caught:
        tensor_cover.check_cover(pieces, "here")
    assert problem in str(caught.value)
