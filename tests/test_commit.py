from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs

from roll_ckpt import names
from roll_ckpt.disk import failpoints, locks, reads, tree, writes
from roll_ckpt.errors import ConfigError, EpochLost, NoRoom, RanksDisagree, RunIsLive, SaveFailed
from roll_ckpt.formats import records
from roll_ckpt.formats.records import Vote
from roll_ckpt.transaction import (
    attempts,
    ballot,
    claims,
    epochs,
    listing,
    publication,
    recovery,
    settlement,
    verification,
)
from roll_ckpt.transaction.attempts import Attempt
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.recovery import Recovery
from roll_ckpt.transaction.settlement import Outcome


@pytest.fixture
def epoch(tmp_path: Path) -> Epoch:
    return runs.claim(tmp_path / "run")


def begin(epoch: Epoch, step: int = 1) -> Attempt:
    return attempts.begin(epoch, names.checkpoint(step), step=step, expected=runs.CLUSTERS)


def vote_all(attempt: Attempt, salt: str = "x", but: int = 0) -> None:
    for cluster, rank in runs.RANKS[: len(runs.RANKS) - but]:
        runs.vote(attempt, salt, cluster, rank)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_commit_is_invisible_until_every_rank_of_every_cluster_has_voted(epoch: Epoch) -> None:
    attempt = begin(epoch)
    vote_all(attempt, but=1)
    settled: list[Outcome] = []
    lead = threading.Thread(target=lambda: settled.append(settlement.settle(attempt, lead=True, timeout_s=30)))
    lead.start()
    time.sleep(0.3)
    assert entries(epoch.output_dir) == [] and not settled
    runs.vote(attempt, "x", *runs.RANKS[-1])
    lead.join()
    assert settled == [Outcome(True)]
    assert runs.assert_sound(epoch.output_dir) == {"checkpoint-1": "x"}
    runs.assert_clean(epoch.output_dir, epoch)


def test_a_rank_that_waits_learns_the_outcome_and_the_reason(epoch: Epoch) -> None:
    def wait(attempt: Attempt, outcomes: list[Outcome]) -> None:
        outcomes.append(settlement.settle(attempt, lead=False, timeout_s=9))

    for but in (0, 1):
        attempt = begin(epoch)
        vote_all(attempt, but=but)
        waiter: list[Outcome] = []
        thread = threading.Thread(target=wait, args=(attempt, waiter))
        thread.start()
        outcome = settlement.settle(attempt, lead=True, timeout_s=0.2)
        thread.join()
        assert waiter == [outcome] and outcome.committed == (not but)
    assert "cluster 'critic' rank 1" in waiter[0].reason


def test_a_no_vote_abandons_the_attempt_at_once_and_says_why(epoch: Epoch) -> None:
    attempt = begin(epoch)
    vote_all(attempt, but=2)
    ballot.cast(attempt, Vote("critic", 1, epoch.number, 1, (), error="write of x.pt: disk full"))
    began = time.monotonic()
    outcome = settlement.settle(attempt, lead=True, timeout_s=60)
    assert time.monotonic() - began < 5
    assert outcome == Outcome(False, "cluster 'critic' rank 1 failed: write of x.pt: disk full")
    runs_left = [path.name for path in epoch.output_dir.iterdir()]
    assert sorted(runs_left) == [names.EPOCHS, names.TRASH]
    with pytest.raises(SaveFailed, match="abandoned: cluster 'critic' rank 1 failed"):
        runs.vote(attempt, "x", "critic", 0) if attempt.checkpoint_dir.exists() else ballot.cast(
            attempt, Vote("critic", 0, epoch.number, 1, ())
        )
    assert runs.save(epoch, 1, "y", alone=True).committed


def test_missing_votes_are_named_after_the_time_limit(epoch: Epoch) -> None:
    outcome = settlement.settle(begin(epoch), lead=False, timeout_s=0.05)
    assert not outcome.committed
    assert "cluster 'actor' rank 0, 1, cluster 'critic' rank 0, 1" in outcome.reason


