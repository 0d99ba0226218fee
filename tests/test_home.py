"""Bookkeeping: beside the directory of a host, and made again when somebody deletes it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import runs

from roll_ckpt import names
from roll_ckpt.disk import failpoints, locks
from roll_ckpt.errors import EpochLost, RunIsLive, SaveFailed
from roll_ckpt.transaction import attempts, epochs, settlement, trash
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.home import beside_of, choose_home, find_home


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "host" / "run"


@pytest.fixture
def epoch(out: Path) -> Epoch:
    return runs.claim(out, host=True)


def test_a_hosts_directory_holds_checkpoints_and_nothing_of_ours(out: Path, epoch: Epoch) -> None:
    assert runs.save(epoch, 1, "x", alone=True).committed
    attempt = attempts.begin(epoch, "checkpoint-2", step=2, expected=runs.CLUSTERS)
    assert entries(out) == ["checkpoint-1", "helper.py", "latest"]
    assert entries(out.parent) == [".run.roll_ckpt", "run"]
    assert attempt.directory.parent == beside_of(out) == find_home(out) == epoch.home
    with pytest.raises(RunIsLive, match=r"host/run: process"):
        runs.claim(out, host=True)
    with pytest.raises(RunIsLive, match=r"host/run: process"):
        runs.claim(out)  # a pipeline that would keep its bookkeeping inside


def test_bookkeeping_stays_where_it_was_begun(tmp_path: Path) -> None:
    runs.history(tmp_path / "run", [1])
    epoch = runs.claim(tmp_path / "run", host=True)
    assert epoch.home == tmp_path / "run" and epoch.number == 2


def test_where_directories_cannot_be_renamed_from_beside_it_lies_inside(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def observe(operation: str, paths: tuple[str, ...]) -> None:
        if operation == "rename" and ".roll_ckpt/" in paths[0] and str(out) + "/" in paths[1]:
            raise OSError(18, "Invalid cross-device link", paths[0])

    monkeypatch.setattr(failpoints, "observer", observe)
    assert choose_home(out, host=True) == out
    assert entries(out.parent) == ["run"] and entries(out) == []
    assert runs.save(runs.claim(out, host=True), 1, "x", alone=True).committed


DELETIONS: dict[str, Callable[[Path, Path], object]] = {
    "the records": lambda out, home: shutil.rmtree(home / names.EPOCHS),
    "the trash": lambda out, home: shutil.rmtree(home / names.TRASH),
    "all bookkeeping": lambda out, home: shutil.rmtree(home),
    "the whole directory": lambda out, home: shutil.rmtree(out),
    "both": lambda out, home: [shutil.rmtree(path, ignore_errors=True) for path in (out, home)],
    "the record's file": lambda out, home: (home / names.EPOCHS / "1").unlink(),
}


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("deleted", DELETIONS)
def test_what_somebody_deletes_is_made_again_and_the_next_save_goes_on(
    tmp_path: Path, deleted: str, host: bool
) -> None:
    out = tmp_path / "run"
    epoch = runs.claim(out, host=host)
    assert runs.save(epoch, 1, "x", alone=True).committed
    if deleted != "the whole directory" or host:
        DELETIONS[deleted](out, epoch.home)
    else:
        shutil.rmtree(out)
    assert runs.save(epoch, 2, "y", alone=True).committed
    assert runs.assert_sound(out)["checkpoint-2"] == "y"
    assert locks.is_locked(epoch.home / names.EPOCHS / "1")
    left = (out / "checkpoint-1").exists()
    assert runs.prune(epoch, 1) == (["checkpoint-1"] if left else [])
    epoch.release()
    assert runs.claim(out, host=host).number == 2


@pytest.mark.parametrize("deleted", ["the trash", "the whole directory", "the records"])
@pytest.mark.parametrize("decided", [True, False])
def test_a_save_in_flight_survives_what_is_not_its_own(out: Path, epoch: Epoch, deleted: str, decided: bool) -> None:
    assert runs.save(epoch, 1, "x", alone=True).committed
    attempt = attempts.begin(epoch, "checkpoint-2", step=2, expected=runs.CLUSTERS)
    for cluster, rank in runs.RANKS if decided else runs.RANKS[1:]:
        runs.vote(attempt, "y", cluster, rank)
    DELETIONS[deleted](out, epoch.home)
    outcome = settlement.settle(attempt, lead=True, timeout_s=0)
    assert outcome.committed == decided
    assert ("checkpoint-2" in runs.salts(out)) == decided
    assert runs.save(epoch, 3, "z", alone=True).committed
    assert not attempt.directory.exists()


def test_an_attempt_that_is_deleted_is_known_to_be_lost_at_once(out: Path, epoch: Epoch) -> None:
    attempt = attempts.begin(epoch, "checkpoint-2", step=2, expected=runs.CLUSTERS)
    runs.vote(attempt, "y", "actor", 0)
    shutil.rmtree(epoch.home)
    outcome = settlement.settle(attempt, lead=False, timeout_s=600)  # a rank that only waits
    assert not outcome.committed and "vanished" in outcome.reason
    assert runs.save(epoch, 2, "z", alone=True).committed


def test_who_finds_another_run_in_the_place_of_a_deleted_record_has_lost(out: Path, epoch: Epoch) -> None:
    shutil.rmtree(epoch.home)
    other = runs.forked(lambda: (runs.claim(out, host=True), os.kill(os.getpid(), signal.SIGKILL)))
    assert runs.ended(other) == -signal.SIGKILL
    assert epochs.newest_number(epoch.home) == 1  # the number that this run has
    with pytest.raises(EpochLost, match="another run has claimed the directory since"):
        attempts.begin(epoch, "checkpoint-2", step=2, expected=runs.CLUSTERS)


def test_a_late_process_cannot_use_a_trash_that_it_makes_again(out: Path, epoch: Epoch) -> None:
    assert runs.save(epoch, 1, "x", alone=True).committed
    late = Epoch(epoch.number, out, epoch.home, runs.RUN, runs.CLUSTERS, None)
    epoch.release()
    runs.claim(out, host=True)
    with pytest.raises(EpochLost):
        trash.trash(late.home, out / "checkpoint-1", late.number)
    assert entries(epoch.home / names.TRASH) == ["2"]
    assert "checkpoint-1" in runs.salts(out)


def test_a_run_killed_at_any_operation_is_recovered_from_beside(tmp_path: Path) -> None:
    reached, count = True, 0
    while reached:
        out = tmp_path / str(count) / "run"
        done = runs.ended(runs.forked(lambda out=out, count=count: _save_until(out, count)))  # type: ignore[misc]
        reached, count = done == -signal.SIGKILL, count + 13
        assert done in (0, -signal.SIGKILL)
        epoch = runs.claim(out, host=True)
        found = runs.assert_sound(out)
        assert found.get("checkpoint-1") in (None, "a", "b")
        assert [entry for entry in entries(epoch.home) if names.parse_attempt_dir(entry)] == []
        assert runs.save(epoch, 9, "c", alone=True).committed
        epoch.release()
    assert count > 100


def _save_until(out: Path, limit: int) -> None:
    left = limit

    def observe(operation: str, paths: tuple[str, ...]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.observer = observe
    epoch = runs.claim(out, host=True)
    runs.save(epoch, 1, "a", alone=True)
    runs.save(epoch, 1, "b", alone=True)
    runs.save(epoch, 2, "d", alone=True)
    runs.prune(epoch, 1)
    epoch.release()


# --- names ---------------------------------------------------------------------------------------------------

NESTED = ["epoch1/step5", ".best", "a/b/c/d", "model", "..best", "x.tmp", "a.b/.c"]


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("host", [True, False])
def test_a_tag_may_lie_in_folders_and_begin_with_a_dot(tmp_path: Path, name: str, host: bool) -> None:
    out = tmp_path / "run"
    epoch = runs.claim(out, host=host)
    for salt in ("x", "y"):
        attempt = attempts.begin(epoch, name, step=1, expected=runs.CLUSTERS)
        for cluster, rank in runs.RANKS:
            runs.vote(attempt, salt, cluster, rank)
        assert settlement.settle(attempt, lead=True, timeout_s=9).committed
        assert runs.assert_sound(out) == {name: salt}
        assert (out / "latest").read_text() == name
        assert (out / name / names.MANIFEST).is_file()
    left = attempts.begin(epoch, name, step=1, expected=runs.CLUSTERS)
    for cluster, rank in runs.RANKS:
        runs.vote(left, "z", cluster, rank)
    epoch.release()
    again = runs.claim(out, host=host)  # finishes it
    assert runs.assert_sound(out) == {name: "z"}
    assert runs.save(again, 3, "s", alone=True).committed
    (out / "latest").write_text("checkpoint-3")
    runs.prune(again, 1)
    assert name in runs.salts(out), "a series of its own"


@pytest.mark.parametrize(
    ("there", "name", "reason"),
    [
        ("checkpoint-1", "checkpoint-1/inner", "is a checkpoint, and"),
        ("folder/checkpoint-1", "folder", "the folder of other checkpoints, such as 'folder/checkpoint-1'"),
    ],
)
def test_checkpoints_do_not_lie_in_each_other(out: Path, epoch: Epoch, there: str, name: str, reason: str) -> None:
    attempt = attempts.begin(epoch, there, step=1, expected=runs.CLUSTERS)
    for cluster, rank in runs.RANKS:
        runs.vote(attempt, "x", cluster, rank)
    assert settlement.settle(attempt, lead=True, timeout_s=9).committed
    with pytest.raises(SaveFailed, match=reason):
        attempts.check_replaced(out, name)


def test_the_directory_of_another_run_is_not_replaced(out: Path, epoch: Epoch) -> None:
    runs.history(out / "inner", [1])
    with pytest.raises(SaveFailed, match="the output directory of a run"):
        attempts.check_replaced(out, "inner")
    assert runs.salts(out) == {}, "its checkpoints are not ours"


def test_a_run_that_ends_leaves_nothing_beside(out: Path, epoch: Epoch) -> None:
    assert runs.save(epoch, 1, "x", alone=True).committed
    lost = attempts.begin(epoch, "checkpoint-2", step=2, expected=runs.CLUSTERS)
    assert not settlement.settle(lost, lead=True, timeout_s=0).committed
    epoch.release()
    assert entries(out.parent) == ["run"]
    again = runs.claim(out, host=True)
    assert again.number == 2
    attempts.begin(again, "checkpoint-3", step=3, expected=runs.CLUSTERS)
    again.release()  # at an exit that did not wait for the save
    assert entries(out.parent) == [".run.roll_ckpt", "run"]
    last = runs.claim(out, host=True)
    last.release()
    assert entries(out.parent) == ["run"] and list(runs.salts(out)) == ["checkpoint-1"]


def test_what_a_killed_run_left_beside_a_directory_that_is_gone_is_removed(tmp_path: Path) -> None:
    """A trainer that makes a directory for each checkpoint, and rotates them."""

    def work() -> None:
        for step in (1, 2):
            attempts.begin(runs.claim(tmp_path / f"c-{step}", host=True), "tag", step=1, expected=runs.CLUSTERS)
        os.kill(os.getpid(), signal.SIGKILL)

    assert runs.ended(runs.forked(work)) == -signal.SIGKILL
    shutil.rmtree(tmp_path / "c-1")
    alive = runs.claim(tmp_path / "c-3", host=True)
    shutil.rmtree(tmp_path / "c-3")
    runs.claim(tmp_path / "c-4", host=True)
    assert entries(tmp_path) == [".c-2.roll_ckpt", ".c-3.roll_ckpt", ".c-4.roll_ckpt", "c-2", "c-4"]
    assert runs.save(alive, 1, "x", alone=True).committed


def test_a_run_that_took_over_leaves_its_number_for_one_that_wakes_up(out: Path) -> None:
    """Else the next run would get the number of the late one, whose ranks could write into its attempts."""

    def work() -> None:
        runs.claim(out, host=True)
        os.kill(os.getpid(), signal.SIGKILL)

    assert runs.ended(runs.forked(work)) == -signal.SIGKILL
    taken_over = runs.claim(out, host=True)
    taken_over.release()
    with pytest.raises(EpochLost):
        epochs.check(taken_over.home, 1)
    assert runs.claim(out, host=True).number == 3
