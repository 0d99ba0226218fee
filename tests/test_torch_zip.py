"""Files that stock torch reads, and that we read back; what is damaged or hostile is refused, never run."""

from __future__ import annotations

import enum
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

from roll_ckpt.errors import Damaged, RollCkptError, UnsupportedError
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.torch_zip import archive as archive_module
from roll_ckpt.formats.torch_zip import layout, safe_pickle
from roll_ckpt.formats.torch_zip.archive import Archive
from roll_ckpt.formats.torch_zip.hash_guard import HashGuard
from roll_ckpt.formats.torch_zip.read import parse as parse_
from roll_ckpt.formats.torch_zip.unpickler import Unpickler
from roll_ckpt.native.extension import Arena
from roll_ckpt.native.mover import Mover
from roll_ckpt.save import cluster_save

pytestmark = pytest.mark.core("torch")

BLOCK = 64 << 10
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
]


@pytest.fixture(scope="module")
def mover() -> Iterator[Mover]:
    mover = Mover(Arena(16 * BLOCK, BLOCK), copy_threads=1, io_threads=2)
    yield mover
    mover.shutdown(10)


def write(mover: Mover, path: Path, state: object) -> FileImage:
    image = layout.lay_out(state, path.stem)
    transfer = mover.save(path, cluster_save.native_image(image))
    assert transfer.wait_copied()
    digest = transfer.wait_written()
    assert digest.nbytes == image.nbytes == path.stat().st_size
    return image


def parse(path: Path, allow: tuple[Any, ...] = ()) -> Any:
    return parse_(bytearray(path.read_bytes()), str(path), "cpu", allow)


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bytes, NaNs and negative zeros included; a bool has none but 0 and 1."""
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.frombuffer(bytearray(random_bytes(nbytes) or b"\0"), dtype=torch.uint8)[:nbytes].clone()
    return raw.view(dtype).reshape(shape)


def random_bytes(nbytes: int) -> bytes:
    return bytes(torch.randint(0, 256, (nbytes,), dtype=torch.uint8).tolist())


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Equal in type, in structure, and in every bit of every tensor."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.layout) == (b.dtype, b.shape, b.layout), where
        assert (a.requires_grad, a.is_conj(), a.is_neg()) == (b.requires_grad, b.is_conj(), b.is_neg()), where
        if a.layout is torch.sparse_coo:
            assert_same(a._indices(), b._indices(), where)
            assert_same(a._values(), b._values(), where)
        else:
            assert a.stride() == b.stride(), where
            assert bits(a) == bits(b), where
    elif isinstance(a, torch.storage.TypedStorage):
        assert a.dtype is b.dtype and a.tolist() == b.tolist(), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def bits(tensor: torch.Tensor) -> list[int]:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    return plain.view(torch.uint8).tolist() if plain.numel() else []  # type: ignore[no-any-return]


def check_everywhere(mover: Mover, path: Path, state: object, *, safe: bool = True) -> Any:
    """Write `state`; stock torch in every way, Python's zipfile and we find it unchanged. Returns ours."""
    write(mover, path, state)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    # What stock makes of its own file is the measure: it normalises a few types itself.
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    stock = torch.load(file, weights_only=False)
    assert_same(torch.load(path, weights_only=False), stock)
    assert_same(torch.load(path, weights_only=False, mmap=True), stock)
    if safe:
        assert_same(torch.load(path, weights_only=True), stock)
        ours = parse(path)
        assert_same(ours, stock)
        return ours
    return None


# ---- states


def flat_views() -> Any:
    """As ZeRO-1/2 holds its 16-bit weights: a few views of one flat storage, with padding behind them."""
    flat = random_tensor(torch.bfloat16, 1000)
    return {"a": flat[:100].view(10, 10), "b": flat[100:350], "c": flat[350:351], "rest": 5}


def overlapping_views() -> Any:
    base = torch.arange(40, dtype=torch.float32)
    return {"whole": base[4:30], "head": base[:6], "inside": base[10:12], "far": base[38:]}


def odd_strides() -> Any:
    base = random_tensor(torch.int32, 6, 5)
    return {
        "transposed": base.t(),
        "slice": base[1:4, 2:4],
        "steps": base.flatten()[3::7],
        "expanded": torch.ones(1).expand(4, 3),
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }


def small_shapes() -> Any:
    return {
        "none": torch.empty(0),
        "none_inside": torch.arange(9)[4:4],
        "none_2d": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "scalar_inside": torch.arange(9)[4],
        "one": torch.ones(1, 1),
    }


