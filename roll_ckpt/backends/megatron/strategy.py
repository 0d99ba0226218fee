"""`SaveStrategy`: Megatron plans, and we move the bytes, in our transaction or under Megatron's own save."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.msc_utils import MultiStorageClientFeature

from roll_ckpt.backends.megatron.facts import COMMON
from roll_ckpt.backends.megatron.files import Files, write
from roll_ckpt.backends.megatron.index import Source
from roll_ckpt.backends.megatron.plan import Plan
from roll_ckpt.config import Settings
from roll_ckpt.errors import ConfigError, UnsupportedError
from roll_ckpt.formats.tensor_index.writer import Indexer
from roll_ckpt.formats.torch_zip import safe_pickle
from roll_ckpt.load import trust


class SaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's `torch_dist` strategy, whose files we lay out, stage, write and fsync: one file for each rank.

    It can be given to stock `dist_checkpointing.save(sharded_strategy=...)`. Then every file is durable under its name
    before `.metadata`, and that before `metadata.json`, which remains the marker of a complete checkpoint. With
    `async_sharded_save=True`, give the request to Megatron's `AsyncCallsQueue`, whose `schedule_async_request` returns
    when everything is copied. Its persistent worker does not work: it pickles the request.

    Args:
        settings: how to copy and write; default `Settings()`.
        **stock: arguments of `TorchDistSaveShardedStrategy` beyond backend and version.
    """

    def __init__(self, settings: Settings | None = None, **stock: Any) -> None:
        super().__init__("torch_dist", 1, **{"thread_count": 1, **stock})
        self.settings = settings or Settings()
        self.use_cached_ckpt_structure: bool
        self.plan: Plan | None = None
        """The plan of the last save in our transaction; None if there was none, or this rank could not lay it out."""
        self.has_staged = False
        """Whether a save was staged on all ranks: the first one says on every rank if it was not."""
        self.source: Callable[[], Source] = Source
        """Says where the states that are saved come from; `attach` sets it."""
        self.indexer = Indexer()
        self._planned: list[Any] | None = None
        """Not None while `planned_by_stock` runs: there the hook leaves what Megatron planned."""
        self._warned: set[str] = set()

    def warn_unloadable(self, common: dict[str, Any], directory: Path, settings: Settings) -> None:
        """Log a warning, once, about each entry of the common state that a safe load would refuse."""
        unsafe = safe_pickle.unsafe_parts(common, trust.allowed(settings))
        trust.warn_unloadable(directory / COMMON, unsafe, self._warned)

    def planned_by_stock(self, outer: Any, sharded: dict[str, Any], directory: Path) -> tuple[Any, Any, Any]:
        """Let Megatron plan which rank writes what. Every rank calls; collectives of Megatron's.

        Returns Megatron's writer, on the coordinator the content of `.metadata`, and the group that planned. `outer`
        is this strategy or the wrapper around it. Writes no file, but makes `directory` if it is missing.

        Bypasses Megatron's own caches of plans, which assume that the structure never changes.
        """
        use_cache, self.use_cached_ckpt_structure = self.use_cached_ckpt_structure, False
        if isinstance(outer, FullyParallelSaveStrategyWrapper):
            outer.cached_distribution = None
        self._planned = []
        try:
            outer.async_save(sharded, directory)
            writer, metadata, group = self._planned
        finally:
            self._planned = None
            self.use_cached_ckpt_structure = use_cache
        return writer, metadata, group

    def async_save(self, *args: Any, **kwargs: Any) -> AsyncRequest:
        """Plan, and return the request whose steps copy, write and finish; see the class. Every rank calls.

        Raises:
            UnsupportedError: Megatron's multi-storage client is enabled.
        """
        if MultiStorageClientFeature.is_enabled():
            raise UnsupportedError(
                "roll_ckpt does not support Megatron's multi-storage client in this version: the commit needs a "
                "directory of a file system; disable it"
            )
        with _without_results_process():
            return super().async_save(*args, **kwargs)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *rest: Any) -> AsyncRequest:
        """Megatron calls this hook between planning and writing; `rest` is unused.

        `planned` holds the writer, the content of `.metadata` on the coordinator, and the group that planned.
        """
        _, metadata, group = planned
        if self._planned is not None:
            self._planned += [writer, metadata, group]
            return AsyncRequest(None, (), [])
        files = Files(self.settings, writer, metadata, group)
        return AsyncRequest(write, (None, None, None), [files.finish], {}, preload_fn=files.begin)


def strategy_of(strategy: Any) -> SaveStrategy:
    """The `SaveStrategy` that `strategy` is or wraps.

    Raises:
        ConfigError: it is or wraps another strategy.
    """
    inner = getattr(strategy, "base_strategy", strategy)
    if not isinstance(inner, SaveStrategy):
        raise ConfigError(
            f"strategy is {type(inner).__name__}; give a {SaveStrategy.__name__}, bare or in a "
            f"{FullyParallelSaveStrategyWrapper.__name__}"
        )
    return inner


@contextmanager
def _without_results_process() -> Iterator[None]:
    """Keep Megatron from starting a manager process for the results of its writer processes, which we do not use."""
    results_queue = filesystem_async._results_queue
    filesystem_async._results_queue = results_queue or queue.SimpleQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = results_queue
