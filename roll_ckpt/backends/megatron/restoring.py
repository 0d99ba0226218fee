"""How a bound model is restored from a checkpoint, and what is refused before anything changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

from roll_ckpt.backends.megatron.binding import Binding, set_random_states
from roll_ckpt.backends.megatron.facts import (
    RESHARDABLE,
    check_sharding_type,
    content_metadata_of,
    parallel_layout,
)
from roll_ckpt.backends.megatron.load import check_complete, check_content, load, recorded, told_by_stock
from roll_ckpt.errors import ModelMismatch, UnsupportedError
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.together import open_together
from roll_ckpt.ranks.group import RankGroup

log = logging.getLogger("roll_ckpt")


def restore(bound: Binding, path: Path, *, verified: bool) -> dict[str, Any]:
    """Load `path`, which is complete, and return the state that it held; see `load`."""
    _check_resumes(bound, path)
    with open_together(RankGroup.current(), path, bound.settings) as reader:
        return _restore(bound, path, recorded(reader.checkpoint, bound.cluster), verified)


def _restore(bound: Binding, path: Path, saved: Mapping[str, Any], verified: bool) -> dict[str, Any]:
    _check_layout(path, saved)
    told = dict(saved)
    if not saved:
        RankGroup.current().run_on_all_ranks(
            lambda: told.update(told_by_stock(path, bound.settings)), bound.settings.commit_timeout_s
        )
    check_sharding_type(told)
    sharding_type = told.get("distrib_optim_sharding_type")
    with_rng = saved.get("layout") == parallel_layout()
    if not with_rng:
        log.warning("%s: saved by another parallel layout, or by stock code: random states are not restored", path)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    try:
        loaded = load(
            bound.state(sharding_type=sharding_type, loading=True, with_rng=with_rng),
            path,
            settings=bound.settings,
            cluster=bound.cluster,
            strategy=FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group),
            verified=verified,
        )
    except ModelMismatch as problem:
        if saved or sharding_type != "dp_reshardable":
            raise
        raise ModelMismatch(
            f"{problem}\nOr another layout: stock code saved its optimizer as dp_reshardable, which loads "
            f"{RESHARDABLE[sharding_type]} and in no other layout, and does not note the layout"
        ) from None
    for key, chunk in bound.chunks().items():
        chunk.load_state_dict(loaded[key])
    with torch.no_grad():  # Megatron writes into views of parameters that require a gradient
        bound.optimizer.load_state_dict(loaded["optimizer"])
    if bound.scheduler is not None and "opt_param_scheduler" in loaded:
        bound.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if with_rng:
        set_random_states(loaded["rng_state"])
    return loaded


def check(bound: Binding, path: Path) -> None:
    """Raise unless `path`, a checkpoint of ours, can be loaded here; nothing is loaded. No collective: a rank
    looks at its share of the pickled objects."""
    _check_resumes(bound, path)
    check_complete(path)
    saved = recorded(OpenedCheckpoint.around(path), bound.cluster)
    check_sharding_type(saved)
    _check_layout(path, saved)
    told = content_metadata_of(bound.sharding_type)
    parameters = {key: chunk.sharded_state_dict(metadata=told) for key, chunk in bound.chunks().items()}
    check_content(parameters, path, bound.settings, RankGroup.current())


def _check_resumes(bound: Binding, path: Path) -> None:
    if bound.save_only_model:
        raise UnsupportedError(
            f"{path}: cluster {bound.cluster} saves only its model (save_only_model), and such a cluster cannot "
            "resume; leave save_only_model out to resume with the optimizer, or load the weights alone with "
            "roll_ckpt.megatron.load"
        )


def _check_layout(path: Path, saved: Mapping[str, Any]) -> None:
    before, now = saved.get("layout"), parallel_layout()
    if before is None or saved.get("distrib_optim_sharding_type") != "dp_reshardable":
        return
    changed = [f"{key} {before.get(key)} to {now[key]}" for key in now if key != "dp" and before.get(key) != now[key]]
    if changed:
        raise UnsupportedError(
            f"{path}: its optimizer was saved as dp_reshardable, which loads {RESHARDABLE['dp_reshardable']} and "
            f"in no other layout; this job changes {', '.join(changed)}. Start it as it was saved, and save with "
            "fully_reshardable to change the layout"
        )
