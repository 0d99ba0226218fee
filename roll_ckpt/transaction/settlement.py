"""Settlement: wait until an attempt is decided, and carry the decision out; its outcome."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from roll_ckpt.disk import tree
from roll_ckpt.disk.writes import NotDurable
from roll_ckpt.errors import EpochLost, SaveFailed
from roll_ckpt.formats.records import Decision
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.attempts import Attempt, abort_reason, carries
from roll_ckpt.transaction.ballot import Ballot, decide, decided
from roll_ckpt.transaction.publication import carry_out

log = logging.getLogger("roll_ckpt")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.2
_STUBBORN_S = 10.0  # how long settling is retried on a disk that refuses it
_VANISHED = 50  # how often a path may vanish: another process carries the decision out, and is soon done


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `reason` says why it was abandoned; for a committed one it is a note to the user, or "".

    If not `durable`, an fsync of a directory has failed: the checkpoint is committed, but a power failure may lose it.
    """

    committed: bool
    reason: str = ""
    durable: bool = True


def settle(attempt: Attempt, *, lead: bool, timeout_s: float, refusal: str = "") -> Outcome:
    """Wait until the attempt is committed or abandoned. Every rank calls it; any thread may. Blocks.

    A commit is durable on return. A lead (rank 0 of each job) collects the votes, decides, and carries the decision
    out; two leads may do so at once. Other ranks wait, and do the same after `timeout_s` seconds, or at once if they
    have a `refusal`: the reason why this rank could not even vote. A disk that refuses is retried for _STUBBORN_S.

    Raises:
        EpochLost: a newer run owns the directory, and did not finish this attempt.
        SaveFailed: the disk refused; the message names the path. The next save or start carries out what was decided,
            or decides.
    """
    attempt.refuse_fork()
    try:
        return _settle(attempt, lead, timeout_s, refusal)
    except EpochLost:
        if carries(attempt.final, attempt):
            return Outcome(True, "a newer run has finished it")
        raise
    except OSError as error:
        raise SaveFailed(
            f"{attempt.label}: {error.strerror} ({error.filename}); older checkpoints are untouched. The next save "
            f"or start finishes or discards this one.{refusal and f' Before that: {refusal}'}"
        ) from error


@dataclass
class _Settling:
    """What one process knows of an attempt while it settles it."""

    attempt: Attempt
    ballot: Ballot
    decision: Decision | None = None
    doubt: NotDurable | None = None
    vanished: int = 0
    refused_at_s: float | None = None

    def step(self, *, acts: bool, over: bool) -> Outcome | None:
        """Look, and if this process `acts`, decide and carry out what can be; None if the attempt has not ended."""
        attempt = self.attempt
        if attempt.directory.name not in tree.list_dir(attempt.home):
            return _outcome_of_another(attempt, self.decision)
        self.decision = self.decision or decided(attempt)
        if acts:
            self.decision = self.decision or decide(attempt, self.ballot, attempt.epoch, over)
            if self.decision is not None:
                return self._carry_out(self.decision)
        self.refused_at_s = None
        return None

    def _carry_out(self, decision: Decision) -> Outcome:
        note = carry_out(self.attempt, decision, self.attempt.epoch, save_latest=self.attempt.save_latest)
        if decision.commit and self.doubt is not None:
            return Outcome(True, f"fsync: {self.doubt.strerror} ({self.doubt.filename})", durable=False)
        return Outcome(decision.commit, decision.reason or note)

    def may_go_on(self, error: OSError) -> bool:
        """Whether the step that raised `error` shall be retried."""
        if isinstance(error, FileNotFoundError):
            # Another process carries the decision out. If none does, a person is deleting files.
            self.vanished += 1
            return self.vanished <= _VANISHED
        if isinstance(error, NotDurable):
            self.doubt = error  # the steps that are left are taken all the same
        if self.refused_at_s is None:
            self.refused_at_s = time.monotonic()
            log.warning("%s: %s (%s); this is retried for %g s", self.attempt.label, error.strerror, error.filename,
                        _STUBBORN_S)  # fmt: skip
            return True
        return time.monotonic() - self.refused_at_s <= _STUBBORN_S


def _settle(attempt: Attempt, lead: bool, timeout_s: float, refusal: str) -> Outcome:
    limit = time.monotonic() + timeout_s
    settling = _Settling(attempt, Ballot(refusal=refusal))
    pause = _FIRST_PAUSE_S
    while True:
        over = time.monotonic() >= limit
        try:
            outcome = settling.step(acts=lead or over or bool(refusal), over=over)
        except OSError as error:
            if not settling.may_go_on(error):
                raise
        else:
            if outcome is not None:
                return outcome
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _outcome_of_another(attempt: Attempt, decision: Decision | None) -> Outcome:
    """The outcome of an attempt that another process has carried out."""
    if carries(attempt.final, attempt):
        return Outcome(True)
    reason = abort_reason(attempt)
    if reason is None and decision is not None:
        return Outcome(decision.commit, decision.reason)
    epochs.check(attempt.home, attempt.epoch)
    return Outcome(
        False,
        reason
        or f"{attempt.directory} vanished, and no reason is recorded: another job gave it up, or someone removed it",
    )
