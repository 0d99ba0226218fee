"""Which checkpoints are owed to the Hub: derived from the committed checkpoints and from one record of each push.

    <output_dir>/.hub/destination.json      the repository that checkpoints are pushed to
    <output_dir>/.hub/records/<name>.json   the state of one checkpoint's push
    <output_dir>/.hub/hashes/<name>.json    digests that a push has computed, kept until it is done
    <output_dir>/.hub/uploader.lock         locked by the one process that pushes

A checkpoint is owed unless there is a `done` or `cancelled` record of it for this repository and the same manifest.
So a crash between a commit and its record loses nothing. Every record is sealed; a damaged one counts as missing.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

from roll_ckpt import names
from roll_ckpt.disk import reads, tree, writes
from roll_ckpt.disk.missing import if_there
from roll_ckpt.errors import Damaged, NotFound, presentable
from roll_ckpt.formats import sealed_json
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.records import Receipt
from roll_ckpt.formats.sealed_json import Fields
from roll_ckpt.transaction import listing
from roll_ckpt.upload.hub.address import Remote

log = logging.getLogger("roll_ckpt")

State = Literal["owed", "failed", "done", "cancelled"]
_FORMAT = 1
_WRITE_EVERY_S = 1.0
_PRUNED_KEPT = 100  # so many records of pruned checkpoints are kept


@dataclass(frozen=True)
class Repository:
    """The repository and the branch that a run's checkpoints are pushed to."""

    repo_id: str
    revision: str = "main"
    private: bool = True

    @property
    def remote(self) -> Remote:
        return Remote(self.repo_id, self.revision)


@dataclass(frozen=True)
class Entry:
    """One checkpoint and the state of its push.

    `detail` is the last problem, for people; `commit` the id of the commit on the Hub; `attempts` how often it was
    pushed; `nbytes` the bytes of all its files. `age` is (epoch, step, attempt): newer checkpoints have greater ones.
    """

    name: str
    state: State
    detail: str
    commit: str | None
    attempts: int
    nbytes: int
    manifest_sha256: str
    age: tuple[int, ...]


def set_repository(output_dir: Path, to: Repository) -> None:
    """Record where the run's checkpoints are pushed to; durable. What was pushed to another repository is owed again.

    ConfigError if `to` has an impossible name. A damaged record is replaced.
    """
    Remote(to.repo_id, to.revision)
    try:
        if repository(output_dir) == to:
            return
    except Damaged as problem:
        log.warning("%s; it is written anew, for %s", problem, to.remote.uri)
    _write(output_dir / names.HUB_DESTINATION, asdict(to))


def repository(output_dir: Path) -> Repository | None:
    """Where the run's checkpoints are pushed to; None if that was never set. Damaged: set it again."""
    path = output_dir / names.HUB_DESTINATION
    try:
        fields = Fields(_read(path), path)
    except FileNotFoundError as absent:
        log.debug("%s pushes nowhere: %s", output_dir, absent)
        return None
    to = _take_repository(fields)
    fields.end()
    return to


def list_entries(output_dir: Path, to: Repository | None = None) -> list[Entry]:
    """Every checkpoint of the run and the state of its push to `to`, by default the run's repository.

    First the newest of those that were pushed and then pruned, then the committed ones; each oldest first. [] if the
    run pushes nowhere.
    """
    to = to or repository(output_dir)
    if to is None:
        return []
    records = _records(output_dir, to)
    committed = [
        _entry(output_dir / manifest.name, manifest, records.pop(manifest.name, None))
        for manifest in listing.committed(output_dir, report=lambda problem: log.debug("%s", problem))
    ]
    pruned = [entry for entry in records.values() if entry.state in ("done", "cancelled")]
    return [*sorted(pruned, key=lambda entry: entry.age), *(entry for entry in committed if entry is not None)]


def owed(output_dir: Path, to: Repository | None = None) -> list[str]:
    """The committed checkpoints that are not pushed yet, failed ones too, the oldest first. They must not be pruned.

    [] if the run pushes nowhere.
    """
    return [entry.name for entry in list_entries(output_dir, to) if entry.state in ("owed", "failed")]


