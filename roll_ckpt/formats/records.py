"""The records of one attempt to save: receipts of files, votes of ranks, the votes expected, and the decision.

Each is a sealed record (see `sealed_json`); `manifests` builds the record of the whole checkpoint from them. Reading
trusts nothing: wrong types, ranges and paths are refused as errors.Damaged. Nothing here touches the disk.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from roll_ckpt import __version__, names
from roll_ckpt.errors import Damaged
from roll_ckpt.formats.sealed_json import Fields, is_count, is_sha256, seal, unseal

log = logging.getLogger("roll_ckpt")

FORMAT = 3
"""The format of new records. Still read: format 1, with the tensor index as JSON, and 2, both without a `Lineage`."""
_FORMATS = (1, 2, 3)
SOFTWARE = f"roll_ckpt {__version__}"
BLOCK_BYTES = 4 << 20
SMALLEST_BLOCK_BYTES = 4096  # a stranger's record that asks for a digest of every byte would fill the memory
_NO_ROOM = "No space left on device, not even to record which rank ran out first; see the logs of all ranks"
_DEEPEST_FACT = 16


@dataclass(frozen=True, order=True)
class Receipt:
    """One written file: its path below the checkpoint directory, its size, and `root_of` its block CRC-32s."""

    path: str
    nbytes: int
    block_bytes: int
    root: str


def root_of(nbytes: int, block_bytes: int, crcs: Sequence[int]) -> str:
    """One SHA-256 (hex) over a file's size, block size and the CRC-32 of each block. An empty file has no block.

    Raises:
        ValueError: the number of `crcs` does not fit the sizes.
    """
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


@dataclass(frozen=True)
class Vote:
    """One rank's vote on one attempt: the files that it wrote, or the error that kept it from writing them.

    `facts` (framework, parallel sizes, number of parameters, …) go into the manifest; plain JSON only.
    `directories_durable`, set by transaction.ballot, is False if the file system cannot fsync a directory.
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
        """The bytes of the vote's file. ValueError or TypeError if a fact is not plain JSON."""
        return seal({**asdict(self), "format": FORMAT, "receipts": receipts_to_json(self.receipts)})


def parse_vote(data: bytes, where: object) -> Vote:
    """The vote in the bytes of a file in votes/. Damaged, naming `where`, if they cannot be trusted."""
    fields = Fields(unseal(data, where), where)
    take_format(fields)
    vote = Vote(
        cluster=fields.take("cluster", str),
        rank=fields.count("rank"),
        epoch=fields.count("epoch"),
        attempt=fields.count("attempt"),
        receipts=parse_receipts(fields.take("receipts", dict), where),
        error=fields.optional("error", str),
        facts=fields.take("facts", dict, is_shallow),
        directories_durable=fields.take("directories_durable", bool),
    )
    fields.end()
    return vote


def receipts_to_json(receipts: Iterable[Receipt]) -> dict[str, Any]:
    """Receipts as they stand in a record, by path. ValueError for two of one path, or a path that leaves its root."""
    entries = {}
    for receipt in receipts:
        path = names.check_relative(receipt.path)
        if path in entries:
            raise ValueError(f"two receipts for {path}")
        entries[path] = {"nbytes": receipt.nbytes, "block_bytes": receipt.block_bytes, "root": receipt.root}
    return entries


def parse_receipts(entries: dict[str, Any], where: object) -> tuple[Receipt, ...]:
    """The receipts in a record, sorted by path. Damaged, naming `where`, if they cannot be trusted."""
    receipts = []
    for path, entry in sorted(entries.items()):
        fields = _fields(entry, f"{where}: {path!r}")
        nbytes = fields.count("nbytes")
        block_bytes = fields.take("block_bytes", int, lambda value: SMALLEST_BLOCK_BYTES <= value < 2**40)
        receipts.append(Receipt(_path(path, where), nbytes, block_bytes, fields.take("root", str, is_sha256)))
        fields.end()
    refuse_file_as_directory([receipt.path for receipt in receipts], where)
    return tuple(receipts)


def refuse_file_as_directory(paths: list[str], where: object) -> None:
    """Damaged, naming `where`, if one of these paths of files lies below another."""
    files = set(paths)
    for path in paths:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in files:
                raise Damaged(f"{where}: {path!r} lies below a file")


@dataclass(frozen=True)
class Lineage:
    """Which checkpoints a checkpoint continues.

    `order` counts the saves that an epoch has begun. A `series` is what one engine or pipeline saves, in all its runs;
    it gets a new name where one begins to save without having resumed. A `segment` is a part of it without a load in
    between, and `continues` ("epoch.order") is the checkpoint that was loaded before it, "" if none was.
    """

    order: int = 0
    series: str = ""
    segment: str = ""
    continues: str = ""


