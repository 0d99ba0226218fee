"""A model with its optimizer, scheduler and random states, by itself or as a cluster of a pipeline."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.distributed import DistributedDataParallel

from roll_ckpt import names
from roll_ckpt.backends.megatron.facts import (
    FRAMEWORK,
    RESHARDABLE,
    check_sharding_type,
    content_metadata_of,
    describe,
    parallel_layout,
)
from roll_ckpt.backends.megatron.fence import Fence, distributed_parts, gathers_late, overlappable_storages
from roll_ckpt.backends.megatron.load import check_complete, check_content, load, recorded, told_by_stock
from roll_ckpt.backends.megatron.save import Prepared, prepare, stage, transact
from roll_ckpt.backends.megatron.strategy import SaveStrategy
from roll_ckpt.config import Settings
from roll_ckpt.errors import Damaged, ModelMismatch, SaveFailed, UnsupportedError
from roll_ckpt.load.checkpoint import OpenedCheckpoint, as_unreadable
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import claims, pending
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import listing

log = logging.getLogger("roll_ckpt")

_RNG = "roll_ckpt.rng"
_OPTIMIZER_BYTES = 12  # of one parameter: a main copy and two moments in fp32


class MegatronHandle:
    """A Megatron model, its optimizer, scheduler and random states on this rank, to save and load as one.

    Made by `attach`. All methods are called by every rank.
    """

    framework = FRAMEWORK

    def __init__(
        self,
        model: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        settings: Settings,
        cluster: str,
        form: str,
        save_only_model: bool = False,
    ) -> None:
        self.model = list(model)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.settings = settings
        self.cluster = cluster
        self.form = form
        self._save_only_model = save_only_model
        self._verified: Path | None = None
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.strategy = FullyParallelSaveStrategyWrapper(SaveStrategy(settings), group)
        self._fence = Fence.of(optimizer, self.model)

    def estimate_bytes(self) -> int:
        """About what this rank will write, in bytes, without making the state."""
        parameters = [parameter for chunk in self.model for parameter in chunk.parameters()]
        nbytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        if not self._save_only_model:
            nbytes += sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _OPTIMIZER_BYTES
        return int(nbytes // parallel_layout()["dp"])

    def state(
        self, step: int = 0, *, form: str | None = None, loading: bool = False, with_rng: bool = True
    ) -> dict[str, Any]:
        """The sharded state of everything attached. Unless `loading`, `fully_reshardable` gathers the optimizer on
        data parallel rank 0, and parameters whose gather is overlapped with the forward pass are gathered.

        Raises:
            SaveFailed: the optimizer has made no step yet; on every rank where a collective would follow.
        """
        told = content_metadata_of(form or self.form)
        if not loading:
            self._ready_to_save()
        state: dict[str, Any] = {key: chunk.sharded_state_dict(metadata=told) for key, chunk in self._chunks().items()}
        if self._save_only_model:
            return state
        whole = dict(state) if len(self.model) > 1 else state["model"]
        state["optimizer"] = self.optimizer.sharded_state_dict(whole, is_loading=loading, metadata=told)
        state |= {"iteration": step, "checkpoint_version": 3.0}
        if self.scheduler is not None:
            state["opt_param_scheduler"] = self.scheduler.state_dict()
        if with_rng:
            state["rng_state"] = _rng_object()
        return state

    def save(self, directory: str | os.PathLike[str], step: int) -> Save:
        """See `save` of this module. With `async_save` it returns while what only the optimizer's step changes is
        still being copied; the step waits for that.

        Raises:
            SaveFailed: also of an earlier save, if `fail_training` is set.
        """
        self.fence()
        told = content_metadata_of(self.form)
        made = transact(
            lambda: self.prepare(self.state(step)),
            lambda ticket, unit, prepared: self.stage(ticket, unit, prepared.state, prepared),
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

    @property
    def alone(self) -> bool:
        """Whether a rank makes its state without the others: nothing is gathered for it."""
        return self.form != "fully_reshardable" and not any(gathers_late(chunk) for chunk in self.model)

    def prepare(self, state: dict[str, Any]) -> Prepared:
        """`prepare` of this module for `state` of this model."""
        return prepare(state, self.strategy, content_metadata_of(self.form))

    def stage(
        self, ticket: ClusterSave, directory: Path, state: dict[str, Any], prepared: Prepared | None = None
    ) -> None:
        """`stage` of this module for `state` of this model, copied under training; `fence` ends that."""
        self._fence.add(ticket.save)
        stable = overlappable_storages(self.model, self.optimizer) if self.settings.staging.overlap else frozenset()
        stage(
            ticket,
            directory,
            state,
            self.strategy,
            content_metadata_of(self.form),
            prepared=prepared,
            stable=lambda storage: storage._cdata in stable,
        )

    def fence(self) -> None:
        """Wait until no save reads this model's tensors any more; not for the disk.

        Raises:
            SaveFailed: an earlier save failed in the background and `fail_training` is set.
        """
        self._fence.wait()

    def _ready_to_save(self) -> None:
        if not self._save_only_model:
            if self.alone:
                self._check_stepped()
            else:  # a rank that stays away from a gather would leave the others in it
                RankGroup.current().together(self._check_stepped, self.settings.commit_timeout_s)
        for chunk in self.model:
            if gathers_late(chunk):
                chunk.start_param_sync(force_sync=True)

    def _check_stepped(self) -> None:
        for part in distributed_parts(self.optimizer):
            inner = part.optimizer
            if any(not inner.state.get(parameter) for group in inner.param_groups for parameter in group["params"]):
                raise SaveFailed(
                    f"cluster {self.cluster}: the optimizer has made no step yet (or has skipped them all), it has "
                    f"no moments, and Megatron can neither gather it nor load it back from {self.form}; save after "
                    "the first step"
                )

    def find(self, output_dir: str | os.PathLike[str]) -> Path | None:
        """The newest sound checkpoint in `output_dir`, the same on every rank; None if there is none. What a killed run
        left there is finished or discarded first; damaged ones are passed over, by name. Every rank calls; reads every
        byte, which `load` of what is returned does not do once more.

        Raises:
            Damaged: there are checkpoints, and none is sound. Unreadable: the disk does not tell whether one is;
                nothing older is taken in its place. RanksDisagree: the ranks do not see one and the same.
        """
        path, world = Path(output_dir).absolute(), RankGroup.current()
        pending.wait_pending()

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            claims.recover(path, self.settings, {self.cluster: world.size})
            with as_unreadable(path):
                return {"names": [found.name for found in listing.newest_first(path)]}

        refused: list[str] = []
        for name in world.agree({}, decide, self.settings.commit_timeout_s)["names"]:
            try:
                with open_together(world, path / name, self.settings):
                    check_bytes(world, path / name)
            except Damaged as problem:
                log.error("%s. Falling back to the checkpoint before it.", problem)
                refused.append(name)
                continue
            if refused:
                log.warning("%s: found %s; refused: %s", path, name, ", ".join(refused))
            self._verified = path / name
            return self._verified
        if refused:
            raise Damaged(
                f"{path}: none of its checkpoints is sound ({', '.join(refused)}); see `roll-ckpt verify {path}`"
            )
        return None

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
        RankGroup.current().together(lambda: check_complete(path), self.settings.commit_timeout_s)
        step: int = self.restore(path, verified=path == self._verified)["iteration"]
        return step

    def restore(self, path: Path, *, verified: bool) -> dict[str, Any]:
        """Load `path`, which is complete, and return the state that it held; see `load`."""
        self._check_resumes(path)
        with open_together(RankGroup.current(), path, self.settings) as reader:
            return self._restore(path, recorded(reader.unit, self.cluster), verified)

    def _restore(self, path: Path, saved: Mapping[str, Any], verified: bool) -> dict[str, Any]:
        self._check_layout(path, saved)
        told = dict(saved)
        if not saved:
            RankGroup.current().together(
                lambda: told.update(told_by_stock(path, self.settings)), self.settings.commit_timeout_s
            )
        check_sharding_type(told)
        form = told.get("distrib_optim_sharding_type")
        with_rng = saved.get("layout") == parallel_layout()
        if not with_rng:
            log.warning("%s: saved by another parallel layout, or by stock code: random states are not restored", path)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        try:
            loaded = load(
                self.state(form=form, loading=True, with_rng=with_rng),
                path,
                settings=self.settings,
                cluster=self.cluster,
                strategy=FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group),
                verified=verified,
            )
        except ModelMismatch as problem:
            if saved or form != "dp_reshardable":
                raise
            raise ModelMismatch(
                f"{problem}\nOr another layout: stock code saved its optimizer as dp_reshardable, which loads "
                f"{RESHARDABLE[form]} and in no other layout, and does not note the layout"
            ) from None
        for key, chunk in self._chunks().items():
            chunk.load_state_dict(loaded[key])
        with torch.no_grad():  # Megatron writes into views of parameters that require a gradient
            self.optimizer.load_state_dict(loaded["optimizer"])
        if self.scheduler is not None and "opt_param_scheduler" in loaded:
            self.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        if with_rng:
            _restore_rng(loaded["rng_state"])
        return loaded

    def check(self, path: Path) -> None:
        """Raise unless `path`, a checkpoint of ours, can be loaded here; nothing is loaded. No collective: a rank
        looks at its share of the pickled objects."""
        self._check_resumes(path)
        check_complete(path)
        saved = recorded(OpenedCheckpoint.around(path), self.cluster)
        check_sharding_type(saved)
        self._check_layout(path, saved)
        told = content_metadata_of(self.form)
        parameters = {key: chunk.sharded_state_dict(metadata=told) for key, chunk in self._chunks().items()}
        check_content(parameters, path, self.settings, RankGroup.current())

    def _check_resumes(self, path: Path) -> None:
        if self._save_only_model:
            raise UnsupportedError(
                f"{path}: cluster {self.cluster} saves only its model (save_only_model), and such a cluster cannot "
                "resume; leave save_only_model out to resume with the optimizer, or load the weights alone with "
                "roll_ckpt.backends.megatron.load"
            )

    def _chunks(self) -> dict[str, Any]:
        bare = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in self.model]
        return {"model": bare[0]} if len(bare) == 1 else {f"model{index}": chunk for index, chunk in enumerate(bare)}

    def _check_layout(self, path: Path, saved: Mapping[str, Any]) -> None:
        before, now = saved.get("layout"), parallel_layout()
        if before is None or saved.get("distrib_optim_sharding_type") != "dp_reshardable":
            return
        changed = [
            f"{key} {before.get(key)} to {now[key]}" for key in now if key != "dp" and before.get(key) != now[key]
        ]
        if changed:
            raise UnsupportedError(
                f"{path}: its optimizer was saved as dp_reshardable, which loads {RESHARDABLE['dp_reshardable']} and "
                f"in no other layout; this job changes {', '.join(changed)}. Start it as it was saved, and save with "
                "fully_reshardable to change the layout"
            )


def attach(
    model: Any,
    optimizer: Any,
    scheduler: Any = None,
    *,
    settings: Settings | None = None,
    cluster: str = "model",
    form: str = "dp_reshardable",
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
    check_sharding_type({"distrib_optim_sharding_type": form})
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    for chunk in chunks:
        config = getattr(chunk, "ddp_config", None)
        if getattr(config, "use_megatron_fsdp", False):
            raise UnsupportedError("roll_ckpt does not support Megatron's FSDP in this version: it was not tried")
    return MegatronHandle(chunks, optimizer, scheduler, settings or Settings(), cluster, form, save_only_model)


def _rng_object() -> ShardedObject:
    """Every random state of this rank, under the rank's place in the layout."""
    state = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject(_RNG, state, (size,), (rank,), replica_id=0)


def _restore_rng(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(state["tracker"]))
