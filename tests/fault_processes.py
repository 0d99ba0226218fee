"""Whole processes that tests/test_faults.py starts: python fault_processes.py DIRECTORY CASE..."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import faults
import runs

from roll_ckpt import names, process
from roll_ckpt.disk import locks as locks_module
from roll_ckpt.disk import reads, tree
from roll_ckpt.errors import RunIsLive, SaveFailed
from roll_ckpt.load.reader import open_reader
from roll_ckpt.save import arena, cluster_save, pending
from roll_ckpt.transaction import attempts, epochs, reader_locks, settlement
from roll_ckpt.transaction.attempts import abort_reason


def clock(folder: Path) -> None:
    """The wall clock jumps by a day with every look, also under the heartbeat."""
    epochs.HEARTBEAT_S, epochs.SILENCE_S = 0.02, 0.3
    out = folder / "run"

    def claims(host: str) -> Callable[[], None]:
        def work() -> None:
            if host:
                reads.boot_id = lambda: host
            runs.claim(out)

        return work

    def is_refused(host: str) -> Callable[[], None]:
        def work() -> None:
            try:
                claims(host)()
            except RunIsLive:
                return
            raise AssertionError("it was taken over")

        return work

    with faults.jumping_clock(86_400):
        looks = [time.time() for _ in range(4)]
        assert max(looks) - min(looks) > 86_400, "the clock does not jump"
        mine = runs.claim(out)
        assert runs.save(mine, 1, "old", alone=True).committed
        for host in ("", "another"):
            assert runs.ended(runs.forked(is_refused(host))) == 0, host
        attempt = attempts.begin(mine, "checkpoint-2", step=2, expected=runs.CLUSTERS)
        runs.vote(attempt, "new", *runs.RANKS[0])
        began = time.monotonic()
        outcome = settlement.settle(attempt, lead=True, timeout_s=0.3)
        assert not outcome.committed and "cluster 'actor' rank 1" in outcome.reason
        assert time.monotonic() - began >= 0.3
        mine.release()
        assert runs.ended(runs.forked(claims("another"))) == 0  # and it dies there
        assert runs.ended(runs.forked(claims("a third"))) == 0  # which the heartbeat tells
        assert runs.ended(runs.forked(claims("a third"))) == 0
    assert runs.salts(out) == {"checkpoint-1": "old"}


def arena_full(folder: Path) -> None:
    """A second save waits for slots that the first one holds; the disk of that one hangs, then fails."""
    import test_saver as t
    import torch

    from roll_ckpt.errors import SaveFailed

    state = {"w": torch.arange(230_000.0)}
    first = t.begin(folder / "run", "t1")
    faults.rule("write", "/t1/model.pt", -errno.EIO, times=-1)
    with first.staging():
        t.stage(first, state, overlappable=True)
    first.fence()
    used = arena.mover(t.SETTINGS).arena
    assert used.used_bytes > used.capacity_bytes // 2
    second = t.begin(folder / "run", "t2")

    def save() -> None:
        with second.staging():
            t.stage(second, state, overlappable=True)

    waiting = threading.Thread(target=save)
    waiting.start()
    assert t.wait_until(lambda: used.used_bytes == used.capacity_bytes)
    assert waiting.is_alive() and not second.settled
    assert t.wait_until(lambda: faults.struck() > 0, 30), "its disk does not hang yet"
    faults.clear()
    waiting.join(20)
    second.wait(20)
    try:
        first.wait(20)
        raise AssertionError("it was committed")
    except SaveFailed as problem:
        assert "rank 0" in str(problem) and "model.pt" in str(problem) and "Input/output error" in str(problem)
    assert used.peak_bytes <= used.capacity_bytes
    assert t.wait_until(lambda: used.used_bytes == 0)
    assert torch.equal(t.load(folder / "run", "t2")["w"], state["w"])
    assert not (folder / "run" / "t1").exists()


def hanging_disk(folder: Path) -> None:
    """Nobody else is there to give the save up: it says what it waits for, and goes on."""
    import logging

    import test_saver as t
    import torch

    said: list[str] = []
    told = threading.Event()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            told.set()

    logging.getLogger("roll_ckpt").addHandler(Ear())
    cluster_save._LOOK_S = 0.02
    save = t.begin(folder / "run", "t1", t.Settings.parse({**t.SMALL, "commit_timeout_s": 0.1}, "the test"))
    faults.rule("write", "/t1/model.pt", faults.HANG, times=-1)
    with save.staging():
        t.stage(save, {"w": torch.ones(1000)})
    assert told.wait(20) and not save.settled
    assert "cluster 'model' rank 0" in said[0] and "/t1/model.pt" in said[0], said
    faults.clear()
    save.wait(20)
    assert len(said) == 1


def forks(folder: Path) -> None:
    """Children are forked in the middle of a save and of a load, and end in every way."""
    import test_saver as t
    import torch

    out = folder / "run"
    state = {"w": torch.arange(100_000.0)}
    t.save_now(out, state, "t0")

    def look() -> None:
        assert pending.pending() == []
        pending.fence()
        pending.wait_pending()
        assert not reader_locks.is_being_read(out / "none")

    def children() -> None:
        """Exit handlers run in the second; the last two are data loaders' workers."""
        for leave in (os._exit, sys.exit):
            with held_by_another_thread(
                process.part(pending.PendingSaves)._lock, process.part(reader_locks.Readers).guard
            ):
                child = os.fork()
                if not child:
                    look()
                    leave(0)
                assert runs.ended(child) == 0
        worker = multiprocessing.get_context("fork").Process(target=look)
        worker.start()
        worker.join(20)
        assert worker.exitcode == 0
        data = torch.utils.data.DataLoader(list(range(8)), num_workers=2, multiprocessing_context="fork")
        assert len(list(data)) == 8

    def is_locked(path: Path) -> bool:
        """As another process sees it."""
        return runs.ended(runs.forked(lambda: sys.exit(0) if locks_module.is_locked(path) else os._exit(3))) != 3

    record = out / names.EPOCHS / "1"
    save = t.begin(out, "t1")
    faults.rule("write", "/t1/model.pt", faults.HANG, times=-1)  # so that native threads are at work all the time
    with save.staging():
        t.stage(save, state, overlappable=True)
        children()
    assert pending.pending() == [save] and is_locked(record)
    faults.clear()
    save.wait(20)
    assert t.wait_until(lambda: arena.mover(t.SETTINGS).arena.used_bytes == 0)
    with open_reader(out / "t1", t.SETTINGS) as reader:
        loaded = reader.load(out / "t1" / "model.pt", "cpu")
        children()
        assert is_locked(out / "t1" / "votes" / "expected.json") and reader_locks.is_being_read(out / "t1")
    assert torch.equal(loaded["w"], state["w"]) and not reader_locks.is_being_read(out / "t1")
    t.save_now(out, state, "t2")
    assert is_locked(record)


