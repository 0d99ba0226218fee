"""The records of a checkpoint: receipts, votes, what was expected, the decision, and the manifest over them.

Each is a sealed record (seal.py). The manifest is a pure function of the votes and of votes/expected.json:
two committers write the same bytes. It names every file of the unit but two: itself, and `decision`, which
names it.
Only read() touches the disk. Reading trusts nothing: wrong types, ranges and paths are refused by
errors.Damaged.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import disk, names
from .errors import Damaged, NotFound
from .seal import Fields, is_count, is_sha256, seal, sha256, unseal
from .seal import canonical as canonical

FORMAT = 1
SOFTWARE = "roll_ckpt 0.1.0"
BLOCK_BYTES = 4 << 20
SMALLEST_BLOCK_BYTES = 4096  # a record that asks for a digest of every byte would fill the memory

_NO_ROOM = "No space left on device, not even to write down which rank met that first; see the logs of all"
_DEEPEST_FACT = 16


# --- receipts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Receipt:
    """One written file: its path below the unit, its size, and the root over its per-block CRC-32s."""

    path: str
    nbytes: int
    block_bytes: int
    root: str


def root_of(nbytes: int, block_bytes: int, crcs: Sequence[int]) -> str:
    """One digest over a file's size, block size and per-block CRC-32s. An empty file has no block."""
    if block_bytes <= 0 or len(crcs) != -(-nbytes // block_bytes):
        raise ValueError(f"{len(crcs)} digests cannot cover {nbytes} bytes in blocks of {block_bytes}")
    return hashlib.sha256(struct.pack(f"<QQ{len(crcs)}I", nbytes, block_bytes, *crcs)).hexdigest()


def digest_bytes(data: bytes | memoryview, block_bytes: int = BLOCK_BYTES) -> list[int]:
    """The CRC-32 of each block of `data`."""
    view = memoryview(data)
    return [zlib.crc32(view[at : at + block_bytes]) for at in range(0, len(view), block_bytes)]


def receipt_of_bytes(path: str, data: bytes | memoryview, block_bytes: int = BLOCK_BYTES) -> Receipt:
    """The receipt of a file that holds exactly `data`."""
    nbytes = memoryview(data).nbytes
    return Receipt(path, nbytes, block_bytes, root_of(nbytes, block_bytes, digest_bytes(data, block_bytes)))


# --- votes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vote:
    """What one rank says of one attempt: the files it wrote, or the error that kept it from writing them.

    `facts` (framework, parallel sizes, number of parameters, …) go into the manifest; plain JSON only.
    `directories_durable` is set by commit.cast: False if the file system cannot fsync a directory.
    """

    cluster: str
    rank: int
    epoch: int
    attempt: int
    receipts: tuple[Receipt, ...]
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    directories_durable: bool = True

    def to_bytes(self) -> bytes:
        """The vote's file. ValueError or TypeError if a fact is not plain JSON."""
        return seal({**asdict(self), "format": FORMAT, "receipts": _spell_receipts(self.receipts)})


def parse_vote(data: bytes, where: object) -> Vote:
    """The vote in a file of votes/."""
    fields = Fields(unseal(data, where), where)
    _take_format(fields)
    vote = Vote(
        cluster=fields.take("cluster", str),
        rank=fields.count("rank"),
        epoch=fields.count("epoch"),
        attempt=fields.count("attempt"),
        receipts=_parse_receipts(fields.take("receipts", dict), where),
        error=fields.optional("error", str),
        facts=fields.take("facts", dict, _is_shallow),
        directories_durable=fields.take("directories_durable", bool),
    )
    fields.end()
    return vote


def _spell_receipts(receipts: Iterable[Receipt]) -> dict[str, Any]:
    spelled = {}
    for receipt in receipts:
        path = names.check_relative(receipt.path)
        if path in spelled:
            raise ValueError(f"two receipts for {path}")
        spelled[path] = {"nbytes": receipt.nbytes, "block_bytes": receipt.block_bytes, "root": receipt.root}
    return spelled


def _parse_receipts(spelled: dict[str, Any], where: object) -> tuple[Receipt, ...]:
    receipts = []
    for path, entry in sorted(spelled.items()):
        fields = _fields(entry, f"{where}: {path!r}")
        nbytes = fields.count("nbytes")
        block_bytes = fields.take("block_bytes", int, lambda value: SMALLEST_BLOCK_BYTES <= value < 2**40)
        receipts.append(Receipt(_path(path, where), nbytes, block_bytes, fields.take("root", str, is_sha256)))
        fields.end()
    _refuse_file_as_directory([receipt.path for receipt in receipts], where)
    return tuple(receipts)


def _refuse_file_as_directory(paths: list[str], where: object) -> None:
    known = set(paths)
    for path in paths:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in known:
                raise Damaged(f"{where}: {path!r} lies below a file")


# --- what was expected, and what was decided ----------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """votes/expected.json: what an attempt is, and whose votes it needs. Written before the first byte."""

    name: str
    step: int | None
    run_id: str
    epoch: int
    attempt: int
    clusters: dict[str, int]
    save_latest: bool
    software: str

    def to_bytes(self) -> bytes:
        """The file's bytes: the same for every world that takes part."""
        return seal({**asdict(self), "format": FORMAT})

    def voters(self) -> list[str]:
        """The names of all votes' files, in order of cluster and rank."""
        return [names.vote_file(c, rank) for c in sorted(self.clusters) for rank in range(self.clusters[c])]


def parse_expected(data: bytes, where: object) -> Expected:
    """The record in votes/expected.json."""
    fields = Fields(unseal(data, where), where)
    _take_format(fields)
    expected = Expected(
        name=_take_name(fields),
        step=fields.optional("step", int, is_count),
        run_id=fields.take("run_id", str),
        epoch=fields.count("epoch"),
        attempt=fields.count("attempt"),
        clusters=fields.take("clusters", dict, are_world_sizes),
        save_latest=fields.take("save_latest", bool),
        software=fields.take("software", str),
    )
    fields.end()
    return expected


def are_world_sizes(clusters: dict[str, Any]) -> bool:
    """Whether these are names of clusters, at least one, each with a number of ranks."""
    return bool(clusters) and all(
        _is_cluster(name) and type(size) is int and 0 < size < 2**24 for name, size in clusters.items()
    )


def _is_cluster(name: str) -> bool:
    try:
        return bool(names.check_name("cluster", name))
    except ValueError:
        return False


@dataclass(frozen=True)
class Decision:
    """`decision`: made once, by whoever linked it first, and obeyed by all."""

    commit: bool
    name: str
    epoch: int
    attempt: int
    manifest: str  # SHA-256 of manifest.json; "" if the decision is to abort
    reason: str  # for a person; "" if the decision is to commit

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return seal({**asdict(self), "format": FORMAT})


def parse_decision(data: bytes, where: object) -> Decision:
    """The record in `decision`. The list of expected votes in its place is an abort: a full disk takes a link yet."""
    spelled = unseal(data, where)
    if "clusters" in spelled:
        told = parse_expected(data, where)
        return Decision(False, told.name, told.epoch, told.attempt, "", _NO_ROOM)
    fields = Fields(spelled, where)
    _take_format(fields)
    commit = fields.take("commit", bool)
    decision = Decision(
        commit=commit,
        name=_take_name(fields),
        epoch=fields.count("epoch"),
        attempt=fields.count("attempt"),
        manifest=fields.take("manifest", str, is_sha256 if commit else lambda value: not value),
        reason=fields.take("reason", str),
    )
    fields.end()
    return decision


# --- the manifest -------------------------------------------------------------------------------------------


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

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return seal({**asdict(self), "files": _spell_receipts(self.files)})


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


def parse_manifest(data: bytes, where: object) -> Manifest:
    """The record in manifest.json."""
    fields = Fields(unseal(data, where), where)
    _take_format(fields)
    manifest = Manifest(
        name=_take_name(fields),
        step=fields.optional("step", int, is_count),
        run_id=fields.take("run_id", str),
        epoch=fields.count("epoch"),
        attempt=fields.count("attempt"),
        clusters=fields.take("clusters", dict, _are_clusters),
        files=_parse_receipts(fields.take("files", dict), where),
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


def read(unit: Path) -> Manifest:
    """The commit record of a checkpoint. NotFound if it has none, Damaged if it cannot be trusted."""
    path = unit / names.MANIFEST
    try:
        return parse_manifest(disk.read_bytes(path), path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{path} does not exist: no checkpoint of roll_ckpt is there") from None


def _are_clusters(clusters: dict[str, Any]) -> bool:
    return all(isinstance(facts, dict) and _is_shallow(facts) for facts in clusters.values()) and are_world_sizes(
        {name: facts.get("world_size") for name, facts in clusters.items()}
    )


def _is_shallow(value: Any, deepest: int = _DEEPEST_FACT) -> bool:
    """Whether values are nested so little that whoever walks them, by calls, comes to an end."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return deepest > 0 and all(_is_shallow(part, deepest - 1) for part in inner)


def _take_format(fields: Fields) -> None:
    version = fields.take("format", int)
    if version != FORMAT:
        raise Damaged(f"{fields.where}: format {version} is not {FORMAT}; another roll_ckpt wrote it")


def _take_name(fields: Fields) -> str:
    name = fields.take("name", str)
    try:
        return names.check_name("tag", name)
    except ValueError as error:
        raise Damaged(f"{fields.where}: {error}") from error


def _path(path: str, where: object) -> str:
    try:
        return names.check_relative(path)
    except ValueError as error:
        raise Damaged(f"{where}: the path {path!r} is refused: {error}") from error


def _fields(entry: object, where: object) -> Fields:
    if not isinstance(entry, dict):
        raise Damaged(f"{where}: not an object")
    return Fields(entry, where)