@dataclass(frozen=True)
class RecordedQueue:
    """What is owed to the repository that is recorded in `output_dir`; implements `retention.Owing`."""

    output_dir: Path

    def owed(self) -> list[str]:
        return owed(self.output_dir)

    def forget(self, name: str) -> None:
        writes.discard_file(self.output_dir / names.hub_hashes(name))


def find(output_dir: Path, name: str) -> Entry:
    """The entry of one checkpoint; NotFound, naming those that there are, if the queue does not have it."""
    entries = {entry.name: entry for entry in list_entries(output_dir)}
    if name not in entries:
        raise NotFound(
            f"{output_dir}: no checkpoint {name} is known to its queue; "
            + (f"known are {', '.join(entries)}" if entries else "the queue is empty")
        )
    return entries[name]


def _entry(checkpoint_dir: Path, manifest: Manifest, recorded: Entry | None) -> Entry | None:
    """The entry of a committed checkpoint: the recorded one if it has the same manifest; None if it was pruned."""
    try:
        digest = sealed_json.sha256(reads.read_bytes(checkpoint_dir / names.MANIFEST))
    except FileNotFoundError as error:
        log.debug("%s was pruned or replaced meanwhile: %s", checkpoint_dir, error)
        return None
    if recorded is not None and recorded.manifest_sha256 == digest:
        return recorded
    age = (manifest.epoch, -1 if manifest.step is None else manifest.step, manifest.attempt)
    return Entry(manifest.name, "owed", "", None, 0, manifest.nbytes(), digest, age)


def record(output_dir: Path, entry: Entry, to: Repository) -> None:
    """Record the state of a push to `to`; durable.

    Nothing is recorded if the run pushes to another repository by now: the record for that one stays. If the run
    comes back to `to`, a push finds on the Hub what is already there.
    """
    current = repository(output_dir)
    if current is None or current.remote != to.remote:
        return
    _write(output_dir / names.hub_record(entry.name), {**asdict(entry), **asdict(to)})
    if entry.state in ("done", "cancelled"):
        writes.discard_file(output_dir / names.hub_hashes(entry.name))
        _forget_pruned(output_dir)


def _forget_pruned(output_dir: Path) -> None:
    """Of checkpoints that were pruned, keep only the newest records."""
    entries, folder = set(listing.names_in(output_dir)), output_dir / names.HUB_RECORDS
    pruned = [folder / file for file in tree.list_dir(folder) if names.parse_hub_record(file) not in {None, *entries}]
    if len(pruned) > _PRUNED_KEPT:
        for path in sorted(pruned, key=reads.mtime_ns)[:-_PRUNED_KEPT]:
            writes.discard_file(path)


def retry(output_dir: Path, name: str | None = None) -> list[str]:
    """Mark the push of `name`, if it failed or was cancelled, as owed again; without a name, all that failed.

    Returns the names of those that were marked; durable.
    """
    to = _required_repository(output_dir)
    chosen = [find(output_dir, name)] if name is not None else list_entries(output_dir, to)
    states = ("failed", "cancelled") if name is not None else ("failed",)
    owed_again = [entry for entry in chosen if entry.state in states]
    for entry in owed_again:
        record(output_dir, replace(entry, state="owed", attempts=0), to)
    return [entry.name for entry in owed_again]


def cancel(output_dir: Path, name: str) -> None:
    """Give up pushing this checkpoint, which may be pruned then; durable. If it was pushed, nothing changes."""
    to, entry = _required_repository(output_dir), find(output_dir, name)
    if entry.state != "done":
        record(output_dir, replace(entry, state="cancelled"), to)


