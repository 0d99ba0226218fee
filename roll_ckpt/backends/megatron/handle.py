"""The handle that `attach` returns: a Megatron model that is saved and loaded by itself, outside of a pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)

from roll_ckpt import names
from roll_ckpt.backends.megatron import restoring
from roll_ckpt.backends.megatron.binding import Binding
from roll_ckpt.backends.megatron.facts import (
    check_sharding_type,
    content_metadata_of,
    describe,
)
from roll_ckpt.backends.megatron.fence import Fence, live_tensors, overlappable_storages
from roll_ckpt.backends.megatron.index import Source
from roll_ckpt.backends.megatron.load import check_complete
from roll_ckpt.backends.megatron.save import Prepared, prepare, stage, transact
from roll_ckpt.backends.megatron.strategy import SaveStrategy
from roll_ckpt.config import Settings
from roll_ckpt.disk.missing import if_there
from roll_ckpt.errors import UnsupportedError
from roll_ckpt.formats import manifests
from roll_ckpt.load.checkpoint import as_unreadable
from roll_ckpt.load.newest import newest_sound
from roll_ckpt.load.reader import Reader
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import arena, gate, pending
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.course import Course
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import listing

log = logging.getLogger("roll_ckpt")


class MegatronHandle(Binding):
    """A Megatron model, its optimizer, scheduler and random states on this rank, saved and loaded as one.

    Made by `attach`. Every rank calls `save`, `find` and `load`; `fence` concerns one rank alone.
    """

    def __init__(
        self,
        model: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        settings: Settings,
        cluster: str,
        sharding_type: str,
        save_only_model: bool = False,
    ) -> None:
        super().__init__(model, optimizer, scheduler, settings, cluster, sharding_type, save_only_model)
        self._verified: Path | None = None
        self.course = Course()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = SaveStrategy(settings=settings)
        strategy.source = lambda: Source.of(self.model, self.optimizer)
        self.strategy = FullyParallelSaveStrategyWrapper(strategy, group)
        self._fence = Fence.of(optimizer, self.model)

    @property
    def content_metadata(self) -> dict[str, Any]:
        """What a stock `dist_checkpointing.save` of this model's state records beside it."""
        return content_metadata_of(self.sharding_type)

    def warm(self) -> None:
        """Make the staging arena for this model's saves, in the background, so that the first save need not."""
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        arena.warm(self.settings, self.estimate_bytes(), device)

    def save(self, directory: str | os.PathLike[str], step: int) -> Save:
        """Save everything bound as the checkpoint `directory`, in one transaction; every rank calls.

        Returns when the checkpoint is committed and durable. With `async_save` it returns earlier, when everything but
        the overlappable tensors is copied; the optimizer's step waits for these, and `wait()` of the result for the
        commit.

        Raises:
            As `backends.megatron.save.save`.
            SaveFailed: also of an earlier save that failed in the background, if `fail_training` is set.
        """
        metadata = content_metadata_of(self.sharding_type)

        def prepare_it() -> Prepared:
            if self.alone:
                self.fence()
            else:  # collectives follow, in which other ranks would wait for one that raises here
                RankGroup.current().run_on_all_ranks(self.fence, self.settings.commit_timeout_s)
            return self.prepare(self.state(step))

        save = transact(
            prepare_it,
            lambda save, cluster_save, prepared: self.stage(
                save, cluster_save, save.attempt.checkpoint_dir, prepared.state, prepared
            ),
            names.absolute(directory),
            step=step,
            settings=self.settings,
            cluster=self.cluster,
            facts=lambda: describe(metadata),
            save_latest=True,
            course=self.course,
            strategy=self.strategy,
        )
        if not save.begun:
            self._fence.add(save)  # `fail_training` raises it at the next fence
        return save

    def prepare(self, state: dict[str, Any]) -> Prepared:
        """Take `state`, which `Binding.state` made, apart for a save; see `save.prepare`. No collective."""
        return prepare(state, self.strategy, content_metadata_of(self.sharding_type))

    def stage(
        self,
        save: Save,
        cluster_save: ClusterSave,
        directory: Path,
        state: dict[str, Any],
        prepared: Prepared | None = None,
    ) -> None:
        """Stage `state`, which `Binding.state` made, as a part of `save`; see `save.stage`. Every rank calls.

        Overlappable tensors may still be copied when it returns; `fence` waits for them.
        """
        self._fence.add(save)
        overlap = self.settings.staging.overlap
        overlappable = overlappable_storages(self.model, self.optimizer) if overlap else frozenset()
        if overlappable:
            cluster_save.live = live_tensors(self.model, self.optimizer)
        stage(
            cluster_save,
            directory,
            state,
            self.strategy,
            content_metadata_of(self.sharding_type),
            prepared=prepared,
            lifetime_of=lambda storage: storage._cdata in overlappable,
        )

    def fence(self) -> None:
        """Block until no save reads this model's tensors any more; does not wait for the disk. This rank alone.

        Raises:
            SaveFailed: an earlier save failed in the background and `fail_training` is set.
        """
        self._fence.wait()

    def find(self, output_dir: str | os.PathLike[str]) -> Path | None:
        """The newest sound checkpoint in `output_dir`, the same on every rank; None if there is no checkpoint.

        Every rank calls; blocks. It verifies every
        byte, so that `load` of the result need not; damaged checkpoints are logged by name and passed over.

        Raises, on every rank:
            Damaged: there are checkpoints, and none is sound.
            Unreadable: the disk does not tell whether a checkpoint is sound; no older one is taken in its place.
            RanksDisagree: the ranks see different checkpoints.
        """
        path, ranks, timeout_s = names.absolute(output_dir), RankGroup.current(), self.settings.commit_timeout_s
        with gate.entered(ranks, f"find in {path}", timeout_s):
            return self._find(path, ranks, timeout_s)

    def _find(self, path: Path, ranks: RankGroup, timeout_s: float) -> Path | None:
        pending.wait_pending()

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            with as_unreadable(path):
                return {"names": [manifest.name for manifest in listing.newest_first(path)]}

        def open_verified(stack: ExitStack, checkpoint_dir: Path) -> Reader:
            reader = stack.enter_context(open_together(ranks, checkpoint_dir, self.settings))
            check_bytes(ranks, checkpoint_dir, timeout_s)
            return reader

        found = ranks.decide_on_rank0({}, decide, timeout_s)["names"]
        with newest_sound(path, found, open_verified) as opened:
            self._verified = None if opened is None else path / opened[0]
        return self._verified

    def load(self, directory: str | os.PathLike[str]) -> int:
        """Restore everything bound from the checkpoint `directory`, and return its step. Every rank calls; blocks.

        Random states are restored only if the parallel layout is the one that saved; otherwise a warning is logged.

        Raises:
            As `backends.megatron.load.load`.
            UnsupportedError: the optimizer's sharding type cannot be loaded in this layout, or `save_only_model` is
                set. Nothing was read.
        """
        path, ranks, timeout_s = names.absolute(directory), RankGroup.current(), self.settings.commit_timeout_s
        with gate.entered(ranks, f"load {path}", timeout_s):
            self.fence()
            pending.wait_pending()
            ranks.run_on_all_ranks(lambda: check_complete(path), timeout_s)
            step: int = self.restore(path, verified=path == self._verified)["iteration"]
            self.course.resumed(if_there(partial(manifests.read, path)))
        return step

    def restore(self, path: Path, *, verified: bool) -> dict[str, Any]:
        """Restore everything bound from `path`, which is complete, and return the state that it held; see `load`."""
        return restoring.restore(self, path, verified=verified)

    def check(self, path: Path) -> None:
        """Raise unless this job can load `path`, a checkpoint that we saved; loads nothing. No collective.

        Each rank inspects its share of the pickled objects.
        """
        restoring.check(self, path)


