"""Commit: how the votes of all ranks become a checkpoint under its final name, or nothing.

    claim → begin → (write, fsync) → cast → settle            and, at the next start:  claim → recover

Any process may carry out a decision, and two may do so at once; what each step finds done is done. Links and
renames decide, never a lock or a time. A checkpoint under its final name is complete; `latest` names no
other.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import Damaged, NotFound, SaveFailed
from roll_ckpt.formats.manifests import read as read_manifest
from roll_ckpt.transaction.attempts import Attempt, carries, places
from roll_ckpt.transaction.ballot import Ballot, decide, decided
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.listing import committed, read_latest
from roll_ckpt.transaction.publication import OLD, carry_out, throw_away

_PAUSE_S = 0.002
from roll_ckpt.transaction.trash import empty_trash, retire_trash


@dataclass(frozen=True)
class Recovery:
    """What became of an attempt that an older epoch had left: `action` is "finished" or "discarded"."""

    name: str
    epoch: int
    attempt: int
    action: str
    reason: str


def recover(output_dir: Path, *, epoch: Epoch) -> list[Recovery]:
    """Finish or discard every attempt of an older epoch, and remove all garbage. claim() calls it.

    Idempotent; a crash anywhere in it, or two processes in it at once, are fine. No committed checkpoint is
    touched.
    """
    retire_trash(output_dir, epoch.number)
    done = []
    for entry in tree.list_dir(output_dir):
        parsed = names.parse_attempt_dir(entry)
        if parsed is not None and parsed[1] < epoch.number:
            done.append(_recover_one(output_dir, *parsed, epoch.number))
        elif names.parse_temporary_file(entry) == names.LATEST:
            writes.discard_file(output_dir / entry)
    _sweep_epochs(output_dir / names.EPOCHS, epoch.number)
    empty_trash(output_dir, epoch.number)
    return done


def clear(epoch: Epoch, busy: Collection[Path]) -> list[Recovery]:
    """Finish or discard the attempts of this process that ended while the disk refused, so that their room is given
    back. `busy` are the directories of those that have not ended. Rank 0 of each world.

    OSError, SaveFailed: the disk refuses still.
    """
    done = []
    for entry in tree.list_dir(epoch.output_dir):
        parsed = names.parse_attempt_dir(entry)
        if parsed is None or parsed[1] != epoch.number or epoch.output_dir / entry in busy:
            continue
        if parsed[2] <= epoch.attempts.get(parsed[0], 0):  # or else of another world, which is ahead of us
            done.append(_recover_one(epoch.output_dir, *parsed, epoch.number))
    return done


def _recover_one(output_dir: Path, name: str, old_epoch: int, number: int, epoch: int) -> Recovery:
    bare = Attempt(output_dir, name, None, "", old_epoch, number, {}, False)
    if link := _link_in(bare):
        # Nothing is written or renamed where a link leads; and no save of ours makes one.
        throw_away(bare, epoch)
        return Recovery(
            name, old_epoch, number, "discarded", f"{link} is no directory but a link or file, which no save makes"
        )
    for _ in range(50):
        try:
            decision = decided(bare) or decide(bare, Ballot(), epoch, over=True)
            if decision is not None:
                save_latest = decision.commit and _is_newest(bare)
                carry_out(bare, decision, epoch, save_latest=save_latest)
                action = "finished" if decision.commit else "discarded"
                return Recovery(name, old_epoch, number, action, decision.reason or "all votes were there")
        except Damaged as error:
            return _discard(bare, epoch, str(error))
        except FileNotFoundError as error:
            if not tree.is_dir(bare.directory):  # another world's recovery was faster
                action = "finished" if carries(bare.final, bare) else "discarded"
                return Recovery(name, old_epoch, number, action, "by another world of this run")
            # Where another world has just published it, what is left is that world's to finish, or ours: look again.
            if not any(tree.exists(u / names.EXPECTED) for u in places(bare) if u != bare.final or carries(u, bare)):
                return _discard(bare, epoch, f"it was interrupted at its beginning, before {error.filename}")
        time.sleep(_PAUSE_S)
    raise SaveFailed(f"{bare.label}: it cannot be recovered; another process keeps changing {bare.directory}")


def _link_in(attempt: Attempt) -> Path | None:
    """What is no directory, in the place of one that recovery would write in or take a checkpoint from."""
    if tree.exists(attempt.directory) and not tree.is_real_dir(attempt.directory):
        return attempt.directory
    own = [e for e in tree.list_dir(attempt.directory) if e == attempt.name or e.startswith(names.SUPERSEDED)]
    return next((attempt.directory / e for e in own if tree.is_link(attempt.directory / e)), None)


def _is_newest(attempt: Attempt) -> bool:
    """Whether `latest` is to name this committed attempt: it wished so, and no newer one is named."""
    for checkpoint_dir in places(attempt):
        with suppress(NotFound, Damaged):
            found = read_manifest(checkpoint_dir)
            if (found.epoch, found.attempt) != (attempt.epoch, attempt.attempt):
                continue
            named = read_latest(attempt.output_dir)
            known = {other.name: other for other in committed(attempt.output_dir) if other.name != found.name}
            return found.save_latest and (named not in known or known[named].age < found.age)
    return False


def _discard(attempt: Attempt, epoch: int, reason: str) -> Recovery:
    """Throw an attempt away that cannot be finished; a checkpoint that stepped aside for it comes back."""
    for entry in tree.list_dir(attempt.directory):
        old = attempt.directory / entry / OLD / attempt.name
        if entry.startswith(names.SUPERSEDED) and tree.exists(old) and not tree.exists(attempt.final):
            writes.rename(old, attempt.final)
            writes.fsync_dir(attempt.output_dir)
    throw_away(attempt, epoch)
    return Recovery(attempt.name, attempt.epoch, attempt.attempt, "discarded", reason)


def _sweep_epochs(folder: Path, epoch: int) -> None:
    """Remove the records of older epochs, their aborts' reasons, and what a killed claimant had prepared."""
    for entry in tree.list_dir(folder):
        member, aborted = names.parse_epoch_file(entry), names.parse_aborted_file(entry)
        number = member[0] if member else aborted[1] if aborted else None
        if names.parse_temporary_file(entry) is not None or (number is not None and number < epoch):
            writes.discard_file(folder / entry)
