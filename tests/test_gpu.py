"""Saves from CUDA memory. Needs a device; elsewhere `pytest -m gpu` collects and skips them all."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_ckpt import native, saver
from roll_ckpt.layout import torch_zip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BLOCK = 64 << 10
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
]


@pytest.fixture(scope="module")
def mover() -> Iterator[native.Mover]:
    mover = native.Mover(native.Arena(64 << 20, BLOCK), copy_threads=2, io_threads=2)
    yield mover
    mover.shutdown(10)


def start(mover: native.Mover, path: Path, state: object, *, stable: bool) -> tuple[native.Transfer, Any]:
    """A transfer, and the image that keeps its sources alive."""
    image = torch_zip.lay_out(state, path.stem, lambda storage: stable)
    return mover.save(path, saver.native_image(image), overlap=stable), image


def write(mover: native.Mover, path: Path, state: object, *, stable: bool = False) -> None:
    transfer, image = start(mover, path, state, stable=stable)
    assert transfer.wait_copied(60)
    transfer.wait_written(60)
    del image


def random_tensor(dtype: torch.dtype, numel: int) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(numel, device="cuda") < 0.5
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, device="cuda").view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def test_the_extension_can_use_the_device() -> None:
    assert native.cuda_compiled and native.cuda_status() == ""


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_loads_as_stock_loads_its_own_file(
    mover: native.Mover, tmp_path: Path, dtype: torch.dtype, stable: bool
) -> None:
    tensor = random_tensor(dtype, 50_000)
    state = {"whole": tensor, "part": tensor[100:200], "odd": tensor[1::3], "host": tensor[:7].cpu()}
    write(mover, tmp_path / "ours.pt", state, stable=stable)
    torch.save(state, tmp_path / "stock.pt")
    assert zipfile.ZipFile(tmp_path / "ours.pt").testzip() is None
    for location in (None, "cpu"):
        ours = torch.load(tmp_path / "ours.pt", location, weights_only=True)
        stock = torch.load(tmp_path / "stock.pt", location, weights_only=True)
        for key in state:
            assert (ours[key].dtype, ours[key].device) == (stock[key].dtype, stock[key].device)
            assert torch.equal(bits(ours[key]), bits(stock[key])), key
    assert ours["whole"].untyped_storage()._cdata == ours["part"].untyped_storage()._cdata


def test_we_read_it_back_to_the_device_and_to_the_host(mover: native.Mover, tmp_path: Path) -> None:
    state = {"w": torch.nn.Parameter(torch.rand(300_000, device="cuda")), "n": 3}
    write(mover, tmp_path / "s.pt", state)
    for location, device in (("cpu", "cpu"), ("cuda", "cuda"), (None, "cuda")):
        found = torch_zip.parse(bytearray((tmp_path / "s.pt").read_bytes()), "s.pt", location)
        assert found["w"].device.type == device and torch.equal(bits(found["w"]), bits(state["w"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_a_copy_comes_after_what_the_current_stream_was_given_before(
    mover: native.Mover, tmp_path: Path, stable: bool, side: bool
) -> None:
    tensor = torch.zeros(4 << 20, device="cuda")
    stream = torch.cuda.Stream() if side else torch.cuda.default_stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second or more: a copy that does not wait reads zeros
        tensor.fill_(1)
        transfer, image = start(mover, tmp_path / "s.pt", {"w": tensor}, stable=stable)
        assert transfer.wait_copied(60)
        tensor.zero_()
    transfer.wait_written(60)
    del image
    assert bool((torch.load(tmp_path / "s.pt", "cpu")["w"] == 1).all())


def test_a_copy_that_overlaps_is_done_when_the_fence_says_so(mover: native.Mover, tmp_path: Path) -> None:
    tensor = torch.ones(8 << 20, dtype=torch.bfloat16, device="cuda")
    transfer, image = start(mover, tmp_path / "s.pt", {"w": tensor}, stable=True)
    assert transfer.overlapped
    assert transfer.wait_copied(60)
    tensor.zero_()
    torch.cuda.synchronize()
    transfer.wait_written(60)
    del image
    assert bool((torch.load(tmp_path / "s.pt", "cpu")["w"] == 1).all())


def test_what_changes_after_an_eager_save_does_not_reach_the_file(mover: native.Mover, tmp_path: Path) -> None:
    tensor = torch.ones(8 << 20, dtype=torch.bfloat16, device="cuda")
    transfer, image = start(mover, tmp_path / "s.pt", {"w": tensor}, stable=False)
    tensor.zero_()
    transfer.wait_written(60)
    del image
    assert bool((torch.load(tmp_path / "s.pt", "cpu")["w"] == 1).all())


def test_a_state_larger_than_the_arena_streams_through_it(tmp_path: Path) -> None:
    small = native.Mover(native.Arena(4 * BLOCK, BLOCK), copy_threads=2, io_threads=2)
    tensor = torch.rand(1 << 20, device="cuda")
    write(small, tmp_path / "s.pt", {"w": tensor}, stable=True)
    assert torch.equal(torch.load(tmp_path / "s.pt", "cpu")["w"], tensor.cpu())
    assert small.arena.peak_bytes <= 4 * BLOCK and small.shutdown(10)


def test_the_arena_is_pinned_once_it_was_warmed_for_a_device(tmp_path: Path) -> None:
    arena = native.Arena(64 * BLOCK, BLOCK)
    assert not arena.pinned
    arena.warm(64 * BLOCK, device=0)
    arena.wait_warm()
    assert arena.pinned and arena.pinned_reason == ""
    own = native.Mover(arena, copy_threads=1, io_threads=1)
    tensor = torch.rand(500_000, device="cuda")
    write(own, tmp_path / "s.pt", {"w": tensor})
    assert torch.equal(torch.load(tmp_path / "s.pt", "cpu")["w"], tensor.cpu())
    assert own.shutdown(10)
