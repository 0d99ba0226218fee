"""Which checkpoints the Hub still lacks: derived from what is committed here and from what was recorded there.

    <output_dir>/.hub/destination.json    where they go
    <output_dir>/.hub/records/<name>.json what became of one
    <output_dir>/.hub/hashes/<name>.json  digests that a push has worked out, until it is done
    <output_dir>/.hub/uploader.lock       held by the one process that pushes

A checkpoint without a `done` or `cancelled` record for this destination and this very manifest is owed: a crash
between a commit and its record loses nothing. Every record is sealed; a damaged one counts as missing.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from roll_ckpt import names
from roll_ckpt.disk import reads, tree, writes
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
_PAUSE_S = 1.0
_GONE_KEPT = 100


@dataclass(frozen=True)
class Repository:
    """Where a run's checkpoints go."""

    repo_id: str
    revision: str = "main"
    private: bool = True

    @property
    def remote(self) -> Remote:
        return Remote(self.repo_id, self.revision)


@dataclass(frozen=True)
class Entry:
    """One checkpoint and its push. `detail` is the last problem, for a person; `commit` the one on the Hub.

    `age` is epoch, step and attempt: the newer checkpoint has the greater one.
    """

    name: str
    state: State
    detail: str
    commit: str | None
    attempts: int
    nbytes: int
    manifest_sha256: str
    age: tuple[int, ...]


def set_repository(output_dir: Path, wanted: Repository) -> None:
    """Let the run's checkpoints go there; durable. What was pushed elsewhere is owed again."""
    Remote(wanted.repo_id, wanted.revision)
    with suppress(Damaged):
        if repository(output_dir) == wanted:
            return
    _write(output_dir / names.HUB_DESTINATION, asdict(wanted))


def repository(output_dir: Path) -> Repository | None:
    """Where the run's checkpoints go; None if nobody has said so. Damaged: set it again."""
    path = output_dir / names.HUB_DESTINATION
    try:
        fields = Fields(_read(path), path)
    except FileNotFoundError:
        return None
    found = Repository(fields.take("repo_id", str), fields.take("revision", str), fields.take("private", bool))
    fields.end()
    return found


def list_entries(output_dir: Path, to: Repository | None = None) -> list[Entry]:
    """Every checkpoint of the run and what `to`, its destination if None, has of it: the oldest first, those that
    were pushed and then pruned (the newest of them) before the others.

    [] if the run has no destination.
    """
    to = to or repository(output_dir)
    if to is None:
        return []
    records = _records(output_dir, to)
    here = [_entry(output_dir / told.name, told, records.pop(told.name, None)) for told in _committed(output_dir)]
    gone = [entry for entry in records.values() if entry.state in ("done", "cancelled")]
    return [*sorted(gone, key=lambda entry: entry.age), *(entry for entry in here if entry is not None)]


def owed(output_dir: Path, to: Repository | None = None) -> list[str]:
    """The committed checkpoints that the destination has not, the oldest first: failed ones too.

    They must not be pruned. [] if the run has no destination.
    """
    return [entry.name for entry in list_entries(output_dir, to) if entry.state in ("owed", "failed")]


@dataclass(frozen=True)
class RecordedQueue:
    """What is owed to the repository that is recorded in `output_dir`, whoever recorded it; see `Destination`."""

    output_dir: Path

    def owed(self) -> list[str]:
        return owed(self.output_dir)

    def forget(self, name: str) -> None:
        writes.discard_file(self.output_dir / names.hub_hashes(name))


def find(output_dir: Path, name: str) -> Entry:
    """The entry of one checkpoint; NotFound names those that there are."""
    known = {entry.name: entry for entry in list_entries(output_dir)}
    if name not in known:
        raise NotFound(
            f"{output_dir}: no checkpoint {name} is known to its queue; "
            + (f"known are {', '.join(known)}" if known else "the queue is empty")
        )
    return known[name]


def _committed(output_dir: Path) -> list[Manifest]:
    return listing.committed(output_dir, report=lambda problem: log.debug("%s", problem))


def _entry(checkpoint_dir: Path, told: Manifest, known: Entry | None) -> Entry | None:
    """The entry of a committed checkpoint: what is recorded of it, unless that is about another manifest."""
    try:
        digest = sealed_json.sha256(reads.read_bytes(checkpoint_dir / names.MANIFEST))
    except FileNotFoundError:
        return None  # pruned or replaced just now
    if known is not None and known.manifest_sha256 == digest:
        return known
    age = (told.epoch, -1 if told.step is None else told.step, told.attempt)
    return Entry(checkpoint_dir.name, "owed", "", None, 0, told.nbytes(), digest, age)


def record(output_dir: Path, entry: Entry, to: Repository) -> None:
    """Keep what became of a push to `to`; durable. Nothing is kept if the run goes elsewhere by now: its record of
    that destination stays, and whoever comes back to `to` finds on the Hub what is there."""
    now = repository(output_dir)
    if now is None or now.remote != to.remote:
        return
    _write(output_dir / names.hub_record(entry.name), {**asdict(entry), **asdict(to)})
    if entry.state in ("done", "cancelled"):
        writes.discard_file(output_dir / names.hub_hashes(entry.name))
        _forget_gone(output_dir)


