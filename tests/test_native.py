"""The native corridor: what stands on disk, what may be in memory, who is told when it fails."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hand_made import HandMadeImage
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_ckpt.errors import Damaged, SourceChanged
from roll_ckpt.native import extension, files
from roll_ckpt.native.extension import Arena
from roll_ckpt.native.image import Lifetime
from roll_ckpt.native.mover import Mover

pytestmark = pytest.mark.core("python")

BLOCK = 64 << 10
SIZES = [0, 1, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 12345]


@pytest.fixture
def arena() -> Arena:
    return Arena(8 * BLOCK, BLOCK)


@pytest.fixture
def mover(arena: Arena) -> Iterator[Mover]:
    mover = Mover(arena, copy_threads=2, io_threads=3)
    yield mover
    mover.shutdown(10)


def image_of(data: bytes | bytearray, *, lazy: bool = False) -> HandMadeImage:
    image = HandMadeImage(len(data))
    if data:
        image.add(0, extension.address_of(data)[0], len(data), lazy=lazy)
    return image


def block_crcs(data: bytes, block: int = BLOCK) -> list[int]:
    return [zlib.crc32(data[i : i + block]) for i in range(0, len(data), block)]


def wait_until(condition: Callable[[], bool], timeout_s: float = 5) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def in_a_process(code: str, *arguments: str) -> str:
    """Runs code in a fresh interpreter; a test that limits, forks or kills must not do so to its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(files.__file__).parents[2]), str(Path(__file__).parent)]),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- bytes on disk


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_the_file_holds_the_sources_bytes(
    tmp_path: Path, mover: Mover, arena: Arena, size: int, lazy: bool, direct: bool
) -> None:
    data = os.urandom(size)
    if not direct:
        mover = Mover(arena, 2, 2, direct=False)
    transfer = mover.save(tmp_path / "f", image_of(data, lazy=lazy))
    assert transfer.wait_copied()
    digest = transfer.wait_written()
    assert (tmp_path / "f").read_bytes() == data
    assert (digest.nbytes, digest.block_bytes, digest.crcs) == (size, BLOCK, block_crcs(data))
    assert transfer.written and arena.used_bytes == 0
    assert transfer.overlapped == (lazy and size > 0)
    assert direct or transfer.stats["direct"] is False
    read = files.read_file(tmp_path / "f", size, BLOCK, digest.crcs, direct=direct)
    assert len(read) == size and bytes(memoryview(read)) == data
    assert files.digest_file(tmp_path / "f", BLOCK, direct=direct).crcs == digest.crcs
    assert files.digest_file(tmp_path / "f", 1000).crcs == block_crcs(data, 1000)


def test_a_longer_file_that_was_there_is_replaced(tmp_path: Path, mover: Mover) -> None:
    (tmp_path / "f").write_bytes(b"x" * (3 * BLOCK))
    mover.save(tmp_path / "f", image_of(b"short")).wait_written()
    assert (tmp_path / "f").read_bytes() == b"short"