def test_a_vote_never_changes(epoch: Epoch) -> None:
    attempt = begin(epoch)
    vote = runs.write(attempt, "x", "actor", 0)
    ballot.cast(attempt, vote)
    ballot.cast(attempt, vote)
    with pytest.raises(SaveFailed, match="'actor' rank 0 has voted already"):
        ballot.cast(attempt, replace(vote, error="no"))
    for wrong in (replace(vote, epoch=9), replace(vote, rank=2), replace(vote, cluster="other")):
        with pytest.raises(ConfigError):
            ballot.cast(attempt, wrong)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda checkpoint_dir: (checkpoint_dir / "actor/rank_1.pt").unlink(),
            "cluster 'actor' rank 1 lists .*does not exist",
        ),
        (
            lambda checkpoint_dir: (checkpoint_dir / "actor/rank_1.pt").write_bytes(b""),
            "cluster 'actor' rank 1 .* and it has 0",
        ),
        (lambda checkpoint_dir: (checkpoint_dir / "critic/x_states.pt").touch(), "no vote lists .*critic/x_states.pt"),
        (
            lambda checkpoint_dir: (checkpoint_dir / "critic/y.distcp").symlink_to("x"),
            "no vote lists .*/y.distcp",
        ),
        (lambda checkpoint_dir: (checkpoint_dir / "votes/actor.1.json").write_bytes(b"{}"), "votes/actor.1.json"),
    ],
)
def test_files_that_are_not_as_the_votes_say_are_not_committed(
    epoch: Epoch, damage: Callable[[Path], object], reason: str
) -> None:
    attempt = begin(epoch)
    vote_all(attempt)
    damage(attempt.checkpoint_dir)
    outcome = settlement.settle(attempt, lead=True, timeout_s=9)
    assert not outcome.committed and re.search(reason, outcome.reason), outcome
    assert entries(epoch.output_dir) == []


