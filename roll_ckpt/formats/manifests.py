"""The records of a checkpoint: receipts, votes, what was expected, the decision, and the manifest over them.

Each is a sealed record (seal.py). The manifest is a pure function of the votes and of votes/expected.json:
two committers write the same bytes. It names every file of the unit but two: itself, and `decision`, which
names it.
Only read() touches the disk. Reading trusts nothing: wrong types, ranges and paths are refused by
errors.Damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.disk import reads
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.formats.records import (
    FORMAT,
    Expected,
    Receipt,
    Vote,
    _refuse_file_as_directory,
    are_world_sizes,
    is_shallow,
    parse_expected,
    parse_receipts,
    parse_vote,
    receipt_of_bytes,
    spell_receipts,
    take_format,
    take_name,
)
from roll_ckpt.formats.sealed_json import Fields, is_count, is_sha256, seal, sha256, unseal


@dataclass(frozen=True)
class Manifest:
    """manifest.json: the commit record of one checkpoint."""

    name: str
    step: int | None
    run_id: str
    epoch: int
    attempt: int
    clusters: dict[str, dict[str, Any]]
    files: tuple[Receipt, ...]
    votes: dict[str, str]
    save_latest: bool
    software: str
    directories_durable: bool
    format: int = FORMAT

    @property
    def age(self) -> tuple[int, int, int, str]:
        """Sorts checkpoints from the oldest to the newest.

        The epoch comes first: a run that resumed from an older step leaves the later steps of its predecessor
        behind it. Within an epoch the step, then the attempt.
        """
        return (self.epoch, -1 if self.step is None else self.step, self.attempt, self.name)

    def nbytes(self) -> int:
        """The bytes of all listed files."""
        return sum(receipt.nbytes for receipt in self.files)

    def record_paths(self) -> tuple[str, ...]:
        """The files that no receipt lists, because they are written by the commit itself: the votes, then the decision.

        Paths are relative to the checkpoint's directory. The manifest itself is not among them.
        """
        return (*(f"{names.VOTES}/{file}" for file in sorted(self.votes)), names.DECISION)

    def paths(self) -> tuple[str, ...]:
        """Every file of the checkpoint, relative to its directory: listed files, records, then the manifest."""
        return (*(receipt.path for receipt in self.files), *self.record_paths(), names.MANIFEST)

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return seal({**asdict(self), "files": spell_receipts(self.files)})


def build(votes: Mapping[str, bytes], expected: bytes) -> bytes:
    """The bytes of manifest.json, from the bytes of every vote's file (by its name) and of expected.json.

    Damaged if a vote is missing, foreign, a no, or contradicts another.
    """
    told = parse_expected(expected, names.EXPECTED)
    if sorted(votes) != sorted(told.voters()):
        raise Damaged("the votes are not those that votes/expected.json asks for")
    cast = [parse_vote(votes[file], f"{names.VOTES}/{file}") for file in told.voters()]
    clusters: dict[str, dict[str, Any]] = {name: {} for name in told.clusters}
    files = {names.EXPECTED: receipt_of_bytes(names.EXPECTED, expected)}
    for file, vote in zip(told.voters(), cast, strict=True):
        if problem := objection(vote, told, file):
            raise Damaged(problem)
        for receipt in vote.receipts:
            if files.setdefault(receipt.path, receipt) != receipt:
                who = f"cluster {vote.cluster!r} rank {vote.rank}"
                raise Damaged(f"{who} and another rank wrote different bytes to {receipt.path}")
        clusters[vote.cluster] = {**vote.facts, **clusters[vote.cluster]}
    _refuse_file_as_directory(sorted(files), "the votes together")
    return Manifest(
        name=told.name,
        step=told.step,
        run_id=told.run_id,
        epoch=told.epoch,
        attempt=told.attempt,
        clusters={name: {**facts, "world_size": told.clusters[name]} for name, facts in clusters.items()},
        files=tuple(sorted(files.values())),
        votes={file: sha256(data) for file, data in votes.items()},
        save_latest=told.save_latest,
        software=told.software,
        directories_durable=all(vote.directories_durable for vote in cast),
    ).to_bytes()


def objection(vote: Vote, expected: Expected, file: str) -> str:
    """Why this vote, found under this name, keeps its attempt from being committed; "" if nothing does."""
    who = f"cluster {vote.cluster!r} rank {vote.rank}"
    if names.vote_file(vote.cluster, vote.rank) != file:
        return f"votes/{file} is the vote of {who}"
    if (vote.epoch, vote.attempt) != (expected.epoch, expected.attempt):
        return f"votes/{file} belongs to attempt {vote.epoch}.{vote.attempt}"
    if vote.error is not None:
        return f"{who} failed: {vote.error}"
    for receipt in vote.receipts:
        if receipt.path in (names.MANIFEST, names.DECISION) or receipt.path.split("/")[0] == names.VOTES:
            return f"{who} lists {receipt.path}, which only the commit itself may write"
    return ""


def parse(data: bytes, where: object) -> Manifest:
    """The record in manifest.json."""
    fields = Fields(unseal(data, where), where)
    take_format(fields)
    manifest = Manifest(
        name=take_name(fields),
        step=fields.optional("step", int, is_count),
        run_id=fields.take("run_id", str),
        epoch=fields.count("epoch"),
        attempt=fields.count("attempt"),
        clusters=fields.take("clusters", dict, _are_clusters),
        files=parse_receipts(fields.take("files", dict), where),
        votes=fields.take("votes", dict, lambda votes: all(is_sha256(digest) for digest in votes.values())),
        save_latest=fields.take("save_latest", bool),
        software=fields.take("software", str),
        directories_durable=fields.take("directories_durable", bool),
    )
    fields.end()
    clusters = manifest.clusters
    # The sizes are compared first: a stranger's world_size could ask for more names than memory holds.
    if sum(facts["world_size"] for facts in clusters.values()) != len(manifest.votes) or set(manifest.votes) != {
        names.vote_file(c, r) for c in clusters for r in range(clusters[c]["world_size"])
    }:
        raise Damaged(f"{where}: its votes are not those of its clusters")
    return manifest


def read(checkpoint_dir: Path) -> Manifest:
    """The commit record of a checkpoint. NotFound if it has none, Damaged if it cannot be trusted."""
    path = checkpoint_dir / names.MANIFEST
    try:
        return parse(reads.read_bytes(path), path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{path} does not exist: no checkpoint of roll_ckpt is there") from None


def _are_clusters(clusters: dict[str, Any]) -> bool:
    return all(isinstance(facts, dict) and is_shallow(facts) for facts in clusters.values()) and are_world_sizes(
        {name: facts.get("world_size") for name, facts in clusters.items()}
    )
