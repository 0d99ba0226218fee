"""A Megatron model bound to its optimizer, scheduler and random states: makes the sharded state of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel

from roll_ckpt.backends.megatron.facts import (
    FRAMEWORK,
    content_metadata_of,
    parallel_layout,
)
from roll_ckpt.backends.megatron.fence import distributed_parts, gathers_late
from roll_ckpt.config import Settings
from roll_ckpt.errors import SaveFailed
from roll_ckpt.ranks import rng
from roll_ckpt.ranks.group import RankGroup

_RNG = "roll_ckpt.rng"
_OPTIMIZER_BYTES = 12  # of one parameter: a main copy and two moments in fp32


class Binding:
    """A Megatron model, its optimizer, scheduler and random states on this rank.

    Every rank calls `state`; the other methods concern one rank alone.
    """

    framework = FRAMEWORK

    def __init__(
        self,
        model: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        settings: Settings,
        cluster: str,
        sharding_type: str,
        save_only_model: bool,
    ) -> None:
        self.model = list(model)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.settings = settings
        self.cluster = cluster
        self.sharding_type = sharding_type
        self.save_only_model = save_only_model

    def estimate_bytes(self) -> int:
        """About how many bytes this rank will write in one save; does not make the state. No collective."""
        parameters = [parameter for chunk in self.model for parameter in chunk.parameters()]
        nbytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        if not self.save_only_model:
            nbytes += sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _OPTIMIZER_BYTES
        return int(nbytes // parallel_layout()["dp"])

    def state(
        self, step: int = 0, *, sharding_type: str | None = None, loading: bool = False, with_rng: bool = True
    ) -> dict[str, Any]:
        """The sharded state of the model and, unless `save_only_model`, of all that is bound to it. Every rank calls.

        For a save there may be collectives: `fully_reshardable` gathers the optimizer on data parallel rank 0, and
        parameters whose gather overlaps the forward pass are gathered now. `loading` makes the state that a load fills.

        Raises:
            SaveFailed: the optimizer has made no step yet. It is raised on every rank where a collective would follow.
        """
        metadata = content_metadata_of(sharding_type or self.sharding_type)
        if not loading:
            self._ready_to_save()
        state: dict[str, Any] = {
            key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in self.chunks().items()
        }
        if self.save_only_model:
            return state
        model_state = dict(state) if len(self.model) > 1 else state["model"]
        state["optimizer"] = self.optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)
        state |= {"iteration": step, "checkpoint_version": 3.0}
        if self.scheduler is not None:
            state["opt_param_scheduler"] = self.scheduler.state_dict()
        if with_rng:
            state["rng_state"] = random_states()
        return state

    def chunks(self) -> dict[str, Any]:
        """The modules of this rank's pipeline stages without DistributedDataParallel, by their names in checkpoints."""
        bare = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in self.model]
        return {"model": bare[0]} if len(bare) == 1 else {f"model{index}": chunk for index, chunk in enumerate(bare)}

    @property
    def alone(self) -> bool:
        """Whether a rank makes its state for a save without a collective."""
        return self.sharding_type != "fully_reshardable" and not any(gathers_late(chunk) for chunk in self.model)

    def _ready_to_save(self) -> None:
        if not self.save_only_model:
            if self.alone:
                self._check_stepped()
            else:  # if one rank raised before a gather, the others would hang in it
                RankGroup.current().run_on_all_ranks(self._check_stepped, self.settings.commit_timeout_s)
        for chunk in self.model:
            if gathers_late(chunk):
                chunk.start_param_sync(force_sync=True)

    def _check_stepped(self) -> None:
        for part in distributed_parts(self.optimizer):
            inner = part.optimizer
            if any(not inner.state.get(parameter) for group in inner.param_groups for parameter in group["params"]):
                raise SaveFailed(
                    f"cluster {self.cluster}: the optimizer has made no step yet (or has skipped them all). It has no "
                    f"moments, so Megatron can neither gather it nor load it back as {self.sharding_type}; save after "
                    "the first step"
                )


def random_states() -> ShardedObject:
    """Every random state of this rank, as a sharded object at the rank's place in the job."""
    state = {**rng.capture(), "cuda": torch.cuda.get_rng_state()}
    state["tracker"] = tensor_parallel.get_cuda_rng_tracker().get_states()
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject(_RNG, state, (size,), (rank,), replica_id=0)


def set_random_states(state: Mapping[str, Any]) -> None:
    """Set the random states of this rank to `state`, the data of what `random_states` returned."""
    rng.restore(state)
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(state["tracker"]))
