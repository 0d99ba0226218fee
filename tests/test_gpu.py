"""Saves from CUDA memory. Needs a device; elsewhere `pytest -m gpu` collects and skips them all."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_made import HandMadeImage

from roll_ckpt.errors import SourceChanged
from roll_ckpt.formats.torch_zip import layout
from roll_ckpt.formats.torch_zip.read import parse
from roll_ckpt.native import extension
from roll_ckpt.native.extension import Arena
from roll_ckpt.native.mover import Mover, Transfer
from roll_ckpt.save import cluster_save

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
def mover() -> Iterator[Mover]:
    mover = Mover(Arena(64 << 20, BLOCK), copy_threads=2, io_threads=2)
    yield mover
    mover.shutdown(10)


def start(mover: Mover, path: Path, state: object, *, stable: bool) -> tuple[Transfer, Any]:
    """A transfer, and the image that keeps its sources alive."""
    image = layout.lay_out(state, path.stem, lambda storage: stable)
    return mover.save(path, cluster_save.native_image(image), overlap=stable), image


def write(mover: Mover, path: Path, state: object, *, stable: bool = False) -> None:
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
    assert extension.cuda_compiled and extension.cuda_status() == ""


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_loads_as_stock_loads_its_own_file(
    mover: Mover, tmp_path: Path, dtype: torch.dtype, stable: bool
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


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_small_tensors_of_every_dtype_arrive_each_in_its_place(
    tmp_path: Path, dtype: torch.dtype, stable: bool
) -> None:
    own = Mover(Arena(64 << 20, 1 << 20), copy_threads=2, io_threads=2)
    pool = random_tensor(dtype, 400_000)
    generator = random.Random(str(dtype))
    sizes = [generator.choice([1, 2, 3, 7, 16, 100, 1000, 5000]) for _ in range(1000)]
    state: dict[str, torch.Tensor] = {}
    for number, size in enumerate(sizes):
        start = generator.randrange(pool.numel() - size)
        piece = pool[start : start + size]  # at any address: words of every width
        state[f"t{number}"] = piece.cpu() if number % 10 == 9 else piece if number % 10 == 8 else piece.clone()
    write(own, tmp_path / "s.pt", state, stable=stable)
    assert own.arena.pinned, own.arena.pinned_reason
    assert zipfile.ZipFile(tmp_path / "s.pt").testzip() is None
    loaded = torch.load(tmp_path / "s.pt", "cpu", weights_only=True)
    assert [name for name in state if not torch.equal(bits(loaded[name]), bits(state[name]))] == []
    assert own.shutdown(10)


def test_extents_that_lie_anywhere_arrive_and_their_neighbours_stay(mover: Mover, tmp_path: Path) -> None:
    """As a layout with another alignment would have them: gaps, host bytes between, pieces cut by blocks."""
    generator = random.Random(0)
    device = torch.randint(0, 256, (8 << 20,), dtype=torch.uint8, device="cuda")
    host = device.cpu()
    rows, wanted, at = [], bytearray(), 0
    while at < 6 << 20:
        nbytes = generator.choice([1, 3, 15, 16, 17, 255, 4096, 4097, 65_535, 65_536, 200_000])
        start, gap = generator.randrange(len(host) - nbytes), generator.choice([0, 0, 1, 8, 64])
        source, number = (host, -1) if generator.random() < 0.3 else (device, 0)
        rows.append((at + gap, source.data_ptr() + start, nbytes, generator.random() < 0.5, number))
        wanted += bytes(gap) + bytes(host[start : start + nbytes].numpy())
        at += gap + nbytes
    image = HandMadeImage(at)
    image.add_many(rows)
    image.stream(0, torch.cuda.current_stream().cuda_stream)
    mover.save(tmp_path / "f", image).wait_written(60)
    assert (tmp_path / "f").read_bytes() == wanted


def test_we_read_it_back_to_the_device_and_to_the_host(mover: Mover, tmp_path: Path) -> None:
    state = {"w": torch.nn.Parameter(torch.rand(300_000, device="cuda")), "n": 3}
    write(mover, tmp_path / "s.pt", state)
    for location, device in (("cpu", "cpu"), ("cuda", "cuda"), (None, "cuda")):
        found = parse(bytearray((tmp_path / "s.pt").read_bytes()), "s.pt", location)
        assert found["w"].device.type == device and torch.equal(bits(found["w"]), bits(state["w"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_a_copy_comes_after_what_the_current_stream_was_given_before(
    mover: Mover, tmp_path: Path, stable: bool, side: bool
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


def test_a_copy_that_overlaps_is_done_when_the_fence_says_so(mover: Mover, tmp_path: Path) -> None:
    tensor = torch.ones(8 << 20, dtype=torch.bfloat16, device="cuda")
    transfer, image = start(mover, tmp_path / "s.pt", {"w": tensor}, stable=True)
    assert transfer.overlapped
    assert transfer.wait_copied(60)
    tensor.zero_()
    torch.cuda.synchronize()
    transfer.wait_written(60)
    del image
    assert bool((torch.load(tmp_path / "s.pt", "cpu")["w"] == 1).all())


@pytest.mark.parametrize("check", ["sample", "full"])
def test_a_change_before_the_copy_is_noticed(tmp_path: Path, check: str) -> None:
    mover = Mover(Arena(64 << 20, BLOCK), copy_threads=2, io_threads=2)
    tensor = torch.ones(4 << 20, device="cuda")
    image = layout.lay_out({"weight": tensor}, "f", lambda storage: True)
    noticed = 0
    for turn in range(20):
        transfer = mover.save(tmp_path / f"{turn}", cluster_save.native_image(image), overlap=True, check=check)
        late = not transfer.copied
        tensor.data.add_(1)  # counts no version
        torch.cuda.synchronize()
        try:
            transfer.wait_written(60)
            saved = torch.load(tmp_path / f"{turn}")["weight"]
            assert saved.min() == saved.max(), "torn"
        except SourceChanged:
            noticed += late
    mover.shutdown(10)
    assert noticed > 0


def test_a_save_whose_sources_stay_passes_its_check(mover: Mover, tmp_path: Path) -> None:
    tensors = {str(i): torch.rand(1000 + i, device="cuda") for i in range(300)}
    image = layout.lay_out(tensors, "f", lambda storage: True)
    for check in ("sample", "full"):
        transfer = mover.save(tmp_path / check, cluster_save.native_image(image), overlap=True, check=check)
        transfer.wait_written(60)


def test_what_changes_after_an_eager_save_does_not_reach_the_file(mover: Mover, tmp_path: Path) -> None:
    tensor = torch.ones(8 << 20, dtype=torch.bfloat16, device="cuda")
    transfer, image = start(mover, tmp_path / "s.pt", {"w": tensor}, stable=False)
    tensor.zero_()
    transfer.wait_written(60)
    del image
    assert bool((torch.load(tmp_path / "s.pt", "cpu")["w"] == 1).all())


def test_a_state_larger_than_the_arena_streams_through_it(tmp_path: Path) -> None:
    small = Mover(Arena(4 * BLOCK, BLOCK), copy_threads=2, io_threads=2)
    tensor = torch.rand(1 << 20, device="cuda")
    write(small, tmp_path / "s.pt", {"w": tensor}, stable=True)
    assert torch.equal(torch.load(tmp_path / "s.pt", "cpu")["w"], tensor.cpu())
    assert small.arena.peak_bytes <= 4 * BLOCK and small.shutdown(10)


def test_a_save_during_a_capture_is_refused_and_leaves_the_graph_alone(mover: Mover, tmp_path: Path) -> None:
    tensor, graph = torch.zeros(1000, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensor.add_(1)
        with pytest.raises(RuntimeError, match="graph is being captured"):
            start(mover, tmp_path / "s.pt", {"w": tensor}, stable=True)
    graph.replay()
    write(mover, tmp_path / "s.pt", {"w": tensor})
    assert bool((torch.load(tmp_path / "s.pt", "cpu")["w"] == 1).all())


def test_a_graph_can_be_captured_while_a_save_is_copied(tmp_path: Path) -> None:
    """The first copies pin memory, load the kernel and open streams: calls that a capture forbids other threads."""
    own = Mover(Arena(300 << 20, BLOCK), copy_threads=2, io_threads=2)
    tensor, other, graph = torch.rand(64 << 20, device="cuda"), torch.zeros(1000, device="cuda"), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # not torch.cuda.graph, which waits for the device first
        graph.capture_begin()
        with torch.cuda.stream(torch.cuda.default_stream()):
            transfer, image = start(own, tmp_path / "s.pt", {"w": tensor}, stable=True)
        other.add_(1)
        assert transfer.wait_copied(60)
        graph.capture_end()
    graph.replay()
    transfer.wait_written(60)
    del image
    torch.cuda.synchronize()
    assert float(other.sum()) == 1000 and own.shutdown(10)
    assert torch.equal(torch.load(tmp_path / "s.pt", "cpu")["w"], tensor.cpu())


def test_a_thread_of_its_own_can_save(mover: Mover, tmp_path: Path) -> None:
    tensor = torch.rand(1 << 20, device="cuda")
    thread = threading.Thread(target=write, args=(mover, tmp_path / "s.pt", {"w": tensor}), kwargs={"stable": True})
    thread.start()
    thread.join()
    assert torch.equal(torch.load(tmp_path / "s.pt", "cpu")["w"], tensor.cpu())


SECOND_DEVICE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_gpu
from roll_ckpt.native.extension import Arena
from roll_ckpt.native.mover import Mover
tensor = torch.rand(1 << 20, device="cuda:1")
before = torch._C._cuda_hasPrimaryContext(0)
mover = Mover(Arena(64 << 20, test_gpu.BLOCK), copy_threads=2, io_threads=2)
test_gpu.write(mover, Path(sys.argv[1]), {"w": tensor}, stable=True)
assert torch.equal(torch.load(sys.argv[1], "cpu")["w"], tensor.cpu())
assert mover.shutdown(10)
del mover
assert not before and not torch._C._cuda_hasPrimaryContext(0), "a context on device 0"
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_of_another_device_are_saved_without_a_context_on_the_current_one(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", SECOND_DEVICE, str(tmp_path / "s.pt"), here]
    subprocess.run(command, check=True, timeout=300)


def test_memory_is_pinned_as_it_is_needed(tmp_path: Path) -> None:
    """And in several registrations, across whose borders no copy may go."""
    own = Mover(Arena(1 << 36, 3 << 20), copy_threads=2, io_threads=2)
    tensor = torch.rand(60 << 20, device="cuda")
    write(own, tmp_path / "s.pt", {"w": tensor}, stable=True)
    assert own.arena.pinned, own.arena.pinned_reason
    assert torch.equal(torch.load(tmp_path / "s.pt", "cpu")["w"], tensor.cpu()) and own.shutdown(10)


def test_the_arena_is_pinned_once_it_was_warmed_for_a_device(tmp_path: Path) -> None:
    arena = Arena(64 * BLOCK, BLOCK)
    assert not arena.pinned
    arena.warm(64 * BLOCK, device=0)
    arena.wait_warm()
    assert arena.pinned and arena.pinned_reason == ""
    own = Mover(arena, copy_threads=1, io_threads=1)
    tensor = torch.rand(500_000, device="cuda")
    write(own, tmp_path / "s.pt", {"w": tensor})
    assert torch.equal(torch.load(tmp_path / "s.pt", "cpu")["w"], tensor.cpu())
    assert own.shutdown(10)
