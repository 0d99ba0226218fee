"""The DeepSpeed backend: `engine.save_checkpoint()` and its kin go through us.

`install()` wraps methods of `DeepSpeedEngine`. An engine whose config has `checkpoint.roll_ckpt`, or that a
`Cluster` attached, gets our `CheckpointEngine`; every other engine behaves as before. Stock code still decides
what a checkpoint holds and how its files are called; we decide where they go (an attempt directory that is
renamed into place when all ranks have voted), how their bytes get there, and when `latest` is written.

Written against DeepSpeed 0.19 (`runtime/engine.py`, `runtime/checkpoint_engine/checkpoint_engine.py`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from roll_ckpt.backends.deepspeed.facts import describe, parameters_of
from roll_ckpt.backends.deepspeed.tensors import offloaded_storages, overlappable_storages
from roll_ckpt.config import Settings
from roll_ckpt.disk import writes
from roll_ckpt.formats.torch_zip.layout import Layouts
from roll_ckpt.load import trust
from roll_ckpt.load.reader import Reader, open_reader
from roll_ckpt.native.image import Lifetime
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import cluster_save, one_file, pending
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save

log = logging.getLogger("roll_ckpt")

ALLOWED_GLOBALS = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed's own files hold beyond torch's `weights_only` list."""


class RollCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """What a `DeepSpeedEngine` calls to save and load files; one for each engine.

    `is_decoupled` is true and `get_commit_info` None, so stock code neither writes `latest` nor commits: both
    happen in our transaction. Its methods never raise between stock code's barriers; an error becomes a no
    vote, which every rank sees.
    """

    def __init__(self, engine: DeepSpeedEngine, settings: Settings, cluster: str) -> None:
        super().__init__()
        self.name = "roll_ckpt"
        self.settings = settings
        self.cluster = cluster
        self.ranks = RankGroup.current()
        self._engine = weakref.ref(engine)
        self._cluster_save: ClusterSave | None = None
        self._overlappable: frozenset[int] = frozenset()
        self._borrowed: frozenset[int] = frozenset()
        self._reader: Reader | None = None
        self.saves: list[Save] = []
        """Saves that may still read this engine's tensors, or whose failure was not raised yet."""
        self.lone_problem: str | None = None
        """Why a file outside of any save could not be written."""
        self._warned: set[str] = set()
        self._allowed = [*ALLOWED_GLOBALS, *trust.allowed(settings)]
        self._layouts = Layouts(self._allowed)
        self.verified: Path | None = None
        """A checkpoint whose every byte all ranks have just read; loading from it reads it once."""

    @property
    def engine(self) -> DeepSpeedEngine:
        engine = self._engine()
        assert engine is not None, "the DeepSpeed engine of this checkpoint engine is gone"
        return engine

    # What DeepSpeed calls.

    def create(self, info: object) -> None:
        """Nothing to do: the attempt was begun before stock code ran."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.no_raise():
            writes.make_dirs(Path(path))

    def save(self, state_dict: object, path: str) -> None:
        """Lay out and stage one file. Outside of `save_checkpoint`: write it at once, durable on return."""
        with self.no_raise():
            # A file by itself may have another name each time: its layout is not kept.
            layouts = Layouts(self._allowed) if self._cluster_save is None else self._layouts
            image, unsafe = layouts.lay_out(Path(path).name, state_dict, Path(path).stem, self._until)
            trust.warn_unloadable(Path(path), unsafe, self._warned)
            if self._cluster_save is None:
                one_file.write_file(Path(path), image, self.settings)
            else:
                self._cluster_save.stage(Path(path), image, overlap=bool(self._overlappable))

    def load(self, path: str, map_location: Any = None) -> Any:
        if self._reader is not None:
            return self._reader.load(Path(path), map_location)
        with open_reader(Path(path).parent, self.settings, ALLOWED_GLOBALS) as reader:
            return reader.load(Path(path), map_location)

    def commit(self, info: object) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return True

    def get_commit_info(self) -> None:
        return None

    def preserves_storage_sharing(self) -> bool:
        return False

    def cleanup(self) -> None:
        self.fence()

    # What our wrappers call.

    def fence(self, changes: cluster_save.Changes = lambda storage: True) -> None:
        """Wait until no save of this engine reads its tensors any more; not for the disk, but that those which were
        offloaded when it began and which `changes` are written.

        Raises:
            SaveFailed: an earlier save failed in the background and `fail_training` is set.
        """
        pending.wait_copied(self.saves, changes)

    @contextmanager
    def staging(self, save: Save) -> Iterator[ClusterSave]:
        """Inside the block, files that stock code saves become this engine's part of `save`."""
        cluster_save = save.add_cluster(self.cluster, {})
        self.saves.append(save)
        try:
            with self.no_raise(cluster_save):
                cluster_save.facts |= describe(self.engine)
                cluster_save.parameters = parameters_of(self.engine)
                if self.settings.staging.overlap:
                    self._overlappable = overlappable_storages(self.engine)
                    self._borrowed = self._overlappable & offloaded_storages(self.engine)
                if self._borrowed:
                    get_accelerator().synchronize()  # offload_states(non_blocking=True) may still be copying there
            self._cluster_save = cluster_save
            yield cluster_save
        finally:
            self._cluster_save = None
            self._overlappable = self._borrowed = frozenset()

    @contextmanager
    def reading(self, reader: Reader) -> Iterator[None]:
        """Inside the block, files that stock code loads come from `reader`."""
        self._reader = reader
        try:
            yield
        finally:
            self._reader = None

    @contextmanager
    def no_raise(self, cluster_save: ClusterSave | None = None) -> Iterator[None]:
        """Inside stock code's barriers: an error becomes a no vote, or what `save_16bit_model` reports."""
        try:
            yield
        except Exception as problem:
            cluster_save = cluster_save or self._cluster_save
            if cluster_save is not None:
                cluster_save.fail(problem)
            else:
                self.lone_problem = f"{type(problem).__name__}: {problem}"
                log.error("rank %d: a file outside of any checkpoint was not written: %s", self.ranks.rank, problem)

    def _until(self, storage: torch.UntypedStorage) -> Lifetime:
        if storage._cdata in self._borrowed:
            return Lifetime.UNTIL_WRITTEN
        return Lifetime.UNTIL_FENCE if storage._cdata in self._overlappable else Lifetime.UNTIL_SAVE_RETURNS


def nothing(storage: torch.UntypedStorage) -> bool:
    return False
