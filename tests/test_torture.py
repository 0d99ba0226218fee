"""A few kills of each kind; `make torture` has a thousand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import environment

HERE = Path(__file__).parent


def torture(part: str, kills: int) -> str:
    """What it says; it fails if anything was lost, or if the control lost nothing."""
    command = [sys.executable, str(HERE / "torture.py"), "--part", part, "--kills", str(kills)]
    done = subprocess.run(command, env=environment(), cwd=HERE.parent, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("part", "kills", "at_least"),
    [("miniature", 20, 10), pytest.param("nfs", 20, 10, marks=pytest.mark.long), ("real", 4, 2)],
)
def test_whoever_is_killed_the_newest_complete_checkpoint_is_found_whole(part: str, kills: int, at_least: int) -> None:
    said = torture(part, kills)
    struck, committed, lost = map(int, re.findall("([0-9]+) (?:kills|checkpoints|lost)", said))
    assert struck >= kills and committed >= at_least and lost == 0


def test_the_same_kills_lose_checkpoints_of_others() -> None:
    assert "lost: the tracker names what cannot be loaded" in torture("control", 2)
