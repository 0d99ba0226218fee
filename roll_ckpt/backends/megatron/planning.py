"""Megatron's planning of a save, the same for every version of it: how to run it, what it plans, which request follows.

Stock `async_save` of `TorchDistSaveShardedStrategy` plans, calls its own method `HOOK`, and returns what that returns.
Whoever overrides or replaces `HOOK` gets the plan there, before anything is written.
"""

from __future__ import annotations

import inspect
import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as stock
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

HOOK = "_get_save_and_finalize_callbacks"
"""The method that stock code calls between planning and writing: `(writer, told)`, from 0.17 on with the name of the
asynchronous implementation behind them."""

MCORE, NVRX = "mcore", "nvrx"
"""Names of Megatron's asynchronous implementations: its own, and that of nvidia-resiliency-ext, from 0.17 on."""

_PARAMETER = inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters.get("async_strategy")

DEFAULT: str = MCORE if _PARAMETER is None else _PARAMETER.default
"""The implementation that a caller of stock `async_save` gets who names none."""


@dataclass(frozen=True)
class Planned:
    """What stock code planned for one save, on this rank."""

    writer: Any
    """Its `write_buckets` hold, for each file, path, name, and its objects and tensors as pairs of item and value."""
    metadata: Any
    """The content of `.metadata` on the coordinator of `group`; None elsewhere."""
    group: Any
    """torch's wrapper of the group that planned, with `gather_object` and `is_coordinator`."""

    @classmethod
    def told_to_hook(cls, writer: Any, told: Sequence[Any], *_: Any) -> Planned:
        """The arguments of `HOOK`."""
        _, metadata, group = told
        return cls(writer, metadata, group)


def plan(async_save: Callable[..., Any], sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> Any:
    """Call stock's `async_save`, bound to its strategy or wrapper, for the sake of its planning; what it returns.

    Every rank calls; collectives of Megatron's. Planning is always Megatron's own: nvidia-resiliency-ext would only be
    needed to write, and need not be installed. Starts no process.
    """
    with _without_results_process(), _without_advice():
        return async_save(sharded_state_dict, checkpoint_dir, *named(MCORE))


def named(async_strategy: str) -> tuple[str, ...]:
    """What stock's `async_save` gets after the directory: the name of an implementation, in versions that take one."""
    return () if _PARAMETER is None else (async_strategy,)


def request(wait: Callable[[Any], None], argument: Any, finish: Callable[[], None]) -> AsyncRequest:
    """The request that `HOOK` returns: its queue calls `wait(argument)` in some process, to which it may have to pickle
    them, and then, when that has returned on every rank, `finish()` on the training thread.

    There is no `preload_fn`: in a persistent worker it would run in that process.
    """
    return AsyncRequest(wait, (argument,), [finish], {})


def request_class(async_strategy: str) -> Any:
    """The class of requests that the queue of an asynchronous implementation takes.

    Raises:
        ModuleNotFoundError: as stock code does, nvidia-resiliency-ext was asked for and is not installed.
    """
    if async_strategy == MCORE:
        return AsyncRequest
    return stock.get_async_strategy(async_strategy, module="AsyncRequest")[1]


def queues() -> list[type]:
    """The classes of queues that run requests: of every asynchronous implementation that is installed."""
    found: list[type] = [AsyncCallsQueue]
    if hasattr(stock, "get_async_strategy"):
        with suppress(ImportError):
            found.append(stock.get_async_strategy(NVRX, module="AsyncCallsQueue")[1])
    return found


@contextmanager
def _without_results_process() -> Iterator[None]:
    """Keep Megatron from starting a manager process for the results of its writer processes, which we do not use."""
    results_queue = filesystem_async._results_queue
    filesystem_async._results_queue = results_queue or queue.SimpleQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = results_queue


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "MCore's async save is deprecated" not in str(record.msg)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep Megatron from advising another implementation of writing, because we do not write by any of its own."""
    stock.logger.addFilter(_is_no_advice)
    try:
        yield
    finally:
        stock.logger.removeFilter(_is_no_advice)
