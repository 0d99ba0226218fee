"""Whatever power failure or delay does to a save, the next start finds the old checkpoint or the new one, whole.

The default form takes every so-manieth crash, the long one all of them; of orders of actors, all with fewer switches
than the number that is given, and every so-manieth with that number.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import crash_record
import pytest

HERE = Path(__file__).parent

SCENARIOS = ["first", "save", "again", "fallback", "only", "abort", "undo"]
KINDS = ["create", "exchange", "fsync", "link", "mkdir", "rename", "rmdir", "size", "unlink", "write"]


# What the C library has that changes files. What disk.py and csrc/file ask of it, the recorder must know.
CHANGES = re.compile(
    "open|creat|p?writev?|f?truncate|(posix_)?fallocate|fsync|fdatasync|(sym)?link(at)?|unlink(at)?|rename(s|at|at2)?|"
    "replace|remove(dirs)?|rmdir|mkdir(at)?|makedirs|mknod|mkfifo|f?chmod|f?chown|f?utimens|utime(nsat)?|setxattr|"
    "copy_file_range|sendfile|splice|mmap|sync_file_range"
)
HARMLESS = {
    "utime": "times tell a user's mistake early; no byte rests on them",
    "sync_file_range": "starts the disk, and promises nothing",
}


# The fsyncs that no crash misses, and why they are there all the same.
SPARE = {
    "fsync_dir writes.fsync_dir < attempts._make of .checkpoint-N.N.N.tmp": "rank 0's vote syncs it again",
    "fsync_dir writes.fsync_dir < attempts._make of checkpoint-N": "every vote syncs it again",
    "fsync_dir writes.fsync_dir < writes.link_durable < attempts._make of votes": "every vote syncs it again",
    "fsync_dir writes.fsync_dir < ballot.cast of checkpoint-N": "the decision syncs it again",
    "fsync_dir writes.fsync_dir < writes.link_durable < ballot.cast of votes": "whoever decides syncs it again",
    "fsync_dir writes.fsync_dir < ballot._make_manifest of votes": "so does each vote, but it is seen earlier",
    "fsync_dir writes.fsync_dir < writes.link_durable < ballot._link_decision of checkpoint-N": "the renamer does, too",
    "fsync_dir writes.fsync_dir < publication._publish of checkpoint-N": "so does the decision, but it is seen earlier",
    "fsync_dir writes.fsync_dir < ballot.cast of deep": "so does write_durable; stock code would not",
    "fsync_dir writes.fsync_dir < ballot.cast of digests": "so does write_durable; stock code would not",
    "fsync_dir writes.fsync_dir < ballot.cast of tensors": "so does write_durable; stock code would not",
    "fsync_dir writes.fsync_dir < writes.write_durable < cluster_save._receipts of digests": "so does the vote",
    "fsync_dir writes.fsync_dir < writes.write_durable < cluster_save._receipts of tensors": "so does the vote",
    "fsync_dir writes.fsync_dir < writes.make_dirs < cluster_save._receipts of checkpoint-N": "so does the vote",
    "fsync_dir writes.fsync_dir < writes.make_dirs < writes.make_own_dir < epochs._make of .trash": "it is remade",
    "fsync_dir writes.fsync_dir < publication._step_aside of .superseded": "the model renames in both at once",
    "fsync_dir writes.fsync_dir < publication._step_aside of .old": "the model renames in both at once",
    "fsync_dir writes.fsync_dir < publication._step_aside of run": "the next rename puts another under the same name",
}


def run(script: str, *arguments: object, preload: str = "") -> str:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "LD_PRELOAD": preload}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def recorder(folder: Path) -> str:
    return str(crash_record.build(folder))


def test_a_power_failure_leaves_the_old_checkpoint_or_the_new_one_whole(folder: Path, recorder: str) -> None:
    asked = ["first:31:0", "save:41:0", "again:67:0", "fallback:41:0", "only:67:0", "abort:47:0", "undo:19:31"]
    said = run("crash_points.py", "sweep", folder, *asked, preload=recorder)
    assert [line.split(":")[0] for line in said.splitlines()] == SCENARIOS
    assert all(kind in said for kind in KINDS)
    assert sum(int(found) for found in re.findall(r"([0-9]+) states after one crash", said)) > 200
    assert all(int(found) for found in re.findall(r"undo: .* ([0-9]+) states after a second", said))


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_power_failure_at_any_moment_and_again_in_the_recovery(folder: Path, recorder: str, scenario: str) -> None:
    said = run("crash_points.py", "sweep", folder, f"{scenario}:1:101", preload=recorder)
    assert re.search(r" [0-9]{2,} states after a second", said), said


@pytest.mark.long
def test_a_manifest_that_comes_after_the_rename_is_noticed(folder: Path, recorder: str) -> None:
    assert run("crash_points.py", "order", folder, preload=recorder) == "True\n"


def test_no_fsync_that_a_commit_rests_on_can_go(folder: Path, recorder: str) -> None:
    sites = [
        r"(cast|_make_manifest) of votes",  # one of the two will do, see SPARE
        r"_write_manifest of \.manifest",
        r"_write_manifest of checkpoint",
        r"_link_decision of \.decision",
        r"(_link_decision|_publish) of checkpoint",
        r"_publish of run",
    ]
    assert run("crash_points.py", "noticed", folder, "save", *sites, preload=recorder).splitlines() == sites


@pytest.mark.long
def test_no_fsync_can_go(folder: Path, recorder: str) -> None:
    unnoticed = set(run("crash_points.py", "unnoticed", folder, preload=recorder).splitlines())
    assert unnoticed <= set(SPARE), sorted(unnoticed - set(SPARE))


ACTORS = ["save", "again", "fallback", "late", "twice"]
MUTANTS = {
    "any checkpoint": ("again", 0, r"committed=True.*'checkpoint-2': 'old'"),
    "own decision": ("late", 2, "one job was told yes and the other no"),
    "decision renamed": ("late", 2, r"decided \[True, False\]"),
    "old epoch": ("save", 2, "by the newcomer there was"),
    "shared place": ("again", 2, r"decided \[True\], there is .*'checkpoint-2': 'old'"),
    "vote overwritten": ("twice", 2, "not the vote that the manifest rests on|told .* decided"),
}
QUICK = ("any checkpoint", "own decision")


def test_the_recorder_knows_every_operation_that_we_ask_for() -> None:
    recorder = (HERE / "crash_record.cpp").read_text()
    known = set(re.findall(r"^(?:int|ssize_t) (\w+)\(|^OPEN\((\w+),", recorder, re.MULTILINE))
    disk = "".join(path.read_text() for path in (HERE.parent / "roll_ckpt/disk").glob("*.py"))
    python = re.findall(r"\bos\.(\w+)\(|\b(renameat2)\b", disk)
    native = re.findall(r"(?<![\w.>:])(?:::)?(\w+)\(", (HERE.parent / "csrc/file.cpp").read_text())
    asked = {name for names in python for name in names} | set(native)
    assert {"open", "ftruncate", "fallocate", "pwrite", "renameat2", "utime"} <= asked
    changes = {name for name in asked if CHANGES.fullmatch(name)}
    assert changes <= {name for names in known for name in names} | set(HARMLESS)


@pytest.mark.parametrize(
    ("scenario", "switches", "steps", "stride"),
    [("again", 1, "all", 20), ("fallback", 1, "all", 20), ("late", 2, "decisive", 15), ("twice", 1, "all", 20)],
)
def test_two_who_decide_and_one_who_takes_over_agree(
    folder: Path, scenario: str, switches: int, steps: str, stride: int
) -> None:
    said = run("crash_actors.py", scenario, folder, switches, steps, stride)
    assert int(re.findall("([0-9]+) orders", said)[0]) > 12 and "Outcome True" in said


@pytest.mark.long
@pytest.mark.parametrize("scenario", ACTORS)
@pytest.mark.parametrize(("switches", "steps", "stride"), [(2, "all", 100), (3, "decisive", 300)])
def test_they_agree_in_more_orders(folder: Path, scenario: str, switches: int, steps: str, stride: int) -> None:
    said = run("crash_actors.py", scenario, folder, switches, steps, stride)
    assert int(re.findall("([0-9]+) orders", said)[0]) > 100


@pytest.mark.parametrize(
    "mutant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in MUTANTS]
)
def test_a_broken_rule_shows_in_some_order(folder: Path, mutant: str) -> None:
    scenario, switches, wrong = MUTANTS[mutant]
    said = run("crash_actors.py", scenario, folder, switches, "decisive", mutant)
    assert re.search(wrong, said), said
