"""The save corridor of one process: begin, stage, write, vote, commit.

A `Save` is this process's part of one checkpoint, a `Ticket` one cluster's part of it. Bytes are copied and
written by native threads; a short-lived Python thread for each save only waits for them, votes and settles.
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
from roll_ckpt.save.pending import forget
from roll_ckpt.transaction import ballot, settlement
from roll_ckpt.transaction.attempts import Attempt

log = logging.getLogger("roll_ckpt")

CommitHook = Callable[["Save"], None]


@dataclass
class Save:
    """This process's part of one checkpoint, from `begin` to the outcome."""

    attempt: Attempt
    settings: Settings
    rank: int
    clusters: tuple[str, ...]
    """The clusters of this world, whose votes this process casts."""
    replays: frozenset[str] = frozenset()
    """The clusters whose earlier plan fits again, on every rank; see `begin`."""
    on_commit: CommitHook | None = None
    tickets: dict[str, ClusterSave] = field(default_factory=dict)
    failure: RollCkptError | None = None
    reported: bool = False
    durable_s: float | None = None
    _sealed: bool = False
    _threaded: bool = False
    _staged: threading.Event = field(default_factory=threading.Event)
    _after: Save | None = None
    _settled: threading.Event = field(default_factory=threading.Event)
    _finished: threading.Event = field(default_factory=threading.Event)
    _started: float = field(default_factory=time.monotonic)

    def ticket(self, cluster: str, facts: Mapping[str, Any]) -> ClusterSave:
        """The part of `cluster`; `facts` go into the manifest."""
        self.tickets[cluster] = ClusterSave(self, cluster, self.rank, facts)
        return self.tickets[cluster]

    @contextmanager
    def staging(self) -> Iterator[None]:
        """Stage every cluster inside the block; when it ends, vote and commit in the background.

        Whatever is raised in it, an interrupt too, turns all votes of this rank into a no.
        """
        self._start_thread()  # now: once there are copies to make, a thread waits long for a processor
        try:
            yield
        except BaseException as problem:
            for ticket in self.tickets.values():
                ticket.fail(problem)
            raise
        finally:
            self._seal()

    def _seal(self) -> None:
        for cluster in self.clusters:
            if cluster not in self.tickets:
                self.ticket(cluster, {}).fail(RuntimeError("the trainer failed before this cluster was staged"))
        self._sealed = True
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
    def settled(self) -> bool:
        """The outcome is known: committed, or `failure` says why not."""
        return self._settled.is_set()

    @property
    def finished(self) -> bool:
        """Settled, and what follows a commit (upload, prune) is done."""
        return self._finished.is_set()

    def fence(self, changes: Changes = lambda owner: True) -> None:
        """`Ticket.fence` of all tickets."""
        for ticket in self.tickets.values():
            ticket.fence(changes)

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

    def _run(self) -> None:
        self._staged.wait()
        try:
            if self._after is not None:
                self._after._settled.wait()
            self._settle(self._vote())
        except RollCkptError as problem:
            self._fail(problem)
        except Exception as problem:
            self._fail(SaveFailed(f"{self.attempt.label}: {type(problem).__name__}: {problem}"))
        finally:
            for ticket in self.tickets.values():
                if self.failure is not None:
                    ticket.abandon()
            self._settled.set()
        try:
            if self.failure is None and self.on_commit is not None:
                self.on_commit(self)
        except Exception as problem:
            self._fail(SaveFailed(f"{self.attempt.label}: committed and sound, but what follows failed: {problem}"))
        finally:
            self._finished.set()
            forget(self)

    def _vote(self) -> str:
        """Cast the vote of each cluster; return why one could not be cast, "" if all were."""
        refusal = ""
        for ticket in self.tickets.values():
            try:
                ballot.cast(self.attempt, ticket.finish())
            except SaveFailed as problem:
                ticket.fail(problem)
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
                f"cluster {t.cluster!r} rank {t.rank} failed: {t.error}" for t in self.tickets.values() if t.error
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
        for ticket in self.tickets.values():
            ticket.timing.commit_s = now - began

    def _fail(self, problem: RollCkptError) -> None:
        self.failure = problem
        log.error("%s", problem)
