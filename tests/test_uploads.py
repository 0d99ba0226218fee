from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
import runs
from test_lineage import Saver

from roll_ckpt.disk import failpoints
from roll_ckpt.errors import ConfigError, Damaged, NotFound
from roll_ckpt.transaction import verification
from roll_ckpt.upload import file_system


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("uploads") / "run"
    runs.history(output_dir, [1, 2])
    return output_dir


def test_what_is_owed_is_uploaded_whole_and_owed_no_more(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    assert file_system.owed(run, there) == ["checkpoint-1", "checkpoint-2"]
    copied: list[int] = []
    file_system.upload(run / "checkpoint-1", there, copied.append)
    assert file_system.owed(run, there) == ["checkpoint-2"]
    assert verification.verify(there / "checkpoint-1") == [] and os.listdir(there) == ["checkpoint-1"]
    assert sum(copied) == sum(path.stat().st_size for path in (there / "checkpoint-1").rglob("*") if path.is_file())
    file_system.upload(run / "checkpoint-1", there, copied.clear)  # type: ignore[arg-type]  # not called
    assert copied


def test_an_incomplete_or_other_copy_is_replaced(run: Path, tmp_path: Path) -> None:
    file_system.upload(run / "checkpoint-1", tmp_path)
    for harm in ("missing", "cut", "other", "file"):
        copy = tmp_path / "checkpoint-1"
        if harm == "missing":
            (copy / "critic/rank_0.pt").unlink()
        elif harm == "cut":
            (copy / "critic/rank_1.pt").write_bytes(b"")
        else:
            shutil.rmtree(copy)
            copy.touch() if harm == "file" else shutil.copytree(run / "checkpoint-2", copy)
        assert "checkpoint-1" in file_system.owed(run, tmp_path)
        file_system.upload(run / "checkpoint-1", tmp_path)
        assert verification.verify(copy) == [] and os.listdir(tmp_path) == ["checkpoint-1"]


def test_a_copy_of_another_run_is_left_alone(tmp_path: Path) -> None:
    there = tmp_path / "there"
    for run in ("one", "other"):
        saver = Saver(runs.claim(tmp_path / run))
        saver.save("checkpoint-1", 1)
        saver.epoch.release()
    file_system.upload(tmp_path / "one/checkpoint-1", there)
    other = file_system.FileSystemDestination(tmp_path / "other", there)
    for refused in (other.check, lambda: other.upload("checkpoint-1")):
        with pytest.raises(ConfigError, match="another run has uploaded"):
            refused()
    assert file_system.is_complete(tmp_path / "one/checkpoint-1", there / "checkpoint-1")
    assert other.owed() == ["checkpoint-1"] and os.listdir(there) == ["checkpoint-1"]


def test_a_step_that_the_same_run_saved_again_replaces_its_copy(tmp_path: Path) -> None:
    for start in (1, 2):
        saver = Saver(runs.claim(tmp_path / "run"))
        saver.save("checkpoint-1", start)
        saver.epoch.release()
        destination = file_system.FileSystemDestination(tmp_path / "run", tmp_path / "there")
        destination.check()
        destination.upload("checkpoint-1")
        assert destination.owed() == []


def test_a_damaged_checkpoint_is_not_uploaded(run: Path, tmp_path: Path) -> None:
    for path in ("actor/rank_0.pt", "votes/actor.0.json", "decision", "votes/expected.json"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(run, tmp_path / "run")
        victim = tmp_path / "run/checkpoint-1" / path
        victim.write_bytes(victim.read_bytes().replace(b"1", b"7", 1).replace(b"old", b"odd", 1))
        with pytest.raises(Damaged):
            file_system.upload(tmp_path / "run/checkpoint-1", tmp_path / "there")
        assert not (tmp_path / "there/checkpoint-1").exists()


def test_an_upload_into_the_run_itself_is_refused(run: Path) -> None:
    for inside in (run, run / "up"):
        with pytest.raises(ConfigError, match="inside"):
            file_system.upload(run / "checkpoint-1", inside)
    with pytest.raises(NotFound):
        file_system.upload(run / "checkpoint-9", run.parent / "there")


def test_a_killed_upload_shows_nothing_and_the_next_one_finishes(run: Path, tmp_path: Path) -> None:
    template = tmp_path / "template"
    shutil.copytree(run / "checkpoint-2", template / "checkpoint-1")  # to be exchanged
    (template / ".checkpoint-7.1.1.tmp/checkpoint-7").mkdir(parents=True)  # of a checkpoint that is there no more
    for at in itertools.count(0, 4):
        there = tmp_path / "there"
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(template, there)

        def work(at: int = at, there: Path = there) -> None:
            count = itertools.count()
            failpoints.observer = lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(count) == at else None
            file_system.upload(run / "checkpoint-1", there)

        code = runs.ended(runs.forked(work))
        assert [found for found in verification.verify(there / "checkpoint-1") if found.kind != "name"] == []
        file_system.upload(run / "checkpoint-1", there)
        assert file_system.owed(run, there) == ["checkpoint-2"] and os.listdir(there) == ["checkpoint-1"]
        if code == 0:
            break
    assert at > 40
