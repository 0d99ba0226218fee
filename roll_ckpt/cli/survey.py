"""What lies in an output directory, for the commands that show it: reads records only and waits for nobody."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.cli.paths import Place, is_foreign
from roll_ckpt.disk import reads, tree
from roll_ckpt.disk.missing import if_there
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.formats import manifests, records
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.transaction import epochs, listing
from roll_ckpt.transaction.epochs import Member
from roll_ckpt.transaction.home import find_home

_HEARTBEAT_S = 60.0  # a run on another host counts as live while its newest heartbeat is no older


@dataclass(frozen=True)
class Pending:
    """An attempt that is not committed.

    `votes` of the `expected` ranks have voted. `fate` is what recovery would do with it now, "finish" or "discard",
    and `reason` says why.
    """

    name: str
    epoch: int
    attempt: int
    votes: int
    expected: int
    fate: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """What lies in an output directory.

    `checkpoints` are the committed ones, the oldest first, `damaged` says what is wrong with each of the others,
    `foreign` are DeepSpeed checkpoints that roll_ckpt did not write, `live` names the processes that save there.
    """

    checkpoints: list[Manifest]
    damaged: list[str]
    pending: list[Pending]
    foreign: list[str]
    latest: str | None
    live: list[str] = field(default_factory=list)


def survey(output_dir: Path) -> Survey:
    """Survey an output directory. OSError if it cannot be listed."""
    damaged: list[str] = []
    checkpoints = listing.committed(output_dir, report=lambda problem: damaged.append(str(problem)), copies=True)
    try:
        latest = listing.read_latest(output_dir)
    except Damaged as error:
        latest = None
        damaged.append(str(error))
    entries = tree.list_dir(output_dir)
    home = find_home(output_dir)
    attempts = [parsed for entry in tree.list_dir(home) if (parsed := names.parse_attempt_dir(entry))]
    return Survey(
        checkpoints=checkpoints,
        damaged=damaged,
        pending=[_look_at_attempt(home, *parsed) for parsed in attempts],
        foreign=[entry for entry in entries if is_foreign(output_dir / entry)],
        latest=latest,
        live=_live(home),
    )


def look(place: Place) -> Survey:
    """The survey of the one checkpoint that `place` names, or else of its output directory."""
    if place.name is None:
        return survey(place.output_dir)
    checkpoints, damaged, latest = [], [], None
    try:
        checkpoints.append(manifests.read(place.checkpoint_dir))
        latest = listing.read_latest(place.output_dir)
    except (Damaged, NotFound) as error:
        damaged.append(str(error))
    except OSError as error:
        damaged.append(f"{error.filename}: it cannot be read: {error.strerror}")
    return Survey(checkpoints, damaged, [], [], latest)


def _look_at_attempt(home: Path, name: str, epoch: int, attempt: int) -> Pending:
    checkpoint_dir = home / names.attempt_dir(name, epoch, attempt) / name
    pending = partial(Pending, name, epoch, attempt)
    votes = needed = 0
    try:
        path = checkpoint_dir / names.EXPECTED
        expected = records.parse_expected(reads.read_bytes(path), path)
        needed = len(expected.voters())
        cast = set(tree.list_dir(checkpoint_dir / names.VOTES)) & set(expected.voters())
        votes = len(cast)
        path = checkpoint_dir / names.DECISION
        if tree.exists(path):
            decision = records.parse_decision(reads.read_bytes(path), path)
            fate, reason = ("finish", "committed") if decision.commit else ("discard", decision.reason)
            return pending(votes, needed, fate, reason)
        for file in sorted(cast):
            path = checkpoint_dir / names.VOTES / file
            if problem := manifests.objection(records.parse_vote(reads.read_bytes(path), path), expected, file):
                return pending(votes, needed, "discard", problem)
    except Damaged as error:
        return pending(votes, needed, "discard", str(error))
    except FileNotFoundError as error:
        # The attempt was begun, renamed or removed meanwhile; or its process was killed at its very beginning.
        return pending(votes, needed, "discard", f"{error.filename} is not there")
    return pending(votes, needed, "finish" if votes == needed else "discard", f"{votes} of {needed} votes")


def _live(home: Path) -> list[str]:
    """The processes that save there now, as far as can be told without waiting for a heartbeat."""
    members = epochs.members(home, epochs.newest_number(home))
    return [
        member.who
        for path, member in members.items()
        if not isinstance(member, Damaged) and if_there(partial(_seems_alive, path, member))
    ]


def _seems_alive(path: Path, member: Member) -> bool:
    """True if the process that `path` is the record of is alive; for one on another host, if it was heard of lately."""
    if member.locked and member.boot_id == reads.boot_id():
        return epochs.is_alive(path, member)
    return time.time() - reads.mtime_ns(path) / 1e9 < _HEARTBEAT_S
