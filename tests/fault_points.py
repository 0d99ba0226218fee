"""Let the disk refuse at every operation of a save; see that both ranks agree, that nothing is lost and nothing left.

    LD_PRELOAD=faults.so python fault_points.py FOLDER FAULT:STRIDE...     prints what was tried

FAULT: `once` (one call answers EIO), `full` (from that call on there is no room), `readonly` (from that call on all
calls are refused); the disk is well again when the save has ended. Two ranks save through the real corridor, each
in threads of this process; each try is a forked child.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import faults
import runs

from roll_ckpt import names, process
from roll_ckpt.config import Settings
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import RollCkptError
from roll_ckpt.formats.image import FileImage
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import arena, claims, cluster_save, pending
from roll_ckpt.save.begin import Request
from roll_ckpt.save.begin import begin as begin_
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import listing, retention, settlement

settlement._STUBBORN_S, settlement._LONGEST_PAUSE_S, cluster_save._LOOK_S = 0.1, 0.005, 0.05
SETTINGS = Settings(commit_timeout_s=0.5, io={"block_bytes": 65536, "threads": 2}, staging={"arena_bytes": 1 << 20})
RANKS, KEPT = 2, 2
CLUSTERS = {"actor": RANKS}
STEP_S = 30.0


def data_of(salt: str, rank: int) -> bytes:
    return f"{salt} {rank} ".encode() * 20_000


def begin(output_dir: Path, name: str) -> list[Save]:
    """Both ranks' parts of one save: rank 0 begins, rank 1 learns of it."""
    request = Request(output_dir, name, None, CLUSTERS)
    first = begin_(RankGroup(0, RANKS, None), request, SETTINGS, nbytes=1000, on_commit=prune)
    if not first.begun:
        return [first] * RANKS
    second = Save(replace(first.attempt), SETTINGS, 1, tuple(CLUSTERS))
    process.part(pending.PendingSaves).add(second)
    second.after = None  # of another process, in truth
    return [second, first]


def prune(save: Save) -> None:
    output_dir = save.attempt.output_dir
    retention.prune(output_dir, claims.epoch_of(output_dir), keep=KEPT)


def save(output_dir: Path, name: str, salt: str) -> list[RollCkptError | None]:
    """Save on both ranks; what became of it on rank 1 and rank 0."""
    saves = begin(output_dir, name)
    if not saves[0].begun:
        return [one.failure for one in saves]
    for one in saves:
        try:
            with one.staging():
                stage(one, salt)
        except OSError as problem:
            assert one.cluster_saves["actor"].error, problem
        # One rank after the other: the same order of operations each time.
        until(lambda: one.settled or one.cluster_saves["actor"].timing.write_s is not None)  # noqa: B023
    for one in saves:
        assert one._finished.wait(STEP_S), f"rank {one.rank} hangs"
    return [one.failure for one in saves]


def stage(one: Save, salt: str) -> None:
    cluster_save = one.add_cluster("actor", {})
    folder = one.attempt.checkpoint_dir / "actor"
    writes.make_dirs(folder)
    path = folder / f"rank_{one.rank}.pt"
    cluster_save.stage(path, FileImage.of_bytes(data_of(salt, one.rank)), overlap=True)
    if not one.rank:
        (one.attempt.directory / "helper.py").write_text(salt)


