"""The dcp layout: files that stock torch.distributed.checkpoint reads."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock_dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from roll_ckpt.config import Settings
from roll_ckpt.errors import SaveFailed
from roll_ckpt.formats.dcp import items as dcp
from roll_ckpt.formats.dcp.items import Span
from roll_ckpt.formats.image import FileImage, Memory
from roll_ckpt.formats.torch_zip import layout
from roll_ckpt.save import one_file

pytestmark = pytest.mark.core("torch")

FILE = "__0_0.distcp"
TAIL = FileImage.of_bytes(b"end")


def write(path: Path, items: list[tuple[str, torch.Tensor | bytes]]) -> tuple[Span, ...]:
    image, spans = dcp.lay_out(items)
    one_file.write_file(path, image, Settings())
    assert path.stat().st_size == image.nbytes
    return spans


class OurWriter(filesystem.FileSystemWriter):
    """Stock's planning and `.metadata` around a file of ours."""

    def write_data(self, plan: Any, planner: DefaultSavePlanner) -> Future[list[WriteResult]]:
        items: list[tuple[str, Any]] = []
        for item in plan.items:
            data = planner.resolve_data(item)
            items.append((item.index.fqn, data.getvalue() if item.type == WriteItemType.BYTE_IO else data.detach()))
        spans = write(Path(self.path) / FILE, items)
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(item.index, span.length, filesystem._StorageInfo(FILE, span.offset, span.length))
                for item, span in zip(plan.items, spans, strict=True)
            ]
        )
        return done


def tensors() -> dict[str, Any]:
    flat = torch.arange(70_000, dtype=torch.float32)
    return {
        "large": torch.randn(300, 400),
        "small": torch.arange(7, dtype=torch.int64),
        "bf16": torch.randn(1000, 100).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "view": flat[1000:41000].view(200, 200),
        "transposed": torch.randn(30, 50).t(),
        "object": {"step": 7, "names": ["a", "b"]},
    }


def test_stock_torch_reads_what_we_laid_out(tmp_path: Path) -> None:
    saved = tensors()
    stock_dcp.save(saved, storage_writer=OurWriter(tmp_path))
    loaded = {name: torch.zeros_like(v) if isinstance(v, torch.Tensor) else {} for name, v in saved.items()}
    loaded["object"] = {"step": 0, "names": ["", ""]}
    stock_dcp.load(loaded, checkpoint_id=tmp_path)
    for name, value in saved.items():
        same = torch.equal(loaded[name], value) if isinstance(value, torch.Tensor) else loaded[name] == value
        assert same, name


def test_every_item_is_a_sound_archive_of_its_own(tmp_path: Path) -> None:
    items = [(name, value) for name, value in tensors().items() if isinstance(value, torch.Tensor)]
    spans = write(tmp_path / FILE, [*items, ("done before", b"pickled already")])
    data = (tmp_path / FILE).read_bytes()
    for (_, value), span in zip(items, spans, strict=False):
        one = io.BytesIO(data[span.offset : span.offset + span.length])
        assert zipfile.ZipFile(one).testzip() is None
        one.seek(0)
        assert torch.equal(torch.load(one, weights_only=True), value)
    assert data[spans[-1].offset :] == b"pickled already"


def test_the_index_names_each_tensor_and_finds_its_bytes(tmp_path: Path) -> None:
    value = torch.randn(200, 200)
    image, _ = dcp.lay_out([("first", torch.ones(3)), ("second", value)])
    one_file.write_file(tmp_path / FILE, image, Settings())
    first, second = image.pieces
    assert (first.name, second.name, second.shape) == ("first", "second", (200, 200))
    assert second.offset % 4096 == 0
    stored = (tmp_path / FILE).read_bytes()[second.offset : second.offset + second.nbytes]
    assert stored == value.numpy().tobytes()


@pytest.mark.parametrize("items", [[], [("nothing", b"")]])
def test_nothing_is_an_empty_file(tmp_path: Path, items: list[tuple[str, bytes]]) -> None:
    spans = write(tmp_path / FILE, list(items))
    assert (tmp_path / FILE).read_bytes() == b""
    assert all(span == Span(0, 0) for span in spans)


def test_a_form_filled_with_other_tensors_is_the_file_that_they_are_laid_out_as(tmp_path: Path) -> None:
    first = [(name, value.contiguous()) for name, value in tensors().items() if isinstance(value, torch.Tensor)]
    form, spans = dcp.template(first)
    other = [(name, (tensor.clone() + 1).to(tensor.dtype)) for name, tensor in first]
    filled = form.fill((tensor for _, tensor in other), lambda storage: True)
    laid_out, same_spans = dcp.lay_out(other)
    assert spans == same_spans and filled.pieces == laid_out.pieces
    for name, image in (("filled", filled), ("laid_out", laid_out)):
        one_file.write_file(tmp_path / name, image, Settings())
    assert (tmp_path / "filled").read_bytes() == (tmp_path / "laid_out").read_bytes()
    assert all(extent.lifetime for extent in filled.extents if isinstance(extent.source, Memory))


def test_a_form_refuses_a_tensor_of_another_size_and_one_whose_memory_was_freed() -> None:
    form, _ = dcp.template([("a", torch.zeros(10))])
    with pytest.raises(ValueError, match="44 bytes, its place in the file 40"):
        form.fill([torch.zeros(11)], lambda storage: False)
    freed = torch.zeros(10)
    freed.untyped_storage().resize_(0)
    with pytest.raises(SaveFailed, match="its memory was freed"):
        form.fill([freed], lambda storage: False)


def test_an_item_in_a_slot_of_any_size_is_a_sound_archive(tmp_path: Path) -> None:
    value = {"numbers": list(range(100)), "tensor": torch.arange(5)}
    needed = layout.lay_out(value, dcp.ARCHIVE).nbytes
    for slot in (0, needed, needed + 1, needed + 100, 1 << 17, 1 << 20):
        image = layout.lay_out(value, dcp.ARCHIVE, at_least=slot)
        assert image.nbytes == max(slot, needed)
        joined = dcp.join([(Span(64, image.nbytes), image), (dcp.place(64 + image.nbytes, 3), TAIL)])
        one_file.write_file(tmp_path / "file", joined, Settings())
        data = (tmp_path / "file").read_bytes()
        assert data.endswith(b"end") and len(data) == joined.nbytes
        archive = data[64 : 64 + image.nbytes]
        assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None
        loaded = torch.load(io.BytesIO(archive), weights_only=True)
        assert loaded["numbers"] == value["numbers"] and torch.equal(loaded["tensor"], torch.arange(5))