def with_gradients() -> Any:
    leaf = torch.rand(5, requires_grad=True)
    return {
        "leaf": leaf,
        "not_leaf": (leaf * 2)[1:3],
        "parameter": torch.nn.Parameter(torch.rand(3, 2)),
        "frozen": torch.nn.Parameter(torch.rand(2), requires_grad=False),
        "view_of_parameter": torch.nn.Parameter(torch.rand(6)).data[2:4],
    }


def tied() -> Any:
    weight = torch.nn.Parameter(torch.rand(4, 4))
    plain = torch.rand(3)
    shared = [plain, {"deep": plain}]
    return {"embed": weight, "head": weight, "list": shared, "again": shared, "data": weight.data}


def python_values() -> Any:
    return OrderedDict(
        none=None,
        big=2**200,
        negative=-(2**70),
        numbers=[0, 1, 255, 256, 65536, 1.5, float("inf"), 1 + 2j],
        tuples=((), (1,), (1, 2), (1, 2, 3, [4])),
        text="Grüße, 世界",
        raw=bytes(range(256)),
        sets={1, 2, 3},
        flags=(True, False),
        size=torch.Size([2, 3]),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        keys={0: "int", (1, "x"): "tuple", None: "none"},
        empty=[{}, [], OrderedDict()],
    )


def other_tensors() -> Any:
    complex_ = random_tensor(torch.complex64, 4)
    return {
        "sparse": torch.eye(3).to_sparse(),
        "conj": complex_.conj(),
        "of_conj": complex_[1:3],
        "negative": complex_.conj().imag.clone().neg(),
        "conj_imag": random_tensor(torch.complex64, 3).conj().imag,
    }


def bare_storages() -> Any:
    return {
        "untyped": torch.arange(5, dtype=torch.uint8).untyped_storage(),
        "typed": torch.FloatStorage([1, 2, 3]),
        "empty": torch.UntypedStorage(0),
    }


def across_alignments() -> Any:
    sizes = [1, 63, 64, 65, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 12345]
    return [random_tensor(torch.uint8, size) for size in sizes]