def _records(output_dir: Path, to: Repository) -> dict[str, Entry]:
    """The recorded entries of pushes to `to`, by checkpoint; damaged records are left out with a warning."""
    entries = {}
    for file in tree.list_dir(output_dir / names.HUB_RECORDS):
        name = names.parse_hub_record(file)
        if name is None:
            continue
        try:
            entry, repository = _read_record(output_dir / names.hub_record(name), name)
        except FileNotFoundError as error:
            log.debug("a record of a push was removed meanwhile: %s", error)
            continue
        except Damaged as problem:
            log.warning("%s; it is left out, and %s counts as owed", problem, presentable(name))
            continue
        if (repository.repo_id, repository.revision) == (to.repo_id, to.revision):
            entries[name] = entry
    return entries


def _read_record(path: Path, name: str) -> tuple[Entry, Repository]:
    """The entry of `name` in a record, and the repository that it is about. Damaged if it cannot be trusted."""
    fields = Fields(_read(path), path)
    repository = _take_repository(fields)
    entry = Entry(
        name=fields.take("name", str, lambda value: value == name),
        state=cast(State, fields.take("state", str, lambda value: value in get_args(State))),
        detail=fields.take("detail", str),
        commit=fields.optional("commit", str),
        attempts=fields.count("attempts"),
        nbytes=fields.count("nbytes"),
        manifest_sha256=fields.take("manifest_sha256", str, sealed_json.is_sha256),
        age=tuple(fields.take("age", list, _is_age)),
    )
    fields.end()
    return entry, repository


def _take_repository(fields: Fields) -> Repository:
    return Repository(fields.take("repo_id", str), fields.take("revision", str), fields.take("private", bool))


def _is_age(value: Any) -> bool:
    return len(value) == 3 and all(type(part) is int for part in value)


def _required_repository(output_dir: Path) -> Repository:
    to = repository(output_dir)
    if to is None:
        raise NotFound(f"{output_dir}: no repository was set for its checkpoints; name one")
    return to


def last_moved_ns(output_dir: Path) -> int:
    """When a push from this directory last made progress, in ns by the file system's clock; 0 if none has begun."""
    return if_there(partial(reads.mtime_ns, output_dir / names.HUB_LOCK)) or 0


def _read(path: Path) -> dict[str, Any]:
    values = sealed_json.unseal(reads.read_bytes(path), path)
    if values.pop("format", None) != _FORMAT:
        raise Damaged(f"{path}: another version of roll_ckpt wrote it")
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    for folder in (path.parent.parent, path.parent) if path.parent.name != names.HUB else (path.parent,):
        writes.make_own_dir(folder)
    writes.write_durable(path, sealed_json.seal({**values, "format": _FORMAT}))


class Hashes:
    """The SHA-256 of one checkpoint's large files, stored until it is pushed: a push after a kill reuses them."""

    def __init__(self, output_dir: Path, entry: Entry) -> None:
        self._path = output_dir / names.hub_hashes(entry.name)
        self._manifest = entry.manifest_sha256
        self._files: dict[str, dict[str, Any]] = {}
        self._written = float("-inf")
        try:
            stored = _read(self._path)
        except (FileNotFoundError, Damaged) as problem:
            log.debug("%s has no stored digests, so they are computed: %s", entry.name, problem)
            return
        files = stored.get("files")
        if stored.get("manifest") == self._manifest and isinstance(files, dict):
            self._files = {path: digest for path, digest in files.items() if isinstance(digest, dict)}

    def known(self, receipt: Receipt, mtime_ns: int) -> str | None:
        """The stored SHA-256 of the receipt's file; None if there is none, or if the file was changed since."""
        stored = self._files.get(receipt.path, {})
        same = (stored.get("root"), stored.get("mtime_ns")) == (receipt.root, mtime_ns)
        return str(stored["sha256"]) if same and sealed_json.is_sha256(stored.get("sha256")) else None

    def remember(self, receipt: Receipt, mtime_ns: int, sha256: str) -> None:
        """Store a digest. The file is written at most once a second, so a kill may lose the newest ones."""
        self._files[receipt.path] = {"root": receipt.root, "mtime_ns": mtime_ns, "sha256": sha256}
        if time.monotonic() - self._written > _WRITE_EVERY_S:
            _write(self._path, {"manifest": self._manifest, "files": self._files})
            self._written = time.monotonic()
