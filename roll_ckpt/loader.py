"""The load corridor of one rank: find, read with every digest checked, parse."""

from __future__ import annotations

import importlib
import logging
import pickle
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from roll_ckpt import commit, disk, errors, manifest, names, native, seal, verify
from roll_ckpt.config import Settings
from roll_ckpt.layout import torch_zip
from roll_ckpt.world import LONGEST_S, World

log = logging.getLogger("roll_ckpt")

_LEVELS_UP = 2  # checkpoint-N/actor_train/checkpoint-N
_LOOK_AGAIN_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_NAMED = 10  # damaged files in one message


@contextmanager
def legible(where: Path) -> Iterator[None]:
    """Inside the block, which only reads, a disk that refuses is told as Unreadable, naming the path or `where`."""
    try:
        yield
    except errors.RollCkptError:
        raise
    except OSError as problem:
        path, why = problem.filename or where, problem.strerror or problem
        raise errors.Unreadable(f"{path}: it cannot be read: {why}. {errors.BY_HAND}") from problem


@dataclass(frozen=True)
class Blocks:
    """A file of a committed checkpoint as its digests tell it."""

    path: Path
    nbytes: int
    block_bytes: int
    crcs: list[int]

    def length(self, index: int) -> int:
        """How many bytes one block has."""
        return min(self.block_bytes, self.nbytes - index * self.block_bytes)

    def read(self, index: int, target: memoryview) -> None:
        """Read one block into `target`, which has its length. Damaged if the bytes are not those that were written."""
        start = index * self.block_bytes
        nbytes = disk.Patience().again(partial(disk.read_into, self.path, start, target))
        if nbytes != len(target) or native.crc32(target) != self.crcs[index]:
            raise errors.Damaged(
                f"{self.path}: block {index} (bytes {start} to {start + len(target)}) is not as it was written"
            )