STATES: list[Callable[[], Any]] = [
    *(flat_views, overlapping_views, odd_strides, small_shapes, with_gradients, tied, python_values),
    *(other_tensors, bare_storages, across_alignments),
]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_what_is_written_loads_everywhere(mover: Mover, tmp_path: Path, state: Callable[[], Any]) -> None:
    check_everywhere(mover, tmp_path / "state.pt", state())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_every_bit(mover: Mover, tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = random_tensor(dtype, 5, 7)
    state = {"whole": tensor, "column": tensor[:, 3], "scalar": tensor[1, 1], "none": tensor[:0]}
    check_everywhere(mover, tmp_path / "t.pt", state)


@pytest.mark.parametrize("state", [7, None, "text", torch.rand(3), [torch.rand(2)], (), {}], ids=repr)
def test_the_state_may_be_anything(mover: Mover, tmp_path: Path, state: object) -> None:
    check_everywhere(mover, tmp_path / "s.pt", state)


def test_a_long_name_or_one_in_unicode_is_fine(mover: Mover, tmp_path: Path) -> None:
    for stem in ("x" * 150, "größe", "a b"):
        check_everywhere(mover, tmp_path / f"{stem}.pt", {"a": torch.rand(20_000), "b": torch.rand(2)})


class Loose:
    """A class that no safe load knows."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loose) and bits(self.weight) == bits(other.weight)


def test_tensors_inside_other_objects_are_written_too(mover: Mover, tmp_path: Path) -> None:
    state = {"loose": Loose(torch.rand(4)), "module": torch.nn.Linear(2, 2).weight}
    path = tmp_path / "s.pt"
    check_everywhere(mover, path, state, safe=False)
    assert_same(parse(path, (Loose,)), state)


class Fresh:
    """Makes its tensor anew whenever it is pickled, as `torch.Generator` does."""

    def __getstate__(self) -> Any:
        return {"x": torch.arange(4.0).clone()}


def test_an_object_that_makes_tensors_while_it_is_pickled_is_written(mover: Mover, tmp_path: Path) -> None:
    write(mover, tmp_path / "s.pt", {"f": Fresh()})
    assert bits(torch.load(tmp_path / "s.pt", weights_only=False)["f"].x) == bits(torch.arange(4.0))


def test_a_random_generator_is_written(mover: Mover, tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(7)
    write(mover, tmp_path / "s.pt", {"g": made})
    found = torch.load(tmp_path / "s.pt", weights_only=False)["g"]
    assert bits(found.get_state()) == bits(made.get_state())


def test_a_wrapper_of_tensors_is_written(mover: Mover, tmp_path: Path) -> None:
    made = TwoTensor(torch.ones(3), torch.zeros(3))
    write(mover, tmp_path / "s.pt", {"t": made, "p": torch.rand(2)})
    found = torch.load(tmp_path / "s.pt", weights_only=False)["t"]
    assert bits(found.a) == bits(made.a) and bits(found.b) == bits(made.b)


def test_a_state_that_holds_itself_is_written(mover: Mover, tmp_path: Path) -> None:
    state: list[Any] = [torch.ones(2)]
    state.append(state)
    found = parse_after(mover, tmp_path, state)
    assert found[1] is found and bits(found[0]) == bits(state[0])


def test_attributes_of_a_plain_tensor_are_kept(mover: Mover, tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.tag = "x"  # type: ignore[attr-defined]
    write(mover, tmp_path / "s.pt", {"t": tensor})
    assert torch.load(tmp_path / "s.pt", weights_only=False)["t"].tag == "x"


@pytest.mark.parametrize("order", [1, -1])
def test_one_memory_as_two_dtypes_is_refused_as_stock_refuses_it(order: int) -> None:
    base = torch.arange(16.0)
    state = [base[1:3], base.view(torch.uint8)[2:10]][::order]
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        torch.save(state, io.BytesIO())
    with pytest.raises(RollCkptError, match="types"):
        layout.lay_out(state, "s")


def test_a_tensor_whose_storage_was_freed_is_refused() -> None:
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(16)
    with pytest.raises(RollCkptError, match="storage"):
        layout.lay_out({"t": tensor}, "s")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", ["storage", "conjugate"])
def test_a_storage_of_one_dtype_beside_a_tensor_of_another_is_refused_too(other: str, order: int) -> None:
    base = torch.arange(16.0)
    strange = base.untyped_storage() if other == "storage" else torch.view_as_complex(base.view(8, 2)).conj()
    state = [base[:2], strange][::order]
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        torch.save(state, io.BytesIO())
    with pytest.raises(RollCkptError, match="types"):
        layout.lay_out(state, "s")


trees = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**80), 2**80),
        st.floats(allow_nan=False),
        st.text(max_size=5),
        st.binary(min_size=1, max_size=5),
        st.tuples(st.sampled_from(DTYPES), st.integers(0, 9), st.integers(0, 9)).map(lambda v: ("tensor", *v)),
        st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda v: ("view", *v)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner),
    ),
    max_leaves=12,
)


def grow(tree: Any, flat: torch.Tensor) -> Any:
    """Put tensors where the tree asks for them; views are of one flat storage."""
    match tree:
        case ("tensor", torch.dtype() as dtype, int() as rows, int() as columns):
            return random_tensor(dtype, rows, columns)
        case ("view", int() as start, int() as length):
            return flat[start : start + length]
        case dict():
            return type(tree)((key, grow(value, flat)) for key, value in tree.items())
        case list() | tuple():
            return type(tree)(grow(value, flat) for value in tree)
    return tree


@settings(max_examples=30, deadline=None)
@given(tree=trees)
def test_random_states_load_everywhere(mover: Mover, tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.mktemp("random") / "state.pt"
    check_everywhere(mover, path, grow(tree, torch.arange(60, dtype=torch.float32)))


# ---- sharing


def test_tensors_that_shared_memory_share_it_again(mover: Mover, tmp_path: Path) -> None:
    base = torch.arange(40, dtype=torch.float32)
    state = {"a": base[:10], "b": base[5:15], "apart": base[20:30], "tied": base[:10]}
    for found in (parse_after(mover, tmp_path, state), torch.load(tmp_path / "s.pt", weights_only=True)):
        found["a"][7] = -1
        assert found["b"][2] == -1 and found["tied"][7] == -1
        assert found["a"].untyped_storage()._cdata == found["b"].untyped_storage()._cdata
        assert found["apart"].untyped_storage()._cdata != found["a"].untyped_storage()._cdata


def test_tied_objects_are_one_object_again(mover: Mover, tmp_path: Path) -> None:
    found = parse_after(mover, tmp_path, tied())
    assert found["embed"] is found["head"] and found["list"] is found["again"]
    assert found["list"][0] is found["list"][1]["deep"]
    assert found["data"].data_ptr() == found["embed"].data_ptr()


def test_tensors_are_views_of_the_buffer_and_not_copies(mover: Mover, tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    image = write(mover, path, {"a": torch.zeros(100)})
    buffer = bytearray(path.read_bytes())
    found = parse_(buffer, str(path))["a"]
    at = image.pieces[0].offset
    buffer[at : at + 4] = struct.pack("<f", 2.5)
    assert found[0] == 2.5


def parse_after(mover: Mover, tmp_path: Path, state: object) -> Any:
    write(mover, tmp_path / "s.pt", state)
    return parse(tmp_path / "s.pt")


def test_a_view_of_a_huge_storage_writes_only_its_own_bytes(mover: Mover, tmp_path: Path) -> None:
    huge = torch.zeros(8 << 20)
    state = {"a": huge[1000:1010], "b": huge[5_000_000:5_000_100].view(10, 10)}
    image = write(mover, tmp_path / "s.pt", state)
    assert image.nbytes < 8192
    assert_same(parse(tmp_path / "s.pt"), state)


def test_neighbours_in_one_storage_are_written_once(mover: Mover, tmp_path: Path) -> None:
    flat = random_tensor(torch.bfloat16, 100_000)
    parts = {f"p{i}": flat[i * 1000 : (i + 1) * 1000] for i in range(100)}
    image = write(mover, tmp_path / "s.pt", parts)
    payload = sum(e.nbytes for e in image.extents if not isinstance(e.source, bytes))
    assert payload == 200_000 and image.nbytes < 200_000 + 100 * 600
    assert_same(parse(tmp_path / "s.pt"), parts)


# ---- the file


def test_the_index_points_at_each_tensors_bytes(mover: Mover, tmp_path: Path) -> None:
    flat = random_tensor(torch.bfloat16, 60_000)
    state = {
        "model": {"w": flat[:50_000], "b": flat[50_000:50_010]},
        "list": [torch.arange(7), (torch.rand(3, 3),)],
        "parameter": torch.nn.Parameter(torch.rand(5)),
        "none": torch.empty(0, 4),
        "text": "x",
    }
    image = write(mover, tmp_path / "s.pt", state)
    data = (tmp_path / "s.pt").read_bytes()
    found = {piece.name: piece for piece in image.pieces}
    assert list(found) == ["model.w", "model.b", "list.0", "list.1.0", "parameter", "none"]
    tensors = [*state["model"].values(), state["list"][0], state["list"][1][0], state["parameter"], state["none"]]  # type: ignore[attr-defined,index]
    for piece, tensor in zip(image.pieces, tensors, strict=True):
        assert piece.shape == tuple(tensor.shape) and f"torch.{piece.dtype}" == str(tensor.dtype)
        assert list(data[piece.offset : piece.offset + piece.nbytes]) == bits(tensor)


def test_large_records_lie_at_multiples_of_4096_and_small_ones_of_64(mover: Mover, tmp_path: Path) -> None:
    image = write(mover, tmp_path / "s.pt", across_alignments())
    for start, nbytes in zip(image.crc_patches.records[::2], image.crc_patches.records[1::2], strict=True):
        assert start % (4096 if nbytes >= BLOCK else 64) == 0
    ends = [0, *(extent.offset + extent.nbytes for extent in image.extents)]
    assert [extent.offset for extent in image.extents] == ends[:-1] and ends[-1] == image.nbytes


def test_the_same_state_gives_the_same_bytes(mover: Mover, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = [flat_views(), tied(), python_values(), across_alignments()]
    (tmp_path / "again").mkdir()
    write(mover, tmp_path / "s.pt", state)
    write(mover, tmp_path / "again" / "s.pt", state)
    assert (tmp_path / "s.pt").read_bytes() == (tmp_path / "again" / "s.pt").read_bytes()


def test_only_stable_storages_may_be_copied_later() -> None:
    stable, other = torch.rand(4), torch.rand(4)
    image = layout.lay_out({"a": stable, "b": other[1:3]}, "s", lambda s: s._cdata == stable.untyped_storage()._cdata)
    memory = [extent for extent in image.extents if not isinstance(extent.source, bytes)]
    assert [extent.lifetime for extent in memory] == [True, False]
    assert [extent.nbytes for extent in memory] == [16, 8]


def record(name: bytes, data: bytes, padding: int, *, header_at: int) -> bytes:
    """One stored record as stock writes it: sizes and CRC in the descriptor behind it."""
    fixed = struct.pack("<4s3H2H3I2H", b"PK\x03\x04", 0, 0x0808, 0, 0, 0, 0, 0, 0, len(name), 4 + padding)
    header = fixed + name + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    assert (header_at + len(header)) % 64 == 0
    return header + data + struct.pack("<4s3I", b"PK\x07\x08", zlib.crc32(data), len(data), len(data))


def directory_entry(name: bytes, data: bytes, header_at: int) -> bytes:
    sizes = (zlib.crc32(data), len(data), len(data), len(name), 0, 0, 0, 0, 0, header_at)
    return struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 0, 0, 0x0808, 0, 0, 0, *sizes) + name


def test_a_whole_file_byte_for_byte(mover: Mover, tmp_path: Path) -> None:
    pickled = (
        b"\x80\x02}qA(X\x01\x00\x00\x00nqBK\x07X\x01\x00\x00\x00wqC"
        b"ctorch._utils\n_rebuild_tensor_v2\nq\x03("
        b"(X\x07\x00\x00\x00storageq\x00ctorch\nShortStorage\nq\x01X\x01\x00\x00\x000"
        b"X\x03\x00\x00\x00cpuq\x02K\x03tQK\x00K\x03\x85K\x01\x85\x89"
        b"ccollections\nOrderedDict\nq\x04)RtRu."
    )
    records = [
        (b"tiny/data.pkl", pickled),
        (b"tiny/byteorder", b"little"),
        (b"tiny/data/0", b"\x01\x00\x02\x00\xff\xff"),
        (b"tiny/version", b"3\n"),
        (b"tiny/.data/serialization_id", b"1111111111111111111122222222222222222222"),
    ]
    wanted, directory = b"", b""
    for name, data in records:
        unpadded = len(wanted) + 34 + len(name)
        directory += directory_entry(name, data, len(wanted))
        wanted += record(name, data, -unpadded % 64, header_at=len(wanted))
    at = len(wanted)
    wanted += directory
    wanted += struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 798, 45, 0, 0, 5, 5, len(directory), at)
    wanted += struct.pack("<4sIQI", b"PK\x06\x07", 0, at + len(directory), 1)
    wanted += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 5, 5, len(directory), at, 0)

    write(mover, tmp_path / "tiny.pt", {"n": 7, "w": torch.tensor([1, 2, -1], dtype=torch.int16)})
    found = (tmp_path / "tiny.pt").read_bytes()
    assert sys.byteorder == "little"
    assert blanked(found) == blanked(wanted)
    assert len(found) == 1165


def blanked(data: bytes) -> bytes:
    """The file without its fingerprint and that record's CRC, which other tests look at."""
    copy = bytearray(data)
    at = copy.index(b"PK\x07\x08", copy.index(b"/.data/serialization_id")) - 40
    assert copy[at : at + 40].isdigit()
    copy[at : at + 40] = b"0" * 40
    copy[at + 44 : at + 48] = bytes(4)
    entry = copy.index(b"tiny/.data/serialization_id", at) - 46
    copy[entry + 16 : entry + 20] = bytes(4)
    return bytes(copy)


def test_the_fingerprint_tells_contents_and_names_apart(mover: Mover, tmp_path: Path) -> None:
    def fingerprint(state: object) -> bytes:
        write(mover, tmp_path / "s.pt", state)
        with zipfile.ZipFile(tmp_path / "s.pt") as archive:
            return archive.read("s/.data/serialization_id")

    one, same = fingerprint({"a": torch.zeros(9)}), fingerprint({"a": torch.zeros(9)})
    contents, longer = fingerprint({"a": torch.ones(9)}), fingerprint([torch.zeros(9), torch.zeros(9)])
    assert one == same and len(one) == 40
    assert contents[:20] == one[:20] and contents[20:] != one[20:]
    assert longer[:20] != one[:20]


def test_more_records_than_a_plain_directory_counts(mover: Mover, tmp_path: Path) -> None:
    made = Archive("s")
    made.add("data.pkl", pickle.dumps({"a": 1}, protocol=2))
    for key in range(66_000):
        made.add(f"data/{key}", b"")
    made.add_serialization_id()
    image = FileImage(made.close(), made.extents, made.crc_patches)
    mover.save(tmp_path / "s.pt", cluster_save.native_image(image)).wait_written()
    with zipfile.ZipFile(tmp_path / "s.pt") as archive:
        assert len(archive.namelist()) == 66_002
    assert parse(tmp_path / "s.pt") == {"a": 1}


def test_wide_directory_entries_are_read_by_python_and_by_us(
    mover: Mover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A record of 4 GiB is too slow for a test. Zip's marker for "look in the zip64 field" is the limit itself,
    # so the image is laid out with another limit, and only the marker is put right afterwards.
    limit = 100_000
    state = {"small": torch.arange(9), "big": random_tensor(torch.uint8, 3 * limit), "far": torch.rand(3)}
    monkeypatch.setattr(archive_module, "ZIP64_LIMIT", limit)
    write(mover, tmp_path / "s.pt", state)
    monkeypatch.undo()
    data = (tmp_path / "s.pt").read_bytes().replace(struct.pack("<I", limit), b"\xff" * 4)
    (tmp_path / "s.pt").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "s.pt") as archive:
        assert archive.testzip() is None
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert sizes["s/data/1"] == 3 * limit
        assert archive.getinfo("s/data/2").header_offset > limit
    assert_same(parse(tmp_path / "s.pt"), state)
    assert_same(torch.load(tmp_path / "s.pt", weights_only=True), state)


# ---- stock files


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_what_stock_wrote_is_read(tmp_path: Path, state: Callable[[], Any]) -> None:
    made = state()
    torch.save(made, tmp_path / "s.pt")
    assert_same(parse(tmp_path / "s.pt"), torch.load(tmp_path / "s.pt", weights_only=False))


def behind(keys: int, state: dict[str, Any]) -> dict[str, Any]:
    """The state after so many other entries: what occurs often in it is then pickled as another number."""
    return {**{f"k{n}": n for n in range(keys)}, **state}


def tuples_in(values: Any) -> Iterator[Any]:
    """The innermost tuples, of what sets are made of, too."""
    for value in values:
        if isinstance(value, tuple) and not any(isinstance(part, list | tuple) for part in value):
            yield value
        elif isinstance(value, list | tuple):
            yield from tuples_in(value)


def no_storage(persistent_id: object) -> Any:
    raise AssertionError(f"a pickle without tensors refers to {persistent_id}")


def test_every_key_that_is_no_plain_value_is_checked_before_it_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(HashGuard, "check", lambda self, values: checked.extend(values))
    for n in range(256):
        repeated = [((i, "label"), {"step": i}, torch.Size((i, 2)), n, n << 8, chr(n), -n << 99, n / 3) for i in (1, 2)]
        keys: dict[Any, Any] = {(n, n): {(n, "one"): frozenset([(n,)])}}
        for protocol in (2, 4):
            state = behind(
                n, {"repeated": repeated, "set": {(n, 2), (3, n)}, "ordered": OrderedDict(a=n), "keys": keys}
            )
            assert Unpickler(pickle.dumps(state, protocol), no_storage, {}, 1000).load() == state
            assert {(n, n), (n, "one"), (n, 2), (3, n), (n,)} <= set(tuples_in(checked)), n
            checked.clear()


@pytest.mark.parametrize(
    "keys", [n if n in range(134, 146) else pytest.param(n, marks=pytest.mark.long) for n in range(256)]
)
def test_shapes_by_name_load_behind_any_number_of_entries(mover: Mover, tmp_path: Path, keys: int) -> None:
    state = behind(
        keys, {"param_shapes": OrderedDict((f"layers.{i}.weight", torch.Size((i, 64))) for i in range(3000))}
    )
    write(mover, tmp_path / "s.pt", state)
    torch.save(state, tmp_path / "stock.pt")
    assert parse(tmp_path / "s.pt") == parse(tmp_path / "stock.pt") == state


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    shape: tuple[int, ...]


@dataclass
class Settings:
    names: list[int]


@dataclass
class Part:
    """Made again by a call, with what all parts share."""

    settings: Settings
    number: int

    def __reduce__(self) -> Any:
        return Part, (self.settings, self.number)


def nested(levels: int) -> Any:
    return {"a": nested(levels - 1), "b": [(levels,)]} if levels else [levels]


def large_states() -> dict[str, Any]:
    key, shared = tuple(range(40)), Settings(list(range(2000)))
    return {
        **{f"numbers like {bytes([n])!r}": [(i, n) for i in range(5000)] for n in b"Rsub\x90\x91"},
        "nested keys": {(i, (f"n{i}", i)): 0 for i in range(5000)},
        "one key": [{key: i} for i in range(5000)],
        "sets": [{(i, 1), (i, 2)} for i in range(2000)],
        "nested": nested(200),
        "records as keys": {Key(f"n{i}", (i,)): i for i in range(2000)},
        "one record in many": [Part(shared, i) for i in range(1000)],
    }


@pytest.mark.parametrize("what", large_states())
def test_a_large_state_is_no_bomb(tmp_path: Path, what: str) -> None:
    state = large_states()[what]
    torch.save(state, tmp_path / "s.pt")
    assert parse(tmp_path / "s.pt", (Key, Settings, Part)) == state


def test_the_device_is_the_one_asked_for(mover: Mover, tmp_path: Path) -> None:
    write(mover, tmp_path / "s.pt", {"a": torch.rand(3)})
    buffer = bytearray((tmp_path / "s.pt").read_bytes())
    for location in ("meta", torch.device("meta"), {"cpu": "meta"}):
        assert parse_(buffer, "s.pt", location)["a"].device.type == "meta"
    asked = []

    def keep(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        asked.append(tag)
        return storage

    parse_(buffer, "s.pt", keep)
    assert asked == ["cpu"]


# ---- damage


@pytest.fixture(scope="module")
def sample(mover: Mover, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sample") / "s.pt"
    write(mover, path, {"a": torch.arange(600.0), "b": [torch.ones(3, dtype=torch.bfloat16)], "c": {"d": 2}})
    return path.read_bytes()


def refused(data: bytes) -> str:
    with pytest.raises(Damaged, match=r"^some/file\.pt: ") as caught:
        parse_(bytearray(data), "some/file.pt")
    return str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_ends(sample: bytes) -> None:
    for length in [*range(0, len(sample), 97), *range(len(sample) - 120, len(sample) - 2)]:
        refused(sample[:length])


@pytest.mark.parametrize("lost", [1, 2])
def test_a_file_without_its_last_bytes_is_refused(sample: bytes, lost: int) -> None:
    refused(sample[:-lost])


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06", b"\0" * 5000, b"garbage" * 999, pickle.dumps({"a": 1})], ids=len)
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    refused(data)


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in records.items():
            made.writestr(f"s/{name}", data)
    return file.getvalue()


def contents(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_an_archive_made_by_python_is_read_so_that_the_refusals_below_mean_something(sample: bytes) -> None:
    assert parse_(bytearray(archive(contents(sample))), "s.pt")["c"] == {"d": 2}


def test_a_compressed_record_is_refused(sample: bytes) -> None:
    assert "compressed" in refused(archive(contents(sample), zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_a_missing_record_is_refused_by_name(sample: bytes, name: str) -> None:
    assert name in refused(archive({k: v for k, v in contents(sample).items() if k != name}))


def test_a_file_of_the_other_byte_order_is_refused(sample: bytes) -> None:
    assert "byte order" in refused(archive({**contents(sample), "byteorder": b"big"}))


def test_a_storage_of_another_size_than_the_pickle_says_is_refused(sample: bytes) -> None:
    records = contents(sample)
    for wrong in (records["data/0"][:-4], records["data/0"] + bytes(4), b""):
        assert "storage 0" in refused(archive({**records, "data/0": wrong}))


def test_a_record_past_the_end_is_refused(sample: bytes) -> None:
    at = sample.index(b"s/data/0", sample.index(b"PK\x01\x02")) - 46
    far = bytearray(sample)
    far[at + 20 : at + 28] = struct.pack("<2I", 1 << 30, 1 << 30)
    assert "past the end" in refused(bytes(far))
    far = bytearray(sample)
    far[at + 42 : at + 46] = struct.pack("<I", len(sample) - 40)
    refused(bytes(far))


@pytest.mark.parametrize("field", [8, 16, 24, 32, 40, 48])
@pytest.mark.parametrize("value", [0, 1, 2**31, 2**63 - 1, 2**64 - 1])
def test_a_hostile_directory_record_is_refused_or_harmless(sample: bytes, field: int, value: int) -> None:
    at = sample.rindex(b"PK\x06\x06")
    hostile = bytearray(sample)
    hostile[at + field : at + field + 8] = struct.pack("<Q", value)
    try:
        found = parse_(hostile, "some/file.pt")
    except Damaged as problem:
        assert "some/file.pt" in str(problem)
    else:
        assert found["c"] == {"d": 2}


@pytest.mark.parametrize("value", [0, 1, 2**40, 2**63, 2**64 - 40])
def test_a_hostile_locator_is_refused(sample: bytes, value: int) -> None:
    at = sample.rindex(b"PK\x06\x07")
    refused(sample[: at + 8] + struct.pack("<Q", value) + sample[at + 16 :])


def outcome_of(sample: bytes, data_pkl: bytes) -> str:
    """Refused as damaged or for a name, or loaded; anything else fails the test."""
    try:
        parse_(bytearray(archive({**contents(sample), "data.pkl": data_pkl})), "some/file.pt")
    except (Damaged, UnsupportedError):
        return "refused"
    return "loaded"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_a_flipped_byte_is_refused_or_loads(sample: bytes) -> None:
    pickled = contents(sample)["data.pkl"]
    outcomes = []
    for at in range(len(pickled)):
        flipped = pickled[:at] + bytes([pickled[at] ^ (1 << at % 8)]) + pickled[at + 1 :]
        outcomes.append(outcome_of(sample, flipped))
    assert outcomes.count("refused") > len(pickled) // 3


def test_a_truncated_pickle_is_refused(sample: bytes) -> None:
    pickled = contents(sample)["data.pkl"]
    assert {outcome_of(sample, pickled[:length]) for length in range(0, len(pickled), 7)} == {"refused"}


class Bomb:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._what = function, arguments

    def __reduce__(self) -> Any:
        return self._what


@pytest.mark.parametrize("how", ["os.system", "builtins.eval", "subprocess.Popen"])
def test_a_forbidden_name_is_refused_and_nothing_is_executed(mover: Mover, tmp_path: Path, how: str) -> None:
    trace = tmp_path / "trace"
    bombs = {
        "os.system": Bomb(os.system, f"touch {trace}"),
        "builtins.eval": Bomb(eval, f"open({str(trace)!r}, 'w')"),
        "subprocess.Popen": Bomb(subprocess.Popen, ["touch", str(trace)]),
    }
    write(mover, tmp_path / "s.pt", {"w": torch.ones(2), "bomb": bombs[how]})
    with pytest.raises(UnsupportedError) as caught:
        parse(tmp_path / "s.pt")
    assert str(tmp_path / "s.pt") in str(caught.value) and "load.allow: [" in str(caught.value)
    assert "its entry 'bomb'" in str(caught.value)
    assert how.rpartition(".")[2] in str(caught.value)
    assert not trace.exists()
    torch.load(tmp_path / "s.pt", weights_only=False)
    if how == "builtins.eval":
        assert trace.exists(), "the bomb is a dud, and the test shows nothing"


def test_what_is_allowed_by_name_loads_and_its_neighbours_do_not(mover: Mover, tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    write(mover, path, {"x": Loose(torch.ones(2))})
    with pytest.raises(UnsupportedError, match="Loose"):
        parse(path)
    assert parse(path, (Loose,))["x"] == Loose(torch.ones(2))
    with pytest.raises(UnsupportedError, match="Loose"):
        parse(path)


def test_a_safe_load_refuses_a_storage_of_another_file(sample: bytes) -> None:
    pickled = contents(sample)["data.pkl"]
    assert outcome_of(sample, pickled.replace(b"\x01\x00\x00\x000", b"\x01\x00\x00\x009")) == "refused"


def test_a_tensor_that_leaves_its_storage_is_refused(sample: bytes) -> None:
    grown = contents(sample)["data.pkl"].replace(b"M\x58\x02\x85", b"M\x59\x02\x85")
    assert grown != contents(sample)["data.pkl"]
    assert outcome_of(sample, grown) == "refused"


# ---- what a safe load would refuse


def unsafe(state: object, allow: tuple[Any, ...] = ()) -> dict[str, list[str]]:
    found = safe_pickle.unsafe_parts(state, allow)
    assert not any(told.reasons for told in found.values())
    return {key: told.names for key, told in found.items()}


def test_unsafe_parts_name_the_entry_and_the_name_in_it() -> None:
    state = {
        "module": {"w": torch.ones(3), "p": torch.nn.Parameter(torch.ones(2))},
        "fine": [1, None, OrderedDict()],
        "client": {"deep": [Loose(torch.ones(1))]},
        3: Loose(torch.ones(1)),
    }
    name = f"{__name__}.Loose"
    assert unsafe(state) == {"client": [name], "3": [name]}
    assert unsafe(state, (Loose,)) == {}
    assert unsafe([Loose(torch.ones(1))]) == {"": [name]}


def test_a_state_of_plain_values_has_no_unsafe_parts() -> None:
    for state in (flat_views, python_values, tied, other_tensors, with_gradients):
        assert unsafe(state()) == {}


def test_unsafe_parts_agree_with_what_loads(mover: Mover, tmp_path: Path) -> None:
    state = {"path": Path("a"), "array": torch.rand(3).numpy(), "fine": 1, "module": torch.nn.Identity()}
    assert set(unsafe(state)) == {"module"}
    write(mover, tmp_path / "s.pt", state)
    with pytest.raises(UnsupportedError):
        parse(tmp_path / "s.pt")


class Colour(enum.Enum):
    RED = 1


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 pickle the member of an enumeration: by `getattr`."""

    def __init__(self, kind: Any, name: str) -> None:
        self.found = kind, name

    def __reduce__(self) -> Any:
        return getattr, self.found


def test_members_of_enumerations_load_as_every_python_pickles_them(mover: Mover, tmp_path: Path) -> None:
    state = {"colour": ByName(Colour, "RED"), "by_value": Colour.RED}
    write(mover, tmp_path / "s.pt", state)
    assert unsafe(state) == {}
    assert parse(tmp_path / "s.pt") == {"colour": Colour.RED, "by_value": Colour.RED}
    write(mover, tmp_path / "s.pt", {"colour": ByName(Colour, "mro")})
    with pytest.raises(UnsupportedError, match=r"Colour\.mro"):
        parse(tmp_path / "s.pt", (Colour,))
