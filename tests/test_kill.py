"""Whenever a run dies, the next start finds the old checkpoint or the new one, whole, and goes on.

Of a plain save every operation, elsewhere every third or so: `kill_points.py SCENARIO DIRECTORY 1` takes all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAST = Path("/dev/shm")


def survive(scenario: str, stride: int) -> int:
    with tempfile.TemporaryDirectory(dir=FAST if os.access(FAST, os.W_OK) else None) as folder:
        command = [sys.executable, str(HERE / "kill_points.py"), scenario, folder, str(stride)]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout)


@pytest.mark.parametrize(
    ("scenario", "stride", "at_least"),
    [
        ("first", 2, 12),
        ("save", 2, 25),
        ("again", 3, 10),
        ("fallback", 3, 15),
        ("only", 5, 8),
        ("rank", 5, 5),
    ],
)
def test_a_killed_run_leaves_the_old_checkpoint_or_the_new_one_whole(scenario: str, stride: int, at_least: int) -> None:
    assert survive(scenario, stride) >= at_least


def test_a_recovery_that_is_killed_is_finished_by_the_next_one() -> None:
    assert survive("recovery", 17) > 10


def test_a_run_that_wakes_up_after_another_took_over_changes_nothing() -> None:
    assert survive("zombies", 17) > 40