class Unit:
    """A committed checkpoint opened for reading: its manifest and the digests of its files.

    NotFound, Damaged, Unreadable: its manifest.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with legible(directory / names.MANIFEST):
            self.manifest = disk.Patience().again(partial(manifest.read, directory))
        self._files = {receipt.path: receipt for receipt in self.manifest.files}
        self._digests: dict[str, dict[str, Any]] | None = None

    @classmethod
    def around(cls, path: Path) -> Unit | None:
        """The checkpoint that `path` lies in, or None for files that no roll_ckpt has saved.

        Damaged if its manifest is gone: then nothing tells what belongs there. Unreadable if the disk does not tell.
        """
        records, patience = (names.MANIFEST, names.DECISION, names.EXPECTED), disk.Patience()
        for folder, enough in [(path, 1), *((parent, 2) for parent in list(path.absolute().parents)[:_LEVELS_UP])]:
            with legible(folder):
                there = sum(patience.again(partial(disk.exists, folder / record)) for record in records)
            if there < enough:
                continue
            try:
                return cls(folder)
            except errors.NotFound as problem:
                raise errors.Damaged(
                    f"{folder}: its {names.MANIFEST} is missing, so nothing in it can be verified. Load another "
                    f"checkpoint, or, to load this one all the same, remove its {names.DECISION} and {names.VOTES}"
                ) from problem
        return None

    def read(self, path: Path, settings: Settings, *, cached: bool = False) -> native.Buffer:
        """The bytes of a file of this checkpoint, each block checked as it is read; `cached` says that they were
        just read through the page cache, and are there.

        Raises:
            Damaged: the manifest does not list the file, or its bytes are not those that were written.
        """
        blocks = self.blocks(path)
        return disk.Patience().again(
            partial(
                native.read_file,
                str(path),
                blocks.nbytes,
                blocks.block_bytes,
                blocks.crcs,
                threads=max(4, settings.io.threads),
                direct=settings.io.direct and not cached,
            )
        )

    def blocks(self, path: Path) -> Blocks:
        """What a file of this checkpoint holds; its bytes are not read.

        Raises:
            Damaged: the manifest does not list the file, or its digests are not those that the manifest rests on.
        """
        relative = path.absolute().relative_to(self.directory.absolute()).as_posix()
        receipt = self._files.get(relative)
        if receipt is None or (disk.exists(path) and not disk.is_file(path)):
            raise errors.Damaged(
                f"{path}: not listed in {self.directory / names.MANIFEST} as a regular file; it does not belong there"
            )
        crcs = self._crcs(relative)
        try:
            root = manifest.root_of(receipt.nbytes, receipt.block_bytes, crcs)
        except (TypeError, ValueError, struct.error) as problem:
            raise errors.Damaged(f"{path}: its digests in {names.DIGESTS}/ are none: {problem}") from problem
        if root != receipt.root:
            raise errors.Damaged(f"{path}: its digests do not match the manifest of {self.directory}")
        return Blocks(path, receipt.nbytes, receipt.block_bytes, crcs)

    def parameters(self, cluster: str, rank: int) -> dict[str, Any]:
        """Names, dtypes and shapes of the model that `rank` of `cluster` saved; empty if not recorded."""
        for candidate in (rank, 0):
            relative = names.tensor_file(cluster, candidate)
            if relative in self._files:
                return _parameters(self._json(relative).get("parameters"), self.directory / relative)
        return {}

    def _crcs(self, relative: str) -> list[int]:
        if self._digests is None:
            self._digests = {}
            for listed in self._files:
                if listed.startswith(names.DIGESTS + "/"):
                    self._digests.update(self._json(listed))
        if relative not in self._digests:
            raise errors.Damaged(f"{self.directory / relative}: no digests for it in {names.DIGESTS}/")
        told = self._digests[relative]
        crcs = told.get("crcs") if isinstance(told, dict) else None
        if not isinstance(crcs, list):
            raise errors.Damaged(f"{self.directory / relative}: what {names.DIGESTS}/ holds of it is no digests")
        return crcs

    def _json(self, relative: str) -> dict[str, Any]:
        path = self.directory / relative
        with legible(path):
            try:
                data = disk.Patience().again(partial(disk.read_bytes, path))
            except FileNotFoundError as problem:
                raise errors.Damaged(f"{path}: it was committed and is not there") from problem
        if manifest.receipt_of_bytes(relative, data) != self._files[relative]:
            raise errors.Damaged(f"{path}: its bytes are not those that were written")
        return seal.parse_json(data, path)


def _parameters(told: Any, where: Path) -> dict[str, Any]:
    sound = isinstance(told, dict) and all(
        isinstance(known, dict) and isinstance(known.get("shape"), list) for known in told.values()
    )
    if not sound:
        raise errors.Damaged(f"{where}: its parameters are not names, each with a shape")
    parameters: dict[str, Any] = told
    return parameters


class Reader:
    """Loads files for one load of one checkpoint.

    DeepSpeed reads a file twice and only looks at the first result: the bytes of the last file are kept for one
    more load, whose state then shares memory with the first.
    """

    def __init__(self, directory: Path, settings: Settings, allow: Iterable[Any]) -> None:
        self.unit = Unit.around(directory)
        self._settings = settings
        self._allow = [*allow, *allowed(settings)]
        self._last: tuple[Path, native.Buffer] | None = None
        self.cached = False
        """Whether `check_bytes` has just read the checkpoint: then the disk need not be read once more."""

    def read_bytes(self, path: Path) -> bytes:
        """The bytes of a small file of a checkpoint of ours. Damaged: see `Unit.read`."""
        assert self.unit is not None
        return bytes(self.unit.read(path, self._settings, cached=self.cached))

    def load(self, path: Path, map_location: Any) -> Any:
        """The state in `path`; its tensors lie where `map_location` says, as `torch.load` does it.

        Raises:
            FileNotFoundError: no such file. Damaged: see `Unit.read` and `torch_zip.parse`.
        """
        if self.unit is None:
            return _load_stock(path, map_location, self._allow)
        if self._last is not None and self._last[0] == path:
            buffer, self._last = self._last[1], None
        else:
            buffer = self.unit.read(path, self._settings, cached=self.cached)
            self._last = (path, buffer)
        return torch_zip.parse(buffer, str(path), map_location, self._allow)


def _load_stock(path: Path, map_location: Any, allow: list[Any]) -> Any:
    try:
        with torch_zip.safe_loads(allow):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as problem:
        raise errors.Damaged(
            f"{path}: refused to load: {problem}. If you trust the file, add the name it needs to load.allow"
        ) from problem
    except OSError:
        raise
    except Exception as problem:  # a damaged pickle can raise anything
        raise errors.Damaged(f"{path}: cannot be read, it is truncated or no torch file: {problem}") from problem


@contextmanager
def reading(directory: Path, settings: Settings, allow: Iterable[Any] = ()) -> Iterator[Reader]:
    """Open the checkpoint around `directory` for loading; nobody prunes it until the block is left."""
    with ExitStack() as stack:
        reader = _open(stack, directory, settings, allow)
        _warn_unverified(directory, reader)
        yield reader


@contextmanager
def reading_together(world: World, directory: Path, settings: Settings, allow: Iterable[Any] = ()) -> Iterator[Reader]:
    """`reading` of one and the same checkpoint on every rank. Every rank calls; blocks.

    A rank that does not see what another one sees looks again for a while: an NFS client believes for some seconds
    that a name is missing, unless its directory is listed.

    Raises, on every rank and with nothing read:
        NotFound, Damaged, Unreadable: as a rank met it.
        RanksDisagree: ranks see different manifests, or some see none.
    """
    opened: list[Reader] = []
    mine = {"manifest": "", "error": "", "text": ""}

    def look(stack: ExitStack, again: bool) -> None:
        if mine["manifest"]:
            return
        opened.clear()
        try:
            with legible(directory):
                for folder in (directory.parent, directory) if again else ():
                    with suppress(OSError):
                        disk.list_dir(folder)
                reader = _open(stack, directory, settings, allow)
                if reader.unit is not None:
                    record = disk.Patience().again(partial(disk.read_bytes, reader.unit.directory / names.MANIFEST))
                    mine["manifest"] = seal.sha256(record)
            opened.append(reader)
            mine["error"] = ""
        except (errors.NotFound, errors.Damaged) as problem:
            if not isinstance(problem, errors.NotFound) and not isinstance(problem.__cause__, errors.NotFound):
                raise
            mine.update(error=type(problem).__name__, text=str(problem))

    with ExitStack() as stack:
        for round, pause in enumerate([*_LOOK_AGAIN_S, 0]):
            world.together(partial(look, stack, round > 0), settings.commit_timeout_s)
            compare = partial(_compare_views, directory, not pause)
            if not world.agree(mine, compare, settings.commit_timeout_s)["again"]:
                break
            time.sleep(pause)
        _warn_unverified(directory, opened[0])
        yield opened[0]


def _compare_views(directory: Path, last: bool, posts: list[dict[str, str]]) -> dict[str, bool]:
    """Whether to look again at a checkpoint that some ranks see and some do not."""
    views = [post["manifest"] for post in posts]
    if len({*views}) == 1:
        for post in posts:
            if post["error"]:
                raise getattr(errors, post["error"])(post["text"])
        return {"again": False}
    if "" in views and not last:
        return {"again": True}
    others = [str(rank) for rank, view in enumerate(views) if view != views[0]]
    shown = "; ".join(f"rank {rank}: {(view and f'SHA-256 {view}') or 'none'}" for rank, view in enumerate(views[:8]))
    raise errors.RanksDisagree(
        f"{directory}: rank {', '.join(others)} and rank 0 see different manifests, or none ({shown}); nothing was "
        "loaded. Give every rank the same directory, on a file system that shows all of them the same"
    )


def _open(stack: ExitStack, directory: Path, settings: Settings, allow: Iterable[Any]) -> Reader:
    reader = Reader(directory, settings, allow)
    if reader.unit is not None:
        stack.enter_context(commit.reading(reader.unit.directory))
    return reader


def _warn_unverified(directory: Path, reader: Reader) -> None:
    if reader.unit is None:
        log.warning(
            "%s has no %s of ours: it is loaded, but what it holds cannot be verified", directory, names.MANIFEST
        )


def check_bytes(world: World, unit: Path) -> None:
    """Re-read every file of a checkpoint, each rank its share, through the page cache: who loads it then reads memory
    and not the disk, as far as memory goes. Every rank calls; blocks.

    Raises:
        Damaged: on every rank; names the first ten damaged files, whoever read them.
        Unreadable: on every rank; no file is damaged as far as is known, and some could not be read.
    """
    mine: dict[str, list[str]] = {"damaged": [], "unreadable": []}

    def check() -> None:
        problems = verify.verify(unit, part=world.rank, parts=world.size, cache=True)
        for problem in problems:
            kind = "unreadable" if problem.kind == "unreadable" else "damaged"
            mine[kind].append(f"{problem.path}: {problem.detail}")

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        told = {kind: sorted({problem for post in posts for problem in post[kind]}) for kind in mine}
        every = told["damaged"] + told["unreadable"]
        shown = "; ".join(every[:_NAMED]) + ("; and more, see `roll-ckpt verify`" if every[_NAMED:] else "")
        if told["damaged"]:
            raise errors.Damaged(f"{unit}: damaged: {shown}")
        if told["unreadable"]:
            raise errors.Unreadable(f"{unit}: it cannot be read: {shown}. {errors.BY_HAND}")
        return {}

    world.together(check, LONGEST_S)
    world.agree({kind: problems[: _NAMED + 1] for kind, problems in mine.items()}, decide, LONGEST_S)


def allowed(settings: Settings) -> list[Any]:
    """What pickles may hold beyond torch's list: members of allowed enumerations, and the objects that `load.allow`
    names.

    Raises:
        ConfigError: a name that cannot be imported.
    """
    found: list[Any] = [torch_zip.ENUM_MEMBERS]
    for name in settings.load.allow:
        module, _, attribute = name.rpartition(".")
        try:
            found.append(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError, ValueError) as problem:
            raise errors.ConfigError(f"load.allow: cannot import {name!r}: {problem}") from problem
    return found


def warn_unloadable(path: Path, unsafe: Mapping[str, list[str]], warned: set[str]) -> None:
    """Say which entries of the state saved at `path` a safe load would refuse, those in `warned` not again.

    `unsafe` is what `torch_zip.unsafe_parts` found.
    """
    for key, found in unsafe.items():
        if key not in warned:
            warned.add(key)
            log.warning(
                "%s: the entry %r holds %s, which a safe load refuses; keep plain values and tensors there, or add "
                "these names to load.allow",
                path,
                key,
                ", ".join(found),
            )


def compare_models(saved: dict[str, Any], live: dict[str, Any], where: str, strict: bool = True) -> None:
    """Refuse a checkpoint of another model before anything is loaded.

    Both map parameter names to a dict with `shape`; dtypes may differ, frameworks convert them. Unless `strict`,
    names may be missing on either side.

    Raises:
        ModelMismatch: lists the first ten differences.
    """
    if not saved:
        return
    differences = []
    for name in [*live, *(n for n in saved if n not in live)]:
        if not strict and (name not in saved or name not in live):
            continue
        if name not in saved:
            differences.append(f"{name}: not in the checkpoint")
        elif name not in live:
            differences.append(f"{name}: not in this model")
        elif list(saved[name]["shape"]) != list(live[name]["shape"]):
            differences.append(
                f"{name}: shape {list(saved[name]['shape'])} in the checkpoint, {list(live[name]['shape'])} here"
            )
    if differences:
        more = f"\n  ... and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise errors.ModelMismatch(
            f"{where} holds another model; nothing was loaded. Differences:\n  " + "\n  ".join(differences[:10]) + more
        )
