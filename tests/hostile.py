"""Every parser of what a checkpoint holds: sound bytes for it, and what it may answer to any others.

`PARSERS` are taken by tests/test_hostile.py, which has tables of hostile bytes, and by tests/fuzz_parsers.py.
"""

from __future__ import annotations

import atexit
import io
import json
import math
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from roll_ckpt import PipelineConfig, WorkerState, names
from roll_ckpt.errors import RollCkptError
from roll_ckpt.formats import manifests, sealed_json
from roll_ckpt.formats import records as records_module
from roll_ckpt.formats.dcp import index as dcp_index
from roll_ckpt.formats.image import TensorPiece
from roll_ckpt.formats.records import Decision, Expected, Receipt, Vote
from roll_ckpt.formats.tensor_index.meanings import ByName, FileTensors, Region, Run, Runs
from roll_ckpt.formats.tensor_index.writer import Indexer
from roll_ckpt.formats.torch_zip import layout
from roll_ckpt.formats.torch_zip.read import parse as parse_
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.compare import compare_models
from roll_ckpt.native.extension import Arena
from roll_ckpt.native.image import NativeImage
from roll_ckpt.native.mover import Mover
from roll_ckpt.ranks.rng import capture_portable, restore_portable
from roll_ckpt.transaction import epochs, listing
from roll_ckpt.transaction.epochs import Member
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.push_queue import Entry, Hashes, Repository, _records

HERE = "some/place"
NAME = "checkpoint-7"
EXPECTED = Expected(NAME, 7, "run", 2, 1, {"actor": 2, "critic": 1}, True, records_module.SOFTWARE)


@dataclass(frozen=True)
class Parser:
    """`parse` takes any bytes; whatever they are, it returns, or raises an error of ours that names the place."""

    seeds: tuple[bytes, ...]
    parse: Callable[[bytes], object]
    sealed: bool = False
    """Whether the bytes are a sealed record: then a change of a field is sealed again, as anybody can."""


def outcome(parser: Parser, data: bytes) -> RollCkptError | None:
    """What is said against the bytes; None if they are taken. Fails for anything else that happens."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch speaks of pickle protocols
            parser.parse(data)
    except RollCkptError as problem:
        text = str(problem)
        assert text and all(character.isprintable() or character == "\n" for character in text), text
        return problem
    return None


# --- changes ------------------------------------------------------------------------------------------------

Edit = tuple[int, int, int, int]
"""What is done, where, how much, with what: any four numbers."""

DEEP: Any = []
for _ in range(600):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 10**400, -(2**63), 0.5, 1e300),
    *("", "x", "..", "../../x", "/etc/passwd", "a/b", "a\0b", "\x1b[2J", "\u202e", "\ud800", "x" * 5000, "0" * 64),
    *([], [None], [[1]], [-1], ["x"], {}, {"": 0}, {"..": {}}, {"a": None}, {"a": {"b": []}}, DEEP, {"a": DEEP}),
)
CHUNKS = (
    *(
        b"\0",
        b"\xff",
        b"\xff" * 4,
        b"\xff" * 8,
        b"\0\0\0\x80",
        b"\xff\xff\xff\x7f",
        b"\0" * 7 + b"\x80",
        b"\n",
        b"{",
        b"[",
    ),
    *(
        b"PK\1\2",
        b"PK\3\4",
        b"PK\5\6",
        b"PK\6\6",
        b"PK\6\7",
        b"../",
        b"\x1b[2J",
        b"[" * 3000,
        b'"a":',
        b"&a [*a]",
        b"!!python/name:os.system ",
    ),
    *(
        b"\x85",
        b"\x86",
        b"\x87",
        b"(",
        b"t",
        b")",
        b"]",
        b"}",
        b"s",
        b"u",
        b"a",
        b"e",
        b"R",
        b"b",
        b"\x81",
        b"Q",
        b"2",
        b"0",
        b".",
    ),
    *(
        b"q\0",
        b"h\0",
        b"h\1",
        b"h\2",
        b"r\xff\xff\xff\x7f",
        b"\x8a\xff",
        b"\x8b\xff\xff\xff\x7f",
        b"\x96" + b"\xff" * 8,
        b"\x85" * 999,
    ),
    *(
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"cbuiltins\ngetattr\n",
        b"ctorch\nSize\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ),
    *(
        b"ccollections\nOrderedDict\n",
        b"cbuiltins\nbytearray\n",
        b"c_codecs\nencode\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch.storage\nUntypedStorage\n",
    ),
)


def edited(parser: Parser, data: bytes, edits: Iterable[Edit]) -> bytes:
    """`data` after these edits, sealed again if it was: what a stranger would make of it. Pure."""
    for what, at, size, how in edits:
        if what % 3 == 0 and (found := _field_changed(data, at, how)) is not None:
            with suppress(ValueError, RecursionError):  # an infinity has come into it before
                data = sealed_json.seal(found) if parser.sealed else sealed_json.canonical(found)
            continue
        at, size = at % (len(data) + 1), size % 64
        chunk = CHUNKS[how % len(CHUNKS)]
        data = (
            data[:at] + chunk + data[at:],
            data[:at] + chunk + data[at + len(chunk) :],
            data[:at] + data[at + size :],
            data[:at],
            data[:at] + data[at : at + size] * (1 + how % 5) + data[at:],
            data[:at] + bytes(byte ^ (1 << how % 8) for byte in data[at : at + 1]) + data[at + 1 :],
            data[:at] + data[how % (len(data) + 1) :],
        )[what % 7]
    return data


def _field_changed(data: bytes, at: int, how: int) -> dict[str, Any] | None:
    """The JSON object in `data` with one value or key of it replaced; None if it is none."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    record.pop("sha256", None)
    places = list(_places(record))
    if not places:
        return record
    holder, key = places[at % len(places)]
    value = VALUES[how % len(VALUES)]
    if isinstance(holder, dict) and at // len(places) % 4 == 0:
        old = holder.pop(key)
        if isinstance(value, str):
            holder[value] = old
    else:
        holder[key] = value
    return record


