"""Carrying out a decision: the checkpoint gets its final name and `latest`, or the attempt is thrown away.

Two processes may carry out the same decision at once; each step accepts that it was done before. Links and renames
decide, never a lock or a clock.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints, reads, tree, writes
from roll_ckpt.disk.missing import missing_ok, not_found_ok
from roll_ckpt.errors import SaveFailed
from roll_ckpt.formats.records import Decision
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.attempts import Attempt, carries, places, sound_manifest
from roll_ckpt.transaction.foreign import move_foreign
from roll_ckpt.transaction.listing import committed, named_by_latest, write_latest
from roll_ckpt.transaction.trash import empty_trash, trash

log = logging.getLogger("roll_ckpt")

_PAUSE_S = 0.002
_PATIENCE_S = 1.0  # how long a process that replaces a checkpoint is given before another one takes that over
_TAKEN = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
OLD = ".old"
_REASONS_KEPT = 100


def carry_out(attempt: Attempt, decision: Decision, epoch: int, *, save_latest: bool) -> str:
    """Commit or abandon the attempt, as decided; return a note for the user, "" if there is none.

    Blocks; durable on return. Idempotent, and any process may call it. EpochLost if `epoch` does not own the directory
    any more; OSError if the disk refuses, or if another process carries the decision out (ENOENT).
    """
    if not decision.commit:
        _abandon(attempt, epoch)
        return ""
    _publish(attempt, epoch)
    _keep_foreign(attempt)
    return _finish(attempt, epoch, save_latest=save_latest)


def _publish(attempt: Attempt, epoch: int) -> None:
    """Give the checkpoint its final name; durable on return."""
    epochs.check(attempt.home, epoch)
    try:
        writes.fsync_dir(attempt.checkpoint_dir)  # the process that decided may not have done it
        writes.make_dirs(attempt.final.parent)  # hosts remove it while a save is pending
        writes.rename(attempt.checkpoint_dir, attempt.final)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        # NFS sent the rename twice, another process was faster, or an older checkpoint has this name: only the
        # checkpoint under the final name can tell.
        if not carries(attempt.final, attempt):
            _replace(attempt, epoch)
    writes.fsync_dir(attempt.final.parent)
    failpoints.failpoint("commit.renamed", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)


def _replace(attempt: Attempt, epoch: int) -> None:
    """Put the attempt's checkpoint in the place of another one that has its name.

    A second exchange would bring the old checkpoint back. So a process that replaces first renames the new one into a
    private directory. A process that takes over after a crash renames that directory, so that the paths of its former
    owner vanish.
    """
    began = time.monotonic()
    while not carries(attempt.final, attempt):
        own = _take(attempt, patient=time.monotonic() - began < _PATIENCE_S)
        if own is None:
            time.sleep(_PAUSE_S)
            continue
        try:
            epochs.check(attempt.home, epoch)
            _swap(attempt, own, epoch)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise


def _take(attempt: Attempt, *, patient: bool) -> Path | None:
    """The private directory of this process, which now holds the checkpoint; None while another process has it.

    FileNotFoundError if no process has it. While `patient`, another process is left alone.
    """
    own = attempt.directory / names.unique(names.SUPERSEDED)
    entries = tree.list_dir(attempt.directory)
    if attempt.checkpoint_dir in places(attempt):
        writes.make_dir(own)
        with not_found_ok():  # another process may have been faster
            writes.rename(attempt.checkpoint_dir, own / attempt.leaf)
            return own
    for entry in entries:
        if entry.startswith(names.SUPERSEDED) and tree.exists(attempt.directory / entry / attempt.leaf):
            if patient:
                return None
            writes.rename(attempt.directory / entry, own)
            return own
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(attempt.checkpoint_dir))


def _swap(attempt: Attempt, own: Path, epoch: int) -> None:
    new = own / attempt.leaf
    if not carries(new, attempt):
        raise SaveFailed(f"{attempt.label}: {new} should be its checkpoint and is not; run `verify` on {new}")
    if not tree.exists(attempt.final):
        writes.rename(new, attempt.final)
        return
    writes.swap(new, attempt.final, lambda: _step_aside(attempt, own))


def _step_aside(attempt: Attempt, own: Path) -> None:
    """Move the old checkpoint away, where two names cannot be exchanged. `latest` does not name it while it is gone."""
    writes.make_dir(own / OLD)
    # The directories of both checkpoints are durable before one of them moves: a crash must not lose either.
    for directory in (own, attempt.directory):
        writes.fsync_dir(directory)
    if attempt.name in named_by_latest(attempt.output_dir):
        others = [manifest.name for manifest in committed(attempt.output_dir) if manifest.name != attempt.name]
        if others:
            write_latest(attempt.output_dir, others[-1], scratch=attempt.directory)
        else:
            writes.discard_file(attempt.output_dir / names.LATEST)
            writes.fsync_dir(attempt.output_dir)
    writes.rename(attempt.final, own / OLD / attempt.leaf)
    for directory in (own / OLD, attempt.final.parent):
        writes.fsync_dir(directory)


def _keep_foreign(attempt: Attempt) -> None:
    """Move what others had put into a replaced directory into the checkpoint that took its place; durable on return."""
    for entry in tree.list_dir(attempt.directory):
        if not entry.startswith(names.SUPERSEDED):
            continue
        for old in (attempt.directory / entry / attempt.leaf, attempt.directory / entry / OLD / attempt.leaf):
            with missing_ok():
                if tree.is_real_dir(old) and not carries(old, attempt):
                    try:
                        _move_foreign(attempt, old)
                    except PermissionError as error:
                        _leave_beside(attempt, old, error)


def _leave_beside(attempt: Attempt, old: Path, error: OSError) -> None:
    """Leave the replaced directory, with files that may not be moved, under a name of its own."""
    place = attempt.final.with_name(f"{attempt.leaf}.before-{attempt.epoch}.{attempt.attempt}")
    writes.rename(old, place)
    writes.fsync_dir(place.parent)
    log.warning("%s: files that others had put there cannot be moved into the new checkpoint: %s (%s). They are in %s",
                attempt.final, error.strerror, error.filename, place)  # fmt: skip


def _move_foreign(attempt: Attempt, old: Path) -> None:
    new = sound_manifest(attempt.final)
    replaced = sound_manifest(old) or new
    written = replaced.paths() if replaced is not None else ()
    moved = move_foreign(old, attempt.final, written, f".before-{attempt.epoch}.{attempt.attempt}")
    if moved:
        log.info("%s: kept %d files or folders that others had put there, such as %s",
                 attempt.final, len(moved), moved[0])  # fmt: skip


def _finish(attempt: Attempt, epoch: int, *, save_latest: bool) -> str:
    """After the rename: write `latest`, move helper files beside the checkpoint, remove the attempt's directory."""
    note = ""
    facts = {"name": attempt.name, "epoch": attempt.epoch, "attempt": attempt.attempt}
    try:
        if save_latest:
            epochs.check(attempt.home, epoch)
            # Prepared in the attempt's directory: a process that comes after another one has finished finds that
            # directory gone, so it cannot turn `latest` back.
            write_latest(attempt.output_dir, attempt.name, scratch=attempt.directory)
            failpoints.failpoint("latest.written", **facts)
        note = _place_beside(attempt)
    except FileNotFoundError:
        if tree.is_dir(attempt.directory):
            raise
    throw_away(attempt, epoch)
    failpoints.failpoint("attempt.removed", **facts)
    return note


