"""manifest.json, the commit record of a checkpoint: built from the votes, parsed and read.

The manifest is a pure function of the votes and of votes/expected.json, so that two committers write the same bytes. It
lists every file of the checkpoint except two: itself, and `decision`, which holds the manifest's digest. Reading trusts
nothing: wrong types, ranges and paths are refused as errors.Damaged. Only read() touches the disk.
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
    NO_LINEAGE,
    Expected,
    Lineage,
    Receipt,
    Vote,
    are_world_sizes,
    is_shallow,
    parse_expected,
    parse_lineage,
    parse_receipts,
    parse_vote,
    receipt_of_bytes,
    receipts_to_json,
    refuse_file_as_directory,
    take_format,
    take_name,
    without_lineage,
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
    lineage: Lineage = NO_LINEAGE
    format: int = FORMAT

    @property
    def age(self) -> tuple[int, int, int, int, str]:
        """A key that sorts checkpoints from the oldest to the newest: by epoch, then in the order of their saves.

        Steps say nothing: a run may go back to an older one, and a counter may start anew. They order only checkpoints
        of formats without an order, which are older than all others of their epoch.
        """
        return (self.epoch, self.lineage.order, -1 if self.step is None else self.step, self.attempt, self.name)

    def nbytes(self) -> int:
        """The size of all listed files together, in bytes."""
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
        """The bytes of manifest.json."""
        return seal(without_lineage({**asdict(self), "files": receipts_to_json(self.files)}))


def build(votes: Mapping[str, bytes], expected: bytes) -> bytes:
    """The bytes of manifest.json, from the bytes of every vote's file (by its name) and of votes/expected.json.

    Raises:
        Damaged: a vote is missing, belongs to another attempt, reports an error or contradicts another vote.
    """
    attempt = parse_expected(expected, names.EXPECTED)
    if sorted(votes) != sorted(attempt.voters()):
        raise Damaged("the votes are not those that votes/expected.json asks for")
    cast = [parse_vote(votes[file], f"{names.VOTES}/{file}") for file in attempt.voters()]
    clusters: dict[str, dict[str, Any]] = {name: {} for name in attempt.clusters}
    files = {names.EXPECTED: receipt_of_bytes(names.EXPECTED, expected)}
    for file, vote in zip(attempt.voters(), cast, strict=True):
        if problem := objection(vote, attempt, file):
            raise Damaged(problem)
        for receipt in vote.receipts:
            if files.setdefault(receipt.path, receipt) != receipt:
                voter = f"cluster {vote.cluster!r} rank {vote.rank}"
                raise Damaged(f"{voter} and another rank wrote different bytes to {receipt.path}")
        clusters[vote.cluster] = {**vote.facts, **clusters[vote.cluster]}
    refuse_file_as_directory(sorted(files), "the votes together")
    return Manifest(
        name=attempt.name,
        step=attempt.step,
        run_id=attempt.run_id,
        epoch=attempt.epoch,
        attempt=attempt.attempt,
        clusters={name: {**facts, "world_size": attempt.clusters[name]} for name, facts in clusters.items()},
        files=tuple(sorted(files.values())),
        votes={file: sha256(data) for file, data in votes.items()},
        save_latest=attempt.save_latest,
        software=attempt.software,
        directories_durable=all(vote.directories_durable for vote in cast),
        lineage=attempt.lineage,
        format=attempt.format,
    ).to_bytes()


def objection(vote: Vote, expected: Expected, file: str) -> str:
    """Why this vote, in the file of this name, prevents the commit of the expected attempt; "" if it does not."""
    voter = f"cluster {vote.cluster!r} rank {vote.rank}"
    if names.vote_file(vote.cluster, vote.rank) != file:
        return f"votes/{file} is the vote of {voter}"
    if (vote.epoch, vote.attempt) != (expected.epoch, expected.attempt):
        return f"votes/{file} belongs to attempt {vote.epoch}.{vote.attempt}"
    if vote.error is not None:
        return f"{voter} failed: {vote.error}"
    for receipt in vote.receipts:
        if receipt.path in (names.MANIFEST, names.DECISION) or receipt.path.split("/")[0] == names.VOTES:
            return f"{voter} lists {receipt.path}, which only the commit itself may write"
    return ""


def parse(data: bytes, where: object) -> Manifest:
    """The record in the bytes of manifest.json. Damaged, naming `where`, if they cannot be trusted."""
    fields = Fields(unseal(data, where), where)
    format = take_format(fields)
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
        lineage=parse_lineage(fields, format),
        format=format,
    )
    fields.end()
    clusters = manifest.clusters
    # Compare the sizes first: a stranger's world_size could ask for more file names than memory holds.
    if sum(facts["world_size"] for facts in clusters.values()) != len(manifest.votes) or set(manifest.votes) != {
        names.vote_file(c, r) for c in clusters for r in range(clusters[c]["world_size"])
    }:
        raise Damaged(f"{where}: its votes are not those of its clusters")
    return manifest


def read(checkpoint_dir: Path) -> Manifest:
    """The commit record of the checkpoint in `checkpoint_dir`.

    Raises:
        NotFound: there is no manifest: the directory holds no committed checkpoint.
        Damaged: the manifest cannot be trusted.
        OSError: the manifest cannot be read.
    """
    path = checkpoint_dir / names.MANIFEST
    try:
        return parse(reads.read_bytes(path), path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{path} does not exist: the directory holds no checkpoint of roll_ckpt") from None


def _are_clusters(clusters: dict[str, Any]) -> bool:
    return all(isinstance(facts, dict) and is_shallow(facts) for facts in clusters.values()) and are_world_sizes(
        {name: facts.get("world_size") for name, facts in clusters.items()}
    )