def _places(value: Any, depth: int = 20) -> Iterator[tuple[Any, Any]]:
    """Every place of a value in a tree of dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items) if depth else ():
        yield value, key
        yield from _places(inner, depth - 1)


# --- sound bytes --------------------------------------------------------------------------------------------


def vote(cluster: str, rank: int) -> Vote:
    receipts = (records_module.receipt_of_bytes(f"{cluster}/{rank}.pt", b"x" * 9),)
    return Vote(cluster, rank, 2, 1, receipts, facts={"framework": "none", "layout": {"tp": 2, "of": [1, 2]}})


def built() -> bytes:
    cast = [vote("critic", 0), vote("actor", 1), vote("actor", 0)]
    return manifests.build({f"{v.cluster}.{v.rank}.json": v.to_bytes() for v in cast}, EXPECTED.to_bytes())


def decision(made: bool) -> bytes:
    return Decision(made, NAME, 2, 1, "0" * 64 if made else "", "" if made else "disk full").to_bytes()


def member() -> bytes:
    return Member(3, "run", {"actor": 2}, {"actor": 2, "critic": 1}, "host", "boot", 77, True).to_bytes()


def archive(records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in records.items():
            made.writestr(f"archive/{name}", data)
    return file.getvalue()


def records_in(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        return {name.partition("/")[2]: found.read(name) for name in found.namelist()}


torch.sparse.check_sparse_tensor_invariants.disable()  # the default, but then torch does not mention it
STATE = {
    "weight": torch.arange(24.0).reshape(4, 6),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 0]]), torch.tensor([3.0, 4.0]), (3, 2)),
    "step": {"at": 7, "betas": (0.9, 0.95), "names": ["a", "b"], "big": 2**70},
}


OBJECT = {"at": 7, "state": torch.arange(3)}


def saved(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@cache
def ours() -> bytes:
    """As our own layout writes it."""
    path = folder("ours") / "state.pt"
    mover = Mover(Arena(1 << 20, 64 << 10))
    image = layout.lay_out(STATE, "archive")
    extents, crc_patches = image.extents, image.crc_patches
    made = NativeImage.of(
        image.nbytes,
        extents.rows,
        extents.owners,
        crc_patches.records,
        crc_patches.crcs,
        crc_patches.serials,
        extents.streams,
    )
    mover.save(path, made).wait_written()
    mover.shutdown(10)
    return path.read_bytes()


@cache
def index() -> Metadata:
    tensor = TensorStorageMetadata(
        TensorProperties(torch.bfloat16),
        torch.Size([4, 6]),
        [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 6]))],
    )
    nbytes = len(saved(OBJECT))
    places = {
        MetadataIndex("weight", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 9),
        MetadataIndex("step"): _StorageInfo("__0_0.distcp", 9, nbytes),
    }
    return Metadata({"weight": tensor, "step": BytesStorageMetadata()}, None, places)


# --- where they lie -----------------------------------------------------------------------------------------


@cache
def scratch() -> Path:
    path = Path(mkdtemp(prefix="roll_ckpt_hostile_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def folder(name: str) -> Path:
    path = scratch() / name
    path.mkdir(exist_ok=True)
    return path


def read_index(data: bytes) -> object:
    directory = folder("dcp")
    (directory / dcp_index.INDEX).write_bytes(data)
    if not (directory / "__0_0.distcp").exists():
        (directory / "__0_0.distcp").write_bytes(b"x" * 9 + saved(OBJECT))
    found = dcp_index.read(directory)
    dcp_index.check_objects(directory, found)
    return found


def read_object(data: bytes) -> object:
    path = folder("object") / "common.pt"
    path.write_bytes(data)
    dcp_index.read_file(path)
    return path


def read_pickle(data: bytes) -> object:
    return parse_(bytearray(archive({**records_in(saved(STATE)), "data.pkl": data})), HERE)


def read_rng(data: bytes) -> object:
    state = capture_portable()
    try:
        restore_portable(parse_(bytearray(data), HERE), HERE)
    finally:
        restore_portable(state, HERE)
    return state


def unit_with(files: Mapping[str, bytes], listed: Mapping[str, Receipt] | None = None) -> OpenedCheckpoint:
    """A checkpoint that holds these files, or says so: its manifest is well made, as anybody can make one."""
    checkpoint_dir = folder("unit") / NAME
    for path, data in files.items():
        (checkpoint_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint_dir / path).write_bytes(data)
    receipts = {path: records_module.receipt_of_bytes(path, data) for path, data in files.items()} | dict(listed or {})
    told = manifests.parse(built(), HERE)
    (checkpoint_dir / names.MANIFEST).write_bytes(replace(told, files=tuple(sorted(receipts.values()))).to_bytes())
    return OpenedCheckpoint(checkpoint_dir)


SETTINGS = PipelineConfig.parse({"output_dir": "x", "save_steps": 1, "max_steps": 2}, where="the test")
CONTENTS = b"the bytes of one file" * 9


def read_digests(data: bytes) -> object:
    path = "actor/0.pt"
    checkpoint_dir = unit_with({path: CONTENTS, names.digest_file("actor", 0): data})
    return checkpoint_dir.read(checkpoint_dir.directory / path, SETTINGS)


def read_tensors(data: bytes) -> object:
    """An index of format 1."""
    checkpoint_dir = unit_with({names.old_tensor_file("actor", 0): data})
    live = {"weight": {"shape": [4, 6], "dtype": "float32"}}
    compare_models(checkpoint_dir.parameters("actor", 0), live, HERE)
    return checkpoint_dir


INDEXED = "actor/0.pt"


def read_tensor_index(data: bytes) -> object:
    checkpoint_dir = unit_with({INDEXED: CONTENTS, names.tensor_file("actor", 0): data})
    index = checkpoint_dir.tensor_index("actor", 0)
    assert index is not None
    pieces = list(index)
    for piece in pieces:
        assert 0 <= piece.offset <= piece.offset + piece.nbytes <= len(CONTENTS)
        assert 0 <= piece.start < piece.stop <= math.prod(piece.lengths)
        assert index.find(piece.name, piece.role)
    return index.parameters, pieces


def tensor_indexes() -> Iterator[bytes]:
    """Of a flat buffer of two parameters, one of them a slice, and of a transposed tensor."""
    regions = Region("weight", (4, 6)), Region.box("bias", (8,), (4,), (4,))
    flat = Runs.of([Run(0, regions[0], 6, 18), Run(18, regions[1], 0, 4, replica=True)])
    pieces = (
        TensorPiece("state.exp_avg", "float32", (22,), 64, 88),
        TensorPiece("turned", "bfloat16", (2, 3), 16, 12, (1, 2)),
        TensorPiece("step", "int64", (), 8, 8),
    )
    told = FileTensors(pieces, ByName(states={"state": flat}))
    yield Indexer().encode([(INDEXED, told)], {"weight": {"dtype": "bfloat16", "shape": [4, 6]}})
    yield Indexer().encode([(INDEXED, FileTensors(pieces))], {})


def read_latest(data: bytes) -> object:
    (folder("run") / names.LATEST).write_bytes(data)
    return listing.read_latest(folder("run"))


TO = Repository("me/demo", "main", True)


def hub_file(path: str, data: bytes) -> Path:
    target = folder("hub") / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return folder("hub")


def read_destination(data: bytes) -> object:
    found = push_queue.repository(hub_file(names.HUB_DESTINATION, data))
    return found and found.remote


def read_record(data: bytes) -> object:
    return _records(hub_file(names.hub_record(NAME), data), TO)


ENTRY = Entry(NAME, "failed", "the Hub said no", None, 2, 99, "0" * 64, (2, 7, 1))
RECEIPT = records_module.receipt_of_bytes("actor/0.pt", b"x")
HASHES = {"manifest": "0" * 64, "files": {RECEIPT.path: {"root": RECEIPT.root, "mtime_ns": 5, "sha256": "1" * 64}}}


def read_hashes(data: bytes) -> object:
    return Hashes(hub_file(names.hub_hashes(NAME), data), ENTRY).known(RECEIPT, 5)


def read_config(data: bytes) -> object:
    path = folder("config") / "run.yaml"
    path.write_bytes(data)
    return PipelineConfig.from_yaml(path)


CONFIG = b"output_dir: runs/x\nsave_steps: 5\nmax_steps: 10\nstaging: {arena_bytes: 64MiB}\nload: {allow: [a.b]}\n"


def sealed(values: Mapping[str, Any]) -> bytes:
    return sealed_json.seal({**values, "format": 1})


DIGESTS = sealed_json.canonical({"actor/0.pt": {"crcs": records_module.digest_bytes(CONTENTS)}})
TENSORS = sealed_json.canonical({"parameters": {"weight": {"dtype": "float32", "shape": [4, 6]}}, "files": {}})
WORKER = WorkerState(7, [{"loss": 0.5, "steps": [1, 2]}], {"seed": 1, "deep": {"a": [None, True]}}).to_json()

PARSERS: dict[str, Parser] = {
    "manifest": Parser((built(),), lambda data: manifests.parse(data, HERE), sealed=True),
    "vote": Parser((vote("actor", 0).to_bytes(),), lambda data: records_module.parse_vote(data, HERE), sealed=True),
    "expected": Parser((EXPECTED.to_bytes(),), lambda data: records_module.parse_expected(data, HERE), sealed=True),
    "decision": Parser(
        (decision(True), decision(False)), lambda data: records_module.parse_decision(data, HERE), sealed=True
    ),
    "member": Parser((member(),), lambda data: epochs.parse_member(data, HERE), sealed=True),
    "destination": Parser((sealed(asdict(TO)),), read_destination, sealed=True),
    "hub record": Parser((sealed({**asdict(ENTRY), **asdict(TO)}),), read_record, sealed=True),
    "hashes": Parser((sealed(HASHES),), read_hashes, sealed=True),
    "latest": Parser((NAME.encode(),), read_latest),
    "digests": Parser((DIGESTS,), read_digests),
    "tensors": Parser((TENSORS,), read_tensors),
    "tensor index": Parser(tuple(tensor_indexes()), read_tensor_index),
    "worker state": Parser((WORKER,), lambda data: WorkerState.from_json(data, HERE)),
    "config": Parser((CONFIG,), read_config),
    "torch_zip": Parser((saved(STATE), ours()), lambda data: parse_(bytearray(data), HERE)),
    "data.pkl": Parser((records_in(saved(STATE))["data.pkl"],), read_pickle),
    "random numbers": Parser((saved(capture_portable()),), read_rng),
    "object": Parser((saved(OBJECT),), read_object),
    "index": Parser((pickle.dumps(index(), 2, fix_imports=False), pickle.dumps(index())), read_index),
}
