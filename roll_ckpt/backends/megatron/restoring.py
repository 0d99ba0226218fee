"""How everything bound to a Megatron model is restored, and what is refused before anything changes."""

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

from roll_ckpt.backends.megatron import version
from roll_ckpt.backends.megatron.binding import Binding, set_random_states
from roll_ckpt.backends.megatron.facts import (
    check_sharding_type,
    content_metadata_of,
    parallel_layout,
)
from roll_ckpt.backends.megatron.load import (
    check_complete,
    check_content,
    facts_of,
    load_inside,
    stock_content_metadata,
)
from roll_ckpt.errors import ModelMismatch, UnsupportedError
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.together import open_together
from roll_ckpt.ranks.group import RankGroup

log = logging.getLogger("roll_ckpt")


def restore(binding: Binding, path: Path, *, verified: bool) -> dict[str, Any]:
    """Restore everything bound from `path`, which is complete, and return the state that it held. Every rank calls.

    `verified`: the ranks have verified every byte just now. See `handle.MegatronHandle.load` for the errors.
    """
    _check_resumes(binding, path)
    with open_together(RankGroup.current(), path, binding.settings) as reader:
        return _restore(binding, path, facts_of(reader.checkpoint, binding.cluster), verified)


def _restore(binding: Binding, path: Path, saved: Mapping[str, Any], verified: bool) -> dict[str, Any]:
    _check_layout(path, saved)
    facts = dict(saved)
    if not saved:
        RankGroup.current().run_on_all_ranks(
            lambda: facts.update(stock_content_metadata(path, binding.settings)), binding.settings.commit_timeout_s
        )
    check_sharding_type(facts)
    sharding_type = facts.get("distrib_optim_sharding_type")
    with_rng = saved.get("layout") == parallel_layout()
    if not with_rng:
        log.warning("%s: saved in another parallel layout, or by stock Megatron: random states are not restored", path)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    try:
        loaded = load_inside(
            binding.state(sharding_type=sharding_type, loading=True, with_rng=with_rng),
            path,
            binding.settings,
            FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group),
            verified=verified,
        )
    except ModelMismatch as problem:
        if saved or sharding_type != "dp_reshardable":
            raise
        raise ModelMismatch(
            f"{problem}\nOr the parallel layout differs: stock Megatron saved this optimizer as dp_reshardable, which "
            f"loads {version.SHARDING_TYPES[sharding_type]} and in no other layout, and it does not record the layout. "
            "Start this job as the one that saved"
        ) from None
    for key, chunk in binding.chunks().items():
        chunk.load_state_dict(loaded[key])
    with torch.no_grad():  # Megatron writes to views of parameters that require a gradient
        binding.optimizer.load_state_dict(loaded["optimizer"])
    if binding.scheduler is not None and "opt_param_scheduler" in loaded:
        binding.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if with_rng:
        set_random_states(loaded["rng_state"])
    return loaded


def check(binding: Binding, path: Path) -> None:
    """Raise unless this job can load `path`, a checkpoint that we saved; loads nothing. No collective.

    Each rank inspects its share of the pickled objects.
    """
    _check_resumes(binding, path)
    check_complete(path)
    saved = facts_of(OpenedCheckpoint.around(path), binding.cluster)
    check_sharding_type(saved)
    _check_layout(path, saved)
    metadata = content_metadata_of(binding.sharding_type)
    parameters = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in binding.chunks().items()}
    check_content(parameters, path, binding.settings, RankGroup.current())


def _check_resumes(binding: Binding, path: Path) -> None:
    if binding.save_only_model:
        raise UnsupportedError(
            f"{path}: cluster {binding.cluster} saves only its model (save_only_model), and such a cluster cannot "
            "resume; leave save_only_model out to resume with the optimizer, or load the weights alone with "
            "roll_ckpt.megatron.load"
        )


def _check_layout(path: Path, saved: Mapping[str, Any]) -> None:
    """UnsupportedError if the optimizer, saved with the facts `saved`, cannot be loaded in this job's layout."""
    before, now = saved.get("layout"), parallel_layout()
    if before is None or saved.get("distrib_optim_sharding_type") != "dp_reshardable":
        return
    changed = [f"{key} {before.get(key)} to {now[key]}" for key in now if key != "dp" and before.get(key) != now[key]]
    if changed:
        raise UnsupportedError(
            f"{path}: its optimizer was saved as dp_reshardable, which loads "
            f"{version.SHARDING_TYPES['dp_reshardable']} and in no other layout; this job changes "
            f"{', '.join(changed)}. Start it as it was saved, and save with fully_reshardable to change the layout"
        )