@contextmanager
def held_by_another_thread(*locks: threading.Lock) -> Iterator[None]:
    """A child that is forked meanwhile finds them locked for ever."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    parent = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == parent:
            done.set()
            thread.join()


def fill(path: Path) -> None:
    """Leave no room in the file system."""
    with open(path, "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError as problem:
            assert problem.errno == errno.ENOSPC


def small_disk(folder: Path) -> None:
    """A file system of 8 MiB is full when the save begins to write, or when it has written one file of two."""
    import test_saver as t
    import torch

    mount("tmpfs", folder, "size=8m")
    out, state = folder / "run", {"w": torch.ones(200_000)}
    t.save_now(out, state, "good")
    for files in (["model.pt"], ["first.pt", "model.pt"]):
        before = tree.free_bytes(out)
        save = t.begin(out, "bad")
        with save.staging():
            for file in files[:-1]:
                t.stage(save, state, file=file)._staged[-1].transfer.wait_written()
            fill(folder / "filler")
            t.stage(save, state, file=files[-1])
        try:
            save.wait(20)
            raise AssertionError("it was committed")
        except SaveFailed as problem:
            assert "No space left on device" in str(problem) and "rank 0" in str(problem) and "model.pt" in str(problem)
        # What the other ranks hear: the first file's room is enough for the reason.
        told = abort_reason(save.attempt) or ""
        assert ("rank 0" in told and "model.pt" in told) if files[1:] else ("see the logs of all" in told), told
        assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == ["good", "latest"]
        assert not save.attempt.directory.exists()
        (folder / "filler").unlink()
        assert before - tree.free_bytes(out) <= 16 << 10, "its room was not given back"
    t.save_now(out, state, "next")


def without_direct_io(folder: Path) -> None:
    """ramfs answers EINVAL to O_DIRECT, and does not tell how much room it has."""
    import test_saver as t
    import torch

    mount("ramfs", folder)
    try:
        os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        raise AssertionError("ramfs has direct I/O")
    except OSError as problem:
        assert problem.errno == errno.EINVAL
    save = t.begin(folder / "run", "t1")
    with save.staging():
        cluster_save = t.stage(save, {"w": torch.ones(300_001)})
    save.wait(20)
    assert not cluster_save._staged[0].transfer.stats["direct"]
    with open_reader(folder / "run" / "t1", t.SETTINGS) as reader:
        assert reader.load(folder / "run" / "t1" / "model.pt", "cpu")["w"].sum() == 300_001


def mount(kind: str, folder: Path, options: str = "rw") -> None:
    """In the mount namespace of this process alone."""
    done = subprocess.run(["mount", "-t", kind, "-o", options, "none", folder], capture_output=True, text=True)
    if done.returncode:
        print("cannot mount:", done.stderr.strip())
        sys.exit(0)


if __name__ == "__main__":
    for case in sys.argv[2:]:
        place = Path(sys.argv[1]) / case
        place.mkdir()
        getattr(sys.modules[__name__], case)(place)
    print("done")
