"""A model with its optimizer, scheduler and random states, by itself or as a cluster of a pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
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
from roll_ckpt.backends.megatron.fence import Fence, overlappable_storages
from roll_ckpt.backends.megatron.load import check_complete
from roll_ckpt.backends.megatron.save import Prepared, prepare, stage, transact
from roll_ckpt.backends.megatron.strategy import SaveStrategy
from roll_ckpt.config import Settings
from roll_ckpt.errors import UnsupportedError
from roll_ckpt.load.checkpoint import as_unreadable
from roll_ckpt.load.newest import newest_sound
from roll_ckpt.load.reader import Reader
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import arena, claims, pending
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import listing

log = logging.getLogger("roll_ckpt")


class MegatronHandle(Binding):
    """A Megatron model, its optimizer, scheduler and random states on this rank, to save and load as one.

    Made by `attach`. Every rank calls all methods.
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
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.strategy = FullyParallelSaveStrategyWrapper(SaveStrategy(settings), group)
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
        """See `save` of this module. With `async_save` it returns while what only the optimizer's step changes is
        still being copied; the step waits for that.

        Raises:
            SaveFailed: also of an earlier save, if `fail_training` is set.
        """
        self.fence()
        told = content_metadata_of(self.sharding_type)
        made = transact(
            lambda: self.prepare(self.state(step)),
            lambda save, cluster_save, prepared: self.stage(
                save, cluster_save, save.attempt.checkpoint_dir, prepared.state, prepared
            ),
            Path(directory).absolute(),
            step=step,
            settings=self.settings,
            cluster=self.cluster,
            facts=lambda: describe(told),
            save_latest=True,
        )
        if not made.begun:
            self._fence.add(made)  # `fail_training` raises it at the next fence
        return made

    def prepare(self, state: dict[str, Any]) -> Prepared:
        """`prepare` of this module for `state` of this model."""
        return prepare(state, self.strategy, content_metadata_of(self.sharding_type))

    def stage(
        self,
        save: Save,
        cluster_save: ClusterSave,
        directory: Path,
        state: dict[str, Any],
        prepared: Prepared | None = None,
    ) -> None:
        """`stage` of this module for `state` of this model, copied under training; `fence` ends that."""
        self._fence.add(save)
        late = overlappable_storages(self.model, self.optimizer) if self.settings.staging.overlap else frozenset()
        stage(
            cluster_save,
            directory,
            state,
            self.strategy,
            content_metadata_of(self.sharding_type),
            prepared=prepared,
            lifetime_of=lambda storage: storage._cdata in late,
        )

    def fence(self) -> None:
        """Wait until no save reads this model's tensors any more; not for the disk.

        Raises:
            SaveFailed: an earlier save failed in the background and `fail_training` is set.
        """
        self._fence.wait()

    def find(self, output_dir: str | os.PathLike[str]) -> Path | None:
        """The newest sound checkpoint in `output_dir`, the same on every rank; None if there is none. What a killed run
        left there is finished or discarded first; damaged ones are passed over, by name. Every rank calls; reads every
        byte, which `load` of what is returned does not do once more.

        Raises:
            Damaged: there are checkpoints, and none is sound. Unreadable: the disk does not tell whether one is;
                nothing older is taken in its place. RanksDisagree: the ranks do not see one and the same.
        """
        path, ranks = Path(output_dir).absolute(), RankGroup.current()
        pending.wait_pending()

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            claims.recover(path, self.settings, {self.cluster: ranks.size})
            with as_unreadable(path):
                return {"names": [manifest.name for manifest in listing.newest_first(path)]}

        def open_verified(stack: ExitStack, checkpoint_dir: Path) -> Reader:
            reader = stack.enter_context(open_together(ranks, checkpoint_dir, self.settings))
            check_bytes(ranks, checkpoint_dir)
            return reader

        names = ranks.decide_on_rank0({}, decide, self.settings.commit_timeout_s)["names"]
        with newest_sound(path, names, open_verified) as found:
            self._verified = None if found is None else path / found[0]
        return self._verified

    def load(self, directory: str | os.PathLike[str]) -> int:
        """Restore everything from `directory` and return its step; see `load` of this module.

        The random states come back where the parallel layout is the one that saved; elsewhere a warning says so.

        Raises:
            UnsupportedError: the optimizer was saved in a form that this layout cannot load, or `save_only_model` is
                set. Nothing was read.
        """
        path = Path(directory).absolute()
        self.fence()
        pending.wait_pending()
        RankGroup.current().run_on_all_ranks(lambda: check_complete(path), self.settings.commit_timeout_s)
        step: int = self.restore(path, verified=path == self._verified)["iteration"]
        return step

    def restore(self, path: Path, *, verified: bool) -> dict[str, Any]:
        """Load `path`, which is complete, and return the state that it held; see `load`."""
        return restoring.restore(self, path, verified=verified)

    def check(self, path: Path) -> None:
        """Raise unless `path`, a checkpoint of ours, can be loaded here; nothing is loaded. No collective: a rank
        looks at its share of the pickled objects."""
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
    """Bind a model (a module, or the list of its virtual pipeline stages), its optimizer and scheduler.

    `form` is Megatron's `distrib_optim_sharding_type`, see `RESHARDABLE`; with `save_only_model` the weights alone
    are saved. The optimizer's step, and what else changes its tensors, waits for the copies of pending saves. No
    collective.

    Raises:
        UnsupportedError: Megatron's FSDP, or a form that cannot be saved.
    """
    names.check_name("cluster", cluster)
    check_sharding_type({"distrib_optim_sharding_type": sharding_type})
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    for chunk in chunks:
        config = getattr(chunk, "ddp_config", None)
        if getattr(config, "use_megatron_fsdp", False):
            raise UnsupportedError("roll_ckpt does not support Megatron's FSDP in this version: it was not tried")
    return MegatronHandle(chunks, optimizer, scheduler, settings or Settings(), cluster, sharding_type, save_only_model)