def test_a_file_system_without_direct_io_is_served(mover: Mover) -> None:
    path = Path("/dev/shm") / f"roll-ckpt-test-{os.getpid()}"
    if not os.access(path.parent, os.W_OK):
        pytest.skip("no /dev/shm")
    data = os.urandom(3 * BLOCK + 7)
    try:
        digest = mover.save(path, image_of(data)).wait_written()
        assert path.read_bytes() == data
        assert bytes(memoryview(files.read_file(path, len(data), BLOCK, digest.crcs))) == data
    finally:
        path.unlink(missing_ok=True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_extents_gaps_patches_and_serials_come_out_right(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    check_random_extents(tmp_path_factory.mktemp("random") / "f", random.Random(seed))


@pytest.mark.long
@settings(max_examples=2000, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_many_random_extents_come_out_right(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    check_random_extents(tmp_path_factory.mktemp("random") / "f", random.Random(seed))


def check_random_extents(path: Path, rng: random.Random) -> None:
    """Sources of any size, address and lifetime, in blocks of any size, give the bytes that Python puts together."""
    block = rng.choice([BLOCK, BLOCK, BLOCK + 4096])
    mover = Mover(Arena(rng.choice([2, 3, 40]) * block, block), 2, 2, direct=rng.random() < 0.8)
    size = rng.choice([0, 100, BLOCK, 3 * BLOCK + 5, 11 * BLOCK - 1, 8 * block + rng.randrange(block)])
    image, expected, sources = HandMadeImage(size), bytearray(size), []
    at = 0
    while at < size:
        at += rng.choice([0, 0, 1, 63, 5000, block])
        nbytes = min(rng.choice([0, 1, 17, 4096, 70000, 3 * block, 5 * block + 1]), size - at)
        if nbytes <= 0:
            at += 1
            continue
        data = rng.randbytes(nbytes)
        sources.append(data)
        address = extension.address_of(data)[0]
        if rng.random() < 0.5:  # at an address that agrees with the place in the file, modulo a page
            sources.append(mapped := mmap.mmap(-1, nbytes + mmap.PAGESIZE))
            start = at % mmap.PAGESIZE
            mapped[start : start + nbytes] = data
            address = extension.address_of(mapped)[0] + start
        lazy = rng.choice([Lifetime.UNTIL_SAVE_RETURNS, Lifetime.UNTIL_FENCE, Lifetime.UNTIL_WRITTEN])
        image.add(at, address, nbytes, lazy=lazy)
        expected[at : at + nbytes] = data
        at += nbytes
    at, crcs = 0, []
    while True:  # records, each with its CRC behind it; now and then a serial that the next record may hold
        start = at + rng.choice([0, 3, 1000])
        nbytes = rng.choice([0, 1, 500, BLOCK - 20, 2 * BLOCK + 1])
        hole = rng.choice([0, 1, 300])
        if start + nbytes + hole + 50 > size:
            break
        if crcs and nbytes > 100:
            offset, first = start + rng.randrange(nbytes - 20), rng.randrange(len(crcs))
            image.serial_at(offset, first, len(crcs) - first)
            expected[offset : offset + 20] = b"%020d" % serial_of(crcs[first:])
        index = image.record(start, nbytes)
        crcs.append(zlib.crc32(expected[start : start + nbytes]))
        at = start + nbytes + hole
        image.crc_at(index, at)
        expected[at : at + 4] = crcs[-1].to_bytes(4, "little")
        at += 4
    transfer = mover.save(path, image, overlap=rng.random() < 0.7, check=rng.choice(["off", "sample", "full"]))
    transfer.wait_copied()
    digest = transfer.wait_written()
    assert transfer.wait_released()
    assert path.read_bytes() == expected
    assert digest.crcs == block_crcs(bytes(expected), block)
    assert bytes(memoryview(files.read_file(path, size, block, digest.crcs))) == expected
    mover.shutdown(10)


def serial_of(crcs: list[int]) -> int:
    serial = 0
    for crc in crcs:
        serial = (serial ^ (crc + 0x9E3779B9 + (serial << 6) + (serial >> 2))) & (2**64 - 1)
    return serial


@pytest.mark.parametrize("into_second_block", [1, 2, 3])
def test_a_patch_may_straddle_two_blocks(tmp_path: Path, mover: Mover, into_second_block: int) -> None:
    data = bytearray(os.urandom(3 * BLOCK))
    image = image_of(data)
    image.crc_at(image.record(10, 1000), BLOCK - 4 + into_second_block)
    image.serial_at(2 * BLOCK - 20 + 6 * into_second_block, 0, 1)
    digest = mover.save(tmp_path / "f", image).wait_written()
    crc = zlib.crc32(data[10:1010])
    at = BLOCK - 4 + into_second_block
    data[at : at + 4] = crc.to_bytes(4, "little")
    at = 2 * BLOCK - 20 + 6 * into_second_block
    data[at : at + 20] = b"%020d" % serial_of([crc])
    assert (tmp_path / "f").read_bytes() == data
    assert digest.crcs == block_crcs(bytes(data))


def test_an_image_that_cannot_be_meant_is_refused(tmp_path: Path, mover: Mover) -> None:
    def refused(match: str, size: int, build: Callable[[HandMadeImage], object]) -> None:
        image = HandMadeImage(size)
        build(image)
        with pytest.raises(ValueError, match=match):
            mover.save(tmp_path / "f", image)

    data = bytes(100)
    address = extension.address_of(data)[0]
    refused("ends", 100, lambda i: (i.add(0, address, 50), i.add(49, address, 50)))
    refused("ends", 100, lambda i: (i.add(50, address, 50), i.add(0, address, 50)))
    refused("past the end of the file", 100, lambda i: i.add(51, address, 50))
    refused("past the end of the file", 100, lambda i: i.add(1 << 62, address, 1 << 62))
    refused("past the end of the file", 100, lambda i: i.add(10, address, -5))
    refused("null address", 100, lambda i: i.add(0, 0, 50))
    refused("ends", 100, lambda i: (i.record(0, 50), i.record(10, 50)))
    refused("before the end", 100, lambda i: i.crc_at(i.record(0, 50), 49))
    refused("does not exist", 100, lambda i: i.crc_at(0, 49))
    refused("past the end of the file", 100, lambda i: i.crc_at(i.record(0, 50), 97))
    refused("ends", 100, lambda i: (i.crc_at(i.record(0, 50), 60), i.crc_at(0, 62)))
    assert not (tmp_path / "f").exists()


# ---- memory


def test_a_small_arena_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cannot hold two blocks"):
        Arena(2 * BLOCK - 1, BLOCK)
    with pytest.raises(ValueError, match="multiple of 4096"):
        Arena(100 * BLOCK, BLOCK + 1)
    assert Arena(3 * BLOCK - 1, BLOCK).capacity_bytes == 2 * BLOCK


@pytest.mark.parametrize("lazy", [True, False])
def test_a_file_four_times_the_arena_streams_within_the_cap(
    tmp_path: Path, mover: Mover, arena: Arena, lazy: bool
) -> None:
    data = os.urandom(4 * arena.capacity_bytes + 99)
    transfer = mover.save(tmp_path / "f", image_of(data, lazy=lazy))
    assert transfer.copied and not transfer.overlapped
    transfer.wait_written()
    assert (tmp_path / "f").read_bytes() == data
    assert 0 < arena.peak_bytes <= arena.capacity_bytes
    assert arena.used_bytes == 0


def test_many_saves_at_once_share_a_small_arena(tmp_path: Path) -> None:
    arena = Arena(2 * BLOCK, BLOCK)
    mover = Mover(arena, 2, 2)
    datas = [os.urandom(size) for size in (0, 10, BLOCK, 7 * BLOCK + 3, 12 * BLOCK, 9 * BLOCK - 1)]
    errors: list[BaseException] = []

    def save(index: int) -> None:
        try:
            for round_ in range(3):
                path = tmp_path / f"{index}.{round_}"
                transfer = mover.save(path, image_of(datas[index], lazy=round_ % 2 == 0))
                transfer.wait_copied()
                transfer.wait_written(30)
                assert path.read_bytes() == datas[index]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(len(datas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert arena.peak_bytes <= arena.capacity_bytes and arena.used_bytes == 0
    assert mover.shutdown(5)


def test_a_file_is_made_once_however_late_a_thread_of_its_own_comes(tmp_path: Path) -> None:
    data = b"twelve bytes"
    mover = Mover(Arena(16 * BLOCK, BLOCK), copy_threads=2, io_threads=64)
    paths = [tmp_path / str(number) for number in range(3000)]
    for first in range(0, len(paths), 8):
        for transfer in [mover.save(path, image_of(data)) for path in paths[first : first + 8]]:
            transfer.wait_written(10)
    mover.shutdown(10)
    assert [path for path in paths if path.read_bytes() != data] == []


def test_eager_bytes_are_free_after_save_and_lazy_ones_after_wait_copied(tmp_path: Path) -> None:
    arena = Arena(64 << 20, 1 << 20)
    mover = Mover(arena, 1, 2)
    for round_ in range(4):
        eager, lazy = bytearray(os.urandom(5 << 20)), bytearray(os.urandom(40 << 20))
        expected = bytes(eager) + bytes(lazy)
        image = HandMadeImage(len(expected))
        image.add(0, extension.address_of(eager)[0], len(eager))
        image.add(len(eager), extension.address_of(lazy)[0], len(lazy), lazy=True)
        transfer = mover.save(tmp_path / "f", image, overlap=round_ < 3)
        assert transfer.overlapped == (round_ < 3)
        eager[:] = bytes(len(eager))
        transfer.wait_copied()
        lazy[:] = bytes(len(lazy))
        transfer.wait_written()
        assert (tmp_path / "f").read_bytes() == expected
        assert transfer.stats["lazy_bytes"] == len(lazy) and transfer.stats["eager_bytes"] == len(eager)


def test_warming_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    arena = Arena(32 << 20, 1 << 20)
    mover = Mover(arena)
    arena.warm(1 << 40)
    data = os.urandom(20 << 20)
    transfer = mover.save(tmp_path / "f", image_of(data))
    arena.wait_warm()
    transfer.wait_written()
    assert (tmp_path / "f").read_bytes() == data
    assert not arena.pinned and arena.pinned_reason


# ---- failures


@pytest.mark.parametrize("size", [10, 40 * BLOCK])
def test_a_failed_save_names_its_path_and_frees_the_arena(
    tmp_path: Path, mover: Mover, arena: Arena, size: int
) -> None:
    data = bytes(size)
    (tmp_path / "plain").write_bytes(b"")
    cases: list[tuple[Path, type[OSError]]] = [
        (tmp_path, IsADirectoryError),
        (tmp_path / "none" / "f", FileNotFoundError),
        (tmp_path / "plain" / "f", NotADirectoryError),
    ]
    for path, kind in cases:
        transfer = mover.save(path, image_of(data, lazy=True))
        assert transfer.wait_copied(10)
        for _ in range(2):
            with pytest.raises(kind) as caught:
                transfer.wait_written(10)
            assert caught.value.filename == str(path)
        assert not transfer.written
        assert wait_until(lambda: arena.used_bytes == 0)


def test_a_path_that_is_no_utf8_is_named_too(tmp_path: Path, mover: Mover) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe/f"
    with pytest.raises(FileNotFoundError) as caught:
        mover.save(path, image_of(b"x")).wait_written()
    assert os.fsencode(caught.value.filename) == path
    with pytest.raises(FileNotFoundError):
        files.read_file(path, 1, BLOCK)


@pytest.mark.parametrize("direct", ["1", ""])
def test_a_full_file_system_is_an_error_with_path_and_size(tmp_path: Path, direct: str) -> None:
    out = in_a_process(
        """
        import os, resource, signal, sys
        from hand_made import HandMadeImage
        from roll_ckpt.errors import SourceChanged
        from roll_ckpt.native.extension import Arena, address_of
        from roll_ckpt.native.mover import Mover
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        arena = Arena(4 << 16, 1 << 16)
        mover = Mover(arena, 2, 2, direct=bool(sys.argv[2]))
        data = bytes(2_000_000)
        image = HandMadeImage(len(data))
        image.add_bytes(0, data)
        try:
            mover.save(sys.argv[1], image).wait_written()
        except OSError as error:
            print(error.errno, error.filename, error.strerror)
        mover.shutdown()
        print(arena.used_bytes)
        """,
        str(tmp_path / "f"),
        direct,
    )
    first, used = out.splitlines()
    assert first.startswith(f"{errno.EFBIG} {tmp_path / 'f'} allocating")
    assert used == "0"


def test_a_wait_that_runs_out_of_time_says_so(tmp_path: Path, mover: Mover) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # opening it for writing blocks until somebody reads
    transfer = mover.save(fifo, image_of(b"x" * 10, lazy=True))
    assert transfer.wait_copied(5)
    with pytest.raises(TimeoutError, match="fifo"):
        transfer.wait_written(0.05)
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="fifo"):
            transfer.wait_written(10)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("direct", [True, False])
def test_a_flipped_bit_is_named_with_its_block(tmp_path: Path, mover: Mover, direct: bool) -> None:
    data = bytearray(os.urandom(4 * BLOCK + 100))
    crcs = mover.save(tmp_path / "f", image_of(data)).wait_written().crcs
    for at in (0, 2 * BLOCK + 7, len(data) - 1):
        broken = bytearray(data)
        broken[at] ^= 0x10
        (tmp_path / "f").write_bytes(broken)
        with pytest.raises(Damaged, match=rf"/f: block {at // BLOCK} \(bytes {at // BLOCK * BLOCK} to "):
            files.read_file(tmp_path / "f", len(data), BLOCK, crcs, direct=direct)
        assert bytes(memoryview(files.read_file(tmp_path / "f", len(data), BLOCK, None))) == broken


def test_a_file_of_another_size_is_named(tmp_path: Path, mover: Mover) -> None:
    data = os.urandom(2 * BLOCK + 100)
    crcs = mover.save(tmp_path / "f", image_of(data)).wait_written().crcs
    for wrong in (data[:-1], data + b"x", b""):
        (tmp_path / "f").write_bytes(wrong)
        with pytest.raises(Damaged, match=f"/f: {len(wrong)} bytes on disk where {len(data)} were written"):
            files.read_file(tmp_path / "f", len(data), BLOCK, crcs)
    with pytest.raises(ValueError, match="1 block digests for 3 blocks"):
        files.read_file(tmp_path / "f", len(data), BLOCK, crcs[:1])
    with pytest.raises(IsADirectoryError):
        files.digest_file(tmp_path, BLOCK)


# ---- sources that are changed before they are copied


@pytest.fixture
def late_mover(arena: Arena) -> Iterator[Mover]:
    """Copies nothing that is lazy before wait_copied."""
    mover = Mover(arena, copy_threads=0)
    yield mover
    mover.shutdown(10)


def noticed(mover: Mover, path: Path, at: int, check: str, nbytes: int = 3 * BLOCK, extents: int = 1) -> bool:
    """Whether one byte that is changed before it is copied fails the save."""
    data = bytearray(nbytes)
    image, each = HandMadeImage(nbytes), nbytes // extents
    for offset in range(0, nbytes, each):
        image.add(offset, extension.address_of(data)[0] + offset, each, lazy=True)
    transfer = mover.save(path, image, check=check)
    assert transfer.overlapped and not transfer.copied
    data[at] = 1
    transfer.wait_copied()
    try:
        transfer.wait_written(20)
    except SourceChanged as changed:
        assert changed.start <= at < changed.end and f"{path}: " in str(changed)
        assert changed.end - changed.start == (BLOCK if check == "full" else min(each, 512))
        return True
    assert path.read_bytes() == data
    return False


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5, 3 * BLOCK - 1])
def test_a_full_check_notices_every_byte_and_none_if_off(tmp_path: Path, late_mover: Mover, at: int) -> None:
    assert noticed(late_mover, tmp_path / "f", at, "full")
    assert not noticed(late_mover, tmp_path / "f", at, "off")


def test_a_sample_is_another_one_at_each_save(tmp_path: Path, late_mover: Mover) -> None:
    for at in (1000, 3000):  # no sample has both
        assert any(noticed(late_mover, tmp_path / "f", at, "sample", 4096) for _ in range(500))


def test_a_sample_has_of_each_extent_but_not_of_thousands(tmp_path: Path, late_mover: Mover) -> None:
    few, many = (
        [noticed(late_mover, tmp_path / "f", 777, "sample", extents * 64, extents) for _ in range(100)]
        for extents in (500, 3000)
    )
    assert all(few) and any(many) and not all(many)


def test_an_unknown_check_is_refused(tmp_path: Path, late_mover: Mover) -> None:
    with pytest.raises(ValueError, match="give off, sample or full"):
        noticed(late_mover, tmp_path / "f", 0, "some")


# ---- lives and deaths


def test_an_abandoned_save_reads_no_source_and_frees_its_slots(tmp_path: Path) -> None:
    arena = Arena(64 << 20, 1 << 20)
    mover = Mover(arena, 1, 1)
    for _ in range(5):
        source = mmap.mmap(-1, 60 << 20)
        image = HandMadeImage(60 << 20)
        image.add(0, extension.address_of(source)[0], 60 << 20, lazy=True)
        transfer = mover.save(tmp_path / "f", image)
        transfer.abandon()
        assert transfer.copied
        source.close()  # a read from here on would be a crash
        with pytest.raises(OSError, match="abandoned") as caught:
            transfer.wait_written(10)
        assert caught.value.errno == errno.ECANCELED
        assert wait_until(lambda: arena.used_bytes == 0)
        transfer.abandon()
    data = os.urandom(1000)
    mover.save(tmp_path / "f", image_of(data)).wait_written()
    assert (tmp_path / "f").read_bytes() == data


def test_a_transfer_that_nobody_keeps_is_abandoned(tmp_path: Path) -> None:
    arena = Arena(64 << 20, 1 << 20)
    mover = Mover(arena, 1, 1)
    for _ in range(5):
        image = HandMadeImage(50 << 20)
        source = mmap.mmap(-1, 50 << 20)
        image.add(0, extension.address_of(source)[0], 50 << 20, lazy=True)
        transfer = mover.save(tmp_path / "f", image)
        del transfer
        source.close()
    del mover
    gc.collect()
    assert arena.used_bytes == 0


def test_shutdown_lets_saves_end_and_refuses_new_ones(tmp_path: Path, arena: Arena) -> None:
    mover = Mover(arena)
    data = os.urandom(3 * BLOCK)
    transfer = mover.save(tmp_path / "f", image_of(data, lazy=True))
    assert mover.shutdown(10) and mover.shutdown(10)
    transfer.wait_written(0)
    assert (tmp_path / "f").read_bytes() == data
    with pytest.raises(RuntimeError, match="shut down"):
        mover.save(tmp_path / "g", image_of(data))


def test_leaving_the_interpreter_finishes_what_was_saved(tmp_path: Path) -> None:
    in_a_process(
        """
        import sys
        from hand_made import HandMadeImage
        from roll_ckpt.errors import SourceChanged
        from roll_ckpt.native.extension import Arena, address_of
        from roll_ckpt.native.mover import Mover
        mover = Mover(Arena(64 << 20, 1 << 20))
        data = b"x" * (30 << 20)
        image = HandMadeImage(len(data))
        image.add(0, address_of(data)[0], len(data), lazy=True)
        transfer = mover.save(sys.argv[1], image)
        """,
        str(tmp_path / "f"),
    )
    assert (tmp_path / "f").read_bytes() == b"x" * (30 << 20)


def test_a_forked_child_is_refused_and_ends_in_peace(tmp_path: Path) -> None:
    out = in_a_process(
        """
        import gc, os, sys
        from hand_made import HandMadeImage
        from roll_ckpt.errors import SourceChanged
        from roll_ckpt.native.extension import Arena, address_of
        from roll_ckpt.native.mover import Mover
        arena = Arena(64 << 20, 1 << 20)
        mover = Mover(arena)
        data = os.urandom(40 << 20)
        image = HandMadeImage(len(data))
        image.add(0, address_of(data)[0], len(data), lazy=True)
        transfer = mover.save(sys.argv[1], image)
        if (pid := os.fork()) == 0:
            refused = 0
            for call in (
                lambda: mover.save(sys.argv[1], image), lambda: mover.shutdown(0), lambda: arena.peak_bytes,
                lambda: transfer.wait_copied(), lambda: transfer.wait_written(), lambda: transfer.abandon(),
                lambda: Mover(arena), lambda: arena.warm(1),
            ):
                try:
                    call()
                except RuntimeError as error:
                    refused += "forked child" in str(error)
            own = Mover(Arena(64 << 20, 1 << 20))
            own.save(sys.argv[1] + ".child", image).wait_written()
            del transfer, mover, arena
            gc.collect()
            print(refused, flush=True)
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        transfer.wait_copied()
        transfer.wait_written()
        assert open(sys.argv[1], "rb").read() == data
        assert open(sys.argv[1] + ".child", "rb").read() == data
        """,
        str(tmp_path / "f"),
    )
    assert out == "8"


def test_a_digest_is_whole_as_soon_as_the_file_is(tmp_path: Path) -> None:
    mover = Mover(Arena(8 << 16, 1 << 16), copy_threads=2, io_threads=4)
    data = os.urandom(3 << 16)
    expected = [zlib.crc32(data[at : at + (1 << 16)]) for at in range(0, len(data), 1 << 16)]
    for _ in range(300):
        image = HandMadeImage(len(data))
        image.add_bytes(0, data)
        assert mover.save(tmp_path / "file", image).wait_written(20).crcs == expected
    mover.shutdown()


def test_ctrl_c_ends_a_save_that_waits(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    out = in_a_process(
        """
        import os, signal, sys, threading
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        from hand_made import HandMadeImage
        from roll_ckpt.errors import SourceChanged
        from roll_ckpt.native.extension import Arena, address_of
        from roll_ckpt.native.mover import Mover
        arena = Arena(2 << 16, 1 << 16)
        mover = Mover(arena)
        data = bytes(10 << 16)
        image = HandMadeImage(len(data))
        image.add_bytes(0, data)
        try:
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            mover.save(sys.argv[1], image)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        os._exit(0)
        """,
        str(fifo),
    )
    assert out == "interrupted"


def test_no_descriptor_and_no_thread_is_left_behind(tmp_path: Path) -> None:
    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def use() -> None:
        mover = Mover(Arena(4 * BLOCK, BLOCK), 2, 2)
        data = os.urandom(9 * BLOCK)
        digest = mover.save(tmp_path / "f", image_of(data)).wait_written()
        files.read_file(tmp_path / "f", len(data), BLOCK, digest.crcs)
        mover.save(tmp_path, image_of(data))
        with pytest.raises(Damaged):
            files.read_file(tmp_path / "f", len(data), BLOCK, [0] * 9)

    use()
    gc.collect()
    before = counts()
    for _ in range(5):
        use()
    gc.collect()
    assert wait_until(lambda: counts() == before)


# ---- digests


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=700), skip=st.integers(0, 40), start=st.integers(0, 2**32 - 1))
def test_crc32_is_zlibs_at_every_size_and_alignment(data: bytes, skip: int, start: int) -> None:
    view = memoryview(data)[skip:]
    assert extension.crc32(view) == zlib.crc32(view)
    assert extension.crc32(view, start) == zlib.crc32(view, start)
    assert extension._native.crc32(view, start, portable=True) == zlib.crc32(view, start)


def test_large_buffers_have_zlibs_crc32() -> None:
    data = os.urandom((3 << 20) + 13)
    assert extension.crc32(data) == extension._native.crc32(data, 0, portable=True) == zlib.crc32(data)


def test_a_buffer_can_be_written_and_outlives_its_name(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    view = memoryview(files.read_file(tmp_path / "f", 3, BLOCK))
    gc.collect()
    view[1] = ord("x")
    assert bytes(view) == b"axc" and not view.readonly
    assert files.read_file(tmp_path / "f", 3, BLOCK).address % mmap.PAGESIZE == 0


# ---- devices, by the twin of CUDA whose devices are the host


TWIN = """
    import os, random, sys
    from hand_made import HandMadeImage
    from roll_ckpt.errors import SourceChanged
    from roll_ckpt.native import extension
    from roll_ckpt.native.extension import Arena, _native, address_of
    from roll_ckpt.native.mover import Mover
    _native.use_twin_of_cuda(0.01)
    BLOCK = 1 << 16
    mover = Mover(Arena(400 * BLOCK, BLOCK), copy_threads=1)

    def save(name, data, each, check="sample", lazy=True):
        image = HandMadeImage(len(data))
        for offset in range(0, len(data), each):
            image.add(offset, address_of(data)[0] + offset, each, lazy=lazy, device=0)
        return mover.save(os.path.join(sys.argv[1], name), image, check=check)

    def outcome(transfer):
        try:
            transfer.wait_written(20)
            return "written"
        except SourceChanged as changed:
            return f"changed {changed.end - changed.start}"
"""


def test_a_change_of_device_memory_before_its_copy_is_noticed(tmp_path: Path) -> None:
    out = in_a_process(
        TWIN
        + """
    for each, check, change in (
        (BLOCK, "sample", True), (64, "sample", True), (3 * BLOCK, "full", True), (BLOCK, "off", True),
        (64, "sample", False),
    ):
        data = bytearray(os.urandom(96 * BLOCK))
        before = bytes(data)
        transfer = save("f", data, each, check)
        late = not transfer.copied
        if change:
            data[:] = bytes(len(data))
        print(late, outcome(transfer), open(transfer.path, "rb").read() == before)
    mover.shutdown(10)
    """,
        str(tmp_path),
    )
    assert out.splitlines() == [
        "True changed 512 False",
        "True changed 64 False",
        f"True changed {BLOCK} False",
        "True written False",
        "True written True",
    ]


def test_the_last_bytes_of_a_device_block_are_always_sampled(tmp_path: Path) -> None:
    out = in_a_process(
        TWIN
        + """
    data = bytearray(64 * BLOCK)
    transfer = save("f", data, 64)
    data[-1] = 1
    print(outcome(transfer))
    mover.shutdown(10)
    """,
        str(tmp_path),
    )
    assert out == "changed 64"


def test_what_a_save_waits_for_overtakes_the_late_copies_of_an_earlier_file(tmp_path: Path) -> None:
    out = in_a_process(
        TWIN
        + """
    large, small = bytearray(os.urandom(200 * BLOCK)), bytearray(os.urandom(BLOCK))
    earlier = save("large", large, BLOCK)
    later = save("small", small, BLOCK, lazy=False)
    print(earlier.copied, later.copied)
    for transfer, data in ((earlier, large), (later, small)):
        transfer.wait_written(30)
        print(open(transfer.path, "rb").read() == data)
    mover.shutdown(10)
    """,
        str(tmp_path),
    )
    assert out.split() == ["False", "True", "True", "True"]


def test_cuda_says_whether_it_can_be_used() -> None:
    status = extension.cuda_status()
    if not extension.cuda_compiled:
        assert status == "built without CUDA"
    arena = Arena(2 * BLOCK, BLOCK)
    if status:
        arena.warm(0, device=0)
        arena.wait_warm()
        assert not arena.pinned and arena.pinned_reason


def test_a_device_extent_without_a_device_is_an_error(tmp_path: Path, mover: Mover) -> None:
    if not extension.cuda_status():
        pytest.skip("there is a device")
    image = HandMadeImage(100)
    image.add(0, 4096, 100, lazy=True, device=0)
    with pytest.raises(RuntimeError, match=r"CUDA|cuda"):
        mover.save(tmp_path / "f", image)
