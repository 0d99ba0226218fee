"""Cluster: one named model of a pipeline, saved and loaded through its framework's own calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MegatronModel:
    """What Megatron-core trains, as a `Cluster` takes it.

    Args:
        model: the module, or the list of this rank's virtual pipeline stages, in DistributedDataParallel or bare.
        optimizer: what `get_megatron_optimizer` returned.
        scheduler: the `OptimizerParamScheduler`, if there is one.
        sharding_type: Megatron's `distrib_optim_sharding_type`: `dp_reshardable` gathers nothing and loads at other data
            parallel sizes, `fully_reshardable` gathers on data parallel rank 0 at each save and loads anywhere.
    """

    model: Any
    optimizer: Any
    scheduler: Any = None
    sharding_type: str = "dp_reshardable"
