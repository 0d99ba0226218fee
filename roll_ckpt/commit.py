"""Commit: how the votes of all ranks become a checkpoint under its final name, or nothing.

    claim → begin → (write, fsync) → cast → settle            and, at the next start:  claim → recover

Any process may carry out a decision, and two may do so at once; what each step finds done is done. Links and
renames decide, never a lock or a time. A checkpoint under its final name is complete; `latest` names no
other.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import disk, names
from . import epoch as epochs
from .attempt import Attempt, abandoned, abort_reason, begin, cast, check_replaced, check_room, pass_over
from .epoch import Epoch
from .errors import BY_HAND, ConfigError, Damaged, EpochLost, NotFound, SaveFailed, Unreadable, presentable
from .lease import is_being_read, reading, removing
from .manifest import (
    Decision,
    Expected,
    Manifest,
    Vote,
    build,
    objection,
    parse_decision,
    parse_expected,
    parse_vote,
)
from .manifest import read as read_manifest
from .seal import sha256
from .trash import empty_trash, retire_trash, trash

__all__ = [
    "Attempt", "Epoch", "Outcome", "Recovery", "abandoned", "begin", "cast", "check_replaced", "check_room", "claim",
    "clear", "committed", "empty_trash", "is_being_read", "newest_first", "pass_over", "read_manifest", "reading",
    "recover", "removing", "settle", "trash", "write_latest",
]  # fmt: skip

log = logging.getLogger("roll_ckpt")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.2
_PATIENCE_S = 1.0  # how long a process that replaces a checkpoint is left alone by another that would do the same
_STUBBORN_S = 10.0  # how long a disk is asked again that refuses what settling needs
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_TAKEN = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
_OLD = ".old"
_REASONS_KEPT = 100


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `reason` says why it was abandoned, or what a committed one left to wish for.

    Not `durable`: this process saw an fsync of a directory fail, so it is there and may not survive a power failure.
    """

    committed: bool
    reason: str = ""
    durable: bool = True


@dataclass(frozen=True)
class Recovery:
    """What became of an attempt that an older epoch had left: `action` is "finished" or "discarded"."""

    name: str
    epoch: int
    attempt: int
    action: str
    reason: str


# --- claiming -----------------------------------------------------------------------------------------------


def claim(
    output_dir: Path,
    *,
    run_id: str,
    clusters: Mapping[str, int],
    expected_clusters: Mapping[str, int] | None = None,
    take_over: bool = False,
) -> Epoch:
    """Make this world the one (or one of those) that may write in `output_dir`, and recover what lies there.

    Rank 0 of each world only. Blocks: up to epoch.SILENCE_S if an earlier run on another host has not said
    goodbye. With `expected_clusters`, worlds of the same `run_id` join one epoch.

    Raises:
        RunIsLive: another live run owns it; the message names host and process. Nothing was touched.
        ConfigError: names that cannot be, clusters that are not among the expected, a directory that cannot
            be written.
    """
    for cluster in {*clusters, *(expected_clusters or {})}:
        names.check_name("cluster", cluster)
    if not clusters:
        raise ConfigError("a world without clusters cannot claim an output directory")
    if expected_clusters is not None:
        for cluster, world_size in clusters.items():
            if expected_clusters.get(cluster) != world_size:
                raise ConfigError(
                    f"cluster {cluster!r} with {world_size} ranks is not among expected_clusters "
                    f"{dict(expected_clusters)}; give every world the same expected_clusters"
                )
    output_dir = Path(output_dir)
    try:
        claimed = epochs.claim_number(output_dir, run_id, clusters, expected_clusters, take_over)
    except OSError as error:
        raise ConfigError(
            f"output_dir {output_dir} cannot be written: {error.strerror} ({error.filename}); choose another"
        ) from error
    disk.reach("epoch.claimed", number=claimed.number)
    try:
        for found in recover(output_dir, epoch=claimed):
            log.warning("%s of attempt %s.%s: %s (%s)", output_dir / found.name, found.epoch, found.attempt,
                        found.action, presentable(found.reason))  # fmt: skip
    except BaseException:
        claimed.release()
        raise
    return claimed


# --- settling -----------------------------------------------------------------------------------------------