def _place_beside(attempt: Attempt) -> str:
    """Move files that stock code left in its save directory (helper scripts) beside the checkpoint; durable.

    Returns a note about what stays behind and is deleted, "" if nothing does.
    """
    dropped: list[str] = []
    moved = False
    for entry in tree.list_dir(attempt.directory):
        path = attempt.directory / entry
        if names.is_own(entry) or entry in (names.LATEST, attempt.name.partition("/")[0]):  # stock code's own `latest`
            continue
        if not tree.is_file(path) or tree.is_dir(attempt.output_dir / entry):
            dropped.append(entry)
            continue
        with not_found_ok():  # another process may have been faster
            writes.rename(path, attempt.output_dir / entry)
            moved = True
    if moved:
        writes.fsync_dir(attempt.output_dir)
    return f"not kept from the save directory, because only files are: {', '.join(dropped)}" if dropped else ""


def _abandon(attempt: Attempt, epoch: int) -> None:
    """Throw the attempt away; ranks that wait for it find the reason in `.epochs/`."""
    unrecorded = _record_reason(attempt) if attempt.epoch == epoch else None
    throw_away(attempt, epoch)
    if unrecorded is not None:
        log.warning("%s was abandoned, and the reason could not be recorded for its other ranks: %s",
                    attempt.label, unrecorded)  # fmt: skip
    failpoints.failpoint("attempt.removed", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)


def _record_reason(attempt: Attempt) -> OSError | None:
    """Link the decision into `.epochs/`. The error if the disk refuses: a full one gets room back without a reason."""
    decision = attempt.checkpoint_dir / names.DECISION
    record = attempt.home / names.EPOCHS / names.aborted_file(attempt.name, attempt.epoch, attempt.attempt)
    try:
        try:
            writes.link(decision, record)
        except OSError as error:
            if error.errno not in writes.NO_LINKS:
                raise
            writes.write_durable(record, reads.read_bytes(decision), scratch=attempt.directory)
        _forget_reasons(attempt.home / names.EPOCHS)
    except FileNotFoundError as error:
        log.debug("%s: gone, so another process abandons this attempt, too", error.filename)
    except OSError as error:
        return error
    return None


def _forget_reasons(folder: Path) -> None:
    """Remove all but the newest reasons. A rank that asks later learns only that the save was abandoned."""
    reasons = [entry for entry in tree.list_dir(folder) if names.parse_aborted_file(entry) is not None]
    if len(reasons) > _REASONS_KEPT:
        oldest_first = sorted(reasons, key=lambda entry: reads.mtime_ns(folder / entry))
        for entry in oldest_first[:-_REASONS_KEPT]:
            writes.discard_file(folder / entry)


def throw_away(attempt: Attempt, epoch: int) -> None:
    """Remove the attempt's directory; durable on return. Fine if it is gone; EpochLost if that is the epoch's end."""
    try:
        place = trash(attempt.home, attempt.directory, epoch)
    except FileNotFoundError as error:
        epochs.check(attempt.home, epoch)
        log.debug("%s: gone, so another process has thrown the attempt away", error.filename)
        return
    writes.fsync_dir(attempt.home)
    writes.remove_tree(place)
    empty_trash(attempt.home, epoch)  # what earlier calls could not delete
