"""Copies of committed checkpoints in another directory (checkpoint_config.type: file_system)."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from roll_ckpt import names
from roll_ckpt.disk import failpoints, reads, tree, writes
from roll_ckpt.disk.missing import if_there
from roll_ckpt.errors import ConfigError, Damaged, SaveFailed
from roll_ckpt.formats import manifests, records
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.sealed_json import Fields, seal, sha256, unseal
from roll_ckpt.transaction import listing, reader_locks

log = logging.getLogger("roll_ckpt")

_POLL_S = 0.2
_OLD = ".old"


@dataclass(frozen=True)
class Copies:
    """What a directory of copies is owed; implements `retention.Owing`."""

    output_dir: Path
    upload_dir: Path

    def owed(self) -> list[str]:
        return owed(self.output_dir, self.upload_dir)

    def forget(self, name: str) -> None:
        for entry in tree.list_dir(self.upload_dir):
            parsed = names.parse_attempt_dir(entry)
            if parsed is not None and parsed[0] == name:
                writes.remove_tree(self.upload_dir / entry)


class FileSystemDestination:
    """A directory that receives copies; implements `destination.Destination`."""

    in_background: ClassVar[bool] = False

    def __init__(self, output_dir: Path, upload_dir: Path) -> None:
        self._copies = Copies(output_dir, upload_dir)
        self._one_at_a_time = threading.Lock()

    def owed(self) -> list[str]:
        return self._copies.owed()

    def check(self) -> None:
        output_dir, upload_dir = self._copies.output_dir, self._copies.upload_dir
        _refuse_inside(output_dir, upload_dir)
        for manifest in listing.committed(output_dir, report=lambda problem: log.debug("%s", problem)):
            _refuse_other_run(upload_dir / manifest.name, manifest)

    def upload(self, name: str, *, again: bool = False) -> None:
        with self._one_at_a_time:
            _record(self._copies.output_dir, self._copies.upload_dir)
            upload(self._copies.output_dir / name, self._copies.upload_dir)

    def wait(self, name: str, patience_s: float, check: Callable[[], None]) -> None:
        limit = time.monotonic() + patience_s
        while name in self.owed():
            if time.monotonic() > limit:
                raise SaveFailed(
                    f"{self._copies.output_dir / name}: committed, but the job that uploads did not upload it within "
                    f"{patience_s:g} s (exit_timeout_s); see the log of that job"
                )
            check()
            time.sleep(_POLL_S)

    def forget(self, name: str) -> None:
        self._copies.forget(name)


def recorded(output_dir: Path) -> Path | None:
    """Where the run in `output_dir` uploads to, by the record that its last upload left; None if there is none.

    Damaged, naming the record, if it cannot be trusted.
    """
    path = output_dir / names.COPIES
    data = if_there(partial(reads.read_bytes, path))
    if data is None:
        return None
    fields = Fields(unseal(data, path), path)
    upload_dir = fields.take("upload_dir", str, os.path.isabs)
    fields.end()
    return Path(upload_dir)


def _record(output_dir: Path, upload_dir: Path) -> None:
    """Let `roll-ckpt prune` know of the destination; durable, but no reason not to upload if the disk refuses."""
    path, data = output_dir / names.COPIES, seal({"upload_dir": str(upload_dir.absolute())})
    try:
        if if_there(partial(reads.read_bytes, path)) != data:
            writes.write_durable(path, data)
    except OSError as error:
        log.warning("%s cannot be written, so `roll-ckpt prune` does not know of %s: %s", path, upload_dir, error)


def owed(output_dir: Path, upload_dir: Path) -> list[str]:
    """The names of committed checkpoints without a complete copy in `upload_dir`, the oldest first.

    Compares manifests and sizes; contents were checked when they were copied.
    """
    return [
        manifest.name
        for manifest in listing.committed(output_dir)
        if not is_complete(output_dir / manifest.name, upload_dir / manifest.name)
    ]


def is_complete(checkpoint_dir: Path, copy: Path) -> bool:
    """True if `copy` has the manifest of the checkpoint, and every file with the size that the manifest says.

    A copy of which something cannot be read counts as incomplete: it stays owed, and uploading it raises the error.
    """
    try:
        if reads.read_bytes(copy / names.MANIFEST) != reads.read_bytes(checkpoint_dir / names.MANIFEST):
            return False
        manifest = manifests.read(copy)
        return all(tree.file_bytes(copy / r.path) == r.nbytes for r in manifest.files) and all(
            tree.is_file(copy / path) for path in manifest.record_paths()
        )
    except (OSError, Damaged) as problem:
        log.debug("%s: no complete copy of %s: %s", copy, checkpoint_dir, problem)
        return False


def upload(checkpoint_dir: Path, upload_dir: Path, progress: Callable[[int], None] | None = None) -> None:
    """Copy a committed checkpoint to `<upload_dir>/<name>`. The copy appears there complete and durable, or not at all.

    Blocks. One process calls. Idempotent: a complete copy is left alone, what a killed upload left is removed, an
    incomplete copy or one of another attempt is replaced. `progress` is called with the number of bytes of each block
    that was copied. The checkpoint is not pruned meanwhile.

    Raises:
        Damaged: a file is not as it was committed; nothing appears under the final name.
        NotFound: there is no such checkpoint. ConfigError: `upload_dir` lies inside the run's directory, or holds a
            checkpoint of this name that another run has uploaded.
        SaveFailed: another process changed the copy while it was written. OSError: the disk refused.
    """
    _refuse_inside(checkpoint_dir.parent, upload_dir)
    with reader_locks.reading(checkpoint_dir):
        manifest = manifests.read(checkpoint_dir)
        name = manifest.name
        _remove_leftovers(upload_dir, manifest)
        if is_complete(checkpoint_dir, upload_dir / name):
            return
        _refuse_other_run(upload_dir / name, manifest)
        staging = upload_dir / names.attempt_dir(name, manifest.epoch, manifest.attempt)
        writes.make_dirs(upload_dir)
        writes.make_dir(staging)
        _copy_all(checkpoint_dir, staging / name, manifest, progress or (lambda _: None))
    failpoints.failpoint("upload.copied", name=name)
    if not is_complete(checkpoint_dir, staging / name):
        raise SaveFailed(f"{staging}: another process changed it while it was copied; upload {name} again")
    _publish(staging, upload_dir / name)
    failpoints.failpoint("upload.renamed", name=name)
    writes.remove_tree(staging)


def _refuse_inside(output_dir: Path, upload_dir: Path) -> None:
    source = output_dir.resolve()
    if upload_dir.resolve() == source or source in upload_dir.resolve().parents:
        raise ConfigError(f"uploads to {upload_dir} would lie inside {output_dir}; choose another directory")


def _refuse_other_run(copy: Path, manifest: Manifest) -> None:
    """ConfigError if `copy` is a checkpoint of another run, which may be the only one left of it.

    Checkpoints of one run, also of its restarts, have one series. A copy that cannot be read is replaced.
    """
    try:
        theirs = manifests.read(copy)
    except (OSError, Damaged) as problem:
        log.debug("%s is no checkpoint of another run: %s", copy, problem)
        return
    ours, other = manifest.lineage.series, theirs.lineage.series
    if ours and other and ours != other:  # older formats name no series
        raise ConfigError(
            f"{copy}: there lies a checkpoint of this name that another run has uploaded; it was left alone, and "
            f"{manifest.name} was not uploaded. Let every run upload to a directory of its own, or remove that copy "
            "if nothing needs it"
        )


def _remove_leftovers(upload_dir: Path, manifest: Manifest) -> None:
    """Remove what killed uploads have left: of this checkpoint, and of others up to its epoch.

    A run uploads one checkpoint at a time, so none of these uploads is still going on.
    """
    for entry in tree.list_dir(upload_dir):
        parsed = names.parse_attempt_dir(entry)
        if parsed is not None and (parsed[0] == manifest.name or parsed[1] <= manifest.epoch):
            writes.remove_tree(upload_dir / entry)


def _copy_all(checkpoint_dir: Path, copy: Path, manifest: Manifest, progress: Callable[[int], None]) -> None:
    folders = {copy}
    for path in manifest.paths():
        folders.update(parent for parent in (copy / path).parents if copy in parent.parents)
    for folder in sorted(folders):
        writes.make_dir(folder)
    for receipt in manifest.files:
        crcs = _copy(checkpoint_dir / receipt.path, copy / receipt.path, receipt.block_bytes, progress)
        nbytes = tree.file_bytes(copy / receipt.path)
        if nbytes != receipt.nbytes or records.root_of(nbytes, receipt.block_bytes, crcs) != receipt.root:
            raise Damaged(f"{checkpoint_dir / receipt.path}: not as it was committed; the upload was abandoned")
    for path in (*manifest.record_paths(), names.MANIFEST):
        _copy(checkpoint_dir / path, copy / path, records.BLOCK_BYTES, progress)
    _check_records(copy, manifest)
    for folder in sorted(folders, reverse=True):  # a directory becomes durable after what is in it
        writes.fsync_dir(folder)
    writes.fsync_dir(copy.parent)


def _copy(source: Path, target: Path, block_bytes: int, progress: Callable[[int], None]) -> list[int]:
    """Copy one file, fsync it, and return the CRC-32 of each block that was read."""
    from roll_ckpt.native import extension  # as in transaction/verification.py

    crcs = []
    descriptor = writes.create(target)
    try:
        for block in reads.read_blocks(source, block_bytes):
            crcs.append(extension.crc32(block))
            writes.write_all(descriptor, block, target)
            progress(len(block))
        writes.fsync(descriptor, target)
    finally:
        os.close(descriptor)
    return crcs


def _check_records(copy: Path, manifest: Manifest) -> None:
    """Damaged unless the copied manifest, votes and decision are those of `manifest`."""
    record = reads.read_bytes(copy / names.MANIFEST)
    if manifests.parse(record, copy / names.MANIFEST) != manifest:
        raise Damaged(f"{copy / names.MANIFEST}: it changed while it was copied; upload again")
    for file, digest in manifest.votes.items():
        if sha256(reads.read_bytes(copy / names.VOTES / file)) != digest:
            raise Damaged(f"{copy / names.VOTES / file}: it is not the vote that the manifest rests on")
    decision = records.parse_decision(reads.read_bytes(copy / names.DECISION), copy / names.DECISION)
    if not decision.commit or decision.manifest != sha256(record):
        raise Damaged(f"{copy / names.DECISION}: it is not the decision to commit this manifest")


def _publish(staging: Path, target: Path) -> None:
    """Rename the copy into place. A copy that had the name moves into the staging directory, which is removed."""
    new = staging / target.name
    try:
        writes.rename(new, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        writes.swap(new, target, lambda: _step_aside(target, staging))
    writes.fsync_dir(target.parent)


def _step_aside(target: Path, staging: Path) -> None:
    writes.make_dir(staging / _OLD)
    writes.rename(target, staging / _OLD / target.name)
