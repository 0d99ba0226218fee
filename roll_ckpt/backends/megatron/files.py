"""This rank's files of one save by stock `dist_checkpointing.save`: laid out as Megatron planned them, moved by us."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from roll_ckpt import names, process
from roll_ckpt.backends.megatron.facts import COMMON, DCP_METADATA, MARKER
from roll_ckpt.backends.megatron.handover import Handover
from roll_ckpt.backends.megatron.planning import Planned
from roll_ckpt.config import Settings
from roll_ckpt.disk import tree, writes
from roll_ckpt.formats.dcp import items as dcp
from roll_ckpt.formats.image import FileImage
from roll_ckpt.native.mover import Transfer
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import arena, cluster_save, gate


@dataclass
class _LaidOut:
    path: Path
    image: FileImage
    results: list[WriteResult]


def _lay_out(writer: Any) -> list[_LaidOut]:
    """One image for each file that Megatron planned for this rank. The images take the tensors over from `writer`."""
    files = []
    for path, name, (objects, tensors) in writer.write_buckets or ():
        plan = [*objects, *tensors]
        image, spans = dcp.lay_out((item.index.fqn, _plain(value)) for item, value in plan)
        results = [
            WriteResult(item.index, span.length, _StorageInfo(name, span.offset, span.length))
            for (item, _), span in zip(plan, spans, strict=True)
        ]
        files.append(_LaidOut(Path(path), image, results))
    writer.write_buckets = None
    return files


def _plain(value: Any) -> torch.Tensor | bytes:
    """The value of a planned item: a tensor, or the bytes that Megatron has pickled into a stream."""
    return value.detach() if isinstance(value, torch.Tensor) else bytes(value.getbuffer())


class Unfinished:
    """The part of the `process` registry that knows the saves of stock Megatron that are not finished."""

    def __init__(self) -> None:
        self.files: weakref.WeakSet[Files] = weakref.WeakSet()

    def writes_to(self, directory: Path) -> bool:
        """Whether such a save writes to `directory`, on any rank: all ranks take part in each."""
        return bool(self.of(directory))

    def of(self, directory: Path) -> list[Files]:
        """The saves that write to `directory`."""
        real = os.path.realpath(directory)
        return [files for files in self.files if os.path.realpath(files.directory) == real]


class Files:
    """This rank's files of one save by stock `dist_checkpointing.save`: written to temporary files, then renamed.

    Megatron has a barrier between `begin` and `finish`, so `begin` does not raise: `finish` raises its error, and that
    of the thread that moves the files, on every rank.
    """

    def __init__(self, settings: Settings, planned: Planned, marker: bytes) -> None:
        self.handover = Handover()
        """Ends when this rank's files are durable under their names, or have failed."""
        self.directory = Path(planned.writer.path)
        self.when_complete: list[Callable[[], None]] = []
        """What `finish` calls on this rank once the checkpoint is complete and durable."""
        self._superseded = False
        self._settings = settings
        self._planned = planned
        self._marker = marker
        self._results: list[WriteResult] = []
        self._moving: list[tuple[Path, Path, Transfer]] = []
        self._problem: Exception | None = None

    def begin(self) -> None:
        """Copy everything and start writing; returns when the tensors may change. Never raises; see the class."""
        process.part(Unfinished).files.add(self)
        try:
            mover = arena.mover(self._settings)
            for file in _lay_out(self._planned.writer):
                temporary = file.path.with_name(names.temporary_file(file.path.name))
                transfer = mover.save(temporary, cluster_save.native_image(file.image), overlap=False)
                self._moving.append((temporary, file.path, transfer))
                self._results += file.results
        except Exception as problem:
            self._problem = problem
        name = f"roll_ckpt {self.directory.name}"
        try:
            threading.Thread(target=self._move, name=name, daemon=True).start()
        except RuntimeError:  # no thread can be started: then training waits for the disk
            self._move()

    def supersede(self, earlier: Files) -> None:
        """Take over the directory from an unfinished save, whose files are overwritten. Every rank calls."""
        earlier.handover.wait()  # or it could rename its file after we have
        earlier._superseded = True
        self.when_complete += earlier.when_complete
        earlier.when_complete = []

    def _move(self) -> None:
        """Make the files durable under their names; remove them if one fails."""
        try:
            self._rename_written()
        except Exception as problem:
            self._problem = problem
        finally:
            self._discard()
            self.handover.end()

    def _rename_written(self) -> None:
        directories = {path.parent for _, path, _ in self._moving}
        while self._moving and self._problem is None:
            temporary, path, transfer = self._moving[0]
            transfer.wait_written()
            writes.rename(temporary, path)
            self._moving.pop(0)
        for directory in directories:
            writes.fsync_dir(directory)

    def _discard(self) -> None:
        for temporary, _, transfer in self._moving:
            transfer.abandon()
            try:
                writes.discard_file(temporary)
            except OSError as problem:
                self._problem = self._problem or problem
        self._moving.clear()

    def finish(self) -> None:
        """Write `.metadata`, and then `metadata.json`, once all files of all ranks are durable.

        Every rank calls, on the training thread. Blocks until the files are written. Durable on return.

        Raises:
            The error of any rank, on every rank; the directory then has no `metadata.json`.
        """
        ranks, timeout_s = RankGroup.current(), self._settings.commit_timeout_s

        def complete() -> None:
            if self._planned.group.is_coordinator and not self._superseded:
                self._complete(self.directory, gathered)

        process.part(Unfinished).files.discard(self)
        with gate.entered(ranks, f"finish {self.directory}", timeout_s):
            ranks.run_on_all_ranks(self._check, timeout_s, working=True)
            gathered = self._planned.group.gather_object(self._results)
            ranks.run_on_all_ranks(complete, timeout_s, working=True)
        for action in self.when_complete:
            action()

    def _check(self) -> None:
        self.handover.wait()
        if self._problem is not None:
            raise self._problem

    def _complete(self, directory: Path, gathered: Any) -> None:
        if tree.exists(directory / COMMON):  # stock code has just written it, without fsync
            writes.fsync_file(directory / COMMON)
        self._planned.writer.finish(self._planned.metadata, gathered)
        writes.fsync_file(directory / DCP_METADATA)
        writes.fsync_dir(directory)
        with suppress(PermissionError):
            writes.fsync_dir(directory.parent)  # the host has just made the directory
        writes.write_durable(directory / MARKER, self._marker)
