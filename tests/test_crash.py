"""Whatever power failure or delay does to a save, the next start finds the old checkpoint or the new one, whole.

The default form takes every so-manieth crash, the long one all of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAST = Path("/dev/shm")

SCENARIOS = ["first", "save", "again", "fallback", "only", "abort", "undo"]
KINDS = ["create", "exchange", "fsync", "link", "mkdir", "rename", "rmdir", "size", "unlink", "write"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST if os.access(FAST, os.W_OK) else None) as made:
        yield Path(made)


def run(script: str, *arguments: object, preload: str = "") -> str:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "LD_PRELOAD": preload}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def recorder(folder: Path) -> str:
    library = folder / "crash_record.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, HERE / "crash_record.cpp", "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    return str(library)


def test_a_power_failure_leaves_the_old_checkpoint_or_the_new_one_whole(folder: Path, recorder: str) -> None:
    asked = ["first:31:0", "save:41:0", "again:67:0", "fallback:41:0", "only:67:0", "abort:47:0", "undo:19:67"]
    said = run("crash_points.py", "sweep", folder, *asked, preload=recorder)
    assert [line.split(":")[0] for line in said.splitlines()] == SCENARIOS
    assert all(kind in said for kind in KINDS)
    assert sum(int(found) for found in re.findall(r"([0-9]+) states after one crash", said)) > 200
    assert all(int(found) for found in re.findall(r"undo: .* ([0-9]+) states after a second", said))


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_power_failure_at_any_moment_and_again_in_the_recovery(folder: Path, recorder: str, scenario: str) -> None:
    said = run("crash_points.py", "sweep", folder, f"{scenario}:1:12", preload=recorder)
    assert re.search(r" [0-9]{2,} states after a second", said), said


@pytest.mark.long
def test_a_manifest_that_comes_after_the_rename_is_noticed(folder: Path, recorder: str) -> None:
    assert run("crash_points.py", "order", folder, preload=recorder) == "True\n"


@pytest.mark.parametrize(("scenario", "stride"), [("save", 40), ("again", 40), ("fallback", 40)])
def test_two_who_decide_and_one_who_takes_over_agree(folder: Path, scenario: str, stride: int) -> None:
    said = run("crash_actors.py", scenario, folder, stride, 1)
    assert int(re.findall("([0-9]+) orders", said)[0]) > 10 and "OutcomeTrue" in said


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["save", "again", "fallback"])
def test_they_agree_in_every_order_with_one_switch_and_in_many_with_two(folder: Path, scenario: str) -> None:
    said = run("crash_actors.py", scenario, folder, 1501, 2)
    assert int(re.findall("([0-9]+) orders", said)[0]) > 500
