"""What follows a commit on rank 0 goes on, or says why not, when what it needs is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import runs

from roll_ckpt import process
from roll_ckpt.config import Settings, Upload
from roll_ckpt.save import claims
from roll_ckpt.save.course import Course
from roll_ckpt.save.pending import PendingSaves
from roll_ckpt.transaction import listing
from roll_ckpt.upload.after_commit import AfterCommit

SETTINGS = Settings.parse({"max_ckpt_to_keep": 1}, "the test")


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with process.installed(process.Process()):
        yield


def course_of(output_dir: Path) -> Course:
    """That of a run that has resumed from the newest checkpoint."""
    course = Course()
    course.resumed(listing.newest_first(output_dir)[0])
    return course


def caught_up(after: AfterCommit, output_dir: Path) -> None:
    """Runs `catch_up` to its end. Fails if its thread dies of an exception."""
    with mock.patch("threading.excepthook", side_effect=AssertionError) as died:
        after.catch_up(output_dir)
        for thread, _ in process.part(PendingSaves).threads():
            thread.join(20)
    assert not died.called


def test_a_run_that_starts_again_uploads_and_prunes_what_is_owed(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    runs.history(run, [1, 2])
    claims.claim(run, SETTINGS, {"actor": 1})
    after = AfterCommit(SETTINGS, course_of(run))
    after.send_to(Upload(type="file_system", output_dir=there), run)
    caught_up(after, run)
    assert set(runs.salts(run)) == {"checkpoint-2"}
    assert {path.name for path in there.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_a_destination_that_cannot_be_read_is_said_and_nothing_is_pruned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    runs.history(run, [1, 2])
    claims.claim(run, SETTINGS, {"actor": 1})
    after = AfterCommit(SETTINGS, course_of(run))
    after.send_to(Upload(type="file_system", output_dir=tmp_path / "there"), run)
    with mock.patch.object(after._destination, "owed", side_effect=OSError(5, "Input/output error")):
        caught_up(after, run)
    assert set(runs.salts(run)) == {"checkpoint-1", "checkpoint-2"}
    assert "still owes to the upload cannot be read" in caplog.text and "pruning" in caplog.text


def test_nothing_is_pruned_in_a_directory_whose_claim_was_given_back(tmp_path: Path) -> None:
    runs.history(tmp_path, [1, 2])
    caught_up(AfterCommit(SETTINGS, course_of(tmp_path)), tmp_path)
    assert set(runs.salts(tmp_path)) == {"checkpoint-1", "checkpoint-2"}