def settle(
    attempt: Attempt, *, lead: bool, timeout_s: float, refusal: str = "", clock: Callable[[], float] = time.monotonic
) -> Outcome:
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
        return _settle(attempt, lead, timeout_s, refusal, clock)
    except EpochLost:
        if _carries(attempt.final, attempt):
            return Outcome(True, "a newer run has finished it")
        raise
    except OSError as error:
        raise SaveFailed(
            f"{attempt.label}: {error.strerror} ({error.filename}); older checkpoints are untouched. The next save, "
            f"or start, finishes or discards what lies there.{refusal and f' Before that: {refusal}'}"
        ) from error


def _settle(attempt: Attempt, lead: bool, timeout_s: float, refusal: str, clock: Callable[[], float]) -> Outcome:
    limit = clock() + timeout_s
    ballot = _Ballot(refusal=refusal)
    decision: Decision | None = None
    pause, vanished, refused = _FIRST_PAUSE_S, 0, 0.0
    doubt: disk.NotDurable | None = None
    while True:
        over = clock() >= limit
        try:
            if attempt.directory.name not in disk.list_dir(attempt.output_dir):
                return _afterwards(attempt, decision)
            decision = decision or _decided(attempt)
            if lead or over or refusal:
                decision = decision or _decide(attempt, ballot, attempt.epoch, over)
                if decision is not None:
                    note = _carry_out(attempt, decision, attempt.epoch, save_latest=attempt.save_latest)
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
            if isinstance(error, disk.NotDurable):
                doubt = error  # what is left to do is done all the same
            if not refused:
                refused = clock()
                log.warning("%s: %s (%s); it is tried again for %g s", attempt.label, error.strerror, error.filename,
                            _STUBBORN_S)  # fmt: skip
            elif clock() - refused > _STUBBORN_S:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _afterwards(attempt: Attempt, decision: Decision | None) -> Outcome:
    """What was the end of an attempt that somebody else has carried out."""
    if _carries(attempt.final, attempt):
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


# --- deciding -----------------------------------------------------------------------------------------------


@dataclass
class _Ballot:
    """The votes that have come so far: each is read and parsed once."""

    data: dict[str, bytes] = field(default_factory=dict)
    votes: dict[str, Vote] = field(default_factory=dict)
    refusal: str = ""


def _decide(attempt: Attempt, ballot: _Ballot, epoch: int, over: bool) -> Decision | None:
    """Decide if the votes that are there, or the time, suffice; return what was decided, by whomever."""
    path = attempt.unit / names.EXPECTED
    expected = disk.read_bytes(path)
    told = parse_expected(expected, path)
    voters = told.voters()
    _collect(attempt, told, voters, ballot)
    reason = ballot.refusal
    if not reason and len(ballot.votes) < len(voters):
        if not over:
            return None
        missing = [file for file in voters if file not in ballot.votes]
        reason = (
            f"no vote came from {_ranks_of(missing)} in time (commit_timeout_s): died, stopped, or waiting for the "
            "disk; see the log of those processes"
        )
    reason = reason or _unsound(attempt.unit, ballot)
    epochs.check(attempt.output_dir, epoch)
    sealed = ""
    if not reason:
        try:
            disk.fsync_dir(attempt.unit / names.VOTES)  # a vote is seen before its rank has made its name durable
            sealed = _write_manifest(attempt, ballot.data, expected)
        except Damaged as error:
            reason = str(error)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise
            reason = f"the manifest could not be written: {error.strerror} ({error.filename})"
    ours = Decision(not reason, attempt.name, attempt.epoch, attempt.attempt, sealed, reason)
    epochs.check(attempt.output_dir, epoch)
    try:
        disk.link_durable(attempt.unit / names.DECISION, ours.to_bytes(), scratch=attempt.directory)
    except disk.NotDurable:
        raise
    except OSError as error:
        if (won := _decided(attempt)) is not None:
            return won
        if ours.commit or error.errno not in _NO_ROOM:
            raise
        # Only its end gives the disk room again: see parse_decision.
        disk.link(path, attempt.unit / names.DECISION)
    disk.reach("decision.linked", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)
    return _decided(attempt)


