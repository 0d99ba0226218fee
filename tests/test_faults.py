"""The disk refuses, a rank dies or hangs, the clock jumps, a child is forked: the save is abandoned or whole on every
rank, its room is given back, and the next save works."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faults
import pytest
import shims
from worlds import World

from roll_ckpt.transaction import verification

HERE = Path(__file__).parent
CASES = "fault_cases"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shims.build("faults", tmp_path_factory.mktemp("faults")))


@pytest.fixture(scope="module")
def ranks(shim: str) -> Iterator[World]:
    """Two ranks of a job that nobody supervises, on a disk that can be made to refuse."""
    world = World(2, torchrun=False, preload=shim)
    yield world
    world.close()


def run(*command: object, preload: str = "", within: Sequence[str] = (), timeout_s: float = 300) -> str:
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "LD_PRELOAD": preload}
    done = subprocess.run(
        [*within, sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


# ---- every operation of a save


def tried(shim: str, folder: Path, *faults: str) -> Counter[str]:
    """How often each operation of each fault was refused."""
    found: Counter[str] = Counter()
    for line in run(HERE / "fault_points.py", folder, *faults, preload=shim, timeout_s=580).splitlines():
        fault, operation, _, count = line.split()
        found[f"{fault} {operation}"] += int(count)
    return found


def test_wherever_the_disk_refuses_both_ranks_agree_and_nothing_is_left(shim: str, folder: Path) -> None:
    assert sum(tried(shim, folder, "once:9", "full:9", "readonly:23").values()) >= 12


@pytest.mark.long
@pytest.mark.parametrize("fault", ["once", "full", "readonly"])
def test_at_whatever_operation_the_disk_refuses(shim: str, folder: Path, fault: str) -> None:
    wanted = ["create", "write", "mkdir"]
    if fault != "full":
        wanted += ["fsync", "fsync_dir", "link", "rename", "unlink"]
    found = tried(shim, folder, f"{fault}:1")
    assert {f"{fault} {operation}" for operation in wanted} <= set(found), found


# ---- clocks, arenas, forks


def test_clocks_that_jump_change_nothing(shim: str, folder: Path) -> None:
    assert run(HERE / "fault_processes.py", folder, "clock", preload=shim) == "done\n"


def test_neither_a_full_arena_nor_a_hanging_disk_nor_forked_children_disturb_a_save(shim: str, folder: Path) -> None:
    assert run(HERE / "fault_processes.py", folder, "arena_full", "hanging_disk", "forks", preload=shim) == "done\n"


# ---- real file systems


def test_real_file_systems_that_lack_room_or_direct_io(tmp_path: Path) -> None:
    """Mounted where only this process sees it."""
    may = subprocess.run(["unshare", "-rm", "true"], capture_output=True, text=True)
    if may.returncode:
        pytest.skip(f"no mount namespace of one's own: {may.stderr.strip()}")
    told = run(HERE / "fault_processes.py", tmp_path, "small_disk", "without_direct_io", within=["unshare", "-rm"])
    if told.startswith("cannot mount"):
        pytest.skip(told.strip())
    assert told == "done\n"


# ---- real ranks


FAULTS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "No space left on device": ("allocate write", errno.ENOSPC, -1, {}),
    "fsync failed: Input/output error": ("fsync", errno.EIO, 1, {}),
    "writing": ("write", errno.EIO, 1, {"fail_training": True}),
    "Read-only file system": ("create", errno.EROFS, -1, {}),
}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=[pytest.mark.long] if words in ("writing", "Read-only file system") else [])
        for words in FAULTS
    ],
)
def test_a_fault_on_one_rank_ends_the_save_on_all_and_the_next_one_works(
    ranks: World, tmp_path: Path, words: str
) -> None:
    operations, code, times, ours = FAULTS[words]
    for found in ranks.call(f"{CASES}:meet_a_fault", str(tmp_path / "run"), operations, code, times, ours):
        told = found["told"]
        assert words in told and "cluster 'model' rank 1" in told and "zero_pp_rank_1" in told, told
        assert "bad (attempt " in told and "next save" in told
        assert found["raised"].startswith("SaveFailed") if ours else found["raised"] == "nothing was raised"
        assert_given_back(found)
    assert found["struck"] and found["again"] == []


@pytest.mark.parametrize("fail_training", [False, True])
def test_a_disk_that_lets_no_save_begin_does_not_stop_training(
    ranks: World, tmp_path: Path, fail_training: bool
) -> None:
    for found in ranks.call(f"{CASES}:cannot_begin", str(tmp_path / "run"), fail_training):
        assert found["saved"] is False and found["problems"] == 0
        assert found["raised"].startswith("NoRoom" if fail_training else "nothing was raised")
        assert {"good", "next"} <= set(found["entries"]) and not [e for e in found["entries"] if "bad" in e]


def test_a_pipeline_goes_on_without_room_and_its_last_save_raises(ranks: World, tmp_path: Path) -> None:
    for found in ranks.call(f"{CASES}:pipeline_without_room", str(tmp_path / "run")):
        assert "checkpoint-2" in found["second"] and "has 10 left" in found["second"]
        assert found["last"].startswith("NoRoom") and found["then"] == 4


def assert_given_back(found: dict[str, Any], *also: str) -> None:
    assert [name for name in found["entries"] if not name.startswith(".") and not name.endswith(".py")] == sorted(
        ["good", "next", "latest", *also]
    )
    assert not [name for name in found["entries"] if name.endswith(".tmp")] and found["trash"] == []
    assert found["used_bytes"] == 0 and found["latest"] == "next" and found["problems"] == []


@pytest.mark.parametrize(("operations", "code"), [("write", faults.SHORT), ("direct", errno.EINVAL)])
def test_short_writes_and_no_direct_io_cost_nothing_but_time(
    ranks: World, tmp_path: Path, operations: str, code: int
) -> None:
    for found in ranks.call(f"{CASES}:meet_a_fault", str(tmp_path / "run"), operations, code, -1, {}):
        assert found["told"] == ""
        assert_given_back(found, "bad")
    assert found["struck"] and verification.verify(tmp_path / "run" / "bad") == []


def test_a_rank_that_hangs_in_its_write_is_given_up_after_the_time_limit(ranks: World, tmp_path: Path) -> None:
    """The next save is written while that disk hangs still."""
    arguments = ("write", faults.HANG, 1, {"commit_timeout_s": 3.0})
    for found in ranks.call(f"{CASES}:meet_a_fault", str(tmp_path / "run"), *arguments):
        assert "no vote came from cluster 'model' rank 1" in found["told"] and len(found["losses"]) == 2
        assert_given_back(found)
    assert found["struck"] == 1


def test_a_rank_that_is_killed_is_named_by_the_time_limit(ranks: World, tmp_path: Path) -> None:
    """The last test of these ranks."""
    out = str(tmp_path / "run")
    ranks.call(f"{CASES}:save_up_to", out, 1, "write.done", 2.0)
    ranks.kill(1)
    (found,) = ranks.call(f"{CASES}:outcome", out)
    told, then = found["told"]
    assert told.startswith("SaveFailed") and "no vote came from cluster 'model' rank 1" in told and "second" in told
    assert then.startswith("RanksDisagree: rank 1 of 2 did not come")
    assert found["latest"] == "good" and not {"second", ".second.1.1.tmp"} & set(found["entries"])


@pytest.mark.long
@pytest.mark.parametrize("point", ["manifest.before", "decision.linked", "commit.renamed"])
def test_another_rank_takes_over_when_the_committer_is_killed(shim: str, tmp_path: Path, point: str) -> None:
    out = tmp_path / "run"
    world = World(2, torchrun=False, preload=shim)
    try:
        world.call(f"{CASES}:save_up_to", str(out), 0, point, 2.0)
        world.kill(0)
        (found,) = world.call(f"{CASES}:outcome", str(out))
    finally:
        world.close()
    told, then = found["told"]
    assert told == "nothing was raised" and found["latest"] == "second"
    assert then.startswith("RanksDisagree: rank 1: no answer from rank 0")
    assert verification.verify(out / "second") == [] and ".second.1.1.tmp" not in found["entries"]
