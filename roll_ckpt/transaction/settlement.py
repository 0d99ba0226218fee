"""Commit: how the votes of all ranks become a checkpoint under its final name, or nothing.

    claim → begin → (write, fsync) → cast → settle            and, at the next start:  claim → recover

Any process may carry out a decision, and two may do so at once; what each step finds done is done. Links and
renames decide, never a lock or a time. A checkpoint under its final name is complete; `latest` names no
other.
"""

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
_STUBBORN_S = 10.0  # how long a disk is asked again that refuses what settling needs


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `reason` says why it was abandoned, or what a committed one left to wish for.

    Not `durable`: this process saw an fsync of a directory fail, so it is there and may not survive a power failure.
    """

    committed: bool
    reason: str = ""
    durable: bool = True


def settle(attempt: Attempt, *, lead: bool, timeout_s: float, refusal: str = "") -> Outcome:
    """Wait until the attempt is committed or abandoned. Blocks; a commit is durable on return.

    A lead (rank 0 of each world) collects the votes, decides and carries out; two may do so at once. The
    others wait, and do the same once `timeout_s` has passed; or at once with a `refusal`, the reason why a rank could
    not even vote. A disk that refuses is asked again for a while. Any thread may call.

    Raises:
        EpochLost: a newer run owns the directory, and did not finish this attempt.
        SaveFailed: the disk refused; the message names the path. The next save, or start, carries out what was
            decided, or decides.
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
            f"{attempt.label}: {error.strerror} ({error.filename}); older checkpoints are untouched. The next save, "
            f"or start, finishes or discards what lies there.{refusal and f' Before that: {refusal}'}"
        ) from error


def _settle(attempt: Attempt, lead: bool, timeout_s: float, refusal: str) -> Outcome:
    limit = time.monotonic() + timeout_s
    ballot = Ballot(refusal=refusal)
    decision: Decision | None = None
    pause, vanished, refused = _FIRST_PAUSE_S, 0, 0.0
    doubt: NotDurable | None = None
    while True:
        over = time.monotonic() >= limit
        try:
            if attempt.directory.name not in tree.list_dir(attempt.output_dir):
                return _afterwards(attempt, decision)
            decision = decision or decided(attempt)
            if lead or over or refusal:
                decision = decision or decide(attempt, ballot, attempt.epoch, over)
                if decision is not None:
                    note = carry_out(attempt, decision, attempt.epoch, save_latest=attempt.save_latest)
                    if decision.commit and doubt is not None:
                        return Outcome(True, f"fsync: {doubt.strerror} ({doubt.filename})", durable=False)
                    return Outcome(decision.commit, decision.reason or note)
            refused = 0.0
        except FileNotFoundError:
            # Another process is carrying it out: look again. If nobody is, somebody deletes by hand.
            vanished += 1
            if vanished > 50:
                raise
        except OSError as error:
            if isinstance(error, NotDurable):
                doubt = error  # what is left to do is done all the same
            if not refused:
                refused = time.monotonic()
                log.warning("%s: %s (%s); it is tried again for %g s", attempt.label, error.strerror, error.filename,
                            _STUBBORN_S)  # fmt: skip
            elif time.monotonic() - refused > _STUBBORN_S:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _afterwards(attempt: Attempt, decision: Decision | None) -> Outcome:
    """What was the end of an attempt that somebody else has carried out."""
    if carries(attempt.final, attempt):
        return Outcome(True)
    reason = abort_reason(attempt)
    if reason is None and decision is not None:
        return Outcome(decision.commit, decision.reason)
    epochs.check(attempt.output_dir, attempt.epoch)
    return Outcome(
        False,
        reason
        or f"{attempt.directory} vanished, and no reason is recorded: another world gave it up, or somebody removed it",
    )
