"""A save by stock `dist_checkpointing.save` whose bytes we move: Megatron plans, and gets a request of ours back."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as stock
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.msc_utils import MultiStorageClientFeature

from roll_ckpt import names, process
from roll_ckpt.backends.megatron import handover
from roll_ckpt.backends.megatron.facts import MARKER
from roll_ckpt.backends.megatron.files import Files, Planned, Unfinished
from roll_ckpt.config import Settings
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import UnsupportedError
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import gate


def async_save(plan: Callable[..., Any], directory: Path, async_strategy: str | None, settings: Settings) -> Any:
    """Let Megatron plan by `plan()`, its own `async_save`, which comes to `request`; return the request of that.

    Every rank calls, on the training thread. When it returns everything is copied, and nothing is durable yet.
    `async_strategy` is what the caller asks for, where this Megatron-core knows it: it only says whose queue will run
    the request, for Megatron's own code always plans.

    Raises:
        UnsupportedError: Megatron's multi-storage client is enabled. Nothing was written.
        ModuleNotFoundError, TypeError: Megatron's own, if it does not have that `async_strategy`.
    """
    request_class = AsyncRequest
    if hasattr(stock, "get_async_strategy"):
        request_class = stock.get_async_strategy(async_strategy or "nvrx", module="AsyncRequest")[1]
    with gate.entered(RankGroup.current(), f"save {directory}", settings.commit_timeout_s):
        planned = plan_by_mcore(plan)
    return request_class(planned.async_fn, planned.async_fn_args, planned.finalize_fns, {})


def plan_by_mcore(plan: Callable[..., Any]) -> Any:
    """Call `plan` so that Megatron's own code plans, whose writer then holds what is planned; every rank calls.

    Raises:
        UnsupportedError: Megatron's multi-storage client is enabled.
    """
    if MultiStorageClientFeature.is_enabled():
        raise UnsupportedError(
            "roll_ckpt does not support Megatron's multi-storage client in this version: the commit needs a "
            "directory of a file system; disable it"
        )
    with _without_results_process():
        return plan(async_strategy="mcore") if hasattr(stock, "get_async_strategy") else plan()


def request(strategy: Any, writer: Any, planned: Any, settings: Settings) -> AsyncRequest:
    """What Megatron's hook between planning and writing returns; every rank calls. Everything is copied on return.

    `planned` holds the writer, the content of `.metadata` on the coordinator, and the group that planned.

    Raises:
        OSError: on every rank, if an older `metadata.json` cannot be removed.
    """
    _, metadata, group = planned
    marker = json.dumps(asdict(CheckpointingConfig(strategy.backend, strategy.version))).encode()
    files = Files(settings, Planned(writer, metadata, group, marker))

    def clear() -> None:
        if group.is_coordinator:
            _clear(Path(writer.path))

    # The directory is incomplete from here on, before any rank gives a file its name.
    RankGroup.current().run_on_all_ranks(clear, settings.commit_timeout_s, working=True)
    files.begin()
    return AsyncRequest(handover.wait, (files.handover,), [files.finish])


def _clear(directory: Path) -> None:
    """Take the mark of completeness from a directory that an earlier save wrote, and what a killed one left there."""
    others = process.part(Unfinished).writes_to(directory)
    for entry in tree.list_dir(directory):
        if entry == MARKER or (names.parse_temporary_file(entry) is not None and not others):
            writes.discard_file(directory / entry)
    writes.fsync_dir(directory)


@contextmanager
def _without_results_process() -> Iterator[None]:
    """Keep Megatron from starting a manager process for the results of its writer processes, which we do not use."""
    results_queue = filesystem_async._results_queue
    filesystem_async._results_queue = results_queue or queue.SimpleQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = results_queue
