"""Destinations of committed checkpoints: what a run asks of each, answered by both."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import runs

from roll_ckpt import names
from roll_ckpt.config import HubUpload, Upload
from roll_ckpt.errors import SaveFailed
from roll_ckpt.transaction import verification
from roll_ckpt.upload import destination
from roll_ckpt.upload.destination import Destination
from roll_ckpt.upload.hub import push_queue

SECTIONS = {
    "file_system": lambda folder: Upload(type="file_system", output_dir=folder / "there"),
    "hub": lambda folder: HubUpload(type="hub", repo_id="me/run"),
}


def made(kind: str, folder: Path) -> Destination:
    return destination.make(SECTIONS[kind](folder), folder / "run", lambda ended: None, 1.0)


def nothing() -> None:
    pass


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_destination_has_every_method_as_the_protocol_says(kind: str, tmp_path: Path) -> None:
    methods = [name for name, _ in inspect.getmembers(Destination, inspect.isfunction) if not name.startswith("_")]
    assert methods == ["check", "forget", "owed", "upload", "wait"]
    for name in methods:
        asked = list(inspect.signature(getattr(Destination, name)).parameters)[1:]
        assert list(inspect.signature(getattr(made(kind, tmp_path), name)).parameters) == asked


@pytest.mark.parametrize("kind", SECTIONS)
def test_what_is_committed_is_owed_until_it_is_there(kind: str, tmp_path: Path) -> None:
    runs.history(tmp_path / "run", [1, 2])
    one = made(kind, tmp_path)
    assert one.owed() == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "run/.hub").exists() and not (tmp_path / "there").exists()  # nothing is written by asking


def test_a_copy_is_complete_when_upload_returns(tmp_path: Path) -> None:
    runs.history(tmp_path / "run", [1, 2])
    one = made("file_system", tmp_path)
    one.upload("checkpoint-1")
    one.wait("checkpoint-1", 0.0, nothing)
    assert one.owed() == ["checkpoint-2"] and not verification.verify(tmp_path / "there/checkpoint-1")


def test_whoever_waits_for_another_job_hears_that_nothing_comes_and_may_stop(tmp_path: Path) -> None:
    runs.history(tmp_path / "run", [1])
    for kind in SECTIONS:
        with pytest.raises(SaveFailed, match=r"checkpoint-1.*exit_timeout_s"):
            made(kind, tmp_path).wait("checkpoint-1", 0.01, nothing)
        with pytest.raises(ZeroDivisionError):
            made(kind, tmp_path).wait("checkpoint-1", 60, lambda: 1 / 0)  # type: ignore[arg-type,return-value]


def test_what_a_pruned_checkpoint_has_left_is_forgotten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.history(run, [1, 2])
    half = tmp_path / "there" / names.attempt_dir("checkpoint-1", 1, 1)
    other = tmp_path / "there" / names.attempt_dir("checkpoint-2", 1, 2)
    for folder in (half, other):
        folder.mkdir(parents=True)
    made("file_system", tmp_path).forget("checkpoint-1")
    assert not half.exists() and other.exists()
    push_queue.set_repository(run, push_queue.Repository("me/run"))
    entry = push_queue.find(run, "checkpoint-1")
    hashes = push_queue.Hashes(run, entry)
    hashes.remember(next(iter(runs_receipts(run))), 1, "0" * 64)
    assert (run / names.hub_hashes("checkpoint-1")).exists()
    made("hub", tmp_path).forget("checkpoint-1")
    assert not (run / names.hub_hashes("checkpoint-1")).exists()


def runs_receipts(run: Path) -> list[object]:
    from roll_ckpt.formats import manifests

    return list(manifests.read(run / "checkpoint-1").files)