def _collect(attempt: Attempt, told: Expected, voters: list[str], ballot: _Ballot) -> None:
    folder = attempt.unit / names.VOTES
    entries = set(disk.list_dir(folder))
    for file in voters:
        if file not in entries or file in ballot.votes:
            continue
        data = disk.read_bytes(folder / file)
        try:
            vote = parse_vote(data, folder / file)
        except Damaged as error:
            ballot.refusal = ballot.refusal or str(error)
            continue
        ballot.data[file], ballot.votes[file] = data, vote
        ballot.refusal = ballot.refusal or objection(vote, told, file)


def _ranks_of(files: list[str]) -> str:
    absent: dict[str, list[int]] = {}
    for file in files:
        if parsed := names.parse_vote_file(file):
            absent.setdefault(parsed[0], []).append(parsed[1])
    return ", ".join(f"cluster {cluster!r} rank {_ranks(ranks)}" for cluster, ranks in absent.items())


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def _unsound(unit: Path, ballot: _Ballot) -> str:
    """Why the files in the unit are not those that the votes list, "" if they are."""
    listed: dict[str, tuple[int, str]] = {}
    for vote in ballot.votes.values():
        for receipt in vote.receipts:
            listed[receipt.path] = (receipt.nbytes, f"cluster {vote.cluster!r} rank {vote.rank}")
    ours = {
        names.MANIFEST,
        names.DECISION,
        names.EXPECTED,
        *(f"{names.VOTES}/{file}" for file in ballot.votes),
    }
    found = dict(disk.walk_all(unit))
    for path, (nbytes, who) in sorted(listed.items()):
        if not found.get(path):
            return f"{who} lists {unit / path}, which is not there as a file"
        if (size := disk.file_bytes(unit / path)) != nbytes:
            return f"{who} lists {unit / path} with {nbytes} bytes, and it has {size}"
    if extra := sorted(set(found) - set(listed) - ours):
        return f"no vote lists {unit / extra[0]}" + (f" and {len(extra) - 1} more" if extra[1:] else "")
    return ""


def _write_manifest(attempt: Attempt, votes: Mapping[str, bytes], expected: bytes) -> str:
    """Make manifest.json durable; return its SHA-256. A second committer writes the same bytes."""
    data = build(votes, expected)
    disk.reach("manifest.before", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)
    disk.write_durable(attempt.unit / names.MANIFEST, data, scratch=attempt.directory)
    disk.reach("manifest.written", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)
    return sha256(data)


def _decided(attempt: Attempt) -> Decision | None:
    """The decision of this attempt, wherever its unit lies by now."""
    for unit in _places(attempt):
        path = unit / names.DECISION
        with suppress(FileNotFoundError, NotADirectoryError):
            decision = parse_decision(disk.read_bytes(path), path)
            if (decision.epoch, decision.attempt) == (attempt.epoch, attempt.attempt):
                return decision
    return None


def _places(attempt: Attempt) -> Iterator[Path]:
    """Where the unit may be: written, in the hands of a process that replaces a checkpoint, or committed."""
    entries = disk.list_dir(attempt.directory)
    if attempt.name in entries:
        yield attempt.unit
    yield from (attempt.directory / e / attempt.name for e in entries if e.startswith(names.SUPERSEDED))
    yield attempt.final


def _carries(unit: Path, attempt: Attempt) -> bool:
    """Whether the checkpoint in `unit` is the one of this attempt."""
    try:
        found = read_manifest(unit)
    except (NotFound, Damaged):
        return False
    return (found.name, found.epoch, found.attempt) == (attempt.name, attempt.epoch, attempt.attempt)


# --- carrying out -------------------------------------------------------------------------------------------


def _carry_out(attempt: Attempt, decision: Decision, epoch: int, *, save_latest: bool) -> str:
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
        disk.fsync_dir(attempt.unit)  # whoever made the decision may not have come to that
        disk.rename(attempt.unit, attempt.final)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        # A retransmitted rename, another committer, or an older checkpoint of this name: only what lies
        # there can tell.
        if not _carries(attempt.final, attempt):
            _replace(attempt, epoch)
    disk.fsync_dir(attempt.output_dir)
    disk.reach("commit.renamed", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)


