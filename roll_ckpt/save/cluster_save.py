"""ClusterSave: one cluster's part of one save on one rank.

Its bytes are copied and written by native threads. The training thread stages and fences; the save's own thread waits
until the files are durable and makes the vote.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.config import Check, Settings
from roll_ckpt.disk import failpoints, tree, writes
from roll_ckpt.errors import SourceChanged
from roll_ckpt.formats import records, sealed_json
from roll_ckpt.formats.image import Extents, FileImage, TensorPiece
from roll_ckpt.formats.records import Receipt, Vote
from roll_ckpt.native import files
from roll_ckpt.native.extension import Digest
from roll_ckpt.native.image import Lifetime, NativeImage
from roll_ckpt.native.mover import Mover, Transfer
from roll_ckpt.save import arena
from roll_ckpt.transaction import attempts
from roll_ckpt.transaction.attempts import Attempt

log = logging.getLogger("roll_ckpt")

_LOOK_S = 1.0  # between two looks whether a save that waits for its disk is still wanted
Changes = Callable[[Any], bool]
"""Whether the caller is about to change a leased source; it is given the owner of the memory."""


@dataclass
class _Staged:
    path: Path
    image: FileImage | None
    transfer: Transfer
    pieces: tuple[TensorPiece, ...]


@dataclass
class Timing:
    """Seconds of one cluster's part of a save on this rank; `None` until known."""

    stage_s: float = 0.0
    fence_s: float = 0.0
    write_s: float | None = None
    commit_s: float | None = None


class ClusterSave:
    """One cluster's part of one save on this rank: what the trainer keeps of it.

    The training thread stages and fences; the save's own thread finishes it and votes.
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
        """Whether an earlier plan of this cluster fits again, on every rank."""
        self.parameters: dict[str, dict[str, Any]] = {}
        self.timing = Timing()
        self.nbytes = 0
        self.error: str | None = None
        self._staged: list[_Staged] = []
        self._adopted: list[Path] = []
        self._started = time.monotonic()

    def stage(self, path: Path, image: FileImage, *, overlap: bool) -> None:
        """Copy `image` towards `path`, a file in the unit, and start writing it.

        Blocks until everything but its stable extents has been copied; until everything has if `overlap` is
        false or the arena has too little room. Not durable on return.
        """
        began = time.monotonic()
        settings = self.settings
        staged = stage_file(arena.mover(settings), path, image, overlap, settings.staging.check)
        self.timing.stage_s += time.monotonic() - began
        self.nbytes += image.nbytes
        self._staged.append(staged)

    def adopt(self, path: Path) -> None:
        """Count a file that somebody else wrote into the unit as ours: it is made durable and listed."""
        self._adopted.append(path)

    def holds(self, path: Path) -> bool:
        """Whether this rank's part has a file at `path`, written yet or not."""
        return path in self._adopted or any(staged.path == path for staged in self._staged)

    def file_stats(self) -> list[dict[str, float]]:
        """`Transfer.stats` of each staged file."""
        return [staged.transfer.stats for staged in self._staged]

    def fail(self, problem: BaseException) -> None:
        """Turn this rank's vote into a no. Never raises, so that no rank waits at a framework's barrier."""
        if self.error is None:
            self.error = f"{type(problem).__name__}: {problem}"

    def fence(self, changes: Changes = lambda owner: True) -> None:
        """Wait until every source has been copied, helping with it; then they may change.

        Not for the disk, but that leased sources which `changes` are written.
        """
        began = time.monotonic()
        for staged in self._staged:
            image = staged.image
            if image is None:
                continue
            staged.transfer.wait_copied()
            if not staged.transfer.released and any(changes(owner) for owner in _borrowed(image)):
                staged.transfer.wait_released()
            if staged.transfer.released:
                staged.image = None
        self.timing.fence_s += time.monotonic() - began

    def finish(self) -> Vote:
        """Wait for the bytes to be durable and return this rank's vote; runs on the save's thread."""
        attempt = self.attempt
        receipts: list[Receipt] = []
        try:
            if self.error is None:
                receipts = self._receipts()
        except Exception as problem:
            self.fail(problem)
        if self.error is not None:
            self.abandon()
            self._give_room_back()
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
        """Stop copying and writing, and give the arena's memory back."""
        for staged in self._staged:
            staged.transfer.abandon()
            staged.image = None

    def _give_room_back(self) -> None:
        """Before the no vote, which a full disk would not take; nobody can commit these files any more."""
        for staged in self._staged:
            with suppress(OSError):
                writes.discard_file(staged.path)

    def _receipts(self) -> list[Receipt]:
        checkpoint_dir = self.attempt.checkpoint_dir
        digests: dict[str, Any] = {}
        for staged in self._staged:
            digests[_relative(staged.path, checkpoint_dir)] = self._written(staged)
            staged.image = None
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
        pieces = [
            record
            for staged in self._staged
            for record in _piece_records(staged.pieces, _relative(staged.path, checkpoint_dir))
        ]
        index = {"parameters": self.parameters, "pieces": pieces}
        for relative, record in (
            (names.digest_file(self.cluster, self.rank), blocks),
            (names.tensor_file(self.cluster, self.rank), index),
        ):
            data = sealed_json.canonical(record)
            writes.make_dirs((checkpoint_dir / relative).parent)
            writes.write_durable(checkpoint_dir / relative, data)
            receipts.append(records.receipt_of_bytes(relative, data))
        return receipts

    def _written(self, staged: _Staged) -> Digest:
        """Wait for one file, however long its disk takes, until the others have given this save up."""
        told = False
        while True:
            try:
                return _written(staged, _LOOK_S)
            except TimeoutError as problem:
                if problem.errno is not None:  # the disk's own answer
                    raise
            if not tree.is_dir(self.attempt.directory):
                raise attempts.abandoned(self.attempt)
            if not told and time.monotonic() - self._started > self.settings.commit_timeout_s:
                told = True
                log.warning(
                    "%s: cluster %r rank %d still waits for the disk to take %s, after more than commit_timeout_s = "
                    "%g s", self.attempt.label, self.cluster, self.rank, staged.path, self.settings.commit_timeout_s
                )  # fmt: skip


