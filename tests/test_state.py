"""StateSaver: a state dictionary of a script without a framework."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from worlds import World

import roll_ckpt
from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.formats.records import Vote
from roll_ckpt.save import pending
from roll_ckpt.state import Lifetime, StateSaver
from roll_ckpt.transaction import ballot
from roll_ckpt.transaction.attempts import Attempt


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with process.installed(process.Process()):
        yield


def saver(**more: object) -> StateSaver:
    return StateSaver(Settings.parse({"staging": {"arena_bytes": 16 << 20}, "max_ckpt_to_keep": 2, **more}, "the test"))


def state(salt: float) -> dict[str, object]:
    return {"weight": torch.full((1000, 100), salt), "step": int(salt), "nested": {"bias": torch.arange(7)}}


def test_what_was_saved_is_loaded_and_old_checkpoints_go(tmp_path: Path) -> None:
    ours = saver()
    for step in (1, 2, 3):
        ours.save(state(step), tmp_path / f"step_{step}", step=step)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("step")) == ["step_2", "step_3"]
    loaded = ours.load(tmp_path / "step_3")
    assert torch.equal(loaded["weight"], state(3)["weight"]) and loaded["step"] == 3
    assert torch.equal(torch.load(tmp_path / "step_2/state_rank_0.pt")["weight"], state(2)["weight"])


def test_tensors_that_stay_until_the_fence_may_change_after_it(tmp_path: Path) -> None:
    ours, mine = saver(async_save=True), state(1)
    save = ours.save(mine, tmp_path / "one", unchanged=Lifetime.UNTIL_FENCE)
    roll_ckpt.fence()
    mine["weight"].fill_(9)  # type: ignore[attr-defined]
    save.wait(60)
    assert torch.equal(ours.load(tmp_path / "one")["weight"], state(1)["weight"])
    assert save.copy_stats()["nbytes"] > 400_000


def test_damage_and_absence_are_refused_by_name(tmp_path: Path) -> None:
    ours = saver()
    ours.save(state(1), tmp_path / "one")
    path = tmp_path / "one/state_rank_0.pt"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"state_rank_0\.pt"):
        ours.load(tmp_path / "one")
    with pytest.raises(NotFound):
        ours.load(tmp_path / "two")


def test_a_rank_that_cannot_stage_does_not_leave_the_others_waiting(two_ranks: World, tmp_path: Path) -> None:
    first, second = two_ranks.call("state_cases:one_rank_cannot_stage", str(tmp_path))
    assert first == second and first[1] == ""
    assert first[0].startswith("SaveFailed: the save was not begun: rank 1: state['hook']: cannot be saved")
    assert (tmp_path / "latest").read_text() == "step_2"


@pytest.mark.parametrize("parent_saves", [False, True])
def test_a_forked_child_ends_with_its_save(tmp_path: Path, parent_saves: bool) -> None:
    """A child of multiprocessing runs no atexit handlers."""
    script = f"""
import multiprocessing, sys, torch
from roll_ckpt.config import Settings
from roll_ckpt.state import StateSaver

def child():
    ours = StateSaver(Settings.parse({{"async_save": True}}, "the test"))
    ours.save({{"weight": torch.ones(20_000_000)}}, sys.argv[1] + "/child/step_1", step=1)

if {parent_saves}:
    StateSaver().save({{"weight": torch.ones(3)}}, sys.argv[1] + "/parent/step_1", step=1)
forked = multiprocessing.get_context("fork").Process(target=child)
forked.start()
forked.join()
sys.exit(forked.exitcode)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)
    assert saver().load(tmp_path / "child" / "step_1")["weight"].sum() == 20_000_000


def test_one_directory_under_two_names_has_one_order(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    ours, may_vote = saver(async_save=True), threading.Event()
    cast = ballot.cast

    def late(attempt: Attempt, vote: Vote) -> None:
        if attempt.name == "step_1":
            may_vote.wait(20)
        cast(attempt, vote)

    with mock.patch.object(ballot, "cast", late):
        ours.save(state(1), tmp_path / "real" / "step_1", step=1)
        second = ours.save(state(2), tmp_path / "link" / "step_2", step=2)
        assert not second._finished.wait(0.3)
        may_vote.set()
        pending.wait_pending()
    assert (tmp_path / "real" / "latest").read_text() == "step_2"


def test_two_threads_that_save_first_make_one_claim(tmp_path: Path) -> None:
    ours = [saver(), saver()]
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda n: ours[n].save(state(n), tmp_path / f"step_{n}", step=n), range(2)))
    for n in range(2):
        assert ours[n].load(tmp_path / f"step_{n}")["step"] == n
