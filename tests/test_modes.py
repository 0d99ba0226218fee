"""Files and directories have the modes that the user's umask asks for, whoever makes them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import hub_runs
import pytest
from megatron_worlds import Worlds
from roll_ckpt_hub_dev import LocalHub
from worlds import World

UMASKS = [0o002, 0o022, 0o077]


def wrong(folder: Path, umask: int) -> list[str]:
    """What below a directory has another mode than a program that does not care would give it."""
    found = []
    for above, folders, files in os.walk(folder):
        for name, mode in [*((name, 0o777) for name in folders), *((name, 0o666) for name in files)]:
            path = os.path.join(above, name)
            have = stat.S_IMODE(os.lstat(path).st_mode)
            if name.endswith(".py"):
                have &= ~stat.S_IXUSR  # DeepSpeed lets the owner run its scripts
            if have != mode & ~umask:
                found.append(f"{have:o} {os.path.relpath(path, folder)}")
    assert folders or files or found or any(folder.iterdir())
    return found


@pytest.mark.parametrize("umask", UMASKS)
def test_saves_follow_the_umask(two_ranks: World, tmp_path: Path, umask: int) -> None:
    two_ranks.call("mode_cases:save_all_ways", str(tmp_path), umask)
    there = {path.name for path in tmp_path.iterdir()}
    assert {"run", "copies", "script", "weights", "state", ".script.roll_ckpt"} <= there
    assert wrong(tmp_path, umask) == []


def test_so_do_megatrons(megatron: Worlds, tmp_path: Path) -> None:
    for umask in UMASKS:
        (tmp_path / f"{umask:o}").mkdir()
        megatron.at("DP2").call("megatron_save_cases:save_under", str(tmp_path / f"{umask:o}/one"), umask)
        assert wrong(tmp_path / f"{umask:o}", umask) == []


def test_so_do_pushes_pulls_and_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    for umask in UMASKS:
        run, pulled = tmp_path / f"{umask:o}/run", tmp_path / f"{umask:o}/pulled"
        before = os.umask(umask)
        try:
            hub_runs.history(run, [1, 2])
        finally:
            os.umask(before)
        with LocalHub(tmp_path / f"hub{umask:o}", write_token=hub_runs.TOKEN) as hub:
            told = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub_runs.TOKEN, "HF_HUB_DISABLE_XET": "1"}
            for words in (["push", run, "me/x"], ["pull", "hf://me/x", pulled], ["prune", run, "--keep", "1"]):
                command = [sys.executable, "-m", "roll_ckpt", *map(str, words)]
                subprocess.run(command, env={**os.environ, **told}, umask=umask, check=True, timeout=120)
        assert wrong(run, umask) == wrong(pulled, umask) == []
        assert (run / ".hub/records").is_dir() and (pulled / "checkpoint-2").is_dir()
