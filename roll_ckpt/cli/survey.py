"""roll-ckpt: list, show, verify, prune, recover, and the Hub. Imports nothing heavy, so that it answers at once.

Tables for people go to stdout, or JSON with --json; errors and progress go to stderr.
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 something is damaged, 4 uploads are still owed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.cli.paths import Place, is_foreign
from roll_ckpt.disk import reads, tree
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.formats import manifests, records
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.transaction import epochs, listing

_HEARD_S = 60.0  # a run on another host that was heard of so recently is shown as live


@dataclass(frozen=True)
class Pending:
    """An attempt that is not committed. `fate` is what recovery would do with it as it lies here."""

    name: str
    epoch: int
    attempt: int
    votes: int
    expected: int
    fate: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """What lies in an output directory; `foreign` are DeepSpeed checkpoints that somebody else wrote."""

    checkpoints: list[Manifest]
    damaged: list[str]
    pending: list[Pending]
    foreign: list[str]
    latest: str | None
    live: list[str] = field(default_factory=list)


def survey(output_dir: Path) -> Survey:
    """Look at an output directory. Reads records only, no contents, and waits for nobody."""
    damaged: list[str] = []
    checkpoints = listing.committed(output_dir, report=lambda problem: damaged.append(str(problem)))
    try:
        latest = listing.read_latest(output_dir)
    except Damaged as error:
        latest = None
        damaged.append(str(error))
    entries = tree.list_dir(output_dir)
    attempts = [parsed for entry in entries if (parsed := names.parse_attempt_dir(entry))]
    return Survey(
        checkpoints=checkpoints,
        damaged=damaged,
        pending=[_look_at_attempt(output_dir, *parsed) for parsed in attempts],
        foreign=[entry for entry in entries if is_foreign(output_dir / entry)],
        latest=latest,
        live=_live(output_dir),
    )


def look(place: Place) -> Survey:
    """The survey of a place: of the one checkpoint that it names, else of its output directory."""
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


def _look_at_attempt(output_dir: Path, name: str, number: int, attempt: int) -> Pending:
    checkpoint_dir = output_dir / names.attempt_dir(name, number, attempt) / name
    votes = needed = 0
    try:
        told = records.parse_expected(
            reads.read_bytes(checkpoint_dir / names.EXPECTED), checkpoint_dir / names.EXPECTED
        )
        needed = len(told.voters())
        cast = set(tree.list_dir(checkpoint_dir / names.VOTES)) & set(told.voters())
        votes = len(cast)
        if tree.exists(checkpoint_dir / names.DECISION):
            decision = records.parse_decision(
                reads.read_bytes(checkpoint_dir / names.DECISION), checkpoint_dir / names.DECISION
            )
            fate, reason = ("finish", "committed") if decision.commit else ("discard", decision.reason)
            return Pending(name, number, attempt, votes, needed, fate, reason)
        for file in sorted(cast):
            path = checkpoint_dir / names.VOTES / file
            if problem := manifests.objection(records.parse_vote(reads.read_bytes(path), path), told, file):
                return Pending(name, number, attempt, votes, needed, "discard", problem)
    except Damaged as error:
        return Pending(name, number, attempt, votes, needed, "discard", str(error))
    except FileNotFoundError as error:
        # It was made, renamed or removed while we looked; or its process was killed at its very beginning.
        return Pending(name, number, attempt, votes, needed, "discard", f"{error.filename} is not there")
    fate = "finish" if votes == needed else "discard"
    return Pending(name, number, attempt, votes, needed, fate, f"{votes} of {needed} votes")


def _live(output_dir: Path) -> list[str]:
    """Who saves there now, as far as can be told without waiting for a heartbeat."""
    found = []
    for path, member in epochs.members(output_dir, epochs.newest_number(output_dir)).items():
        if isinstance(member, Damaged):
            continue
        try:
            if member.locked and member.boot_id == reads.boot_id():
                alive = epochs.is_alive(path, member)
            else:
                alive = time.time() - reads.mtime_ns(path) / 1e9 < _HEARD_S
        except FileNotFoundError:
            continue
        if alive:
            found.append(member.who)
    return found
