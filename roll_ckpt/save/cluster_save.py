"""ClusterSave: one cluster's part of one save on one rank.

Native threads copy and write its bytes. The training thread stages and fences; the thread of the save waits until the
files are durable, and makes the vote.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.config import Check, Settings
from roll_ckpt.disk import failpoints, tree, writes
from roll_ckpt.errors import SourceChanged
from roll_ckpt.formats import records, sealed_json
from roll_ckpt.formats.image import Extents, FileImage, TensorPiece
from roll_ckpt.formats.records import Receipt, Vote
from roll_ckpt.formats.tensor_index.layout import Parameters
from roll_ckpt.formats.tensor_index.meanings import FileTensors
from roll_ckpt.formats.tensor_index.writer import Indexer
from roll_ckpt.native import files
from roll_ckpt.native.extension import Digest
from roll_ckpt.native.image import Lifetime, NativeImage
from roll_ckpt.native.mover import Mover, Transfer
from roll_ckpt.save import arena
from roll_ckpt.save.source_versions import SourceVersions, late_storages, names_in, storage_of
from roll_ckpt.transaction import attempts
from roll_ckpt.transaction.attempts import Attempt

log = logging.getLogger("roll_ckpt")

_LOOK_S = 1.0  # how often a save that waits for a slow disk checks that the other ranks have not abandoned it
_NAMED = 8  # the most tensors that an error names
Changes = Callable[[Any], bool]
"""Called with the owner of borrowed memory: True if the caller is about to change that memory."""


@dataclass
class _Staged:
    """One staged file: `image` describes its bytes and is dropped once no source is read any more.

    `versions` are dropped, too, as soon as the sources of their lifetime are copied and the counters compared.
    """

    path: Path
    image: FileImage | None
    transfer: Transfer
    pieces: tuple[TensorPiece, ...]
    tensors: FileTensors
    versions: dict[Lifetime | bool, SourceVersions] = field(default_factory=dict)


@dataclass
class Timing:
    """How long one cluster's part of a save took on this rank, in seconds; None until known. See docs/metrics.md."""

    stage_s: float = 0.0
    fence_s: float = 0.0
    write_s: float | None = None
    commit_s: float | None = None


