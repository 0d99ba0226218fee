"""Commit: how the votes of all ranks become a checkpoint under its final name, or nothing.

    claim → begin → (write, fsync) → cast → settle            and, at the next start:  claim → recover

Any process may carry out a decision, and two may do so at once; what each step finds done is done. Links and
renames decide, never a lock or a time. A checkpoint under its final name is complete; `latest` names no
other.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints, reads, tree, writes
from roll_ckpt.errors import SaveFailed
from roll_ckpt.formats.records import Decision
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.attempts import Attempt, carries
from roll_ckpt.transaction.listing import committed, read_latest, write_latest
from roll_ckpt.transaction.trash import empty_trash, trash

_PAUSE_S = 0.002
_PATIENCE_S = 1.0  # how long a process that replaces a checkpoint is left alone by another that would do the same
_TAKEN = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
OLD = ".old"
_REASONS_KEPT = 100


def carry_out(attempt: Attempt, decision: Decision, epoch: int, *, save_latest: bool) -> str:
    """Commit or abandon, as decided; return a note for the user, if there is one. Idempotent."""
    if not decision.commit:
        _abandon(attempt, epoch)
        return ""
    _publish(attempt, epoch)
    return _finish(attempt, epoch, save_latest=save_latest)


def _publish(attempt: Attempt, epoch: int) -> None:
    """Give the unit its final name; durable on return."""
    epochs.check(attempt.output_dir, epoch)
    try:
        writes.fsync_dir(attempt.checkpoint_dir)  # whoever made the decision may not have come to that
        writes.rename(attempt.checkpoint_dir, attempt.final)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        # A retransmitted rename, another committer, or an older checkpoint of this name: only what lies
        # there can tell.
        if not carries(attempt.final, attempt):
            _replace(attempt, epoch)
    writes.fsync_dir(attempt.output_dir)
    failpoints.failpoint("commit.renamed", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)


def _replace(attempt: Attempt, epoch: int) -> None:
    """Put the unit in the place of another checkpoint of that name.

    A second exchange would bring the old one back. So whoever replaces first renames the unit into a private
    directory; who takes over after a crash renames that directory, and the former owner's paths vanish.
    """
    began = time.monotonic()
    while not carries(attempt.final, attempt):
        own = _take(attempt, patient=time.monotonic() - began < _PATIENCE_S)
        if own is None:
            time.sleep(_PAUSE_S)
            continue
        try:
            epochs.check(attempt.output_dir, epoch)
            _swap(attempt, own, epoch)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise


def _take(attempt: Attempt, *, patient: bool) -> Path | None:
    """The private directory that now holds the unit; None while another process has it. ENOENT if nobody."""
    own = attempt.directory / names.unique(names.SUPERSEDED)
    entries = tree.list_dir(attempt.directory)
    if attempt.name in entries:
        writes.make_dir(own)
        with suppress(FileNotFoundError):
            writes.rename(attempt.checkpoint_dir, own / attempt.name)
            return own
    for entry in entries:
        if entry.startswith(names.SUPERSEDED) and tree.exists(attempt.directory / entry / attempt.name):
            if patient:
                return None
            writes.rename(attempt.directory / entry, own)
            return own
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(attempt.checkpoint_dir))


def _swap(attempt: Attempt, own: Path, epoch: int) -> None:
    new = own / attempt.name
    if not carries(new, attempt):
        raise SaveFailed(f"{attempt.label}: {new} should hold it, and does not; see `verify` of {own}")
    if not tree.exists(attempt.final):
        writes.rename(new, attempt.final)
        return
    writes.swap(new, attempt.final, lambda: _step_aside(attempt, own))


def _step_aside(attempt: Attempt, own: Path) -> None:
    """Without an exchange: move the old checkpoint away. `latest` does not name it while it is absent."""
    writes.make_dir(own / OLD)
    # Where both checkpoints will be is durable before one of them is missed: a crash must not lose the place.
    for directory in (own, attempt.directory):
        writes.fsync_dir(directory)
    if read_latest(attempt.output_dir) == attempt.name:
        others = [found.name for found in committed(attempt.output_dir) if found.name != attempt.name]
        if others:
            write_latest(attempt.output_dir, others[-1], scratch=attempt.directory)
        else:
            writes.discard_file(attempt.output_dir / names.LATEST)
            writes.fsync_dir(attempt.output_dir)
    writes.rename(attempt.final, own / OLD / attempt.name)
    for directory in (own / OLD, attempt.output_dir):
        writes.fsync_dir(directory)


def _finish(attempt: Attempt, epoch: int, *, save_latest: bool) -> str:
    """After the rename: `latest`, helper files beside the unit, and the attempt's directory goes."""
    note = ""
    where = {"name": attempt.name, "epoch": attempt.epoch, "attempt": attempt.attempt}
    try:
        if save_latest:
            epochs.check(attempt.output_dir, epoch)
            # Prepared in the attempt's directory: a late process, after another one has finished all this,
            # finds it gone, and cannot turn `latest` back.
            write_latest(attempt.output_dir, attempt.name, scratch=attempt.directory)
            failpoints.failpoint("latest.written", **where)
        note = _place_beside(attempt)
    except FileNotFoundError:
        if tree.is_dir(attempt.directory):
            raise
    throw_away(attempt, epoch)
    failpoints.failpoint("attempt.removed", **where)
    return note


def _place_beside(attempt: Attempt) -> str:
    """Move what stock code left in its save directory (helper scripts) beside the checkpoint; durable."""
    left: list[str] = []
    moved = False
    for entry in tree.list_dir(attempt.directory):
        path = attempt.directory / entry
        if entry.startswith(".") or entry == names.LATEST:  # stock code's own `latest` has done its duty
            continue
        if not tree.is_file(path) or tree.is_dir(attempt.output_dir / entry):
            left.append(entry)
            continue
        with suppress(FileNotFoundError):  # another committer was faster
            writes.rename(path, attempt.output_dir / entry)
            moved = True
    if moved:
        writes.fsync_dir(attempt.output_dir)
    return f"{', '.join(left)} in the save directory was not kept, only files are" if left else ""


def _abandon(attempt: Attempt, epoch: int) -> None:
    """Throw the attempt away; those who wait for it find the reason in `.epochs/`."""
    if attempt.epoch == epoch:
        record = names.aborted_file(attempt.name, attempt.epoch, attempt.attempt)
        with suppress(OSError):  # a reason is a courtesy: a full disk gets its room back without it
            writes.link(attempt.checkpoint_dir / names.DECISION, attempt.output_dir / names.EPOCHS / record)
            _forget_reasons(attempt.output_dir / names.EPOCHS)
    throw_away(attempt, epoch)
    failpoints.failpoint("attempt.removed", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)


def _forget_reasons(folder: Path) -> None:
    """Remove all but the newest aborts' reasons. Who has not looked by then learns that it was abandoned, not why."""
    reasons = [entry for entry in tree.list_dir(folder) if names.parse_aborted_file(entry) is not None]
    if len(reasons) > _REASONS_KEPT:
        oldest_first = sorted(reasons, key=lambda entry: reads.mtime_ns(folder / entry))
        for entry in oldest_first[:-_REASONS_KEPT]:
            writes.discard_file(folder / entry)


def throw_away(attempt: Attempt, epoch: int) -> None:
    try:
        place = trash(attempt.output_dir, attempt.directory, epoch)
    except FileNotFoundError:
        epochs.check(attempt.output_dir, epoch)
        return
    writes.fsync_dir(attempt.output_dir)
    writes.remove_tree(place)
    empty_trash(attempt.output_dir, epoch)  # what could not be deleted before
