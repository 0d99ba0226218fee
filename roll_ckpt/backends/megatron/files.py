"""This rank's files of one save by stock `dist_checkpointing.save`: laid out as Megatron planned them, moved by us."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from roll_ckpt import names
from roll_ckpt.backends.megatron.facts import DCP_METADATA
from roll_ckpt.config import Settings
from roll_ckpt.disk import writes
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


class Files:
    """This rank's files of one save by stock `dist_checkpointing.save`: written to temporary files, then renamed.

    Megatron has a barrier between `begin` and `finish`, so neither `begin` nor `write` raises: `finish` raises their
    error on every rank.
    """

    def __init__(self, settings: Settings, writer: Any, metadata: Any, group: Any) -> None:
        self._settings = settings
        self._writer = writer
        self._metadata = metadata
        self._group = group
        self._results: list[WriteResult] = []
        self._moving: list[tuple[Path, Path, Transfer]] = []
        self._problem: Exception | None = None
        self._pid = os.getpid()

    def begin(self) -> Files:
        """Copy everything and start writing; returns when the tensors may change. Never raises; see the class."""
        try:
            mover = arena.mover(self._settings)
            for file in _lay_out(self._writer):
                temporary = file.path.with_name(names.temporary_file(file.path.name))
                transfer = mover.save(temporary, cluster_save.native_image(file.image), overlap=False)
                self._moving.append((temporary, file.path, transfer))
                self._results += file.results
        except Exception as problem:
            self._problem = problem
        return self

    def write(self) -> None:
        """Wait until the files are durable under their names. Never raises; see the class.

        Does nothing in a forked child, which has none of our threads: there `finish` calls it again in the parent.
        """
        if os.getpid() != self._pid:
            return
        try:
            while self._moving and self._problem is None:
                temporary, path, transfer = self._moving[0]
                transfer.wait_written()
                writes.rename(temporary, path)
                writes.fsync_dir(path.parent)
                self._moving.pop(0)
        except Exception as problem:
            self._problem = problem
        for temporary, _, transfer in self._moving:
            transfer.abandon()
            writes.discard_file(temporary)
        self._moving.clear()

    def finish(self) -> None:
        """Write `.metadata` once all files of all ranks are durable. Every rank calls, on the training thread.

        `.metadata` is durable on return.

        Raises:
            The error of `begin` or `write`, on every rank; the directory then has no `metadata.json`.
        """
        ranks, path, timeout_s = RankGroup.current(), Path(self._writer.path), self._settings.commit_timeout_s

        def write_metadata() -> None:
            if self._group.is_coordinator:
                self._writer.finish(self._metadata, gathered)
                writes.fsync_file(path / DCP_METADATA)
                writes.fsync_dir(path)

        with gate.entered(ranks, f"finish {path}", timeout_s):
            ranks.run_on_all_ranks(self._check, timeout_s, working=True)
            gathered = self._group.gather_object(self._results)
            ranks.run_on_all_ranks(write_metadata, timeout_s, working=True)

    def _check(self) -> None:
        self.write()
        if self._problem is not None:
            raise self._problem


def write(rank: object, files: Files, unused: object) -> None:
    """Megatron's queue calls this, in a forked child or in this process."""
    files.write()
