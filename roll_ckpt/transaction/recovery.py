"""Recovery: what a run that crashed or was killed has left becomes a checkpoint, or goes.

Two processes may recover the same directory at once; each step accepts that it was done before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import Damaged, SaveFailed
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.transaction.attempts import Attempt, carries, places, sound_manifest
from roll_ckpt.transaction.ballot import Ballot, decide, decided
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.home import remove_probes
from roll_ckpt.transaction.listing import committed, read_latest
from roll_ckpt.transaction.publication import OLD, carry_out, throw_away
from roll_ckpt.transaction.trash import empty_trash, retire_trash

log = logging.getLogger("roll_ckpt")

_PAUSE_S = 0.002
_TRIES = 50


@dataclass(frozen=True)
class Recovery:
    """What became of an attempt that an older epoch left. `action` is "finished" or "discarded"."""

    name: str
    epoch: int
    attempt: int
    action: str
    reason: str


def recover(output_dir: Path, *, epoch: Epoch) -> list[Recovery]:
    """Finish or discard every attempt of an older epoch, and remove what else older epochs left. claim() calls it.

    Rank 0 of each job calls it, after it has claimed `epoch`. Blocks; durable on return. Idempotent: it may crash at
    any point, and two processes may run it at once. It touches no committed checkpoint.

    Raises:
        OSError: the disk refused. SaveFailed: another process keeps changing an attempt.
        EpochLost: a newer run has claimed the directory.
    """
    retire_trash(epoch.home, epoch.number)
    recoveries = []
    for entry in tree.list_dir(epoch.home):
        parsed = names.parse_attempt_dir(entry)
        if parsed is not None and parsed[1] < epoch.number:
            recoveries.append(_recover_one(epoch, *parsed))
    for entry in tree.list_dir(output_dir):
        if names.parse_temporary_file(entry) == names.LATEST:
            writes.discard_file(output_dir / entry)
    for folder in {output_dir, epoch.home}:
        remove_probes(folder)
    _sweep_epochs(epoch.home / names.EPOCHS, epoch.number)
    empty_trash(epoch.home, epoch.number)
    return recoveries


def clear(epoch: Epoch, busy: Collection[Path]) -> list[Recovery]:
    """Finish or discard the attempts of this epoch that ended while the disk refused, to give their room back.

    Rank 0 of each job calls it. `busy` are the directories of attempts that have not ended. Blocks; durable on return.
    OSError or SaveFailed if the disk still refuses; EpochLost if a newer run has claimed the directory.
    """
    recoveries = []
    for entry in tree.list_dir(epoch.home):
        parsed = names.parse_attempt_dir(entry)
        if parsed is None or parsed[1] != epoch.number or epoch.home / entry in busy:
            continue
        if parsed[2] <= epoch.attempts.get(parsed[0], 0):  # a larger number is that of another job, which is ahead
            recoveries.append(_recover_one(epoch, *parsed))
    return recoveries


def _recover_one(owner: Epoch, name: str, old_epoch: int, number: int) -> Recovery:
    epoch, bare = owner.number, Attempt(owner.output_dir, name, None, "", old_epoch, number, {}, False, owner.home)
    if link := _link_in(bare):
        # A link may lead out of the output directory, where nothing may be written or renamed.
        throw_away(bare, epoch)
        return Recovery(
            name, old_epoch, number, "discarded", f"{link} is a link or file instead of a directory; no save makes one"
        )
    for _ in range(_TRIES):
        try:
            decision = decided(bare) or decide(bare, Ballot(), epoch, over=True)
            if decision is not None:
                save_latest = decision.commit and _is_newest(bare)
                carry_out(bare, decision, epoch, save_latest=save_latest)
                action = "finished" if decision.commit else "discarded"
                return Recovery(name, old_epoch, number, action, decision.reason or "all ranks had voted")
        except Damaged as error:
            return _discard(bare, epoch, str(error))
        except FileNotFoundError as error:
            if not tree.is_dir(bare.directory):  # the recovery of another job was faster
                action = "finished" if carries(bare.final, bare) else "discarded"
                return Recovery(name, old_epoch, number, action, "by another job of this run")
            # If another job has just published the checkpoint, the next try finishes what is left of the attempt.
            if not _has_begun(bare):
                return _discard(bare, epoch, f"it was interrupted at its beginning, before {error.filename} existed")
        time.sleep(_PAUSE_S)
    raise SaveFailed(
        f"{bare.label}: it could not be recovered in {_TRIES} tries; another process keeps changing {bare.directory}. "
        "Stop that process and start again"
    )


def _has_begun(attempt: Attempt) -> bool:
    """Whether the list of expected votes, which an attempt writes first, is where its checkpoint may lie."""
    return any(
        tree.exists(checkpoint_dir / names.EXPECTED)
        for checkpoint_dir in places(attempt)
        if checkpoint_dir == attempt.checkpoint_dir or carries(checkpoint_dir, attempt)
    )


def _link_in(attempt: Attempt) -> Path | None:
    """A path that should be a directory but is a link or a file, or None."""
    if tree.exists(attempt.directory) and not tree.is_real_dir(attempt.directory):
        return attempt.directory
    first = attempt.name.partition("/")[0]
    holders = [e for e in tree.list_dir(attempt.directory) if e == first or e.startswith(names.SUPERSEDED)]
    return next((attempt.directory / e for e in holders if tree.is_link(attempt.directory / e)), None)


def _is_newest(attempt: Attempt) -> bool:
    """Whether `latest` shall name this attempt: its save asked for that, and `latest` names no newer checkpoint."""
    for checkpoint_dir in places(attempt):
        manifest = sound_manifest(checkpoint_dir)
        if manifest is not None and (manifest.epoch, manifest.attempt) == (attempt.epoch, attempt.attempt):
            return _is_newer_than_latest(attempt.output_dir, manifest) and manifest.save_latest
    return False


def _is_newer_than_latest(output_dir: Path, manifest: Manifest) -> bool:
    try:
        latest = read_latest(output_dir)
    except Damaged as error:
        log.warning("%s; recovery does not change it", error)
        return False
    others = {other.name: other for other in committed(output_dir) if other.name != manifest.name}
    return latest not in others or others[latest].age < manifest.age


def _discard(attempt: Attempt, epoch: int, reason: str) -> Recovery:
    """Throw away an attempt that cannot be finished; a checkpoint that was moved aside for it comes back."""
    for entry in tree.list_dir(attempt.directory):
        old = attempt.directory / entry / OLD / attempt.leaf
        if entry.startswith(names.SUPERSEDED) and tree.exists(old) and not tree.exists(attempt.final):
            writes.rename(old, attempt.final)
            writes.fsync_dir(attempt.final.parent)
    throw_away(attempt, epoch)
    return Recovery(attempt.name, attempt.epoch, attempt.attempt, "discarded", reason)


def _sweep_epochs(folder: Path, epoch: int) -> None:
    """Remove the records of older epochs, the reasons of their aborts, and temporary files of killed claimants."""
    for entry in tree.list_dir(folder):
        member, aborted = names.parse_epoch_file(names.parse_first_dir(entry) or entry), names.parse_aborted_file(entry)
        number = member[0] if member else aborted[1] if aborted else None
        if names.parse_temporary_file(entry) is not None or (number is not None and number < epoch):
            writes.remove_tree(folder / entry)