NO_LINEAGE = Lineage()
"""That of checkpoints before format 3."""


def parse_lineage(fields: Fields, format: int) -> Lineage:
    """The lineage in a record. Damaged if it cannot be trusted."""
    if format < 3:
        return NO_LINEAGE
    inner = _fields(fields.take("lineage", dict), fields.where)
    lineage = Lineage(
        order=inner.count("order"),
        **{key: inner.take(key, str, _is_short) for key in ("series", "segment", "continues")},
    )
    inner.end()
    return lineage


def _is_short(text: str) -> bool:
    return len(text) <= 64 and text.isprintable()


def without_lineage(record: dict[str, Any]) -> dict[str, Any]:
    """`record` as its format has it: before format 3 there was no lineage."""
    return record if record["format"] >= 3 else {key: value for key, value in record.items() if key != "lineage"}


@dataclass(frozen=True)
class Expected:
    """votes/expected.json: the identity of an attempt, and whose votes it needs.

    Written before the first byte of the checkpoint. `clusters` has the number of ranks of each.
    """

    name: str
    step: int | None
    run_id: str
    epoch: int
    attempt: int
    clusters: dict[str, int]
    save_latest: bool
    software: str
    lineage: Lineage = NO_LINEAGE
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """The bytes of the file: but for the lineage, the same for every job that takes part."""
        return seal(without_lineage(asdict(self)))

    def voters(self) -> list[str]:
        """The file names of all votes, in order of cluster and rank."""
        return [names.vote_file(c, rank) for c in sorted(self.clusters) for rank in range(self.clusters[c])]


def parse_expected(data: bytes, where: object) -> Expected:
    """The record in the bytes of votes/expected.json. Damaged, naming `where`, if they cannot be trusted."""
    fields = Fields(unseal(data, where), where)
    format = take_format(fields)
    expected = Expected(
        name=take_name(fields),
        step=fields.optional("step", int, is_count),
        run_id=fields.take("run_id", str),
        epoch=fields.count("epoch"),
        attempt=fields.count("attempt"),
        clusters=fields.take("clusters", dict, are_world_sizes),
        save_latest=fields.take("save_latest", bool),
        software=fields.take("software", str),
        lineage=parse_lineage(fields, format),
        format=format,
    )
    fields.end()
    return expected


def are_world_sizes(clusters: dict[str, Any]) -> bool:
    """Whether `clusters` has at least one valid name of a cluster, and a number of ranks for each."""
    return bool(clusters) and all(
        _is_cluster(name) and type(size) is int and 0 < size < 2**24 for name, size in clusters.items()
    )


def _is_cluster(name: str) -> bool:
    try:
        return bool(names.check_name("cluster", name))
    except ValueError as error:
        log.debug("refused in a record: %s", error)
        return False


@dataclass(frozen=True)
class Decision:
    """`decision`: to commit or to abort. The first process that links the file decides; all others follow."""

    commit: bool
    name: str
    epoch: int
    attempt: int
    manifest: str  # SHA-256 of manifest.json; "" if the decision is to abort
    reason: str  # for people; "" if the decision is to commit

    def to_bytes(self) -> bytes:
        """The bytes of the file."""
        return seal({**asdict(self), "format": FORMAT})


def parse_decision(data: bytes, where: object) -> Decision:
    """The record in the bytes of `decision`. Damaged, naming `where`, if they cannot be trusted.

    A copy of votes/expected.json is an abort too: a full disk cannot take a new file, but still takes a link to one.
    """
    record = unseal(data, where)
    if "clusters" in record:
        expected = parse_expected(data, where)
        return Decision(False, expected.name, expected.epoch, expected.attempt, "", _NO_ROOM)
    fields = Fields(record, where)
    take_format(fields)
    commit = fields.take("commit", bool)
    decision = Decision(
        commit=commit,
        name=take_name(fields),
        epoch=fields.count("epoch"),
        attempt=fields.count("attempt"),
        manifest=fields.take("manifest", str, is_sha256 if commit else lambda value: not value),
        reason=fields.take("reason", str),
    )
    fields.end()
    return decision


def is_shallow(value: Any, deepest: int = _DEEPEST_FACT) -> bool:
    """Whether `value` is nested at most `deepest` levels, so that recursive code may walk it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return deepest > 0 and all(is_shallow(part, deepest - 1) for part in parts)


def take_format(fields: Fields) -> int:
    """Damaged if the record has another format version than this code."""
    version = fields.take("format", int)
    if version not in _FORMATS:
        raise Damaged(
            f"{fields.where}: format {version} is not {FORMAT}: another version of roll_ckpt wrote it; use that version"
        )
    return version


def take_name(fields: Fields) -> str:
    """The record's checkpoint name. Damaged if it is not a valid tag."""
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
