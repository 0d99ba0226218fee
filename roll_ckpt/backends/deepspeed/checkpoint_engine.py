"""The DeepSpeed backend: `engine.save_checkpoint()` and its kin go through us.

`install()` wraps methods of `DeepSpeedEngine`. An engine whose config has `checkpoint.roll_ckpt`, or that a
`Cluster` attached, gets our `CheckpointEngine`; every other engine behaves as before. Stock code still decides
what a checkpoint holds and how its files are called; we decide where they go (an attempt directory that is
renamed into place when all ranks have voted), how their bytes get there, and when `latest` is written.

Written against DeepSpeed 0.19 (`runtime/engine.py`, `runtime/checkpoint_engine/checkpoint_engine.py`).
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from roll_ckpt.backends.deepspeed.facts import describe, parameters_of
from roll_ckpt.backends.deepspeed.load import check_world, tags_to_load
from roll_ckpt.backends.deepspeed.refusals import refuse_parts
from roll_ckpt.backends.deepspeed.tensors import estimate_bytes, offloaded_storages, overlappable_storages
from roll_ckpt.config import Settings
from roll_ckpt.disk import tree, writes
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import Damaged, RanksDisagree, SaveFailed
from roll_ckpt.formats.torch_zip.layout import Layouts
from roll_ckpt.load import trust
from roll_ckpt.load.checkpoint import OpenedCheckpoint, as_unreadable
from roll_ckpt.load.compare import compare_models
from roll_ckpt.load.reader import Reader, open_reader
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.native.image import Lifetime
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import claims, cluster_save, one_file, pending
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import retention

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
        self.world = RankGroup.current()
        self._engine = weakref.ref(engine)
        self._ticket: ClusterSave | None = None
        self._stable: frozenset[int] = frozenset()
        self._leased: frozenset[int] = frozenset()
        self._reader: Reader | None = None
        self._saves: list[Save] = []
        self._loose_problem: str | None = None
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
        with self._no_raise():
            writes.make_dirs(Path(path))

    def save(self, state_dict: object, path: str) -> None:
        """Lay out and stage one file. Outside of `save_checkpoint`: write it at once, durable on return."""
        with self._no_raise():
            # A file by itself may have another name each time: its layout is not kept.
            layouts = Layouts(self._allowed) if self._ticket is None else self._layouts
            image, unsafe = layouts.lay_out(Path(path).name, state_dict, Path(path).stem, self._until)
            trust.warn_unloadable(Path(path), unsafe, self._warned)
            if self._ticket is None:
                one_file.write_file(Path(path), image, self.settings)
            else:
                self._ticket.stage(Path(path), image, overlap=bool(self._stable))

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
        pending.wait_copied(self._saves, changes)

    def save_checkpoint(
        self,
        stock: Callable[..., Any],
        save_dir: str,
        tag: object = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """`engine.save_checkpoint` as one transaction on `save_dir/tag`; every rank calls.

        With `async_save` it returns once all but the stable tensors are copied, otherwise when committed. False: the
        disk refused before the first byte.
        """
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        self.fence(nothing)
        name = str(tag) if tag is not None else f"global_step{self.engine.global_steps}"
        request = Request(
            Path(save_dir), name, self.engine.global_steps, {self.cluster: self.world.size}, None, save_latest
        )
        nbytes, problem = 0, None
        try:
            names.check_name("tag", name)
            nbytes = estimate_bytes(self.engine)
        except Exception as found:
            problem = str(found)
        save = begin(self.world, request, self.settings, nbytes=nbytes, problem=problem, on_commit=self._prune)
        if not save.begun:
            self._saves.append(save)  # `fail_training` raises it at the next fence
            if not self.settings.async_save:
                save.wait()
            return False
        with save.staging():
            arguments = {
                "client_state": client_state or {},
                "save_latest": save_latest,
                "exclude_frozen_parameters": exclude_frozen_parameters,
            }
            self.run_stock(stock, save, save.attempt.directory, name, arguments)
        if not self.settings.async_save:
            pending.wait_together(self.world, save, uploaded=True)
        return True

    def run_stock(
        self, stock: Callable[..., Any], save: Save, directory: Path, tag: str, arguments: dict[str, Any]
    ) -> ClusterSave:
        """Let stock `save_checkpoint` write into `directory`, inside the attempt of `save`."""
        ticket = save.ticket(self.cluster, {})
        self._saves.append(save)
        try:
            with self._no_raise(ticket):
                ticket.facts |= describe(self.engine)
                ticket.parameters = parameters_of(self.engine)
                if self.settings.staging.overlap:
                    self._stable = overlappable_storages(self.engine)
                    self._leased = self._stable & offloaded_storages(self.engine)
                if self._leased:
                    get_accelerator().synchronize()  # offload_states(non_blocking=True) may still be copying there
            self._ticket = ticket
            stock(self.engine, str(directory), tag=tag, **arguments)
        finally:
            self._ticket = None
            self._stable = self._leased = frozenset()
        return ticket

    def save_16bit_model(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`engine.save_16bit_model`: blocks, durable on return; a failure is raised on every rank.

        Raises:
            UnsupportedError: rank 0 holds a part of the model only. Nothing was written.
        """
        refuse_parts(self.engine)
        self._loose_problem = None
        result = stock(self.engine, *args, **kwargs)

        def report() -> None:
            if self._loose_problem is not None:
                raise SaveFailed(
                    f"save_16bit_model: rank {self.world.rank}: {self._loose_problem}; an older file is untouched"
                )

        self.world.together(report, self.settings.commit_timeout_s)
        return result

    def load_checkpoint(
        self, stock: Callable[..., Any], load_dir: str, tag: object = None, *args: Any, **kwargs: Any
    ) -> Any:
        """`engine.load_checkpoint`: waits for pending saves, checks the model and every byte.

        Without a tag it takes the one that `latest` names, or else the newest, and falls back past damaged ones to
        the newest sound one, saying so.

        Raises:
            Damaged: the tag that was asked for is damaged, or all are. Unreadable: the disk does not tell whether one
                is; nothing older is taken in its place. RanksDisagree: the ranks do not see one and the same
                checkpoint. On every rank, before anything is loaded.
        """
        self.fence()
        pending.wait_pending()
        if self.engine.load_universal_checkpoint():
            return stock(self.engine, load_dir, tag, *args, **kwargs)
        refused: list[str] = []
        for name in self._agree_on_tags(Path(load_dir), None if tag is None else str(tag)):
            told = inspect.signature(stock).bind(self.engine, load_dir, name, *args, **kwargs)
            told.apply_defaults()
            with ExitStack() as stack:
                try:
                    self._reader = self._open_checked(stack, Path(load_dir), told.arguments)
                except Damaged as problem:
                    if tag is not None:
                        raise
                    log.error("%s. Falling back to the newest sound checkpoint.", problem)
                    refused.append(name)
                    continue
                if refused:
                    log.warning("%s: loading %s; refused: %s", load_dir, name, ", ".join(refused))
                try:
                    return stock(self.engine, load_dir, name, *args, **kwargs)
                finally:
                    self._reader = None
        if refused:
            raise Damaged(
                f"{load_dir}: none of its checkpoints is sound ({', '.join(refused)}); see "
                f"`roll-ckpt verify {load_dir}`"
            )
        return stock(self.engine, load_dir, tag, *args, **kwargs)

    def _open_checked(self, stack: ExitStack, load_dir: Path, told: Mapping[str, Any]) -> Reader:
        """A reader of the tag that `told` names, checked as far as it can be; open until `stack` is left."""
        directory = load_dir / told["tag"]
        reader = stack.enter_context(open_together(self.world, directory, self.settings, ALLOWED_GLOBALS))
        if reader.unit is not None:
            self._check_together(reader.unit, load_dir, told)
            reader.cached = True
        return reader

    def _agree_on_tags(self, load_dir: Path, tag: str | None) -> list[str]:
        """The tags to load, the one to try first first, the same on every rank; none where there is no such directory.
        What a killed run left there is finished or discarded first."""

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            asked = {post["tag"] for post in posts}
            if len(asked) > 1:
                raise RanksDisagree(f"{load_dir}: ranks ask to load different tags: {sorted(map(str, asked))}")
            claims.recover(load_dir, self.settings, {self.cluster: self.world.size})
            with as_unreadable(load_dir):
                tags = tags_to_load(load_dir) if tag is None else [tag]
                patience = ReadRetries()
                return {"tags": [name for name in tags if patience.again(partial(tree.is_dir, load_dir / name))]}

        found: list[str] = self.world.agree({"tag": tag}, decide, self.settings.commit_timeout_s)["tags"]
        return found

    def _check_together(self, unit: OpenedCheckpoint, load_dir: Path, told: Mapping[str, Any]) -> None:
        """Refuse on every rank another model, another world's optimizer partitions, and damaged files."""
        clusters, where = unit.manifest.clusters, str(load_dir / told["tag"])
        cluster = load_dir.resolve().name if load_dir.resolve().name in clusters else next(iter(clusters))

        def check() -> None:
            resuming = told["load_optimizer_states"] and not told["load_module_only"]
            if resuming and self.engine.zero_optimization():
                check_world(clusters[cluster], self.world.size, where)
            if told["custom_load_fn"] is None:
                saved = unit.parameters(cluster, self.world.rank)
                compare_models(saved, parameters_of(self.engine), where, strict=told["load_module_strict"])

        self.world.together(check, self.settings.commit_timeout_s)
        if self.verified != unit.directory:
            check_bytes(self.world, unit.directory)

    def _prune(self, save: Save) -> None:
        if save.lead and self.settings.max_ckpt_to_keep:
            output_dir = save.attempt.output_dir
            retention.prune(output_dir, claims.epoch_of(output_dir), keep=self.settings.max_ckpt_to_keep)

    @contextmanager
    def _no_raise(self, ticket: ClusterSave | None = None) -> Iterator[None]:
        """Inside stock code's barriers: an error becomes a no vote, or what `save_16bit_model` reports."""
        try:
            yield
        except Exception as problem:
            ticket = ticket or self._ticket
            if ticket is not None:
                ticket.fail(problem)
            else:
                self._loose_problem = f"{type(problem).__name__}: {problem}"

    def _until(self, storage: torch.UntypedStorage) -> Lifetime:
        if storage._cdata in self._leased:
            return Lifetime.WRITTEN
        return Lifetime.FENCE if storage._cdata in self._stable else Lifetime.RETURN


def nothing(storage: torch.UntypedStorage) -> bool:
    return False
