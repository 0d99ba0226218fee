"""The vote on one attempt: each rank casts one; together they become a manifest and one decision.

A vote lists the files that a rank has made durable, or the error that kept it from doing so. The decision is made by
giving its file a name that is free, so the first one wins, whichever process makes it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints, reads, tree, writes
from roll_ckpt.disk.missing import missing_ok
from roll_ckpt.disk.writes import NotDurable
from roll_ckpt.errors import ConfigError, Damaged, SaveFailed
from roll_ckpt.formats.manifests import build, objection
from roll_ckpt.formats.records import Decision, Expected, Receipt, Vote, parse_decision, parse_expected, parse_vote
from roll_ckpt.formats.sealed_json import sha256
from roll_ckpt.transaction import epochs, foreign
from roll_ckpt.transaction.attempts import Attempt, abandoned, places


def cast(attempt: Attempt, vote: Vote) -> None:
    """Cast one rank's vote; every rank calls it for itself. Blocks; durable on return. Any thread may call.

    The caller has fsynced the files of the vote's receipts; cast() fsyncs their directories. Casting the same vote
    again is fine.

    Raises:
        ConfigError: the vote is for another attempt, or comes from a rank that is not expected.
        SaveFailed: this rank has cast a different vote before, a file that it lists is missing, the disk refused, or
            the attempt was abandoned meanwhile.
        EpochLost: a newer run owns the directory.
    """
    attempt.refuse_fork()
    who = f"cluster {vote.cluster!r} rank {vote.rank}"
    if (vote.epoch, vote.attempt) != (attempt.epoch, attempt.attempt):
        raise ConfigError(f"{attempt.label}: {who} votes for attempt {vote.epoch}.{vote.attempt}")
    if not 0 <= vote.rank < attempt.expected.get(vote.cluster, 0):
        raise ConfigError(
            f"{attempt.label}: {who} votes, and votes are expected from clusters (with world sizes) "
            f"{dict(attempt.expected)} only"
        )
    try:
        if vote.error is None:
            # The vote refers to the files, so the directory entries of the files become durable before the vote.
            durable = [writes.fsync_dir(path) for path in _directories(attempt.checkpoint_dir, vote.receipts)]
            if not vote.rank:
                _sync_beside(attempt)
            vote = replace(vote, directories_durable=vote.directories_durable and all(durable))
        epochs.check(attempt.home, attempt.epoch)
        failpoints.failpoint("vote.before", name=attempt.name, cluster=vote.cluster, rank=vote.rank)
        path = attempt.checkpoint_dir / names.VOTES / names.vote_file(vote.cluster, vote.rank)
        data = vote.to_bytes()
        if not writes.link_durable(path, data, scratch=attempt.directory) and reads.read_bytes(path) != data:
            raise SaveFailed(
                f"{attempt.label}: {who} has voted already, and differently ({path}); a vote never changes"
            )
    except FileNotFoundError as error:
        if tree.is_dir(attempt.checkpoint_dir):
            raise SaveFailed(
                f"{attempt.label}: {who} votes for a file that does not exist: {error.filename}"
            ) from error
        raise abandoned(attempt) from error
    except OSError as error:
        raise SaveFailed(f"{attempt.label}: {who} could not vote: {error.strerror} ({error.filename})") from error
    failpoints.failpoint("vote.cast", name=attempt.name, cluster=vote.cluster, rank=vote.rank)


def _directories(checkpoint_dir: Path, receipts: Iterable[Receipt]) -> list[Path]:
    """The directories that lead from `checkpoint_dir` to the files, each once, the deepest first."""
    folders = {checkpoint_dir}
    for receipt in receipts:
        folder = (checkpoint_dir / receipt.path).parent
        while folder not in folders:
            folders.add(folder)
            folder = folder.parent
    return sorted(folders, key=lambda path: (-len(path.parts), path))


def _sync_beside(attempt: Attempt) -> None:
    """Make the files durable that stock code left beside the checkpoint: no vote lists them, the commit moves them."""
    for entry in tree.list_dir(attempt.directory):
        if not names.is_own(entry) and tree.is_file(attempt.directory / entry):
            writes.fsync_file(attempt.directory / entry)
    writes.fsync_dir(attempt.directory)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Ballot:
    """The votes that one process has read so far, by file name: each is read and parsed once.

    `refusal` is why the attempt cannot be committed whatever votes are still to come, "" if nothing speaks against it.
    """

    data: dict[str, bytes] = field(default_factory=dict)
    votes: dict[str, Vote] = field(default_factory=dict)
    refusal: str = ""


def decide(attempt: Attempt, ballot: Ballot, epoch: int, over: bool) -> Decision | None:
    """Decide if the votes suffice or the time is `over`. The decision in force, whoever made it; None if it is open.

    Does not wait for votes. A decision is durable on return. FileNotFoundError if another process has moved the
    checkpoint; EpochLost if `epoch` does not own the directory any more; OSError if the disk refuses.
    """
    path = attempt.checkpoint_dir / names.EXPECTED
    data = reads.read_bytes(path)
    expected = parse_expected(data, path)
    voters = expected.voters()
    _collect(attempt, expected, voters, ballot)
    absent = [file for file in voters if file not in ballot.votes]
    if absent and not ballot.refusal and not over:
        return None
    reason = ballot.refusal or _absence(absent) or _unsound(attempt.checkpoint_dir, ballot)
    epochs.check(attempt.home, epoch)
    digest = ""
    if not reason:
        digest, reason = _make_manifest(attempt, ballot, data)
    decision = Decision(not reason, attempt.name, attempt.epoch, attempt.attempt, digest, reason)
    epochs.check(attempt.home, epoch)
    return _link_decision(attempt, decision)


def _make_manifest(attempt: Attempt, ballot: Ballot, expected: bytes) -> tuple[str, str]:
    """(SHA-256 of the durable manifest, "") or ("", why there can be none). OSError if the attempt is gone."""
    try:
        # A vote can be seen before its rank has made the entry in votes/ durable.
        writes.fsync_dir(attempt.checkpoint_dir / names.VOTES)
        return _write_manifest(attempt, ballot.data, expected), ""
    except Damaged as error:
        return "", str(error)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise
        return "", f"the manifest could not be written: {error.strerror} ({error.filename})"


def _link_decision(attempt: Attempt, decision: Decision) -> Decision | None:
    """Put `decision` in force unless another one is; the one that is in force. Durable on return."""
    path = attempt.checkpoint_dir / names.DECISION
    try:
        writes.link_durable(path, decision.to_bytes(), scratch=attempt.directory)
    except NotDurable:
        raise
    except OSError as error:
        if (in_force := decided(attempt)) is not None:
            return in_force
        if decision.commit or error.errno not in _NO_ROOM:
            raise
        # The disk is full, and only the end of this attempt gives it room again. Another name needs none: the list of
        # expected votes in place of a decision means abort, see parse_decision.
        writes.give_name(attempt.checkpoint_dir / names.EXPECTED, path, attempt.directory)
    failpoints.failpoint("decision.linked", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)
    return decided(attempt)


def _collect(attempt: Attempt, expected: Expected, voters: list[str], ballot: Ballot) -> None:
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
        ballot.refusal = ballot.refusal or objection(vote, expected, file)


def _absence(files: list[str]) -> str:
    """What to say of votes that have not come in time, "" if none is missing."""
    if not files:
        return ""
    absent: dict[str, list[int]] = {}
    for file in files:
        if parsed := names.parse_vote_file(file):
            absent.setdefault(parsed[0], []).append(parsed[1])
    who = ", ".join(f"cluster {cluster!r} rank {_ranks(ranks)}" for cluster, ranks in absent.items())
    return (
        f"no vote came from {who} in time (commit_timeout_s): these ranks have died, were stopped, or wait for the "
        "disk; see their logs"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def _unsound(checkpoint_dir: Path, ballot: Ballot) -> str:
    """How the files in the checkpoint differ from those that the votes list, "" if they do not."""
    listed: dict[str, tuple[int, str]] = {}
    for vote in ballot.votes.values():
        for receipt in vote.receipts:
            listed[receipt.path] = (receipt.nbytes, f"cluster {vote.cluster!r} rank {vote.rank}")
    records = {
        names.MANIFEST,
        names.DECISION,
        names.EXPECTED,
        *(f"{names.VOTES}/{file}" for file in ballot.votes),
    }
    is_regular = dict(tree.walk_all(checkpoint_dir))
    for path, (nbytes, who) in sorted(listed.items()):
        if not is_regular.get(path):
            return f"{who} lists {checkpoint_dir / path}, which does not exist as a regular file"
        if (size := tree.file_bytes(checkpoint_dir / path)) != nbytes:
            return f"{who} lists {checkpoint_dir / path} with {nbytes} bytes, and it has {size}"
    extra = [path for path in sorted(set(is_regular) - set(listed) - records) if foreign.read_by_stock(path)]
    if extra:
        return f"no vote lists {checkpoint_dir / extra[0]}" + (f" and {len(extra) - 1} more" if extra[1:] else "")
    return ""


def _write_manifest(attempt: Attempt, votes: Mapping[str, bytes], expected: bytes) -> str:
    """Make manifest.json durable; return its SHA-256. Another process that decides writes the same bytes."""
    data = build(votes, expected)
    failpoints.failpoint("manifest.before", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)
    writes.write_durable(attempt.checkpoint_dir / names.MANIFEST, data, scratch=attempt.directory)
    failpoints.failpoint("manifest.written", name=attempt.name, epoch=attempt.epoch, attempt=attempt.attempt)
    return sha256(data)


def decided(attempt: Attempt) -> Decision | None:
    """The decision on this attempt, wherever its checkpoint lies by now; None if there is none."""
    for checkpoint_dir in places(attempt):
        path = checkpoint_dir / names.DECISION
        with missing_ok():
            decision = parse_decision(reads.read_bytes(path), path)
            if (decision.epoch, decision.attempt) == (attempt.epoch, attempt.attempt):
                return decision
    return None