class ClusterSave:
    """One cluster's part of one save on this rank. Made by `Save.add_cluster`.

    `facts` describe the cluster in the manifest, `parameters` name its parameters (dtype and shape) for the tensor
    index. `nbytes` counts the bytes staged so far; `error` is the reason for a no vote, None so far.
    """

    def __init__(
        self,
        attempt: Attempt,
        settings: Settings,
        cluster: str,
        rank: int,
        facts: Mapping[str, Any],
        reuses_plan: bool = False,
    ) -> None:
        self.attempt = attempt
        self.settings = settings
        self.cluster = cluster
        self.rank = rank
        self.facts = dict(facts)
        self.reuses_plan = reuses_plan
        """Whether an earlier save plan of this cluster fits again, on every rank."""
        self.parameters: Parameters = {}
        """Names, dtypes and shapes of the model's parameters, for the tensor index."""
        self.indexer = Indexer()
        """A backend that saves often puts one here that it keeps."""
        self.timing = Timing()
        self.nbytes = 0
        self.error: str | None = None
        self._staged: list[_Staged] = []
        self._adopted: list[Path] = []
        self.live: list[Any] = []
        """Tensors of the model that share memory, but no version counter, with tensors that are staged: they are
        watched as well."""
        self._comparing = threading.Lock()
        self._started = time.monotonic()

    def stage(self, path: Path, image: FileImage, *, overlap: bool) -> None:
        """Copy the bytes of `image` to the arena and start writing them to `path`, a file in the checkpoint directory.

        Blocks until everything except the overlappable extents has been copied; until everything has, if `overlap` is
        false or the arena has too little room. Not durable on return. The training thread calls.

        A file that cannot be created or written raises nothing here: it becomes this rank's no vote.

        Raises:
            ValueError: the image is inconsistent. ConfigError: see `arena.mover`.
        """
        began = time.monotonic()
        settings = self.settings
        versions = self._versions(image) if overlap and settings.staging.check != "off" else {}
        staged = stage_file(arena.mover(settings), path, image, overlap, settings.staging.check)
        if not staged.transfer.released:
            staged.versions = versions
        self.timing.stage_s += time.monotonic() - began
        self.nbytes += image.nbytes
        self._staged.append(staged)

    def adopt(self, path: Path) -> None:
        """Take over a file that other code wrote into the checkpoint directory: it is made durable and listed."""
        self._adopted.append(path)

    def holds(self, path: Path) -> bool:
        """Whether this rank's part includes a file at `path`, whether or not it is written yet."""
        return path in self._adopted or any(staged.path == path for staged in self._staged)

    def file_stats(self) -> list[dict[str, float]]:
        """`Transfer.stats` of each staged file."""
        return [staged.transfer.stats for staged in self._staged]

    def fail(self, problem: BaseException) -> None:
        """Turn this rank's vote into a no, with the first `problem` as the reason.

        Never raises, so that this rank still reaches the framework's barriers.
        """
        if self.error is None:
            self.error = f"{type(problem).__name__}: {problem}"

    def fence(self, changes: Changes = lambda owner: True) -> None:
        """Block until every source has been copied, helping with the copies; then the sources may change.

        Does not wait for the disk, except for borrowed sources that the caller is about to change (`changes(owner)`):
        those are waited for until they are written. Raises nothing: a failed transfer becomes a no vote.
        """
        began = time.monotonic()
        for staged in self._staged:
            image = staged.image
            if image is None:
                continue
            staged.transfer.wait_copied()
            self._compare(staged, Lifetime.UNTIL_FENCE)
            if not staged.transfer.released and any(changes(owner) for owner in _borrowed(image)):
                staged.transfer.wait_released()
            if staged.transfer.released:
                self._release(staged)
        self.timing.fence_s += time.monotonic() - began

    def reads(self, storages: set[int] | None) -> bool:
        """Whether a source in one of `storages` (`_cdata`; None: anywhere) must stay as it is: it is still to be
        copied, or its version counter to be compared."""
        for staged in list(self._staged):
            image = staged.image
            if image is None or (staged.transfer.released and not staged.versions):
                continue
            if storages is None or not storages.isdisjoint(late_storages(image)):
                return True
        return False

    def _versions(self, image: FileImage) -> dict[Lifetime | bool, SourceVersions]:
        watched = dict(image.watched)
        if self.live:
            late = late_storages(image)
            live = [tensor for tensor in self.live if storage_of(tensor) in late]
            watched[Lifetime.UNTIL_FENCE] = [*watched.get(Lifetime.UNTIL_FENCE, []), *live]
        return {
            lifetime: SourceVersions(tensors, staying=lifetime == Lifetime.UNTIL_WRITTEN)
            for lifetime, tensors in watched.items()
        }

    def _compare(self, staged: _Staged, lifetime: Lifetime | bool) -> None:
        """Vote no if a source of `lifetime` was changed; call it as soon as they have been copied.

        The lock keeps the training thread, which is about to change them, waiting while another thread compares.
        """
        with self._comparing:
            versions, image = staged.versions.get(lifetime), staged.image
            changed = versions.changed() if versions is not None else []
            if changed and image is not None:
                self.fail(_source_changed(staged.path, *names_in(image, changed)))
            staged.versions.pop(lifetime, None)  # only now: `reads` looks at it without the lock

    def _release(self, staged: _Staged) -> None:
        for lifetime in list(staged.versions):
            self._compare(staged, lifetime)
        staged.image = None

    def confirm_copies(self) -> None:
        """Block until the sources are copied, without helping, and compare their counters at once: what changes them
        later does no harm. Raises nothing. The save's thread calls, once staging has ended.
        """
        self.live = []
        try:
            for staged in self._staged if self.error is None else ():
                self._wait(staged, lambda staged: staged.transfer.wait_copied(_LOOK_S, helping=False))
                self._compare(staged, Lifetime.UNTIL_FENCE)
        except Exception as problem:
            self.fail(problem)

    def finish(self) -> Vote:
        """Block until the files are durable or have failed, and return this rank's vote. The save's thread calls."""
        attempt = self.attempt
        receipts: list[Receipt] = []
        try:
            if self.error is None:
                receipts = self._receipts()
        except Exception as problem:
            self.fail(problem)
        if self.error is not None:
            self.abandon()
            self._free_disk_space()
            receipts = []
        self.timing.write_s = time.monotonic() - self._started
        return Vote(
            cluster=self.cluster,
            rank=self.rank,
            epoch=attempt.epoch,
            attempt=attempt.attempt,
            receipts=tuple(receipts),
            error=self.error,
            facts=self.facts,
        )

    def abandon(self) -> None:
        """Stop copying and writing, and free the arena's memory. Blocks until no source is read any more."""
        for staged in self._staged:
            staged.transfer.abandon()
            staged.image, staged.versions = None, {}

    def _free_disk_space(self) -> None:
        """Remove this rank's files, which can no longer be committed, so that a full disk has room for the no vote."""
        for staged in self._staged:
            try:
                writes.discard_file(staged.path)
            except OSError as problem:
                log.warning(
                    "%s: cluster %r rank %d: a file of this failed save cannot be removed now; the next save or start "
                    "removes it: %s", self.attempt.label, self.cluster, self.rank, problem
                )  # fmt: skip

    def _receipts(self) -> list[Receipt]:
        checkpoint_dir = self.attempt.checkpoint_dir
        digests: dict[str, Any] = {}
        for staged in self._staged:
            digests[_relative(staged.path, checkpoint_dir)] = self._wait(staged, _written)
            self._release(staged)
        if self.error is not None:
            return []
        for path in sorted(set(self._adopted)):
            writes.fsync_file(path)
            digests[_relative(path, checkpoint_dir)] = files.digest_file(str(path), records.BLOCK_BYTES)
        failpoints.failpoint("write.done", cluster=self.cluster, rank=self.rank, name=self.attempt.name)
        receipts = [
            Receipt(path, d.nbytes, d.block_bytes, records.root_of(d.nbytes, d.block_bytes, d.crcs))
            for path, d in digests.items()
        ]
        blocks = {
            path: {"nbytes": d.nbytes, "block_bytes": d.block_bytes, "crcs": list(d.crcs)}
            for path, d in digests.items()
        }
        tensors = [(_relative(s.path, checkpoint_dir), s.tensors) for s in self._staged if s.tensors.tensors]
        for relative, data in (
            (names.digest_file(self.cluster, self.rank), sealed_json.canonical(blocks)),
            (names.tensor_file(self.cluster, self.rank), self.indexer.encode(tensors, self.parameters)),
        ):
            writes.make_dirs((checkpoint_dir / relative).parent)
            writes.write_durable(checkpoint_dir / relative, data)
            receipts.append(records.receipt_of_bytes(relative, data))
        return receipts

    def _wait(self, staged: _Staged, step: Callable[[_Staged], Any]) -> Any:
        """Repeat `step`, which waits for `_LOOK_S`, until it returns something true, and return that.

        However long the disk takes, unless the other ranks have abandoned this save.
        """
        warned = False
        while True:
            done = step(staged)
            if done:
                return done
            if not tree.is_dir(self.attempt.directory):
                raise attempts.abandoned(self.attempt)
            if not warned and time.monotonic() - self._started > self.settings.commit_timeout_s:
                warned = True
                log.warning(
                    "%s: cluster %r rank %d still waits for the disk to write %s, after more than commit_timeout_s = "
                    "%g s", self.attempt.label, self.cluster, self.rank, staged.path, self.settings.commit_timeout_s
                )  # fmt: skip


