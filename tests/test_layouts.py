"""A file laid out again holds what it would hold if it were laid out for the first time, whatever has changed."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_torch_zip import STATES, assert_same, grow, mover, parse, random_tensor, trees

from roll_ckpt.errors import SaveFailed
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.torch_zip import layout
from roll_ckpt.formats.torch_zip.layout import Layouts
from roll_ckpt.native.mover import Mover
from roll_ckpt.save import cluster_save

__all__ = ["mover"]


def lay_out(layouts: Layouts, state: object) -> FileImage:
    return layouts.lay_out("s.pt", state, "s", lambda storage: True)[0]


def write_again(layouts: Layouts, mover: Mover, path: Path, state: object) -> FileImage:
    """Write `state` as the next save of the file; stock torch and we find what stock makes of it."""
    image = lay_out(layouts, state)
    mover.save(path, cluster_save.native_image(image)).wait_written()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    stock = torch.load(file, weights_only=True)
    assert_same(torch.load(path, weights_only=True), stock)
    assert_same(parse(path), stock)
    return image


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_the_same_structure_keeps_its_offsets_and_gets_its_new_bytes(
    mover: Mover, tmp_path: Path, state: Callable[[], Any]
) -> None:
    layouts = Layouts()
    first = write_again(layouts, mover, tmp_path / "s.pt", state())
    second = write_again(layouts, mover, tmp_path / "s.pt", state())
    assert second.pieces is first.pieces and second.crc_patches is first.crc_patches


def test_the_pickle_may_change_and_grow(mover: Mover, tmp_path: Path) -> None:
    layouts = Layouts()
    tensor = random_tensor(torch.float32, 200, 100)
    crc_patches = []
    for step in (1, 255, 256, 2**40, "x" * 500, "x" * 100_000, 3):
        image = write_again(layouts, mover, tmp_path / "s.pt", {"step": step, "w": tensor})
        crc_patches.append(image.crc_patches)
    assert all(kept is crc_patches[0] for kept in crc_patches[:5])
    assert crc_patches[5] is not crc_patches[0] and crc_patches[6] is crc_patches[5]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(w=s["w"].double()),
        lambda s: s.update(w=s["w"].view(torch.int32)),
        lambda s: s.update(w=s["w"].t()),
        lambda s: s.update(w=s["w"][1:]),
        lambda s: s.update(w=s["w"].clone().requires_grad_()),
        lambda s: s.update(w=torch.nn.Parameter(s["w"])),
        lambda s: s.update(b=s["w"]),
        lambda s: s.update(b=s["w"][0]),
        lambda s: s.update(b=s["w"].clone(), w=s.pop("b")),
        lambda s: s.update(v=s.pop("w")),
        lambda s: s.pop("b"),
        lambda s: s.update(c=torch.ones(3)),
        lambda s: s.update(b=None),
        lambda s: s.update(b=[s["b"]]),
        lambda s: s.update(b=torch.empty(0)),
        lambda s: s.update(u=torch.nn.Parameter(s["w"]), v=torch.nn.Parameter(s["w"]), x=s.pop("b"), step=2),
    ],
)
def test_another_structure_is_laid_out_anew(
    mover: Mover, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    layouts = Layouts()
    state = {"w": random_tensor(torch.float32, 6, 6), "b": random_tensor(torch.float32, 6), "step": 1}
    write_again(layouts, mover, tmp_path / "s.pt", state)
    change(state)
    image = write_again(layouts, mover, tmp_path / "s.pt", state)
    assert [piece.name for piece in image.pieces] == [piece.name for piece in layout.lay_out(state, "s").pieces]
    data = (tmp_path / "s.pt").read_bytes()
    for piece in image.pieces:
        tensor = {**state, "b.0": state["b"][0] if isinstance(state.get("b"), list) else None}[piece.name]
        assert tensor is not None and piece.shape == tuple(tensor.shape)
        if tensor.is_contiguous():
            expected = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            assert data[piece.offset : piece.offset + piece.nbytes] == expected


@settings(max_examples=15, deadline=None)
@given(one=trees, other=trees)
def test_random_states_one_after_the_other(
    mover: Mover, tmp_path_factory: pytest.TempPathFactory, one: Any, other: Any
) -> None:
    layouts, path = Layouts(), tmp_path_factory.mktemp("random") / "s.pt"
    for tree in (one, one, other, one):
        write_again(layouts, mover, path, grow(tree, torch.arange(60, dtype=torch.float32)))


def test_the_index_follows_objects_that_change_places(mover: Mover, tmp_path: Path) -> None:
    layouts = Layouts()
    one, other = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(4))
    for middle in (one, other):
        image = write_again(layouts, mover, tmp_path / "s.pt", {"a": one, "b": middle, "c": other})
        data = (tmp_path / "s.pt").read_bytes()
        bytes_of = {piece.name: data[piece.offset : piece.offset + piece.nbytes] for piece in image.pieces}
        assert bytes_of["b"] == middle.detach().numpy().tobytes()


def test_many_objects_that_stand_twice_are_one_object_again(mover: Mover, tmp_path: Path) -> None:
    layouts = Layouts()
    tensors = [torch.rand(3) for _ in range(300)]
    for _ in range(2):
        write_again(layouts, mover, tmp_path / "s.pt", {"a": tensors, "b": list(tensors), "c": tensors[7]})
        loaded = torch.load(tmp_path / "s.pt", weights_only=True)
        assert all(a is b for a, b in zip(loaded["a"], loaded["b"], strict=True)) and loaded["c"] is loaded["a"][7]


def test_memory_that_was_freed_is_refused_at_a_later_save_too() -> None:
    layouts = Layouts()
    tensor = torch.rand(50)
    lay_out(layouts, [tensor])
    tensor.untyped_storage().resize_(0)
    with pytest.raises(SaveFailed, match="memory was freed"):
        lay_out(layouts, [tensor])


def test_no_tensor_is_kept() -> None:
    layouts = Layouts()
    arrays = [torch.rand(50).numpy(), torch.rand(9).numpy()]
    gone = [weakref.ref(array) for array in arrays]
    state = [torch.from_numpy(arrays[0]), torch.nn.Parameter(torch.from_numpy(arrays[1]))]
    for _ in range(2):
        lay_out(layouts, state)
    del state, arrays
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_what_a_safe_load_refuses_is_told_when_it_is_new() -> None:
    layouts = Layouts()

    def unsafe(state: object) -> dict[str, list[str]]:
        return layouts.lay_out("s.pt", state, "s", lambda storage: True)[1]

    assert unsafe({"step": 1, "path": None}) == {}
    assert list(unsafe({"step": 2, "path": Mover})) == ["path"]
    assert unsafe({"step": 3, "path": Mover}) == {}


def test_files_of_different_names_do_not_disturb_each_other(mover: Mover, tmp_path: Path) -> None:
    layouts = Layouts()
    patches = []
    for turn in range(2):
        for name, state in (("a", [torch.ones(3) * turn]), ("b", {"x": torch.zeros(4) + turn})):
            image, _ = layouts.lay_out(name, state, "s", lambda storage: True)
            mover.save(tmp_path / name, cluster_save.native_image(image)).wait_written()
            assert_same(parse(tmp_path / name), state)
            patches.append(image.crc_patches)
    assert patches[0] is patches[2] and patches[1] is patches[3]
