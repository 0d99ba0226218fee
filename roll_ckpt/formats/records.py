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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from roll_ckpt import __version__, names
from roll_ckpt.errors import Damaged
from roll_ckpt.formats.sealed_json import Fields, is_count, is_sha256, seal, unseal

FORMAT = 1
SOFTWARE = f"roll_ckpt {__version__}"
BLOCK_BYTES = 4 << 20
SMALLEST_BLOCK_BYTES = 4096  # a record that asks for a digest of every byte would fill the memory
_NO_ROOM = "No space left on device, not even to write down which rank met that first; see the logs of all"
_DEEPEST_FACT = 16


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
        return seal({**asdict(self), "format": FORMAT, "receipts": spell_receipts(self.receipts)})


def parse_vote(data: bytes, where: object) -> Vote:
    """The vote in a file of votes/."""
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


def spell_receipts(receipts: Iterable[Receipt]) -> dict[str, Any]:
    spelled = {}
    for receipt in receipts:
        path = names.check_relative(receipt.path)
        if path in spelled:
            raise ValueError(f"two receipts for {path}")
        spelled[path] = {"nbytes": receipt.nbytes, "block_bytes": receipt.block_bytes, "root": receipt.root}
    return spelled


def parse_receipts(spelled: dict[str, Any], where: object) -> tuple[Receipt, ...]:
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
    take_format(fields)
    expected = Expected(
        name=take_name(fields),
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
    """Whether values are nested so little that whoever walks them, by calls, comes to an end."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return deepest > 0 and all(is_shallow(part, deepest - 1) for part in inner)


def take_format(fields: Fields) -> None:
    version = fields.take("format", int)
    if version != FORMAT:
        raise Damaged(f"{fields.where}: format {version} is not {FORMAT}; another roll_ckpt wrote it")


def take_name(fields: Fields) -> str:
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