def _replace(attempt: Attempt, epoch: int) -> None:
    """Put the unit in the place of another checkpoint of that name.

    A second exchange would bring the old one back. So whoever replaces first renames the unit into a private
    directory; who takes over after a crash renames that directory, and the former owner's paths vanish.
    """
    began = time.monotonic()
    while not _carries(attempt.final, attempt):
        own = _take(attempt, patient=time.monotonic() - began < _PATIENCE_S)
        if own is None:
            time.sleep(_FIRST_PAUSE_S)
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
    entries = disk.list_dir(attempt.directory)
    if attempt.name in entries:
        disk.make_dir(own)
        with suppress(FileNotFoundError):
            disk.rename(attempt.unit, own / attempt.name)
            return own
    for entry in entries:
        if entry.startswith(names.SUPERSEDED) and disk.exists(attempt.directory / entry / attempt.name):
            if patient:
                return None
            disk.rename(attempt.directory / entry, own)
            return own
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(attempt.unit))


def _swap(attempt: Attempt, own: Path, epoch: int) -> None:
    new = own / attempt.name
    if not _carries(new, attempt):
        raise SaveFailed(f"{attempt.label}: {new} should hold it, and does not; see `verify` of {own}")
    if not disk.exists(attempt.final):
        disk.rename(new, attempt.final)
        return
    try:
        disk.exchange(new, attempt.final)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        _step_aside(attempt, own)
        disk.rename(new, attempt.final)


def _step_aside(attempt: Attempt, own: Path) -> None:
    """Without an exchange: move the old checkpoint away. `latest` does not name it while it is absent."""
    disk.make_dir(own / _OLD)
    # Where both checkpoints will be is durable before one of them is missed: a crash must not lose the place.
    for directory in (own, attempt.directory):
        disk.fsync_dir(directory)
    if read_latest(attempt.output_dir) == attempt.name:
        others = [found.name for found in committed(attempt.output_dir) if found.name != attempt.name]
        if others:
            write_latest(attempt.output_dir, others[-1], scratch=attempt.directory)
        else:
            disk.discard_file(attempt.output_dir / names.LATEST)
            disk.fsync_dir(attempt.output_dir)
    disk.rename(attempt.final, own / _OLD / attempt.name)
    for directory in (own / _OLD, attempt.output_dir):
        disk.fsync_dir(directory)


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
            disk.reach("latest.written", **where)
        note = _place_beside(attempt)
    except FileNotFoundError:
        if disk.is_dir(attempt.directory):
            raise
    _throw_away(attempt, epoch)
    disk.reach("attempt.removed", **where)
    return note


def _place_beside(attempt: Attempt) -> str:
    """Move what stock code left in its save directory (helper scripts) beside the checkpoint; durable."""
    left: list[str] = []
    moved = False
    for entry in disk.list_dir(attempt.directory):
        path = attempt.directory / entry
        if entry.startswith(".") or entry == names.LATEST:  # stock code's own `latest` has done its duty
            continue
        if not disk.is_file(path) or disk.is_dir(attempt.output_dir / entry):
            left.append(entry)
            continue
        with suppress(FileNotFoundError):  # another committer was faster
            disk.rename(path, attempt.output_dir / entry)
            moved = True
    if moved:
        disk.fsync_dir(attempt.output_dir)
    return f"{', '.join(left)} in the save directory was not kept, only files are" if left else ""


def _abandon(attempt: Attempt, epoch: int) -> None:
    """Throw the attempt away; those who wait for it find the reason in `.epochs/`."""
    if attempt.epoch == epoch:
        record = names.aborted_file(attempt.name, attempt.epoch, attempt.attempt)
        with suppress(OSError):  # a reason is a courtesy: a full disk gets its room back without it
            disk.link(attempt.unit / names.DECISION, attempt.output_dir / names.EPOCHS / record)
            _forget_reasons(attempt.output_dir / names.EPOCHS)
    _throw_away(attempt, epoch)
    disk.reach("attempt.removed", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)


def _forget_reasons(folder: Path) -> None:
    """Remove all but the newest aborts' reasons. Who has not looked by then learns that it was abandoned, not why."""
    reasons = [entry for entry in disk.list_dir(folder) if names.parse_aborted_file(entry) is not None]
    if len(reasons) > _REASONS_KEPT:
        oldest_first = sorted(reasons, key=lambda entry: disk.mtime_ns(folder / entry))
        for entry in oldest_first[:-_REASONS_KEPT]:
            disk.discard_file(folder / entry)


