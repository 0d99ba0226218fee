"""One attempt to save a checkpoint, up to the last vote: begin, write (others do that), cast."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints, reads, tree, writes
from roll_ckpt.disk.writes import NotDurable
from roll_ckpt.errors import ConfigError, Damaged, SaveFailed
from roll_ckpt.formats.manifests import build, objection
from roll_ckpt.formats.records import Decision, Expected, Receipt, Vote, parse_decision, parse_expected, parse_vote
from roll_ckpt.formats.sealed_json import sha256
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.attempts import Attempt, abandoned, places


def cast(attempt: Attempt, vote: Vote) -> None:
    """Cast one rank's vote; durable on return. The files of its receipts must have been fsynced before.

    Their directories are fsynced here. Casting the same vote again is fine.

    Raises:
        ConfigError: the vote is not of this attempt, or not of an expected rank.
        SaveFailed: this rank has voted otherwise before, or the attempt was abandoned meanwhile.
        EpochLost: a newer run owns the directory.
    """
    attempt.refuse_fork()
    who = f"cluster {vote.cluster!r} rank {vote.rank}"
    if (vote.epoch, vote.attempt) != (attempt.epoch, attempt.attempt):
        raise ConfigError(f"{attempt.label}: {who} votes for attempt {vote.epoch}.{vote.attempt}")
    if not 0 <= vote.rank < attempt.expected.get(vote.cluster, 0):
        raise ConfigError(f"{attempt.label}: no vote of {who} is expected, only of {dict(attempt.expected)}")
    try:
        if vote.error is None:
            # The vote refers to the files, so their names become durable before it.
            durable = [writes.fsync_dir(path) for path in _directories(attempt.checkpoint_dir, vote.receipts)]
            if not vote.rank:
                _sync_beside(attempt)
            vote = replace(vote, directories_durable=vote.directories_durable and all(durable))
        epochs.check(attempt.output_dir, attempt.epoch)
        failpoints.failpoint("vote.before", name=attempt.name, cluster=vote.cluster, rank=vote.rank)
        path = attempt.checkpoint_dir / names.VOTES / names.vote_file(vote.cluster, vote.rank)
        data = vote.to_bytes()
        if not writes.link_durable(path, data, scratch=attempt.directory) and reads.read_bytes(path) != data:
            raise SaveFailed(f"{attempt.label}: {who} has voted already, and otherwise; a vote never changes")
    except FileNotFoundError as error:
        if tree.is_dir(attempt.checkpoint_dir):
            raise SaveFailed(f"{attempt.label}: {who} lists a file that is not there: {error.filename}") from error
        raise abandoned(attempt) from error
    except OSError as error:
        raise SaveFailed(f"{attempt.label}: {who} could not vote: {error.strerror} ({error.filename})") from error
    failpoints.failpoint("vote.cast", name=attempt.name, cluster=vote.cluster, rank=vote.rank)


def _directories(checkpoint_dir: Path, receipts: Iterable[Receipt]) -> list[Path]:
    """The directories of all files up to the unit, each once, the deepest first."""
    found = {checkpoint_dir}
    for receipt in receipts:
        folder = (checkpoint_dir / receipt.path).parent
        while folder not in found:
            found.add(folder)
            folder = folder.parent
    return sorted(found, key=lambda path: (-len(path.parts), path))


def _sync_beside(attempt: Attempt) -> None:
    """Make the files durable that stock code left beside the unit: no vote lists them, the commit moves them."""
    for entry in tree.list_dir(attempt.directory):
        if not entry.startswith(".") and tree.is_file(attempt.directory / entry):
            writes.fsync_file(attempt.directory / entry)
    writes.fsync_dir(attempt.directory)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Ballot:
    """The votes that have come so far: each is read and parsed once."""

    data: dict[str, bytes] = field(default_factory=dict)
    votes: dict[str, Vote] = field(default_factory=dict)
    refusal: str = ""


def decide(attempt: Attempt, ballot: Ballot, epoch: int, over: bool) -> Decision | None:
    """Decide if the votes that are there, or the time, suffice; return what was decided, by whomever."""
    path = attempt.checkpoint_dir / names.EXPECTED
    expected = reads.read_bytes(path)
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
    reason = reason or _unsound(attempt.checkpoint_dir, ballot)
    epochs.check(attempt.output_dir, epoch)
    sealed = ""
    if not reason:
        try:
            writes.fsync_dir(
                attempt.checkpoint_dir / names.VOTES
            )  # a vote is seen before its rank has made its name durable
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
        writes.link_durable(attempt.checkpoint_dir / names.DECISION, ours.to_bytes(), scratch=attempt.directory)
    except NotDurable:
        raise
    except OSError as error:
        if (won := decided(attempt)) is not None:
            return won
        if ours.commit or error.errno not in _NO_ROOM:
            raise
        # Only its end gives the disk room again: see parse_decision.
        writes.link(path, attempt.checkpoint_dir / names.DECISION)
    failpoints.failpoint("decision.linked", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)
    return decided(attempt)


def _collect(attempt: Attempt, told: Expected, voters: list[str], ballot: Ballot) -> None:
    folder = attempt.checkpoint_dir / names.VOTES
    entries = set(tree.list_dir(folder))
    for file in voters:
        if file not in entries or file in ballot.votes:
            continue
        data = reads.read_bytes(folder / file)
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


def _unsound(checkpoint_dir: Path, ballot: Ballot) -> str:
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
    found = dict(tree.walk_all(checkpoint_dir))
    for path, (nbytes, who) in sorted(listed.items()):
        if not found.get(path):
            return f"{who} lists {checkpoint_dir / path}, which is not there as a file"
        if (size := tree.file_bytes(checkpoint_dir / path)) != nbytes:
            return f"{who} lists {checkpoint_dir / path} with {nbytes} bytes, and it has {size}"
    if extra := sorted(set(found) - set(listed) - ours):
        return f"no vote lists {checkpoint_dir / extra[0]}" + (f" and {len(extra) - 1} more" if extra[1:] else "")
    return ""


def _write_manifest(attempt: Attempt, votes: Mapping[str, bytes], expected: bytes) -> str:
    """Make manifest.json durable; return its SHA-256. A second committer writes the same bytes."""
    data = build(votes, expected)
    failpoints.failpoint("manifest.before", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)
    writes.write_durable(attempt.checkpoint_dir / names.MANIFEST, data, scratch=attempt.directory)
    failpoints.failpoint("manifest.written", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)
    return sha256(data)


def decided(attempt: Attempt) -> Decision | None:
    """The decision of this attempt, wherever its unit lies by now."""
    for checkpoint_dir in places(attempt):
        path = checkpoint_dir / names.DECISION
        with suppress(FileNotFoundError, NotADirectoryError):
            decision = parse_decision(reads.read_bytes(path), path)
            if (decision.epoch, decision.attempt) == (attempt.epoch, attempt.attempt):
                return decision
    return None