@pytest.mark.parametrize("where", ["the decision's", "the checkpoint's"])
def test_what_an_fsync_has_refused_is_not_called_durable(
    epoch: Epoch, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The fsync of the directory fails once; when it is asked again it says yes, and that proves nothing."""
    attempt = begin(epoch)
    vote_all(attempt)
    folder = attempt.checkpoint_dir if where == "the decision's" else attempt.output_dir
    linked = False

    def observe(operation: str, paths: tuple[str, ...]) -> None:
        nonlocal linked
        linked = linked or (operation == "link" and paths[-1].endswith(names.DECISION))
        if linked and (operation, paths[0]) == ("fsync_dir", str(folder)):
            monkeypatch.setattr(failpoints, "observer", None)
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(failpoints, "observer", observe)
    outcome = settlement.settle(attempt, lead=True, timeout_s=10)
    assert (outcome.committed, outcome.durable) == (True, False) and str(folder) in outcome.reason
    assert runs.assert_sound(epoch.output_dir) == {"checkpoint-1": "x"}
    runs.assert_clean(epoch.output_dir, epoch)


def test_two_hiccups_of_the_disk_far_apart_are_two(epoch: Epoch, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = begin(epoch)
    list_dir, looks = tree.list_dir, iter([True, False, False, True, False])
    clock = iter(range(0, 10**6, 6))  # each look is six seconds after the one before
    monkeypatch.setattr(settlement, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda pause: None))
    refused = 0

    def flaky(path: Path) -> list[str]:
        nonlocal refused
        if path == attempt.output_dir and next(looks, False):
            refused += 1
            raise OSError(errno.EIO, "Input/output error", str(path))
        return list_dir(path)

    monkeypatch.setattr(tree, "list_dir", flaky)
    outcome = settlement.settle(attempt, lead=True, timeout_s=90)
    assert refused == 2 and not outcome.committed and "no vote came" in outcome.reason


def test_a_reason_that_cannot_be_written_down_keeps_no_room(epoch: Epoch, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = begin(epoch)
    vote_all(attempt, but=1)

    def observe(operation: str, paths: tuple[str, ...]) -> None:
        if operation == "link" and "aborted" in paths[-1]:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failpoints, "observer", observe)
    assert not settlement.settle(attempt, lead=True, timeout_s=0).committed
    assert not attempt.directory.exists()
    runs.assert_clean(epoch.output_dir, epoch)


def test_stock_code_s_files_beside_the_unit_are_moved_and_its_latest_is_not(epoch: Epoch) -> None:
    attempt = attempts.begin(epoch, "tag", step=None, expected=runs.CLUSTERS, save_latest=False)
    (attempt.directory / "zero_to_fp32.py").write_text("script")
    (attempt.directory / "latest").write_text("tag")
    vote_all(attempt)
    assert settlement.settle(attempt, lead=True, timeout_s=9) == Outcome(True)
    assert entries(epoch.output_dir) == ["tag", "zero_to_fp32.py"]


def test_everything_is_synced_before_the_decision_that_refers_to_it(
    epoch: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = begin(epoch)
    checkpoint_dir = str(attempt.checkpoint_dir)
    dirty: set[str] = set()
    decided = []

    def watch(operation: str, paths: tuple[str, ...]) -> None:
        if operation == "link" and paths[1] == f"{checkpoint_dir}/decision":
            assert not {path for path in dirty if path.startswith(checkpoint_dir)}, dirty
            decided.append(operation)
        if operation in ("rename",) and paths == (checkpoint_dir, str(attempt.final)):
            assert decided and not {path for path in dirty if path.startswith(checkpoint_dir)}, dirty
        if operation in ("fsync", "fsync_dir"):
            dirty.discard(paths[0])
        elif operation == "write":
            dirty.add(paths[0])
        elif operation in ("create", "link", "rename", "mkdir", "unlink"):
            for path in paths:
                dirty.discard(path) if operation != "mkdir" else None
                dirty.add(str(Path(path).parent))
            if operation == "mkdir":
                dirty.add(paths[0])

    monkeypatch.setattr(failpoints, "observer", watch)
    vote_all(attempt, but=1)
    cluster, rank = runs.RANKS[-1]
    for folder in (attempt.checkpoint_dir / cluster / "made", attempt.checkpoint_dir / cluster / "made/late"):
        writes.make_dir(folder)  # by stock code, which syncs no directory
    descriptor = writes.create(folder / "f")
    writes.write_all(descriptor, b"x", folder / "f")
    writes.fsync(descriptor, folder / "f")
    os.close(descriptor)
    receipt = records.receipt_of_bytes(f"{cluster}/made/late/f", b"x")
    vote = runs.write(attempt, "x", cluster, rank)
    ballot.cast(attempt, replace(vote, receipts=(*vote.receipts, receipt)))
    assert settlement.settle(attempt, lead=True, timeout_s=9).committed and decided


def test_begin_refuses_what_cannot_be_before_it_touches_anything(epoch: Epoch) -> None:
    before = sorted(epoch.output_dir.rglob("*"))
    with pytest.raises(NoRoom, match=r"needs 9,000,000,000,000,000,000 bytes and .* has [\d,]+"):
        attempts.begin(epoch, "c", step=1, expected=runs.CLUSTERS, needed_bytes=9 * 10**18)
    for name in ("latest", "../up", ".epochs"):
        with pytest.raises(ConfigError):
            attempts.begin(epoch, name, step=1, expected=runs.CLUSTERS)
    assert sorted(epoch.output_dir.rglob("*")) == before


def test_a_forked_child_neither_votes_nor_commits(epoch: Epoch) -> None:
    attempt = begin(epoch)

    def child() -> None:
        for work in (lambda: runs.vote(attempt, "x", "actor", 0), lambda: begin(epoch, 2)):
            with pytest.raises(RuntimeError, match="forked"):
                work()
        with pytest.raises(RuntimeError, match="forked"):
            settlement.settle(attempt, lead=True, timeout_s=0)
        epoch.release()

    assert runs.ended(runs.forked(child)) == 0
    epoch.check()
    assert locks.is_locked(epoch.output_dir / names.EPOCHS / "1")


# --- jobs ---------------------------------------------------------------------------------------------------


class Other:
    """Another process, that does what it is told and then lives on until it is killed."""

    def __init__(self, work: Callable[[], object]) -> None:
        ready, told = os.pipe()

        def live() -> None:
            work()
            os.write(told, b"1")
            time.sleep(60)

        self.pid = runs.forked(live)
        os.close(told)
        assert os.read(ready, 1) == b"1", "it failed"
        os.close(ready)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        runs.ended(self.pid)


def job(output_dir: Path, cluster: str) -> Epoch:
    return claims.claim(output_dir, run_id="shared", clusters={cluster: 2}, expected_clusters=runs.CLUSTERS)


def job_saves(epoch: Epoch, cluster: str, step: int, timeout_s: float = 20) -> Outcome:
    attempt = begin(epoch, step)
    for rank in range(2):
        runs.vote(attempt, "x", cluster, rank)
    return settlement.settle(attempt, lead=True, timeout_s=timeout_s)


def test_a_second_run_is_refused_by_name_and_touches_nothing(tmp_path: Path) -> None:
    first = Other(lambda: runs.claim(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(RunIsLive, match=f"process {first.pid} on host .*run-1"):
        claims.claim(tmp_path / "run", run_id="run-2", clusters={"actor": 2})
    with pytest.raises(RunIsLive, match=f"process {first.pid} "):
        runs.claim(tmp_path / "run")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    first.kill()
    began = time.monotonic()
    assert runs.claim(tmp_path / "run").number == 2
    assert time.monotonic() - began < 2, "a restart after SIGKILL works at once"


def test_the_same_process_cannot_claim_twice_but_after_a_release(tmp_path: Path) -> None:
    epoch = runs.claim(tmp_path)
    with pytest.raises(RunIsLive, match=f"process {os.getpid()} "):
        runs.claim(tmp_path)
    epoch.release()
    assert runs.claim(tmp_path).number == 2


def test_a_run_that_is_taken_over_fails_by_name(tmp_path: Path) -> None:
    epoch = runs.claim(tmp_path)
    attempt = begin(epoch)
    other = Other(lambda: runs.claim(tmp_path, take_over=True))
    for work in (
        epoch.check,
        lambda: begin(epoch, 2),
        lambda: settlement.settle(attempt, lead=True, timeout_s=1),
    ):
        with pytest.raises(EpochLost, match=f"epoch 1 was taken over by epoch 2, process {other.pid} on host"):
            work()
    with pytest.raises((EpochLost, FileNotFoundError)):
        runs.vote(attempt, "x", "actor", 0)
    other.kill()


def test_two_jobs_commit_one_checkpoint_together(tmp_path: Path) -> None:
    def critic() -> None:
        epoch = job(tmp_path, "critic")
        for step in range(1, 9):
            assert job_saves(epoch, "critic", step).committed

    epoch = job(tmp_path, "actor")
    other = runs.forked(critic)
    for step in range(1, 9):
        assert job_saves(epoch, "actor", step).committed
    assert runs.ended(other) == 0
    assert len(runs.salts(tmp_path)) == 8 and verification.verify_run(tmp_path) == []
    assert epoch.number == 1


def test_a_job_that_is_missing_aborts_the_attempt(tmp_path: Path) -> None:
    outcome = job_saves(job(tmp_path, "actor"), "actor", 1, timeout_s=0.1)
    assert not outcome.committed and "no vote came from cluster 'critic' rank 0, 1" in outcome.reason
    with pytest.raises(SaveFailed, match="no vote came from cluster 'critic'"):
        begin(job(tmp_path, "critic"), 1)  # it comes late, and does not wait for nothing
    assert not list(tmp_path.glob(".*.tmp"))


def test_jobs_that_disagree_about_a_save_are_told(tmp_path: Path) -> None:
    begin(job(tmp_path, "actor"))
    with pytest.raises(RanksDisagree, match="another job has begun it"):
        attempts.begin(job(tmp_path, "critic"), "checkpoint-1", step=2, expected=runs.CLUSTERS)


def test_jobs_must_tell_the_same_run_and_clusters(tmp_path: Path) -> None:
    job(tmp_path, "actor")
    with pytest.raises(RunIsLive, match="cluster 'actor' of run_id 'shared' is already running"):
        job(tmp_path, "actor")
    for run_id, expected in (("other", runs.CLUSTERS), ("shared", {"critic": 2}), ("shared", None)):
        with pytest.raises(RunIsLive, match="need the same run_id"):
            claims.claim(tmp_path, run_id=run_id, clusters={"critic": 2}, expected_clusters=expected)
    with pytest.raises(ConfigError, match="not among expected_clusters"):
        claims.claim(tmp_path, run_id="shared", clusters={"critic": 3}, expected_clusters=runs.CLUSTERS)


def test_a_job_that_restarts_claims_a_new_epoch_and_the_survivor_is_told(tmp_path: Path) -> None:
    critic = Other(lambda: job(tmp_path, "critic"))
    actor = job(tmp_path, "actor")
    assert actor.number == 1
    critic.kill()
    restarted = Other(lambda: job(tmp_path, "critic"))
    with pytest.raises(EpochLost, match=f"epoch 2, process {restarted.pid} on host .*cluster 'critic'"):
        job_saves(actor, "actor", 1)
    actor.release()
    assert job(tmp_path, "actor").number == 2
    restarted.kill()


def test_all_jobs_of_a_run_are_told_to_take_over(tmp_path: Path) -> None:
    """The first takes over from whoever seems alive, the second joins it instead of taking over from it."""

    def forced(cluster: str) -> Epoch:
        return claims.claim(
            tmp_path, run_id="shared", clusters={cluster: 2}, expected_clusters=runs.CLUSTERS, take_over=True
        )

    zombies = [Other(lambda c=cluster: job(tmp_path, c)) for cluster in runs.CLUSTERS]  # type: ignore[misc]
    first = Other(lambda: forced("actor"))
    second = forced("critic")
    assert second.number == 2 and len(epochs.members(tmp_path, 2)) == 2
    assert job_saves(second, "critic", 1, timeout_s=0.1).reason.startswith("no vote came from cluster 'actor'")
    for other in (first, *zombies):
        other.kill()


def test_a_run_on_another_host_is_known_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(epochs, "SILENCE_S", 0.6)

    def elsewhere() -> None:
        reads.boot_id = lambda: "another boot"
        runs.claim(tmp_path)

    other = Other(elsewhere)
    with pytest.raises(RunIsLive, match=f"process {other.pid}"):
        runs.claim(tmp_path)
    other.kill()
    began = time.monotonic()
    assert runs.claim(tmp_path).number == 2
    assert 0.6 <= time.monotonic() - began < 5


def test_a_heartbeat_that_fails_is_logged_once_and_again_when_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(epochs, "HEARTBEAT_S", 0.01)
    touch, beats = writes.touch, 0

    def fails_five_times(path: Path, *, at_ns: int | None = None) -> None:
        nonlocal beats
        beats += tmp_path in path.parents  # runs of other tests have heartbeats, too
        if beats <= 5 and tmp_path in path.parents:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        touch(path, at_ns=at_ns)

    monkeypatch.setattr(writes, "touch", fails_five_times)
    epoch = runs.claim(tmp_path)
    deadline = time.monotonic() + 10
    while beats < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    epoch.release()
    failed, works = [message for message in caplog.messages if message.startswith(f"{tmp_path}/.epochs/1")]
    assert "the heartbeat of this run fails: Input/output error" in failed and "take this one for dead" in failed
    assert works.endswith("the heartbeat of this run works again")


def test_a_run_on_another_host_that_has_said_goodbye_is_not_waited_for(tmp_path: Path) -> None:
    def elsewhere() -> None:
        reads.boot_id = lambda: "another boot"
        runs.claim(tmp_path).release()

    assert runs.ended(runs.forked(elsewhere)) == 0
    began = time.monotonic()
    runs.claim(tmp_path)
    assert time.monotonic() - began < 2


def test_a_directory_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        runs.claim(tmp_path / "file" / "run")


# --- recovering ---------------------------------------------------------------------------------------------


def left_behind(output_dir: Path, but: int) -> list[Recovery]:
    """What recovery says of a save whose process died with all votes cast `but` so many."""
    other = Other(lambda: vote_all(begin(runs.claim(output_dir)), but=but))
    other.kill()
    epoch = epochs.claim_number(output_dir, runs.RUN, runs.CLUSTERS, None, False)
    found = recovery.recover(output_dir, epoch=epoch)
    runs.assert_clean(output_dir, epoch)
    assert recovery.recover(output_dir, epoch=epoch) == []
    return found


def test_a_save_with_all_votes_is_finished_by_the_next_start(tmp_path: Path) -> None:
    assert left_behind(tmp_path, 0) == [Recovery("checkpoint-1", 1, 1, "finished", "all ranks had voted")]
    assert runs.assert_sound(tmp_path) == {"checkpoint-1": "x"}
    assert (tmp_path / names.LATEST).read_text() == "checkpoint-1"


def test_a_save_without_all_votes_is_discarded_by_the_next_start(tmp_path: Path) -> None:
    (found,) = left_behind(tmp_path, 1)
    assert found.action == "discarded" and "no vote came from cluster 'critic' rank 1" in found.reason
    assert runs.assert_sound(tmp_path) == {}


def test_a_job_that_recovers_late_does_not_keep_latest_from_being_written(tmp_path: Path) -> None:
    """One job is about to write the manifest when another one publishes the checkpoint."""
    Other(lambda: vote_all(begin(runs.claim(tmp_path)))).kill()
    epoch = epochs.claim_number(tmp_path, runs.RUN, runs.CLUSTERS, None, False)
    published, late_one_is_done = threading.Event(), threading.Event()
    faster = threading.Thread(target=lambda: recovery.recover(tmp_path, epoch=epoch), name="faster")

    def listen(point: str, where: dict[str, object]) -> None:
        if threading.current_thread() is faster:
            if point == "commit.renamed":
                published.set()
                assert late_one_is_done.wait(30)
        elif point == "manifest.before":
            faster.start()
            assert published.wait(30)

    failpoints.listener = listen
    try:
        recovery.recover(tmp_path, epoch=epoch)
    finally:
        late_one_is_done.set()
        faster.join()
        failpoints.listener = None
    assert runs.assert_sound(tmp_path) == {"checkpoint-1": "x"}
    assert listing.read_latest(tmp_path) == "checkpoint-1"
    runs.assert_clean(tmp_path, epoch)


# --- finding ------------------------------------------------------------------------------------------------


def test_a_damaged_manifest_is_reported_and_left_out(epoch: Epoch) -> None:
    for step in (1, 2):
        assert runs.save(epoch, step, "x", alone=True).committed
    path = epoch.output_dir / "checkpoint-2" / names.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 3'))
    reported: list[Exception] = []
    assert [told.step for told in listing.committed(epoch.output_dir, reported.append)] == [1]
    assert "checkpoint-2" in str(reported[0])
    newest = listing.newest_first(epoch.output_dir)[0]
    assert newest is not None and newest.name == "checkpoint-1"
    assert runs.save(epoch, 2, "again", alone=True).committed  # in place of the damaged one
    assert runs.salts(epoch.output_dir) == {"checkpoint-1": "x", "checkpoint-2": "again"}
    runs.assert_clean(epoch.output_dir, epoch)


def gone(path: Path, elsewhere: Path) -> None:
    path.unlink()


def a_link(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def a_pipe(path: Path, elsewhere: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("harm", "path"),
    [
        (gone, names.MANIFEST),
        (a_pipe, names.MANIFEST),
        (a_pipe, names.EXPECTED),
        (a_link, "actor/rank_0.pt"),
        (a_link, ""),
    ],
)
def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(
    epoch: Epoch, tmp_path: Path, harm: Callable[[Path, Path], None], path: str
) -> None:
    for step in (1, 2):
        assert runs.save(epoch, step, "x", alone=True).committed
    elsewhere = tmp_path / "elsewhere"
    harm(epoch.output_dir / "checkpoint-2" / path, elsewhere)
    attempts.check_replaced(epoch.output_dir, "checkpoint-2")
    assert runs.save(epoch, 2, "again", alone=True).committed
    assert runs.salts(epoch.output_dir) == {"checkpoint-1": "x", "checkpoint-2": "again"}
    runs.assert_clean(epoch.output_dir, epoch)
    assert not elsewhere.is_dir() or verification.verify(elsewhere) == []  # what a link leads to is not ours to delete


def test_many_leads_at_once_replace_a_checkpoint_once(epoch: Epoch) -> None:
    for salt in ("a", "b", "c"):
        attempt = begin(epoch)
        vote_all(attempt, salt)

        def lead(attempt: Attempt = attempt) -> None:
            mine = replace(attempt, pid=os.getpid())
            assert settlement.settle(mine, lead=True, timeout_s=9).committed

        leads = [runs.forked(lead) for _ in range(6)]
        assert [runs.ended(pid) for pid in leads] == [0] * 6
        assert runs.assert_sound(epoch.output_dir) == {"checkpoint-1": salt}
        runs.assert_clean(epoch.output_dir, epoch)


def test_attempts_of_one_name_are_counted(epoch: Epoch) -> None:
    assert [begin(epoch).attempt, begin(epoch).attempt, begin(epoch, 2).attempt] == [1, 2, 1]
    assert attempts.abort_reason(begin(epoch)) is None


def test_a_name_of_long_ago_gets_another_number_than_its_checkpoint(
    epoch: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_NAMES_KEPT", 2)
    for step, salt in ((1, "a"), (2, "a"), (3, "a"), (1, "b")):
        assert runs.save(epoch, step, salt, alone=True).committed
    assert runs.salts(epoch.output_dir)["checkpoint-1"] == "b"
    assert set(epoch.attempts) == {"checkpoint-3", "checkpoint-1"}


def test_who_asks_after_the_reason_is_forgotten_still_learns_that_it_was_abandoned(
    epoch: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "_REASONS_KEPT", 1)
    first, second = begin(epoch, 1), begin(epoch, 2)
    for attempt in (first, second):
        assert not settlement.settle(attempt, lead=True, timeout_s=0).committed
    assert "no vote came" in settlement.settle(second, lead=False, timeout_s=0).reason
    outcome = settlement.settle(first, lead=False, timeout_s=0)
    assert not outcome.committed and "no reason is recorded" in outcome.reason


def test_a_run_is_newer_than_what_was_copied_into_its_directory(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        runs.history(tmp_path / "old", [step])
    (tmp_path / "new").mkdir()
    shutil.copytree(tmp_path / "old" / "checkpoint-20", tmp_path / "new" / "checkpoint-20")
    runs.history(tmp_path / "new", [15, 25])
    assert [told.name for told in listing.committed(tmp_path / "new")] == [
        *("checkpoint-20", "checkpoint-15", "checkpoint-25"),
    ]
    assert verification.verify_run(tmp_path / "new") == []