def until(condition: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(int(STEP_S / 0.002)):
        if condition():
            return
        waited.wait(0.002)
    raise AssertionError("nothing happens")


def strike(fault: str, output_dir: Path, skip: int) -> None:
    if fault == "once":
        faults.rule("*", output_dir, errno.EIO, skip=skip)
    elif fault == "full":
        faults.rule(faults.ROOM, output_dir, errno.ENOSPC, skip=skip, times=-1)
    else:
        faults.rule("*", output_dir, errno.EROFS, skip=skip, times=-1)


WORDS = {"once": "Input/output error", "full": "No space left on device", "readonly": "Read-only file system"}


def attempt(fault: str, output_dir: Path, skip: int, say: int) -> None:
    """One try, in a forked child."""
    claims.claim(output_dir, SETTINGS, CLUSTERS)
    before = contents(output_dir)
    faults.log(output_dir)
    strike(fault, output_dir, skip)
    ends = save(output_dir, "checkpoint-3", "new")
    struck = faults.clear()
    if not struck:
        os.write(say, b"none\n")
        return
    calls = faults.logged()
    faults.log("\n")  # the clean-up below is not of interest
    where = next(call for call in calls if call.code == {"once": 5, "full": 28, "readonly": 30}[fault])
    told = f"{where.operation} {Path(where.path.split()[-1]).name}: {ends}"
    committed = [end is None or "committed and sound" in str(end) for end in ends]
    found = contents(output_dir)
    assert found.items() <= {**before, "checkpoint-3": "new"}.items() and "checkpoint-2" in found, told
    assert "checkpoint-1" in found or committed[0], told
    assert committed in ([True] * RANKS, [False] * RANKS), told
    if committed[0]:
        assert "checkpoint-3" in found, told
    for end in ends:
        assert end is None or (WORDS[fault] in str(end) and str(output_dir) in str(end)), told
    never_synced_twice(calls, output_dir)
    until(lambda: arena.mover(SETTINGS).arena.leased_bytes == 0)
    # Then the disk is well again.
    assert save(output_dir, "checkpoint-4", "next") == [None, None], told
    left = [name for name in tree.list_dir(output_dir) if names.parse_attempt_dir(name)]
    assert not left, (told, left)
    epoch = claims.epoch_of(output_dir)
    assert tree.list_dir(output_dir / names.trash_dir(epoch.number)) == [], told
    found = contents(output_dir)
    assert len(found) == KEPT and "checkpoint-4" in found and "checkpoint-1" not in found, (told, found)
    assert (output_dir / names.LATEST).read_text() == "checkpoint-4", told
    epoch.release()
    again = runs.claim(output_dir)
    runs.assert_clean(output_dir, again)
    os.write(say, f"{where.operation} {'committed' if committed[0] else 'abandoned'}\n".encode())


def contents(output_dir: Path) -> dict[str, str]:
    """The salt of each committed checkpoint, whose every byte is right."""
    found = {}
    for told in listing.committed(output_dir, report=runs._refuse):
        folder = output_dir / told.name / "actor"
        salt = (folder / "rank_0.pt").read_text().split()[0]
        for rank in range(RANKS):
            assert (folder / f"rank_{rank}.pt").read_bytes() == data_of(salt, rank), (told.name, rank)
        found[told.name] = salt
    return found


def never_synced_twice(calls: list[faults.Call], output_dir: Path) -> None:
    """A file whose fsync failed is not in a checkpoint, and nobody asked again."""
    again, failed = faults.synced_again(calls)
    assert again == []
    assert failed.isdisjoint(
        path.stat().st_ino for checkpoint_dir in output_dir.glob("checkpoint-*") for path in checkpoint_dir.rglob("*")
    )


def main(fault: str, folder: Path, stride: int) -> None:
    logging.getLogger("roll_ckpt").setLevel(logging.CRITICAL)
    template, output_dir = folder / "template", folder / "run"

    def history() -> None:
        for step in (1, 2):
            assert save(template, f"checkpoint-{step}", "old") == [None] * RANKS
        claims.epoch_of(template).release()

    assert runs.ended(runs.forked(history)) == 0
    tried: Counter[str] = Counter()
    failed: list[int] = []
    for skip in itertools.count(0, stride):
        shutil.rmtree(output_dir, ignore_errors=True)
        shutil.copytree(template, output_dir)
        heard, say = os.pipe()
        child = runs.forked(lambda: attempt(fault, output_dir, skip, say))  # noqa: B023
        os.close(say)
        with os.fdopen(heard) as pipe:
            answer = pipe.read().strip()
        if runs.ended(child) != 0:
            failed.append(skip)
        elif answer == "none":
            break
        else:
            tried[answer] += 1
    assert not failed, f"{fault}: operations {failed}"
    for what, count in sorted(tried.items()):
        print(fault, what, count)


if __name__ == "__main__":
    runs.CLUSTERS = CLUSTERS
    for each in sys.argv[2:]:
        what, _, every = each.partition(":")
        place = Path(sys.argv[1]) / what
        place.mkdir()
        main(what, place, int(every))
