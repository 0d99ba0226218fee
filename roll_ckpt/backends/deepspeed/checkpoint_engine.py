"""The checkpoint engine that a `DeepSpeedEngine` calls to write and read files.

Written against `runtime/engine.py` and `runtime/checkpoint_engine/checkpoint_engine.py` of DeepSpeed 0.19; `version`
tells what others have instead.
"""

from __future__ import annotations

import enum
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from roll_ckpt import names
from roll_ckpt.backends.deepspeed.facts import describe
from roll_ckpt.backends.deepspeed.index import EngineIndex
from roll_ckpt.backends.deepspeed.tensors import live_tensors, offloaded_storages, overlappable_storages
from roll_ckpt.backends.deepspeed.weights import Weights, loading
from roll_ckpt.config import Settings
from roll_ckpt.disk import writes
from roll_ckpt.formats.tensor_index.writer import Indexer
from roll_ckpt.formats.torch_zip.layout import Layouts
from roll_ckpt.load import trust
from roll_ckpt.load.reader import Reader, open_reader
from roll_ckpt.native.image import Lifetime
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import cluster_save, one_file, pending
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.course import Course
from roll_ckpt.save.save import Save

log = logging.getLogger("roll_ckpt")

ALLOWED_GLOBALS = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""The classes that DeepSpeed's files contain and that torch's `weights_only` load does not allow by itself."""


class Stage(enum.Enum):
    """How far DeepSpeed's `save_checkpoint` has come, as our hooks see it."""

    BEFORE = "before its first barrier"
    INSIDE = "past its first barrier"
    AFTER = "at its last barrier, or past it"


class RollCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """What one `DeepSpeedEngine` calls to save and load its files.

    `is_decoupled` returns True and `get_commit_info` None, so DeepSpeed neither writes `latest` nor commits: both
    happen in our transaction. Versions that do not ask are told not to write `latest` (`save.save_checkpoint`).
    DeepSpeed calls `makedirs` and `save` between barriers, so these two never raise: an error becomes this rank's no
    vote, which every rank learns of.
    """

    def __init__(self, engine: DeepSpeedEngine, settings: Settings, cluster: str) -> None:
        super().__init__()
        self.name = "roll_ckpt"
        self.settings = settings
        self.cluster = cluster
        self.ranks = RankGroup.current()
        self.course = Course()
        self._engine = weakref.ref(engine)
        self._cluster_save: ClusterSave | None = None
        self._overlappable: frozenset[int] = frozenset()
        self._borrowed: frozenset[int] = frozenset()
        self._reader: Reader | None = None
        self.weights: Weights | None = None
        """The weights-only load that is under way, where DeepSpeed cannot do it by itself."""
        self.saves: list[Save] = []
        """Saves that may still read this engine's tensors, or whose failure has not been raised yet."""
        self.has_staged = False
        """Whether a save of this engine was staged on all ranks: the first one says on every rank if it was not."""
        self.lone_problem: str | None = None
        """Why a file that belongs to no save could not be written; `save_16bit_model` raises it."""
        self._warned: set[str] = set()
        self._allowed = [*ALLOWED_GLOBALS, *trust.allowed(settings)]
        self._layouts = Layouts(self._allowed)
        self._index, self._indexer = EngineIndex(), Indexer()
        self.stage = Stage.BEFORE
        self.dirs_made = 0
        """How often DeepSpeed has called `makedirs` since `create`."""
        self.verified: Path | None = None
        """A checkpoint of which the ranks have just verified every byte; a load from it does not do so again."""

    @property
    def engine(self) -> DeepSpeedEngine:
        engine = self._engine()
        assert engine is not None, "the DeepSpeed engine of this checkpoint engine is gone"
        return engine

    # DeepSpeed calls these.

    def create(self, info: object) -> None:
        """Notes that DeepSpeed's first barrier is passed. Our wrapper began the attempt before DeepSpeed's code ran."""
        self.stage = Stage.INSIDE
        self.dirs_made = 0

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory and its parents. Never raises; see the class."""
        self.dirs_made += 1
        with self.no_raise():
            writes.make_dirs(Path(path))

    def save(self, state_dict: object, path: str) -> None:
        """Lay out one file and stage it as part of the save. Not durable on return. Never raises; see the class.

        Outside of a save it writes the file at once, and the file is durable on return.
        """
        with self.no_raise():
            # A file outside of a save may have another name each time, so its layout is not kept.
            layouts = Layouts(self._allowed) if self._cluster_save is None else self._layouts
            file = Path(path)
            image, unsafe = layouts.lay_out(file.name, state_dict, file.stem, self._lifetime_of, f"{file.name} ")
            trust.warn_unloadable(self._final(file), unsafe, self._warned)
            if self._cluster_save is None:
                one_file.write_file(Path(path), image, self.settings)
            else:
                image = replace(image, tensors=self._index.of_file(Path(path).name, image.pieces))
                self._cluster_save.stage(Path(path), image, overlap=bool(self._overlappable))

    def _final(self, path: Path) -> Path:
        """Where a file will lie once the save that writes it is committed."""
        if self._cluster_save is None:
            return path
        attempt = self._cluster_save.attempt
        return attempt.output_dir / path.relative_to(attempt.directory)

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state in the file `path`, with every digest checked. This rank alone; blocks.

        Raises:
            FileNotFoundError: there is no such file.
            Damaged: a block differs from its digest, or a safe load refuses the file.
        """
        if self._reader is not None:
            state = self._reader.load(Path(path), map_location)
            if self.weights is not None:
                self.weights.state = state
            return state
        with open_reader(Path(path).parent, self.settings, ALLOWED_GLOBALS) as reader:
            return reader.load(Path(path), map_location)

    def commit(self, info: object) -> bool:
        """Nothing. DeepSpeed before 0.17.1 calls it where later versions ask `is_decoupled`."""
        self.stage = Stage.AFTER
        return True

    def is_decoupled(self) -> bool:
        """True. DeepSpeed asks when a save has only its last barrier before it, which is noted."""
        self.stage = Stage.AFTER
        return True

    def get_commit_info(self) -> None:
        return None

    def preserves_storage_sharing(self) -> bool:
        return False

    def cleanup(self) -> None:
        """DeepSpeed calls this when the engine is destroyed; the same as `fence`."""
        self.fence()

    # Our wrappers of the engine's methods call these.

    def expanded(self, given: str) -> str:
        """`given`, a directory in a script, with `~` and variables expanded, which DeepSpeed does not do; logs it once.

        What cannot be expanded stays as it is.
        """
        path = names.expand(given, strict=False)
        if path == os.fspath(given):
            return given
        if given not in self._warned:
            self._warned.add(given)
            log.info("cluster %s: %r is taken as %s", self.cluster, given, path)
        return path

    def fence(self, changes: cluster_save.Changes = lambda storage: True) -> None:
        """Block until no save of this engine reads its tensors any more. This rank alone.

        Does not wait for the disk, except for tensors that were offloaded to the host when their save began and whose
        storage the caller is about to change (`changes(storage)`): these are waited for until they are written.

        Raises:
            SaveFailed: an earlier save failed in the background and `fail_training` is set.
        """
        pending.wait_copied(self.saves, changes)

    @contextmanager
    def staging(self, save: Save) -> Iterator[ClusterSave]:
        """Inside the block, the files that DeepSpeed saves become this engine's part of `save`, which is yielded."""
        cluster_save = save.add_cluster(self.cluster, {})
        self.saves.append(save)
        try:
            with self.no_raise(cluster_save):
                cluster_save.facts |= describe(self.engine)
                cluster_save.parameters, cluster_save.indexer = self._index.look(self.engine), self._indexer
                if self.settings.staging.overlap:
                    self._overlappable = overlappable_storages(self.engine)
                    self._borrowed = self._overlappable & offloaded_storages(self.engine)
                    cluster_save.live = live_tensors(self.engine)
                if self._borrowed:
                    get_accelerator().synchronize()  # offload_states(non_blocking=True) may still be copying there
            self._cluster_save = cluster_save
            self.stage = Stage.BEFORE
            yield cluster_save
        finally:
            self._cluster_save = None
            self._overlappable = self._borrowed = frozenset()

    @contextmanager
    def reading(self, reader: Reader, weights: Weights | None) -> Iterator[None]:
        """Inside the block, the files that DeepSpeed loads come from `reader`, and the weights from `weights`."""
        self._reader, self.weights = reader, weights
        try:
            with loading(weights):
                yield
        finally:
            self._reader = self.weights = None

    def warn_universal(self, load_dir: str) -> None:
        """Warn once that universal checkpoints are not verified: DeepSpeed reads them past its checkpoint engine."""
        if "load_universal" not in self._warned:
            self._warned.add("load_universal")
            log.warning(
                "%s: a universal checkpoint (load_universal) is loaded by DeepSpeed itself; its contents are not "
                "verified, and its pickles may run code. Load only what you trust",
                load_dir,
            )

    def load_weights(self, stock: Callable[..., Any], strict: bool, custom_load_fn: Callable[..., Any] | None) -> None:
        """In place of DeepSpeed's `load_module_state_dict`, which is `stock`; see `Weights.load_module`."""
        assert self.weights is not None and self._reader is not None
        load = partial(self._reader.load, map_location="cpu")
        self.weights.load_module(stock, load, strict=strict, custom_load_fn=custom_load_fn)

    @contextmanager
    def no_raise(self, cluster_save: ClusterSave | None = None) -> Iterator[None]:
        """Keep an error of the block from reaching DeepSpeed's code, where the other ranks wait at a barrier.

        Within a save the error becomes this rank's no vote. Outside of one it is logged and kept in `lone_problem`.
        """
        try:
            yield
        except Exception as problem:
            cluster_save = cluster_save or self._cluster_save
            if cluster_save is not None:
                cluster_save.fail(problem)
            else:
                self.lone_problem = f"{type(problem).__name__}: {problem}"
                log.error(
                    "cluster %s: rank %d: a file outside of any checkpoint was not written: %s",
                    self.cluster,
                    self.ranks.rank,
                    problem,
                )

    def _lifetime_of(self, storage: torch.UntypedStorage) -> Lifetime:
        if storage._cdata in self._borrowed:
            return Lifetime.UNTIL_WRITTEN
        return Lifetime.UNTIL_FENCE if storage._cdata in self._overlappable else Lifetime.UNTIL_SAVE_RETURNS


def no_changes(storage: torch.UntypedStorage) -> bool:
    """For `RollCheckpointEngine.fence`: the caller changes no storage that a save has borrowed."""
    return False
