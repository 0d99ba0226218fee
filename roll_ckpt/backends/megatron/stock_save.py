"""A save by stock `dist_checkpointing.save` whose bytes we move: Megatron plans, and gets a request of ours back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.msc_utils import MultiStorageClientFeature

from roll_ckpt import names, process
from roll_ckpt.backends.megatron import handover, planning
from roll_ckpt.backends.megatron.facts import DCP_METADATA, MARKER
from roll_ckpt.backends.megatron.files import Files, Unfinished
from roll_ckpt.backends.megatron.handover import Handover
from roll_ckpt.backends.megatron.planning import Planned
from roll_ckpt.config import Settings
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import UnsupportedError
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import gate


def async_save(
    stock_async_save: Callable[..., Any],
    sharded_state_dict: dict[str, Any],
    checkpoint_dir: str | Path,
    async_strategy: str,
    settings: Settings,
) -> Any:
    """Let stock's `async_save` plan, which comes to `request`, and return that for the queue of `async_strategy`.

    Every rank calls, on the training thread. When it returns everything is copied, and nothing is durable yet.

    Raises:
        UnsupportedError: Megatron's multi-storage client is enabled. Nothing was written.
        ModuleNotFoundError, TypeError: Megatron's own, if it does not have that `async_strategy`.
        OSError: see `request`.
    """
    refuse_multi_storage()
    request_class = planning.request_class(async_strategy)  # raises before any rank plans
    with gate.entered(RankGroup.current(), f"save {checkpoint_dir}", settings.commit_timeout_s):
        planned = planning.plan(stock_async_save, sharded_state_dict, checkpoint_dir)
    return request_class(planned.async_fn, planned.async_fn_args, planned.finalize_fns, planned.async_fn_kwargs)


def refuse_multi_storage() -> None:
    """Raise UnsupportedError if Megatron's multi-storage client is enabled."""
    if MultiStorageClientFeature.is_enabled():
        raise UnsupportedError(
            "roll_ckpt does not support Megatron's multi-storage client in this version: the commit needs a "
            "directory of a file system; disable it"
        )


def request(strategy: Any, planned: Planned, settings: Settings) -> Any:
    """What Megatron's hook between planning and writing returns; every rank calls. Everything is copied on return.

    Raises:
        UnsupportedError: it was not Megatron's own code that planned.
        OSError: on every rank, if an older `metadata.json` cannot be removed.
    """
    if not hasattr(planned.writer, "write_buckets"):
        kind = type(planned.writer)
        raise UnsupportedError(
            f"roll_ckpt does not support what {kind.__module__}.{kind.__qualname__} has planned: it calls "
            f"{planning.HOOK} of {type(strategy).__name__} past its async_save; use {type(strategy).__name__} as "
            "Megatron-core made it"
        )
    marker = json.dumps(asdict(CheckpointingConfig(strategy.backend, strategy.version))).encode()
    files = Files(settings, planned, marker)

    for earlier in process.part(Unfinished).of(files.directory):
        files.supersede(earlier)

    def clear() -> None:
        if planned.group.is_coordinator:
            unmark(files.directory)
            if not process.part(Unfinished).writes_to(files.directory):
                _remove_temporaries(files.directory)

    # From here on the directory is incomplete; only then does any rank give a file its name.
    RankGroup.current().run_on_all_ranks(clear, settings.commit_timeout_s, working=True)
    files.begin()
    return planning.request(handover.wait, files.handover, files.finish)


def handover_of(request: Any) -> Handover | None:
    """The handover that `request` waits for; None if it is not one of ours."""
    return request.async_fn_args[0] if request.async_fn is handover.wait else None


def unmark(directory: Path) -> None:
    """Take what says that it is complete from a directory that an earlier save wrote. One rank calls; durable.

    Readers of Megatron's look for `metadata.json`, those of torch for `.metadata`.
    """
    present = [directory / name for name in (MARKER, DCP_METADATA) if tree.exists(directory / name)]
    for path in present:
        writes.discard_file(path)
    if present:
        writes.fsync_dir(directory)


def _remove_temporaries(directory: Path) -> None:
    """Remove what a killed save has left."""
    for entry in tree.list_dir(directory):
        if names.parse_temporary_file(entry) is not None:
            writes.discard_file(directory / entry)
