"""`SaveStrategy`: Megatron plans, and we move the bytes, in our transaction or under Megatron's own save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from roll_ckpt.backends.megatron import planning, stock_save
from roll_ckpt.backends.megatron.facts import COMMON
from roll_ckpt.backends.megatron.index import Source
from roll_ckpt.backends.megatron.plan import Plan
from roll_ckpt.backends.megatron.planning import Planned
from roll_ckpt.config import Settings
from roll_ckpt.errors import ConfigError
from roll_ckpt.formats.tensor_index.writer import Indexer
from roll_ckpt.formats.torch_zip import safe_pickle
from roll_ckpt.load import trust


class SaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's `torch_dist` strategy, whose files we lay out, stage, write and fsync: one file for each rank.

    It can be given to stock `dist_checkpointing.save(sharded_strategy=...)`. Then every file is durable under its name
    before `.metadata`, and that before `metadata.json`, which remains the marker of a complete checkpoint. With
    `async_sharded_save=True` that call returns when everything is copied; give its request to Megatron's
    `AsyncCallsQueue`, persistent or not.

    Args:
        backend, version, *stock, **more: arguments of `TorchDistSaveShardedStrategy`, as it takes them; `thread_count`,
            the number of files for each rank, is 1 unless given. `Settings` are also accepted in the place of backend.
        settings: how to copy and write; default `Settings()`.
    """

    def __init__(
        self,
        backend: str | Settings = "torch_dist",
        version: int = 1,
        *stock: Any,
        settings: Settings | None = None,
        **more: Any,
    ) -> None:
        if isinstance(backend, Settings):
            if settings is not None:
                raise ConfigError(f"{type(self).__name__} was given settings twice; give them once")
            settings, backend = backend, "torch_dist"
        if len(stock) < 2:  # the second one is thread_count
            more.setdefault("thread_count", 1)
        super().__init__(backend, version, *stock, **more)
        self.settings = settings or Settings()
        self.use_cached_ckpt_structure: bool
        self.plan: Plan | None = None
        """The plan of the last save in our transaction; None if there was none, or this rank could not lay it out."""
        self.has_staged = False
        """Whether a save was staged on all ranks: the first one says on every rank if it was not."""
        self.source: Callable[[], Source] = Source
        """Says where the states that are saved come from; `attach` sets it."""
        self.indexer = Indexer()
        self._only_plan = False
        """Whether `planned_by_stock` runs: there the hook returns what Megatron planned."""
        self._warned: set[str] = set()

    def warn_unloadable(self, common: dict[str, Any], directory: Path, settings: Settings) -> None:
        """Log a warning, once, about each entry of the common state that a safe load would refuse."""
        unsafe = safe_pickle.unsafe_parts(common, trust.allowed(settings))
        trust.warn_unloadable(directory / COMMON, unsafe, self._warned)

    def planned_by_stock(self, outer: Any, sharded: dict[str, Any], directory: Path) -> Planned:
        """Let Megatron plan which rank writes what. Every rank calls; collectives of Megatron's.

        `outer` is this strategy or the wrapper around it. Writes no file, but makes `directory` if it is missing.

        Bypasses Megatron's own caches of plans, which assume that the structure never changes.
        """
        use_cache, self.use_cached_ckpt_structure = self.use_cached_ckpt_structure, False
        if isinstance(outer, FullyParallelSaveStrategyWrapper):
            outer.cached_distribution = None
        self._only_plan = True
        try:
            planned: Planned = planning.plan(outer.async_save, sharded, directory)
        finally:
            self._only_plan = False
            self.use_cached_ckpt_structure = use_cache
        return planned

    def async_save(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path, async_strategy: str = planning.DEFAULT
    ) -> Any:
        """Plan, copy and start writing, and return the request that waits and finishes. Every rank calls.

        See `stock_save.async_save` for the errors.
        """
        if self._only_plan:
            return planning.plan(super().async_save, sharded_state_dict, checkpoint_dir)
        return stock_save.async_save(
            super().async_save, sharded_state_dict, checkpoint_dir, async_strategy, self.settings
        )

    def _get_save_and_finalize_callbacks(self, writer: Any, told: Any, *_: Any) -> Any:
        """Megatron calls this hook between planning and writing; see `planning.HOOK`."""
        planned = Planned.told_to_hook(writer, told)
        return planned if self._only_plan else stock_save.request(self, planned, self.settings)


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