def _forget_gone(output_dir: Path) -> None:
    """Of checkpoints that are not here any more, keep the newest records only."""
    here, folder = set(tree.list_dir(output_dir)), output_dir / names.HUB_RECORDS
    gone = [folder / file for file in tree.list_dir(folder) if names.parse_hub_record(file) not in {None, *here}]
    if len(gone) > _GONE_KEPT:
        for path in sorted(gone, key=reads.mtime_ns)[:-_GONE_KEPT]:
            writes.discard_file(path)


def retry(output_dir: Path, name: str | None = None) -> list[str]:
    """Let failed and cancelled pushes (of one name, or all failed ones) be owed again; return their names."""
    to = _needed(output_dir)
    chosen = [find(output_dir, name)] if name is not None else list_entries(output_dir, to)
    states = ("failed", "cancelled") if name is not None else ("failed",)
    again = [entry for entry in chosen if entry.state in states]
    for entry in again:
        record(output_dir, replace(entry, state="owed", attempts=0), to)
    return [entry.name for entry in again]


def cancel(output_dir: Path, name: str) -> None:
    """Do not push this checkpoint; it may be pruned. One that was pushed stays where it is."""
    to, entry = _needed(output_dir), find(output_dir, name)
    if entry.state != "done":
        record(output_dir, replace(entry, state="cancelled"), to)


def _records(output_dir: Path, to: Repository) -> dict[str, Entry]:
    found = {}
    for file in tree.list_dir(output_dir / names.HUB_RECORDS):
        name = names.parse_hub_record(file)
        if name is None:
            continue
        path = output_dir / names.hub_record(name)
        try:
            fields = Fields(_read(path), path)
            where = Repository(fields.take("repo_id", str), fields.take("revision", str), fields.take("private", bool))
            entry = Entry(
                name=fields.take("name", str, lambda value, name=name: value == name),  # type: ignore[misc]
                state=cast(State, fields.take("state", str, lambda value: value in get_args(State))),
                detail=fields.take("detail", str),
                commit=fields.optional("commit", str),
                attempts=fields.count("attempts"),
                nbytes=fields.count("nbytes"),
                manifest_sha256=fields.take("manifest_sha256", str, sealed_json.is_sha256),
                age=tuple(fields.take("age", list, _is_age)),
            )
            fields.end()
        except FileNotFoundError:
            continue
        except Damaged as problem:
            log.warning("%s; it is left out, and %s counts as owed", problem, presentable(name))
            continue
        if (where.repo_id, where.revision) == (to.repo_id, to.revision):
            found[name] = entry
    return found


def _is_age(value: Any) -> bool:
    return len(value) == 3 and all(type(part) is int for part in value)


def _needed(output_dir: Path) -> Repository:
    to = repository(output_dir)
    if to is None:
        raise NotFound(f"{output_dir}: nobody has said where its checkpoints go; name a repository")
    return to


def _read(path: Path) -> dict[str, Any]:
    found = sealed_json.unseal(reads.read_bytes(path), path)
    if found.pop("format", None) != _FORMAT:
        raise Damaged(f"{path}: another roll_ckpt wrote it")
    return found


def _write(path: Path, values: dict[str, Any]) -> None:
    for folder in (path.parent.parent, path.parent) if path.parent.name != names.HUB else (path.parent,):
        writes.make_own_dir(folder)
    writes.write_durable(path, sealed_json.seal({**values, "format": _FORMAT}))


class Hashes:
    """The digests of one checkpoint's large files, kept until it is pushed: a killed push works none out again."""

    def __init__(self, output_dir: Path, entry: Entry) -> None:
        self._path = output_dir / names.hub_hashes(entry.name)
        self._manifest = entry.manifest_sha256
        self._files: dict[str, dict[str, Any]] = {}
        self._written = float("-inf")
        with suppress(FileNotFoundError, Damaged):
            kept = _read(self._path)
            files = kept.get("files")
            if kept.get("manifest") == self._manifest and isinstance(files, dict):
                self._files = {path: known for path, known in files.items() if isinstance(known, dict)}

    def known(self, receipt: Receipt, mtime_ns: int) -> str | None:
        """The SHA-256 of the file that the receipt is about, if it has not been touched since."""
        kept = self._files.get(receipt.path, {})
        same = (kept.get("root"), kept.get("mtime_ns")) == (receipt.root, mtime_ns)
        return str(kept["sha256"]) if same and sealed_json.is_sha256(kept.get("sha256")) else None

    def remember(self, receipt: Receipt, mtime_ns: int, sha256: str) -> None:
        """Keep a digest; written at most once a second, so a kill may cost the newest."""
        self._files[receipt.path] = {"root": receipt.root, "mtime_ns": mtime_ns, "sha256": sha256}
        if time.monotonic() - self._written > _PAUSE_S:
            _write(self._path, {"manifest": self._manifest, "files": self._files})
            self._written = time.monotonic()