def _piece_records(pieces: Iterable[TensorPiece], file: str) -> Iterator[dict[str, Any]]:
    for piece in pieces:
        yield {
            **{"name": piece.name, "dtype": piece.dtype, "shape": piece.shape},
            **{"offset": piece.offset, "nbytes": piece.nbytes, "file": file},
        }


def stage_file(mover: Mover, path: Path, image: FileImage, overlap: bool, check: Check = "off") -> _Staged:
    transfer = mover.save(path, native_image(image), overlap=overlap, check=check)
    return _Staged(path, None if transfer.released else image, transfer, image.pieces)


def _borrowed(image: FileImage) -> Iterator[Any]:
    """The owners of the leased sources."""
    extents = image.extents
    for owner, lifetime in zip(extents.owners, extents.rows[3 :: Extents.WIDTH], strict=True):
        if lifetime == Lifetime.UNTIL_WRITTEN:
            yield owner


def _written(staged: _Staged, timeout_s: float) -> Digest:
    try:
        return staged.transfer.wait_written(timeout_s)
    except SourceChanged as changed:
        start, end = changed.start, changed.end
        tensors = [piece.name for piece in staged.pieces if piece.offset < end and start < piece.offset + piece.nbytes]
        raise SourceChanged(
            f"{staged.path}: {', '.join(map(repr, tensors)) or 'a tensor'} (bytes {start} to {end} of the file) was "
            "changed while it was being copied; call roll_ckpt.fence() before changing it, or set "
            "staging.overlap: false",
            start,
            end,
        ) from None


def native_image(image: FileImage) -> NativeImage:
    """The image as the extension takes it: addresses and sizes."""
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
