from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import runs

from roll_ckpt.errors import EpochLost
from roll_ckpt.formats import manifests
from roll_ckpt.transaction import listing, reader_locks, retention
from roll_ckpt.transaction.retention import Record
from roll_ckpt.upload.destination import all_owing
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.push_queue import Repository

NAMES = ["c1", "c2", "c3", "c4"]


def records(*protected: str) -> list[Record]:
    return [Record(name, step, float(step), 1, name in protected) for step, name in enumerate(NAMES)]


def test_the_rule_keeps_the_newest_and_the_protected() -> None:
    assert retention.doomed(records(), 2) == ["c1", "c2"]
    assert retention.doomed(records("c2"), 1) == ["c1", "c3"]
    assert retention.doomed(records(), 0) == [] == retention.doomed(records(), 9) == retention.doomed([], 1)
    with pytest.raises(ValueError, match="-1"):
        retention.doomed(records(), -1)


def test_a_record_tells_what_a_rule_may_ask_for(tmp_path: Path) -> None:
    began = time.time()
    runs.history(tmp_path, [1, 2])
    first, second = retention.records_of(tmp_path, [runs.Owed(lambda: ["checkpoint-1"])])
    assert (first.step, first.protected, second.step, second.protected) == (1, True, 2, True)  # `latest` names it
    assert began - 1 < first.committed_at_s <= second.committed_at_s < time.time() + 1
    assert first.nbytes == manifests.read(tmp_path / "checkpoint-1").nbytes() > 0


def test_a_checkpoint_that_another_save_prunes_meanwhile_has_no_record(tmp_path: Path) -> None:
    runs.history(tmp_path, [1, 2])

    def owed() -> set[str]:
        shutil.rmtree(tmp_path / "checkpoint-1")
        return set()

    assert [record.name for record in retention.records_of(tmp_path, [runs.Owed(owed)])] == ["checkpoint-2"]


def test_pruning_leaves_alone_what_is_read_protected_or_named_by_latest(tmp_path: Path) -> None:
    epoch = runs.claim(tmp_path)
    for step in (1, 2, 3, 4, 5):
        assert runs.save(epoch, step, "x", alone=True).committed
    listing.write_latest(tmp_path, "checkpoint-1")
    kept = runs.Owed(lambda: {"checkpoint-3"})
    with reader_locks.reading(tmp_path / "checkpoint-2"):
        assert retention.prune(tmp_path, epoch, 1, [kept]) == ["checkpoint-4"] == kept.forgotten
    assert set(runs.salts(tmp_path)) == {"checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-5"}
    assert retention.prune(tmp_path, epoch, 1) == ["checkpoint-2", "checkpoint-3"]
    epoch.release()


def test_what_is_committed_while_it_is_asked_what_is_owed_is_not_pruned(tmp_path: Path) -> None:
    epoch = runs.claim(tmp_path)
    for step in (1, 2):
        assert runs.save(epoch, step, "x", alone=True).committed

    def owed() -> set[str]:
        for step in (3, 4):
            assert runs.save(epoch, step, "x", alone=True).committed
        return {"checkpoint-1", "checkpoint-2"}

    assert retention.prune(tmp_path, epoch, 1, [runs.Owed(owed)]) == []
    assert len(runs.salts(tmp_path)) == 4
    epoch.release()


def test_what_another_process_reads_is_not_pruned(tmp_path: Path) -> None:
    runs.history(tmp_path, [1, 2])
    with reader_locks.reading(tmp_path / "checkpoint-1"):
        assert reader_locks.is_being_read(tmp_path / "checkpoint-1")
        runs.salts(tmp_path)  # verifying reads every file, and must not lose the lease

        def other() -> None:
            assert reader_locks.is_being_read(tmp_path / "checkpoint-1")
            assert runs.prune(runs.claim(tmp_path), 1) == []

        assert runs.ended(runs.forked(other)) == 0
    assert not reader_locks.is_being_read(tmp_path / "checkpoint-1")
    assert runs.ended(runs.forked(lambda: runs.prune(runs.claim(tmp_path), 1))) == 0
    assert set(runs.salts(tmp_path)) == {"checkpoint-2"}


def test_a_run_that_lost_its_epoch_prunes_nothing(tmp_path: Path) -> None:
    epoch = runs.claim(tmp_path)
    for step in (1, 2):
        runs.save(epoch, step, "x", alone=True)
    assert runs.ended(runs.forked(lambda: runs.claim(tmp_path, take_over=True))) == 0
    with pytest.raises(EpochLost):
        retention.prune(tmp_path, epoch, 1)
    assert len(runs.salts(tmp_path)) == 2
    epoch.release()


def test_what_is_owed_to_the_hub_is_not_pruned_whoever_prunes(tmp_path: Path) -> None:
    epoch = runs.claim(tmp_path)
    for step in (1, 2, 3):
        assert runs.save(epoch, step, "x", alone=True).committed
    push_queue.set_repository(tmp_path, Repository("me/run"))
    assert retention.prune(tmp_path, epoch, 1, all_owing(tmp_path)) == []
    push_queue.cancel(tmp_path, "checkpoint-1")
    assert retention.prune(tmp_path, epoch, 1, all_owing(tmp_path)) == ["checkpoint-1"]
    epoch.release()
