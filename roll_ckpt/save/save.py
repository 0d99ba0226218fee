"""Save: one rank's part of one checkpoint, from the agreement to begin it until the outcome is known.

Each save has a short-lived thread that waits for the bytes, votes, settles, and runs what follows a commit.
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
from roll_ckpt.errors import EpochLost, RollCkptError, SaveFailed
from roll_ckpt.save.cluster_save import Changes, ClusterSave
from roll_ckpt.transaction import ballot, settlement
from roll_ckpt.transaction.attempts import Attempt

log = logging.getLogger("roll_ckpt")

Hook = Callable[["Save"], None]


@dataclass
class Save:
    """One rank's part of one checkpoint. Made by `begin`; the training thread then stages, fences and waits.

    `cluster_saves` are its parts by cluster. Once it is settled, `failure` is None if the checkpoint was committed and
    is durable, else the reason; `reported` says that it was raised already. `durable_s` is the time from the beginning
    to the commit in seconds, on this rank; None without a durable commit.
    """

    attempt: Attempt
    settings: Settings
    rank: int
    clusters: tuple[str, ...]
    """The clusters of this job; this rank casts one vote for each."""
    reused_plans: frozenset[str] = frozenset()
    """The clusters for which every rank reuses the same earlier save plan; see `begin`."""
    on_commit: Hook | None = None
    """Called on the save's thread after a durable commit (upload, pruning); what it raises becomes `failure`."""
    on_end: Hook | None = None
    """Called on the save's thread at its very end, whatever the outcome."""
    after: Save | None = None
    """The save before this one in the same output directory; it settles first."""
    cluster_saves: dict[str, ClusterSave] = field(default_factory=dict)
    failure: RollCkptError | None = None
    reported: bool = False
    durable_s: float | None = None
    notes: list[str] = field(default_factory=list)
    """Phrases for the log line about what followed the commit: uploaded, pruned."""
    stood_still_s: float = 0.0
    """Seconds for which training has been blocked by this save so far, on this rank."""
    _began_in: int = field(default_factory=threading.get_ident)
    _threaded: bool = False
    _staged: threading.Event = field(default_factory=threading.Event)
    _settled: threading.Event = field(default_factory=threading.Event)
    _finished: threading.Event = field(default_factory=threading.Event)
    _started: float = field(default_factory=time.monotonic)

    def add_cluster(self, cluster: str, facts: Mapping[str, Any]) -> ClusterSave:
        """Add the part of `cluster` to this save; `facts` go into the manifest."""
        self.cluster_saves[cluster] = ClusterSave(
            self.attempt, self.settings, cluster, self.rank, facts, cluster in self.reused_plans
        )
        return self.cluster_saves[cluster]

    @contextmanager
    def staging(self) -> Iterator[None]:
        """Stage every cluster inside the block; after it, the save votes and commits in the background.

        Any exception in the block, KeyboardInterrupt included, turns all votes of this rank into a no and is raised.
        If no thread can be started, leaving the block blocks until the save has ended.
        """
        began = time.monotonic()
        self._start_thread()  # before staging: the copy threads would keep a new thread waiting for a CPU
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
        if not self._threaded:  # nobody else would finish this save
            self._run()

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._run, name=f"roll_ckpt {self.attempt.name}", daemon=True).start()
            self._threaded = True
        except RuntimeError as problem:
            log.warning("%s: no thread can be started, so this save blocks training: %s", self.attempt.label, problem)

    @property
    def begun(self) -> bool:
        """Whether there is an attempt to stage. If not, the save has failed already, and `failure` says why."""
        return self.attempt.attempt > 0

    @property
    def lead(self) -> bool:
        """Whether this rank collects the votes and decides: true on rank 0 of each job."""
        return self.rank == 0

    @property
    def staged(self) -> bool:
        """Whether `staging()` has ended; from then on the save proceeds in the background."""
        return self._staged.is_set()

    @property
    def staged_here(self) -> bool:
        """Whether the calling thread has begun this save, and its staging has not ended."""
        return not self.staged and self._began_in == threading.get_ident()

    @property
    def settled(self) -> bool:
        """Whether the outcome is known: committed, or abandoned for the reason in `failure`."""
        return self._settled.is_set()

    @property
    def finished(self) -> bool:
        """Whether the save is settled and what follows a commit (upload, pruning) has ended."""
        return self._finished.is_set()

    def fence(self, changes: Changes = lambda owner: True) -> None:
        """`ClusterSave.fence` of every cluster: block until their sources on this rank have been copied."""
        began = time.monotonic()
        for cluster_save in self.cluster_saves.values():
            cluster_save.fence(changes)
        self.stood_still_s += time.monotonic() - began

    def reads(self, storages: set[int] | None) -> bool:
        """`ClusterSave.reads` of any cluster. Does not block."""
        return any(cluster_save.reads(storages) for cluster_save in list(self.cluster_saves.values()))

    def wait(self, timeout_s: float | None = None, *, uploaded: bool = False) -> None:
        """Block until the checkpoint is committed; with `uploaded`, until its upload and pruning are done as well.

        Any rank may call alone; the outcome is the same on every rank. Durable on return.

        Raises:
            SaveFailed: the save was abandoned, is committed but perhaps not durable, or its upload or pruning failed.
            EpochLost: a newer run owns the directory.
            TimeoutError: not done within `timeout_s` seconds (None: no limit); the save goes on.
        """
        event = self._finished if uploaded else self._settled
        if not event.wait(timeout_s):
            raise TimeoutError(f"{self.attempt.label}: not done within {timeout_s} s; it goes on in the background")
        if self.failure is not None:
            self.reported = True
            raise self.failure

    def copy_stats(self) -> dict[str, float]:
        """What this rank's files needed: `nbytes`, `eager_bytes` copied before staging returned, and `copy_s` until the
        last was copied (of the file that took longest). Each is summed over files; meant for benchmarks.
        """
        files = [stats for part in self.cluster_saves.values() for stats in part.file_stats()]
        summed = {key: float(sum(stats[key] for stats in files)) for key in ("nbytes", "eager_bytes", "lazy_bytes")}
        return {**summed, "copy_s": max((stats["copy_s"] for stats in files), default=0.0)}

    def wait_settled(self) -> None:
        """Block until the outcome is known; raises nothing."""
        self._settled.wait()

    def _run(self) -> None:
        self._staged.wait()
        try:
            for cluster_save in self.cluster_saves.values():
                cluster_save.confirm_copies()
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
        """Cast the vote of each cluster; return why one could not be cast, "" if all were.

        Any exception counts as a refusal, with which `_settle` abandons the save at once: without a vote, the other
        ranks would wait for `commit_timeout_s`. EpochLost is raised: the newer run ends the attempt.
        """
        refusal = ""
        for cluster_save in self.cluster_saves.values():
            try:
                ballot.cast(self.attempt, cluster_save.finish())
            except EpochLost:
                raise
            except Exception as problem:
                cluster_save.fail(problem)
                refusal = refusal or self._refusal(cluster_save, problem)
        return refusal

    def _refusal(self, cluster_save: ClusterSave, problem: Exception) -> str:
        if isinstance(problem, RollCkptError):
            return str(problem).removeprefix(f"{self.attempt.label}: ")
        who = f"cluster {cluster_save.cluster!r} rank {cluster_save.rank}"
        return f"{who} could not vote: {type(problem).__name__}: {problem}"

    def _settle(self, refusal: str) -> None:
        began = time.monotonic()
        outcome = settlement.settle(
            self.attempt, lead=self.lead, timeout_s=self.settings.commit_timeout_s, refusal=refusal
        )
        now = time.monotonic()
        if not outcome.committed:
            errors = [
                f"cluster {part.cluster!r} rank {part.rank} failed: {part.error}"
                for part in self.cluster_saves.values()
                if part.error
            ]
            reason = "; ".join([outcome.reason, *(error for error in errors if error not in outcome.reason)])
            raise SaveFailed(
                f"{self.attempt.label}: abandoned: {reason}. Older checkpoints are untouched; the next save "
                "starts afresh"
            )
        if not outcome.durable or refusal:
            raise SaveFailed(
                f"{self.attempt.label}: it is committed and whole, but the disk did not say that it is durable: "
                f"{'; '.join(filter(None, (refusal, outcome.reason)))}. It may not survive a power failure; older "
                "checkpoints are kept until a later save is durable. Check the file system"
            )
        self.durable_s = now - self._started
        for cluster_save in self.cluster_saves.values():
            cluster_save.timing.commit_s = now - began

    def _log_outcome(self) -> None:
        """Log one line about a durable commit, on rank 0."""
        if not self.lead or self.durable_s is None:
            return
        nbytes = sum(cluster_save.nbytes for cluster_save in self.cluster_saves.values())
        notes = "".join(f", {note}" for note in self.notes)
        log.info("%s: committed %.2f s after it began (this rank wrote %d bytes)%s; training stood still for %.3f s",
                 self.attempt.final, self.durable_s, nbytes, notes, self.stood_still_s)  # fmt: skip

    def fail_to_begin(self, problem: RollCkptError) -> None:
        """End this save with `problem`: rank 0 could make no attempt for it."""
        self._fail(problem)
        self._settled.set()
        self._finished.set()

    def _fail(self, problem: RollCkptError) -> None:
        self.failure = problem
        log.error("%s", problem)
