"""What differs between versions of Megatron-core. Other modules take it from here; `planning` has what concerns a plan.

| What | Versions | Here |
|---|---|---|
| `dp_reshardable` and `fully_reshardable` | from 0.15 | `SHARDING_TYPES` |
| `ShardedTensor.flattened_range`, and with it `fully_sharded_model_space` | to 0.15 | `SHARDING_TYPES`, `flattened` |
| `utils._clean_metadata_for_serialization` | from 0.16 | `clean_metadata` |
| `load` takes a strategy for the common state; later it calls a function | to 0.16 | `common_state_from` |
| a strategy, later a function, later nothing writes `common.pt` | to 0.16, to 0.18 | `savers_of_common_state` |
| `async_strategy` of `async_save` and of the reader | from 0.17 | `planning`, `reads_through` |
| stock saves keep the common state as an object, and `common.pt` is only read | from 0.19 | `COMMON_OBJECT` |

Each is found by looking for it, not by the number of the version.
"""

from __future__ import annotations

import dis
import functools
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron import core  # not `megatron.core`: while its own import runs, it is no attribute of `megatron` yet
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization, utils
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from roll_ckpt.backends.megatron.requirement import INSTALL, TESTED
from roll_ckpt.errors import UnsupportedError

log = logging.getLogger("roll_ckpt")

NAME = f"Megatron-core {core.__version__}"

# --- sharding types of the distributed optimizer -------------------------------------------------------------

_FLATTENED = hasattr(ShardedTensor, "from_rank_offsets_flat")
_ALL_SHARDING_TYPES = {
    "dp_reshardable": "on any number of data parallel ranks",
    "fully_reshardable": "in any layout",
    "fully_sharded_model_space": "in any layout",
}
_MAKES = {
    "dp_reshardable": hasattr(DistributedOptimizer, "sharded_param_state_dp_reshardable"),
    "fully_reshardable": hasattr(DistributedOptimizer, "sharded_param_state_fully_reshardable"),
    "fully_sharded_model_space": _FLATTENED,
}
_IN = {
    "dp_reshardable": "0.15 or later",
    "fully_reshardable": "0.15 or later",
    "fully_sharded_model_space": "0.14 or 0.15",
}
SHARDING_TYPES = {name: where for name, where in _ALL_SHARDING_TYPES.items() if _MAKES[name]}
"""Those that this version can save and load, and where each can be loaded."""


def since(sharding_type: str) -> str:
    """For the end of a message: which versions have a sharding type that this one lacks; empty if none of them has."""
    return f", or use Megatron-core {_IN[sharding_type]}" if sharding_type in _IN else ""


def flattened(part: Any) -> slice | None:
    """The elements of its box that a `ShardedTensor` holds, row by row, in one dimension; None if it holds the box."""
    elements: slice | None = getattr(part, "flattened_range", None)
    return elements


# --- the common state ----------------------------------------------------------------------------------------

COMMON_OBJECT = "common_state/shard_0_1"
"""The key of the pickled object that holds the common state in a checkpoint without `common.pt`."""

clean_metadata: Callable[[dict[str, Any]], dict[str, Any]] = getattr(utils, "_clean_metadata_for_serialization", dict)
"""The content metadata without what cannot be saved."""

_STRATEGY = getattr(common, "TorchCommonLoadStrategy", None)
_READER = next(
    (
        name
        for name in ("load_common_state_dict", "load_common")
        if hasattr(serialization, name) and name in serialization.load.__code__.co_names
    ),
    None,
)
"""The function that `load` calls for the common state, where it takes no strategy for it."""


def savers_of_common_state() -> list[tuple[Any, str]]:
    """Where stock's functions are that write `common.pt`: owner and name. Their last argument is the directory."""
    places = [(getattr(common, "TorchCommonSaveStrategy", None), "save_common"), (serialization, "save_common")]
    return [(owner, name) for owner, name in places if hasattr(owner, name)]


@contextmanager
def common_state_from(read: Callable[[str | os.PathLike[str]], Any]) -> Iterator[dict[str, Any]]:
    """Inside the block, `dist_checkpointing.load`, called with what this yields, gets the common state from `read`.

    This process alone.
    """
    if _STRATEGY is not None:
        strategy = _STRATEGY()
        strategy.load_common = read
        yield {"common_strategy": strategy}
        return
    assert _READER is not None, "check() refuses a version that has neither"
    stock = getattr(serialization, _READER)
    setattr(serialization, _READER, read)
    try:
        yield {}
    finally:
        setattr(serialization, _READER, stock)