def attach(
    model: Any,
    optimizer: Any,
    scheduler: Any = None,
    *,
    settings: Settings | None = None,
    cluster: str = "model",
    sharding_type: str = "dp_reshardable",
    save_only_model: bool = False,
) -> MegatronHandle:
    """Bind a model to its optimizer and scheduler, to be saved and loaded as one; every rank calls. No collective.

    From then on the optimizer's step, and whatever else changes its tensors, waits for the copies of pending saves.

    Args:
        model: the module, or the list of this rank's virtual pipeline stages, in DistributedDataParallel or bare.
        optimizer: what `get_megatron_optimizer` returned.
        scheduler: the `OptimizerParamScheduler`, if there is one.
        settings: how to save; default `Settings()`.
        cluster: the name under which the manifest lists the model.
        sharding_type: Megatron's `distrib_optim_sharding_type`; see `facts.RESHARDABLE` for the choice.
        save_only_model: save the weights alone; such a checkpoint cannot be resumed.

    Raises:
        ConfigError: `cluster` cannot be used as a name.
        UnsupportedError: Megatron's FSDP, or a sharding type that cannot be saved.
    """
    names.check_name("cluster", cluster)
    check_sharding_type({"distrib_optim_sharding_type": sharding_type})
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    for chunk in chunks:
        config = getattr(chunk, "ddp_config", None)
        if getattr(config, "use_megatron_fsdp", False):
            raise UnsupportedError("roll_ckpt does not support Megatron's FSDP in this version: it was not tested")
    return MegatronHandle(chunks, optimizer, scheduler, settings or Settings(), cluster, sharding_type, save_only_model)
