"""Save: this process's part of one checkpoint, from the agreement to begin until the outcome.

A short-lived Python thread for each save waits for the bytes, votes, settles, and does what follows a commit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from roll_ckpt.config import Settings
from roll_ckpt.errors import RollCkptError, SaveFailed
from roll_ckpt.save.cluster_save import Changes, ClusterSave
from roll_ckpt.transaction import ballot, settlement
from roll_ckpt.transaction.attempts import Attempt

log = logging.getLogger("roll_ckpt")

Hook = Callable[["Save"], None]


@dataclass
class Save:
    """This process's part of one checkpoint, from `begin` to the outcome."""

    attempt: Attempt
    settings: Settings
    rank: int
    clusters: tuple[str, ...]
    """The clusters of this world, whose votes this process casts."""
    reused_plans: frozenset[str] = frozenset()
    """The clusters whose earlier plan fits again, on every rank; see `begin`."""
    on_commit: Hook | None = None
    """Called on the save's thread once the checkpoint is committed: what it raises becomes `failure`."""
    on_end: Hook | None = None
    """Called on the save's thread when all is done."""
    after: Save | None = None
    """The save before this one in the same directory, which settles first."""
    cluster_saves: dict[str, ClusterSave] = field(default_factory=dict)
    failure: RollCkptError | None = None
    reported: bool = False
    durable_s: float | None = None
    notes: list[str] = field(default_factory=list)
    """What followed the commit, for the log: uploaded, pruned."""
    stood_still_s: float = 0.0
    """How long training waited for this save so far, in seconds."""
    _threaded: bool = False
    _staged: threading.Event = field(default_factory=threading.Event)
    _settled: threading.Event = field(default_factory=threading.Event)
    _finished: threading.Event = field(default_factory=threading.Event)
    _started: float = field(default_factory=time.monotonic)

    def add_cluster(self, cluster: str, facts: Mapping[str, Any]) -> ClusterSave:
        """The part of `cluster`; `facts` go into the manifest."""
        self.cluster_saves[cluster] = ClusterSave(
            self.attempt, self.settings, cluster, self.rank, facts, cluster in self.reused_plans
        )
        return self.cluster_saves[cluster]

    @contextmanager
    def staging(self) -> Iterator[None]:
        """Stage every cluster inside the block; when it ends, vote and commit in the background.

        Whatever is raised in it, an interrupt too, turns all votes of this rank into a no.
        """
        began = time.monotonic()
        self._start_thread()  # now: once there are copies to make, a thread waits long for a processor
        try:
            yield
        except BaseException as problem:
            for cluster_save in self.cluster_saves.values():
                cluster_save.fail(problem)
            raise
        finally:
            self.stood_still_s += time.monotonic() - began
            self._end_staging()

    def _end_staging(self) -> None:
        for cluster in self.clusters:
            if cluster not in self.cluster_saves:
                self.add_cluster(cluster, {}).fail(RuntimeError("the trainer failed before this cluster was staged"))
        self._staged.set()
        if not self._threaded:  # no thread to be had: blocking beats a save that nobody finishes
            self._run()

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._run, name=f"roll_ckpt {self.attempt.name}", daemon=True).start()
            self._threaded = True
        except RuntimeError as problem:
            log.warning("%s: no thread can be started, this save blocks: %s", self.attempt.label, problem)

    @property
    def begun(self) -> bool:
        """Whether there is an attempt to stage; else it has failed already: `failure` says why."""
        return self.attempt.attempt > 0

    @property
    def lead(self) -> bool:
        """Whether this process collects the votes and decides: rank 0 of each world."""
        return self.rank == 0

    @property
    def staged(self) -> bool:
        """Whether `staging()` has ended: the save goes on by itself."""
        return self._staged.is_set()

    @property
    def settled(self) -> bool:
        """The outcome is known: committed, or `failure` says why not."""
        return self._settled.is_set()

    @property
    def finished(self) -> bool:
        """Settled, and what follows a commit (upload, prune) is done."""
        return self._finished.is_set()

    def fence(self, changes: Changes = lambda owner: True) -> None:
        """`ClusterSave.fence` of every cluster of this rank: blocks until their sources were copied."""
        began = time.monotonic()
        for cluster_save in self.cluster_saves.values():
            cluster_save.fence(changes)
        self.stood_still_s += time.monotonic() - began

    def wait(self, timeout_s: float | None = None, *, uploaded: bool = False) -> None:
        """Block until the checkpoint is committed; with `uploaded`, until its upload and pruning are done.

        Raises:
            SaveFailed, EpochLost: the save was abandoned; the message says why.
            TimeoutError: not within `timeout_s`; the save goes on.
        """
        event = self._finished if uploaded else self._settled
        if not event.wait(timeout_s):
            raise TimeoutError(f"{self.attempt.label}: not done within {timeout_s} s; it goes on")
        if self.failure is not None:
            self.reported = True
            raise self.failure

    def copy_stats(self) -> dict[str, float]:
        """What this rank's files needed: `nbytes`, `eager_bytes` copied before staging returned, `copy_s` until the last
        was copied (of the file that took longest), each summed over files; meant for benchmarks."""
        files = [stats for part in self.cluster_saves.values() for stats in part.file_stats()]
        summed = {key: float(sum(stats[key] for stats in files)) for key in ("nbytes", "eager_bytes", "lazy_bytes")}
        return {**summed, "copy_s": max((stats["copy_s"] for stats in files), default=0.0)}

    def wait_settled(self) -> None:
        """Block until the outcome is known, whatever it is."""
        self._settled.wait()

    def _run(self) -> None:
        self._staged.wait()
        try:
            if self.after is not None:
                self.after.wait_settled()
            self._settle(self._vote())
        except RollCkptError as problem:
            self._fail(problem)
        except Exception as problem:
            self._fail(SaveFailed(f"{self.attempt.label}: {type(problem).__name__}: {problem}"))
        finally:
            for cluster_save in self.cluster_saves.values():
                if self.failure is not None:
                    cluster_save.abandon()
            self._settled.set()
        try:
            if self.failure is None and self.on_commit is not None:
                self.on_commit(self)
        except Exception as problem:
            self._fail(SaveFailed(f"{self.attempt.label}: committed and sound, but what follows failed: {problem}"))
        finally:
            self._log_outcome()
            self._finished.set()
            self.after = None
            if self.on_end is not None:
                self.on_end(self)

    def _vote(self) -> str:
        """Cast the vote of each cluster; return why one could not be cast, "" if all were."""
        refusal = ""
        for cluster_save in self.cluster_saves.values():
            try:
                ballot.cast(self.attempt, cluster_save.finish())
            except SaveFailed as problem:
                cluster_save.fail(problem)
                refusal = refusal or str(problem).removeprefix(f"{self.attempt.label}: ")
        return refusal

    def _settle(self, refusal: str) -> None:
        began = time.monotonic()
        outcome = settlement.settle(
            self.attempt, lead=self.lead, timeout_s=self.settings.commit_timeout_s, refusal=refusal
        )
        now = time.monotonic()
        if not outcome.committed:
            untold = [
                f"cluster {t.cluster!r} rank {t.rank} failed: {t.error}" for t in self.cluster_saves.values() if t.error
            ]
            reason = "; ".join([outcome.reason, *(here for here in untold if here not in outcome.reason)])
            raise SaveFailed(
                f"{self.attempt.label}: abandoned: {reason}. Older checkpoints are untouched; the next save "
                "starts afresh"
            )
        if not outcome.durable or refusal:
            raise SaveFailed(
                f"{self.attempt.label}: it is committed and whole, but the disk did not say that it is durable: "
                f"{'; '.join(filter(None, (refusal, outcome.reason)))}. It may not survive a power failure; older "
                "checkpoints are kept until a later save is durable. Look after the file system"
            )
        self.durable_s = now - self._started
        for cluster_save in self.cluster_saves.values():
            cluster_save.timing.commit_s = now - began

    def _log_outcome(self) -> None:
        """One line for whoever watches the run, on rank 0."""
        if not self.lead or self.durable_s is None:
            return
        nbytes = sum(cluster_save.nbytes for cluster_save in self.cluster_saves.values())
        notes = "".join(f", {note}" for note in self.notes)
        log.info("%s: committed %.2f s after it began (this rank wrote %d bytes)%s; training stood still for %.3f s",
                 self.attempt.final, self.durable_s, nbytes, notes, self.stood_still_s)  # fmt: skip

    def fail_to_begin(self, problem: RollCkptError) -> None:
        """End this save, for which there is no attempt, with `problem`."""
        self._fail(problem)
        self._settled.set()
        self._finished.set()

    def _fail(self, problem: RollCkptError) -> None:
        self.failure = problem
        log.error("%s", problem)