@contextmanager
def reads_through(reader: Callable[[str | os.PathLike[str]], Any]) -> Iterator[None]:
    """Inside the block, Megatron's load strategies read a directory by what `reader` returns. This process alone."""
    stock = strategies._get_filesystem_reader
    strategies._get_filesystem_reader = lambda directory, *_, **__: reader(directory)
    try:
        yield
    finally:
        strategies._get_filesystem_reader = stock


# --- what every version must have ----------------------------------------------------------------------------


def check() -> None:
    """Refuse a Megatron-core without the names and signatures that this backend relies on.

    The imports of this backend's modules check most names; this checks the rest. A version that is newer than those
    tested and has them all is accepted with a warning, on rank 0.

    Raises:
        UnsupportedError: names what is missing.
    """
    missing = [name for name, is_present in _needed().items() if not is_present]
    if missing:
        raise UnsupportedError(f"{NAME} has no {', '.join(missing)}, which roll_ckpt relies on; {INSTALL}")
    if not SHARDING_TYPES:
        log.warning("%s: roll_ckpt can save no distributed optimizer of it; %s", NAME, INSTALL)
    _warn_if_untested()


@functools.cache
def _warn_if_untested() -> None:
    """Once in this process."""
    if not _is_tested(core.__version__) and os.environ.get("RANK", "0") == "0":
        log.warning(
            "%s: roll_ckpt was tested with %s.x to %s.x; everything that it relies on is there, so it goes on",
            NAME,
            *TESTED,
        )


def _is_tested(version: str) -> bool:
    oldest, newest = ([int(part) for part in end.split(".")] for end in TESTED)
    return oldest <= [int(part) for part in re.findall(r"\d+", version)[:2]] <= newest


def _needed() -> dict[str, bool]:
    strategy, wrapper = TorchDistSaveShardedStrategy, FullyParallelSaveStrategyWrapper
    writer = filesystem_async.FileSystemWriterAsync
    return {
        "TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks": hasattr(
            strategy, "_get_save_and_finalize_callbacks"
        ),
        "TorchDistSaveShardedStrategy.async_save(sharded_state_dict, checkpoint_dir)": _takes(
            strategy.async_save, "self", "sharded_state_dict", "checkpoint_dir"
        ),
        "TorchDistSaveShardedStrategy.use_cached_ckpt_structure": _sets(strategy, "use_cached_ckpt_structure"),
        "FullyParallelSaveStrategyWrapper.base_strategy": _sets(wrapper, "base_strategy"),
        "FullyParallelSaveStrategyWrapper.cached_distribution": _sets(wrapper, "cached_distribution"),
        "FileSystemWriterAsync.write_buckets": _sets(writer, "write_buckets"),
        "filesystem_async._results_queue": hasattr(filesystem_async, "_results_queue"),
        "AsyncRequest.preload_fn": "preload_fn" in AsyncRequest._fields,
        "strategies.torch._get_filesystem_reader(checkpoint_dir)": _takes(
            getattr(strategies, "_get_filesystem_reader", None), "checkpoint_dir"
        ),
        "strategies.common.TorchCommonLoadStrategy, nor a serialization.load that calls load_common": (
            _STRATEGY is not None or _READER is not None
        ),
        "dist_checkpointing.load_content_metadata": hasattr(dist_checkpointing, "load_content_metadata"),
    }


def _takes(function: Callable[..., Any] | None, *names: str) -> bool:
    """Whether its parameters begin with `names`."""
    parameters: Mapping[str, Any] = inspect.signature(function).parameters if function else {}
    return tuple(parameters)[: len(names)] == names


def _sets(kind: type, attribute: str) -> bool:
    """Whether a method of `kind` itself, not of a base class, assigns the attribute."""
    methods = (inspect.unwrap(member) for member in vars(kind).values() if inspect.isfunction(member))
    return any(
        step.opname == "STORE_ATTR" and step.argval == attribute
        for method in methods
        for step in dis.get_instructions(method)
    )
