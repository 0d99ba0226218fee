"""`MegatronModel`, which a script gives to a `Cluster`. Importing this module needs no Megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MegatronModel:
    """A model that Megatron-core trains, to be given to a `Cluster`.

    Args:
        model: the module, or the list of this rank's virtual pipeline stages, in DistributedDataParallel or bare.
        optimizer: what `get_megatron_optimizer` returned.
        scheduler: the `OptimizerParamScheduler`, if there is one.
        sharding_type: Megatron's `distrib_optim_sharding_type`. `dp_reshardable` gathers nothing and can be loaded at
            other data parallel sizes; `fully_reshardable` gathers on data parallel rank 0 at each save and can be
            loaded in any layout.
    """

    model: Any
    optimizer: Any
    scheduler: Any = None
    sharding_type: str = "dp_reshardable"
