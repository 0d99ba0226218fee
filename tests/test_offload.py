"""Leased sources: offloaded state that a save reads where it is, until its files are written."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hand_made import HandMadeImage
from stuck_disk import stuck
from test_native import BLOCK, in_a_process
from worlds import World, environment

from roll_ckpt.errors import SourceChanged
from roll_ckpt.formats.image import Extent, Extents, FileImage, Memory
from roll_ckpt.native import extension
from roll_ckpt.native.extension import Arena
from roll_ckpt.native.image import Lifetime
from roll_ckpt.native.mover import Mover, Transfer
from roll_ckpt.save.cluster_save import native_image

CASES = "offload_cases"
PAGE = 4096


@contextlib.contextmanager
def mover_of(blocks: int) -> Iterator[Mover]:
    mover = Mover(Arena(blocks * BLOCK, BLOCK), copy_threads=2, io_threads=3)
    try:
        yield mover
    finally:
        assert mover.shutdown(20)


class Sources:
    """A file of many extents at addresses that fit direct I/O and others, with gaps, records and their CRCs."""

    def __init__(self, seed: int, *, eager: float = 0.0) -> None:
        chance = random.Random(seed)
        self.memory = mmap.mmap(-1, 64 * BLOCK)
        self.memory[:] = chance.randbytes(len(self.memory))
        self.address = extension.address_of(self.memory)[0]
        self.rows: list[tuple[int, int, int, bool]] = []
        self.crcs: list[tuple[int, int, int]] = []
        at, source = 0, 0
        while source < len(self.memory) - 8 * BLOCK:
            at += chance.choice([0, 40, 1000, BLOCK])
            if chance.random() < 0.6:
                at = -(-at // PAGE) * PAGE
            source += chance.choice([0, 64, PAGE - source % PAGE])
            nbytes = chance.choice([0, 8, 1000, PAGE, 3 * BLOCK + 17, 7 * BLOCK])
            self.rows.append((at, source, nbytes, chance.random() < eager))
            if nbytes:
                self.crcs.append((at, nbytes, at + nbytes))
                at += 4
            at, source = at + nbytes, source + nbytes
        self.nbytes = at + 100

    def image(self, lazy: Lifetime | bool) -> HandMadeImage:
        image = HandMadeImage(self.nbytes)
        for at, source, nbytes, eager in self.rows:
            image.add(at, self.address + source, nbytes, lazy=False if eager else lazy)
        image.add_bytes(self.nbytes - 50, b"the end")
        for at, nbytes, crc_at in self.crcs:
            image.crc_at(image.record(at, nbytes), crc_at)
        return image


@pytest.mark.parametrize("eager", [0.0, 0.2])
@pytest.mark.parametrize("blocks", [2, 16, 96])
@pytest.mark.parametrize("seed", range(3))
def test_a_leased_file_holds_what_a_copied_one_holds(tmp_path: Path, seed: int, blocks: int, eager: float) -> None:
    sources = Sources(seed, eager=eager)
    with mover_of(blocks) as mover:
        plain = mover.save(tmp_path / "copied", sources.image(False))
        copied = plain.wait_written()
        transfer = mover.save(tmp_path / "leased", sources.image(Lifetime.UNTIL_WRITTEN))
        assert transfer.wait_copied() and transfer.wait_released() and transfer.released
        leased = transfer.wait_written()
        assert (tmp_path / "leased").read_bytes() == (tmp_path / "copied").read_bytes()
        assert leased.crcs == copied.crcs
        assert transfer.stats["direct"] == plain.stats["direct"]
        assert 0 < transfer.stats["straight_bytes"] < transfer.stats["leased_bytes"] <= transfer.stats["lazy_bytes"]
        assert mover.arena.leased_bytes == 0


def test_files_that_lease_share_an_arena_too_small_for_one(tmp_path: Path) -> None:
    sources = [Sources(seed, eager=0.1) for seed in range(4)]
    with mover_of(3) as mover:
        wanted = [mover.save(tmp_path / "f", s.image(False), overlap=False).wait_written().crcs for s in sources]
        found: dict[int, list[int]] = {}

        def save(i: int) -> None:
            for lazy in (Lifetime.UNTIL_WRITTEN, False, Lifetime.UNTIL_FENCE):
                transfer = mover.save(tmp_path / f"{i}.{int(lazy)}", sources[i].image(lazy))
                found[i] = transfer.wait_written(60).crcs
                assert found[i] == wanted[i]

        threads = [threading.Thread(target=save, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(4)] == wanted


def test_save_returns_before_a_state_larger_than_the_arena_was_read(tmp_path: Path) -> None:
    state = mmap.mmap(-1, 100 * BLOCK)
    state[:] = os.urandom(len(state))
    extents, wanted, part = Extents(), bytearray(110 * BLOCK), 5 * BLOCK
    for i in range(20):
        at, source = i * (part + 2 * PAGE), i * part
        extents.add(at, header := b"header %2d" % i)
        memory = Memory(extension.address_of(state)[0] + source, part - i % 2, state)
        extents.add(at + PAGE, memory, Lifetime.UNTIL_WRITTEN)
        wanted[at : at + len(header)] = header
        wanted[at + PAGE : at + PAGE + part - i % 2] = state[source : source + part - i % 2]
    with mover_of(16) as mover:
        with contextlib.ExitStack() as disk:
            disk.enter_context(stuck(mover, tmp_path, threads=3))
            too_late = threading.Timer(20, disk.close)
            too_late.start()
            held = mover.arena.leased_bytes
            transfer = mover.save(tmp_path / "f", native_image(FileImage(len(wanted), extents)))
            assert transfer.copied and not transfer.released and not transfer.wait_released(0.05)
            assert mover.arena.leased_bytes - held <= 2 * BLOCK  # an eighth; what has a header in it waits for it
            with pytest.raises(TimeoutError):
                transfer.wait_written(0)
            too_late.cancel()
        assert transfer.wait_released()
        state[:] = bytes(len(state))
        transfer.wait_written()
        assert transfer.stats["straight_bytes"] >= 60 * BLOCK
    assert (tmp_path / "f").read_bytes() == wanted


@pytest.mark.parametrize("last", [7, 8, 9])
def test_blocks_that_hold_slots_do_not_wait_for_those_that_get_none(tmp_path: Path, last: int) -> None:
    """Leased blocks come first in the file, and the others behind them would fill the arena."""
    data = os.urandom((3 + last) * BLOCK)
    address = extension.address_of(data)[0]
    image = HandMadeImage(len(data))
    image.add(0, address, 3 * BLOCK, lazy=Lifetime.UNTIL_WRITTEN)
    image.add(3 * BLOCK, address + 3 * BLOCK, last * BLOCK, lazy=Lifetime.UNTIL_FENCE)
    with mover_of(8) as mover:
        saved: list[Transfer] = []
        thread = threading.Thread(target=lambda: saved.append(mover.save(tmp_path / "f", image)), daemon=True)
        thread.start()
        thread.join(20)
        assert saved, "save is stuck"
        assert saved[0].wait_copied()
        saved[0].wait_written(20)
    assert (tmp_path / "f").read_bytes() == data


def test_a_crc_among_leased_bytes_stands_in_the_file_only(tmp_path: Path) -> None:
    state = mmap.mmap(-1, 4 * BLOCK)
    state[:] = data = os.urandom(len(state))
    image = HandMadeImage(len(state))
    image.add(0, extension.address_of(state)[0], len(state), lazy=Lifetime.UNTIL_WRITTEN)
    image.crc_at(image.record(10, 100), 2 * BLOCK + 8)
    with mover_of(8) as mover:
        transfer = mover.save(tmp_path / "f", image)
        transfer.wait_written()
    at = 2 * BLOCK + 8
    crc = zlib.crc32(data[10:110]).to_bytes(4, "little")
    assert (tmp_path / "f").read_bytes() == data[:at] + crc + data[at + 4 :]
    assert state[:] == data and transfer.stats["straight_bytes"] == 3 * BLOCK


def test_sources_live_until_they_are_written_and_no_longer(tmp_path: Path) -> None:
    class Owner(bytearray):
        pass

    data = Owner(os.urandom(20 * BLOCK + 5))
    memory = Memory(extension.address_of(data)[0], len(data), data)
    extents = Extents.of([Extent(0, b"header!"), Extent(7, memory, Lifetime.UNTIL_WRITTEN)])
    image = native_image(FileImage(len(data) + 7, extents))
    with mover_of(4) as mover:
        with stuck(mover, tmp_path, threads=3):
            transfer = mover.save(tmp_path / "f", image)
            assert transfer.wait_copied()
            assert transfer._image is image
        transfer.wait_released()
        assert transfer._image is None
        transfer.wait_written()
    assert (tmp_path / "f").read_bytes() == b"header!" + data


def test_a_transfer_that_fails_or_is_dropped_lets_go_of_its_sources(tmp_path: Path) -> None:
    sources = Sources(1)
    with mover_of(8) as mover:
        failed = mover.save(tmp_path / "missing" / "f", sources.image(Lifetime.UNTIL_WRITTEN))
        with pytest.raises(FileNotFoundError):
            failed.wait_written()
        assert failed.wait_released() and failed.released
        with stuck(mover, tmp_path, threads=3):
            dropped = mover.save(tmp_path / "f", sources.image(Lifetime.UNTIL_WRITTEN))
            done = threading.Thread(target=dropped.abandon)
            done.start()
        done.join(20)
        assert not done.is_alive() and dropped.released
        assert mover.arena.leased_bytes == 0


def test_leased_memory_is_looked_at_though_no_slot_was_reserved(tmp_path: Path) -> None:
    """Its blocks do not fit direct I/O, and other saves leave the arena too little room to reserve their window."""
    state, filler = mmap.mmap(-1, 20 * BLOCK), os.urandom(12 * BLOCK)
    image, other = HandMadeImage(len(state)), HandMadeImage(len(filler))
    image.add(64, extension.address_of(state)[0], len(state) - 64, lazy=Lifetime.UNTIL_WRITTEN)
    other.add(0, extension.address_of(filler)[0], len(filler), lazy=Lifetime.UNTIL_FENCE)
    with mover_of(16) as mover:
        with stuck(mover, tmp_path, threads=3):
            waiting = mover.save(tmp_path / "other", other)
            assert mover.arena.leased_bytes == 15 * BLOCK
            transfer = mover.save(tmp_path / "f", image, check="full")
            assert not transfer.overlapped
            state[:] = b"x" * len(state)
        waiting.wait_written()
        with pytest.raises(SourceChanged):
            transfer.wait_written()


def test_a_block_written_from_its_source_is_looked_at_after_the_write(tmp_path: Path) -> None:
    state = mmap.mmap(-1, 4 * BLOCK)
    image = HandMadeImage(len(state))
    image.add(0, extension.address_of(state)[0], len(state), lazy=Lifetime.UNTIL_WRITTEN)
    with mover_of(8) as mover:
        with stuck(mover, tmp_path, threads=3):
            transfer = mover.save(tmp_path / "f", image, check="full")
            time.sleep(0.3)  # for the digests; should they be later, the first look finds it
            state[:] = b"x" * len(state)
        with pytest.raises(SourceChanged):
            transfer.wait_written()


def test_without_overlap_save_reads_everything_before_it_returns(tmp_path: Path) -> None:
    sources = Sources(2)
    with mover_of(8) as mover:
        transfer = mover.save(tmp_path / "f", sources.image(Lifetime.UNTIL_WRITTEN), overlap=False)
        assert transfer.released and transfer.stats["straight_bytes"] == 0
        transfer.wait_written()


def test_only_memory_of_the_host_is_leased(tmp_path: Path) -> None:
    with mover_of(2) as mover:
        image = HandMadeImage(10)
        image.add(0, 4096, 10, lazy=Lifetime.UNTIL_WRITTEN, device=0)
        with pytest.raises(ValueError, match="not lazy memory of the host"):
            mover.save(tmp_path / "f", image)


@pytest.mark.parametrize("aslant", [0, 64])
def test_the_host_holds_one_copy(tmp_path: Path, aslant: int) -> None:
    """A process of a 320 MiB state and an arena of 64 MiB: what it needs beside the state while it saves."""
    told = in_a_process(
        """
        import mmap, re, sys
        from hand_made import HandMadeImage
        from roll_ckpt.errors import SourceChanged
        from roll_ckpt.native.extension import Arena, address_of
        from roll_ckpt.native.mover import Mover
        from roll_ckpt.native.image import Lifetime

        def resident(what):
            return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

        state = mmap.mmap(-1, 321 << 20)
        for at in range(0, len(state), 4096):
            state[at] = 1 + at % 255
        image = HandMadeImage(4096 + (320 << 20))
        image.add_bytes(0, b"header")
        image.add(4096, address_of(state)[0] + int(sys.argv[2]), 320 << 20, lazy=Lifetime(int(sys.argv[3])))
        before = resident("VmRSS")
        mover = Mover(Arena(64 << 20, 4 << 20))
        transfer = mover.save(sys.argv[1], image)
        transfer.wait_written()
        print(resident("VmHWM") - before, mover.arena.peak_bytes)
        """,
        str(tmp_path / "f"),
        str(aslant),
        str(int(Lifetime.UNTIL_WRITTEN)),
    )
    beside, arena = map(int, told.split())
    assert beside < 64 << 20
    assert arena <= 16 << 20


@pytest.mark.long
def test_the_host_of_a_real_engine_holds_one_copy(tmp_path: Path) -> None:
    code = "import sys, offload_cases; print(offload_cases.memory_beside_the_state(sys.argv[1]))"
    told = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env=environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1"),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert told.returncode == 0, told.stderr
    state, beside, leased = json.loads(told.stdout.splitlines()[-1])
    assert state > 300 << 20 and leased > 0.9 * state
    assert beside < 128 << 20


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
def test_an_offloaded_state_is_saved_as_any_other(two_ranks: World, tmp_path: Path, stage: int) -> None:
    for found in two_ranks.call(f"{CASES}:save_offloaded", str(tmp_path), stage):
        for name, stats in found["stats"].items():
            if stats["leased_bytes"]:
                assert stats["leased_bytes"] > stats["lazy_bytes"] - 64  # counters are not
            assert "optim" not in name or (stats["eager_bytes"] == 0 < stats["leased_bytes"])
        assert found["same"]
        assert found["losses"] == found["unsaved"] == found["stock"] == found["ours"]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_reload_goes_on_and_the_step_waits_where_the_host_is_the_device(
    two_ranks: World, tmp_path: Path, stage: int
) -> None:
    for found in two_ranks.call(f"{CASES}:train_on_what_is_leased", str(tmp_path), stage):
        assert found["released_at_reload"] is False
        assert found["peak"] < found["state"] / 2
        assert found["losses"] == found["unsaved"] == found["again"]


def test_nothing_is_leased_that_would_be_overwritten_or_freed_without_waiting(two_ranks: World) -> None:
    for usual, replaced, of_optimizer, freed in two_ranks.call(f"{CASES}:what_is_leased"):
        assert usual > 0 == replaced == of_optimizer == freed


@pytest.mark.parametrize(
    ("stage", "by"),
    [
        pytest.param(2, "engine", marks=pytest.mark.long),
        pytest.param(3, "engine", marks=pytest.mark.long),
        (3, "optimizer"),
    ],
)
def test_a_step_beside_leased_buffers_does_not_wait_and_the_next_offload_does(
    two_ranks: World, tmp_path: Path, stage: int, by: str
) -> None:
    for found in two_ranks.call(f"{CASES}:train_beside_what_is_leased", str(tmp_path), stage, by):
        assert found["released_after_training"] is False
        assert found["released_after_offload"] is True
        assert found["again"] == found["losses"]