def _throw_away(attempt: Attempt, epoch: int) -> None:
    try:
        place = trash(attempt.output_dir, attempt.directory, epoch)
    except FileNotFoundError:
        epochs.check(attempt.output_dir, epoch)
        return
    disk.fsync_dir(attempt.output_dir)
    disk.remove_tree(place)
    empty_trash(attempt.output_dir, epoch)  # what could not be deleted before


# --- recovering ---------------------------------------------------------------------------------------------


def recover(output_dir: Path, *, epoch: Epoch) -> list[Recovery]:
    """Finish or discard every attempt of an older epoch, and remove all garbage. claim() calls it.

    Idempotent; a crash anywhere in it, or two processes in it at once, are fine. No committed checkpoint is
    touched.
    """
    retire_trash(output_dir, epoch.number)
    done = []
    for entry in disk.list_dir(output_dir):
        parsed = names.parse_attempt_dir(entry)
        if parsed is not None and parsed[1] < epoch.number:
            done.append(_recover_one(output_dir, *parsed, epoch.number))
        elif names.parse_temporary_file(entry) == names.LATEST:
            disk.discard_file(output_dir / entry)
    _sweep_epochs(output_dir / names.EPOCHS, epoch.number)
    empty_trash(output_dir, epoch.number)
    return done


def clear(epoch: Epoch, busy: Collection[Path]) -> list[Recovery]:
    """Finish or discard the attempts of this process that ended while the disk refused, so that their room is given
    back. `busy` are the directories of those that have not ended. Rank 0 of each world.

    OSError, SaveFailed: the disk refuses still.
    """
    done = []
    for entry in disk.list_dir(epoch.output_dir):
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
        _throw_away(bare, epoch)
        return Recovery(
            name, old_epoch, number, "discarded", f"{link} is no directory but a link or file, which no save makes"
        )
    for _ in range(50):
        try:
            decision = _decided(bare) or _decide(bare, _Ballot(), epoch, over=True)
            if decision is not None:
                save_latest = decision.commit and _is_newest(bare)
                _carry_out(bare, decision, epoch, save_latest=save_latest)
                action = "finished" if decision.commit else "discarded"
                return Recovery(name, old_epoch, number, action, decision.reason or "all votes were there")
        except Damaged as error:
            return _discard(bare, epoch, str(error))
        except FileNotFoundError as error:
            if not disk.is_dir(bare.directory):  # another world's recovery was faster
                action = "finished" if _carries(bare.final, bare) else "discarded"
                return Recovery(name, old_epoch, number, action, "by another world of this run")
            # Where another world has just published it, what is left is that world's to finish, or ours: look again.
            if not any(disk.exists(u / names.EXPECTED) for u in _places(bare) if u != bare.final or _carries(u, bare)):
                return _discard(bare, epoch, f"it was interrupted at its beginning, before {error.filename}")
        time.sleep(_FIRST_PAUSE_S)
    raise SaveFailed(f"{bare.label}: it cannot be recovered; another process keeps changing {bare.directory}")


def _link_in(attempt: Attempt) -> Path | None:
    """What is no directory, in the place of one that recovery would write in or take a checkpoint from."""
    if disk.exists(attempt.directory) and not disk.is_real_dir(attempt.directory):
        return attempt.directory
    own = [e for e in disk.list_dir(attempt.directory) if e == attempt.name or e.startswith(names.SUPERSEDED)]
    return next((attempt.directory / e for e in own if disk.is_link(attempt.directory / e)), None)


def _is_newest(attempt: Attempt) -> bool:
    """Whether `latest` is to name this committed attempt: it wished so, and no newer one is named."""
    for unit in _places(attempt):
        with suppress(NotFound, Damaged):
            found = read_manifest(unit)
            if (found.epoch, found.attempt) != (attempt.epoch, attempt.attempt):
                continue
            named = read_latest(attempt.output_dir)
            known = {other.name: other for other in committed(attempt.output_dir) if other.name != found.name}
            return found.save_latest and (named not in known or known[named].age < found.age)
    return False