def stage_file(mover: Mover, path: Path, image: FileImage, overlap: bool, check: Check = "off") -> _Staged:
    """Start the transfer of one file to `path`; see `ClusterSave.stage`."""
    transfer = mover.save(path, native_image(image), overlap=overlap, check=check)
    tensors = image.tensors or FileTensors(image.pieces)
    return _Staged(path, None if transfer.released else image, transfer, image.pieces, tensors)


def _borrowed(image: FileImage) -> Iterator[Any]:
    """The owners of the borrowed sources."""
    extents = image.extents
    for owner, lifetime in zip(extents.owners, extents.rows[3 :: Extents.WIDTH], strict=True):
        if lifetime == Lifetime.UNTIL_WRITTEN:
            yield owner


def _written(staged: _Staged) -> Digest | None:
    """`Transfer.wait_written` for `_LOOK_S`, with the tensors named in a SourceChanged; None: not written yet."""
    try:
        return staged.transfer.wait_written(_LOOK_S)
    except TimeoutError as problem:
        if problem.errno is not None:  # ETIMEDOUT from the disk, not the end of _LOOK_S
            raise
        return None
    except SourceChanged as changed:
        start, end = changed.start, changed.end
        names = [piece.name for piece in staged.pieces if piece.offset < end and start < piece.offset + piece.nbytes]
        raise _source_changed(staged.path, names, start, end) from None


def _source_changed(path: Path, names: list[str], start: int, end: int) -> SourceChanged:
    named = ", ".join(map(repr, names[:_NAMED])) or "a tensor"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return SourceChanged(
        f"{path}: {named}{more} (bytes {start} to {end} of the file) was changed while it was being copied; call "
        "roll_ckpt.fence() before changing it, or set staging.overlap: false",
        start,
        end,
    )


def native_image(image: FileImage) -> NativeImage:
    """The image as the native extension takes it: addresses and sizes in flat tables."""
    extents, crc_patches = image.extents, image.crc_patches
    return NativeImage.of(
        image.nbytes,
        extents.rows,
        extents.owners,
        crc_patches.records,
        crc_patches.crcs,
        crc_patches.serials,
        extents.streams,
    )


def _relative(path: Path, checkpoint_dir: Path) -> str:
    return path.relative_to(checkpoint_dir).as_posix()
