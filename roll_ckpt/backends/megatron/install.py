"""Makes every stock `TorchDistSaveShardedStrategy` of this process move its bytes through roll_ckpt.

docs/megatron.md tells what we rely on in Megatron-core; look there first if an update breaks something.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from roll_ckpt import process
from roll_ckpt.backends import start
from roll_ckpt.backends.megatron import planning, requirement, stock_save, tracker, version
from roll_ckpt.backends.megatron.facts import COMMON, MARKER
from roll_ckpt.backends.megatron.files import Unfinished
from roll_ckpt.backends.megatron.handover import Handover
from roll_ckpt.backends.megatron.planning import Planned
from roll_ckpt.backends.megatron.strategy import SaveStrategy
from roll_ckpt.config import Settings
from roll_ckpt.disk import reads
from roll_ckpt.errors import ConfigError, RollCkptError
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import gate

Method = Callable[..., Any]
_BEHIND = "_roll_ckpt_behind"
"""The attribute that marks our wrappers; its value is the function that the wrapper replaced."""


class Installed:
    """The part of the `process` registry that holds the settings for stock strategies."""

    def __init__(self) -> None:
        self.settings: Settings | None = None
        """None: nobody has given any, and the defaults hold."""
        self.by = ""
        """Who installed us first, for the log."""
        self.announced = False
        self.begun = False
        """Whether `begin` has been called."""
        self.left_to_stock = False
        """Whether stock strategies save by themselves again, because we could not be switched on."""


def install(settings: Settings | None = None, *, switched_on_by: str = "import roll_ckpt.megatron") -> None:
    """Make every stock `TorchDistSaveShardedStrategy`, existing or to come, move its bytes through us.

    Also behind `FullyParallelSaveStrategyWrapper`, synchronous and asynchronous. `settings` tell how; without them
    those of an earlier call hold, or else the defaults. May be called again. A `SaveStrategy` keeps settings of its
    own. The first save of a stock strategy says in one line that it goes through us, and who switched that on.

    Raises:
        UnsupportedError: this Megatron-core lacks a name that roll_ckpt needs.
        ConfigError: an earlier call gave other settings.
    """
    requirement.check()
    installed = process.part(Installed)
    if settings is not None:
        if installed.settings is not None and installed.settings != settings:
            raise ConfigError(
                f"roll_ckpt was installed for Megatron-core with two different settings: {installed.settings} first "
                f"and {settings} now; give them once"
            )
        installed.settings = settings
    installed.by = installed.by or switched_on_by
    _wrap(TorchDistSaveShardedStrategy, "async_save", _async_save)
    _wrap(TorchDistSaveShardedStrategy, planning.HOOK, _request)
    _wrap(serialization, "save_config", _save_config)
    for owner, name in version.savers_of_common_state():
        _wrap(owner, name, _save_common)
    for queue in planning.queues():
        _wrap(queue, "schedule_async_request", _schedule_async_request)


def begin() -> None:
    """Check what would fail at the first save, and say that saves go through us. Every rank calls, before training.

    One rendezvous in the first call; does nothing later.

    Raises, before anything is written:
        UnsupportedError: Megatron's multi-storage client is enabled, or a rank leaves its saves to stock code.
        ConfigError: the settings do not fit the ranks of this host, or differ between ranks.
        RanksDisagree: roll_ckpt is not switched on for every rank.
    """
    installed = process.part(Installed)
    if installed.begun:
        return
    stock_save.refuse_multi_storage()  # `leave_to_stock` then tells the other ranks, which wait in `agree`
    installed.begun = True
    start.agree(installed.settings or Settings(), "Megatron-core")
    _settings()


def leave_to_stock() -> None:
    """Let stock strategies of this process save by themselves. Every rank calls; others learn it in their `begin`."""
    installed = process.part(Installed)
    if not installed.begun:
        installed.begun = True
        with suppress(RollCkptError):
            start.agree(None, "Megatron-core")
    installed.left_to_stock = True


def _wrap(owner: Any, name: str, replacement: Method) -> None:
    """Let `owner.name` call `replacement(function, *args, **kwargs)`, unless it does so already.

    Others may wrap it before us and after us. Their wrappers are seen through if they set `__wrapped__`, as
    `functools.wraps` does.
    """
    function = getattr(owner, name)
    if hasattr(inspect.unwrap(function, stop=lambda link: hasattr(link, _BEHIND)), _BEHIND):
        return

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(function, *args, **kwargs)

    setattr(wrapper, _BEHIND, function)
    setattr(owner, name, wrapper)


# --- what the wrapped functions do ---------------------------------------------------------------------------


def _async_save(
    original: Method,
    strategy: Any,
    sharded_state_dict: Any,
    checkpoint_dir: Any,
    async_strategy: str = planning.DEFAULT,
) -> Any:
    for owner, name in tracker.openers():  # now, because hosts import Megatron-LM's training after Megatron-core
        _wrap(owner, name, tracker.opened)
    bound = functools.partial(original, strategy)
    if _is_left_to_stock(strategy):
        return bound(sharded_state_dict, checkpoint_dir, *planning.named(async_strategy))
    if isinstance(strategy, SaveStrategy):  # which has called us for the planning
        return planning.plan(bound, sharded_state_dict, checkpoint_dir)
    return stock_save.async_save(bound, sharded_state_dict, checkpoint_dir, async_strategy, _settings())


def _is_left_to_stock(strategy: Any) -> bool:
    return process.part(Installed).left_to_stock and not isinstance(strategy, SaveStrategy)


def _request(original: Method, strategy: Any, writer: Any, told: Any, *rest: Any) -> Any:
    if _is_left_to_stock(strategy):
        return original(strategy, writer, told, *rest)
    return stock_save.request(strategy, Planned.told_to_hook(writer, told), _settings())


def _save_common(original: Method, *args: Any, **kwargs: Any) -> None:
    """Write `common.pt`, which comes first in a save of stock, into a directory that no longer says it is complete.

    Stock calls it on every rank and writes on rank 0. If that fails, all ranks raise, where the others would hang.
    """
    directory = kwargs["checkpoint_dir"] if "checkpoint_dir" in kwargs else args[-1]
    ranks, timeout_s = RankGroup.current(), _settings().commit_timeout_s
    with gate.entered(ranks, f"save {COMMON} to {directory}", timeout_s), ranks.raising_together(timeout_s):
        if ranks.rank == 0:
            stock_save.unmark(Path(directory))
        original(*args, **kwargs)


def _save_config(original: Method, config: Any, checkpoint_dir: Any) -> None:
    """Leave `metadata.json` as it is if it says the same: we have made it durable, and stock would write it anew."""
    if process.part(Unfinished).writes_to(Path(checkpoint_dir)):
        return  # a later save has taken the directory over, and marks it when it is complete
    if reads.read_text_or_none(Path(checkpoint_dir) / MARKER) != json.dumps(asdict(config)):
        original(config, checkpoint_dir)


def _schedule_async_request(original: Method, queue: Any, async_request: Any) -> Any:
    """Schedule a request of ours with a caller that needs no other process, where Megatron would fork or spawn one.

    A forked child of a process that uses CUDA may hang, a spawned one takes GPU memory, and when one dies Megatron
    waits for ever.
    """
    handover = stock_save.handover_of(async_request)
    if handover is None:
        return original(queue, async_request)
    queue._get_async_caller = lambda: _Caller(handover)  # for this call, in the place of the class's method
    try:
        return original(queue, async_request)
    finally:
        del queue._get_async_caller


class _Caller:
    """In the place of an `AsyncCaller` of Megatron: asks the threads of this process, which have long begun."""

    def __init__(self, handover: Handover) -> None:
        self._handover = handover

    def schedule_async_call(self, async_req: Any) -> None:
        pass

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether the files of every rank are durable or have failed, with `no_dist` those of this rank alone.

        Every rank calls, unless `no_dist`: a collective. With `blocking` this rank waits for its own first.
        """
        if blocking:
            self._handover.wait()
        is_alive = not self._handover.ended
        return not is_alive if no_dist else bool(AsyncCaller.sync_all_async_calls(self, int(is_alive)))

    def close(self, abort: bool = False) -> None:
        pass


def _settings() -> Settings:
    """Those of `install`. The first call says in the log that saves go through us; every rank calls."""
    installed = process.part(Installed)
    settings = installed.settings or Settings()
    if not installed.announced and not installed.left_to_stock:
        start.announce(
            version.NAME,
            "every torch_dist checkpoint of Megatron-core in this process",
            settings,
            installed.by,
            async_save=None,
        )
        installed.announced = True
    return settings