def _discard(attempt: Attempt, epoch: int, reason: str) -> Recovery:
    """Throw an attempt away that cannot be finished; a checkpoint that stepped aside for it comes back."""
    for entry in disk.list_dir(attempt.directory):
        old = attempt.directory / entry / _OLD / attempt.name
        if entry.startswith(names.SUPERSEDED) and disk.exists(old) and not disk.exists(attempt.final):
            disk.rename(old, attempt.final)
            disk.fsync_dir(attempt.output_dir)
    _throw_away(attempt, epoch)
    return Recovery(attempt.name, attempt.epoch, attempt.attempt, "discarded", reason)


def _sweep_epochs(folder: Path, epoch: int) -> None:
    """Remove the records of older epochs, their aborts' reasons, and what a killed claimant had prepared."""
    for entry in disk.list_dir(folder):
        member, aborted = names.parse_epoch_file(entry), names.parse_aborted_file(entry)
        number = member[0] if member else aborted[1] if aborted else None
        if names.parse_temporary_file(entry) is not None or (number is not None and number < epoch):
            disk.discard_file(folder / entry)


# --- finding ------------------------------------------------------------------------------------------------


def _warn(problem: Damaged | Unreadable) -> None:
    log.warning("%s; this checkpoint is left out", problem)


def committed(output_dir: Path, report: Callable[[Damaged | Unreadable], None] = _warn) -> list[Manifest]:
    """The committed checkpoints, the oldest first (by step, epoch, attempt).

    `report` is told of each directory whose manifest is gone or cannot be trusted, or cannot be read although it was
    tried for two seconds. File contents are not read. OSError if `output_dir` cannot be listed.
    """
    found, patience = [], disk.Patience()
    for entry in patience.again(partial(disk.list_dir, output_dir)):
        unit = output_dir / entry
        if entry.startswith(".") or entry == names.LOST_AND_FOUND:
            continue
        try:
            manifest = patience.again(partial(_committed_in, unit))
        except Damaged as error:
            report(error)
            continue
        except OSError as error:
            problem = Unreadable(f"{unit / names.MANIFEST}: it cannot be read: {error.strerror}")
            problem.unit = unit
            report(problem)
            continue
        if manifest is not None:
            found.append(manifest)
    return sorted(found, key=lambda manifest: manifest.age)


def _committed_in(unit: Path) -> Manifest | None:
    """The checkpoint in a directory, None if it is something else. Damaged if it cannot be trusted."""
    if not disk.is_dir(unit):
        return None
    try:
        manifest = read_manifest(unit)
    except NotFound:
        if disk.exists(unit / names.DECISION) or disk.exists(unit / names.EXPECTED):
            raise Damaged(f"{unit}: its {names.MANIFEST} is missing, so nothing in it can be verified") from None
        return None
    real = disk.is_real_dir(unit)
    if manifest.name == unit.name and not real:
        raise Damaged(f"{unit}: a symbolic link; move the checkpoint itself there, or give its own path")
    if manifest.name != unit.name and real:
        raise Damaged(f"{unit}: its {names.MANIFEST} is the one of {manifest.name}; is it a copy?")
    return manifest if real else None


def newest_first(output_dir: Path) -> list[Manifest]:
    """The committed checkpoints, the newest first; a warning names those that are left out, as `committed` does.

    Damaged if there are only such: whoever finds nothing would start anew beside them. Unreadable if the disk does not
    tell of one: it may be the newest.
    """
    problems: list[Damaged | Unreadable] = []
    found = committed(output_dir, problems.append)
    if unread := [str(problem) for problem in problems if isinstance(problem, Unreadable)]:
        raise Unreadable(f"{'; '.join(unread)}. {BY_HAND}")
    if problems and not found:
        raise Damaged(f"{output_dir}: none of its checkpoints is sound: {'; '.join(map(str, problems))}")
    for problem in problems:
        _warn(problem)
    return found[::-1]


def read_latest(output_dir: Path) -> str | None:
    """What `latest` names, None if there is no such file. Damaged if it is no name."""
    path = output_dir / names.LATEST
    try:
        text = disk.read_bytes(path).decode()
        return names.check_name("tag", text)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Damaged(f"{path}: it does not name a checkpoint: {error}") from error


def write_latest(output_dir: Path, name: str, *, scratch: Path | None = None) -> None:
    """Let `latest` name a committed checkpoint, else NotFound; atomic, durable on return."""
    read_manifest(output_dir / name)
    disk.write_durable(output_dir / names.LATEST, name.encode(), scratch=scratch)
