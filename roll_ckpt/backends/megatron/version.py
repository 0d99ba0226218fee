"""Whether this Megatron-core has the names and signatures that this backend relies on."""

from __future__ import annotations

import dis
import inspect
import logging

import megatron.core
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from roll_ckpt.errors import UnsupportedError

log = logging.getLogger("roll_ckpt")


def check(tested_with: str) -> None:
    """Refuse a Megatron-core without the names and signatures that this backend relies on.

    The imports of this backend's modules check most names; this checks the rest. A version other than `tested_with`
    that has them all is accepted with a warning.

    Raises:
        UnsupportedError: names what is missing.
    """
    strategy, wrapper = TorchDistSaveShardedStrategy, FullyParallelSaveStrategyWrapper
    writer = filesystem_async.FileSystemWriterAsync
    present = {
        "TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks": hasattr(
            strategy, "_get_save_and_finalize_callbacks"
        ),
        "TorchDistSaveShardedStrategy.async_save(sharded_state_dict, checkpoint_dir)": list(
            inspect.signature(strategy.async_save).parameters
        )
        == ["self", "sharded_state_dict", "checkpoint_dir"],
        "TorchDistSaveShardedStrategy.use_cached_ckpt_structure": _sets(strategy, "use_cached_ckpt_structure"),
        "FullyParallelSaveStrategyWrapper.base_strategy": _sets(wrapper, "base_strategy"),
        "FullyParallelSaveStrategyWrapper.cached_distribution": _sets(wrapper, "cached_distribution"),
        "FileSystemWriterAsync.write_buckets": _sets(writer, "write_buckets"),
        "filesystem_async._results_queue": hasattr(filesystem_async, "_results_queue"),
        "AsyncRequest.preload_fn": "preload_fn" in AsyncRequest._fields,
        "strategies.torch._get_filesystem_reader(checkpoint_dir, cache_metadata)": list(
            inspect.signature(getattr(strategies, "_get_filesystem_reader", lambda: None)).parameters
        )
        == ["checkpoint_dir", "cache_metadata"],
        "dist_checkpointing.load_content_metadata": hasattr(dist_checkpointing, "load_content_metadata"),
    }
    missing = [name for name, is_present in present.items() if not is_present]
    if missing:
        raise UnsupportedError(
            f"Megatron-core {megatron.core.__version__} has no {', '.join(missing)}, which roll_ckpt relies on; "
            f"pip install megatron-core=={tested_with}"
        )
    if megatron.core.__version__ != tested_with:
        log.warning("Megatron-core %s: roll_ckpt was tested with %s", megatron.core.__version__, tested_with)


def _sets(kind: type, attribute: str) -> bool:
    """Whether a method of `kind` itself, not of a base class, assigns the attribute."""
    methods = (inspect.unwrap(member) for member in vars(kind).values() if inspect.isfunction(member))
    return any(
        step.opname == "STORE_ATTR" and step.argval == attribute
        for method in methods
        for step in dis.get_instructions(method)
    )
