"""`engine.save_checkpoint` and `engine.save_16bit_model`: DeepSpeed's own methods, run inside our transaction."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from roll_ckpt import names
from roll_ckpt.backends.deepspeed import version
from roll_ckpt.backends.deepspeed.checkpoint_engine import RollCheckpointEngine, Stage, no_changes
from roll_ckpt.backends.deepspeed.refusals import refuse_parts
from roll_ckpt.backends.deepspeed.tensors import estimate_bytes
from roll_ckpt.errors import SaveFailed
from roll_ckpt.formats.torch_zip import unsavable
from roll_ckpt.save import gate, pending
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit

log = logging.getLogger("roll_ckpt")


def save_checkpoint(
    checkpoint_engine: RollCheckpointEngine,
    stock: Callable[..., Any],
    save_dir: str,
    tag: object = None,
    client_state: Mapping[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """`engine.save_checkpoint` as one transaction on `save_dir/tag`; every rank calls.

    With `async_save` it returns True once everything but the overlappable tensors is copied: not durable yet. Without,
    it returns True once the checkpoint is committed and durable on every rank. False: the save could not begin,
    because the disk refused before the first byte; `fail_training` raises that at the next fence.

    Raises:
        ValueError: `save_dir` is empty.
        RanksDisagree, RunIsLive, NoRoom, SaveFailed: see `save.begin.begin`; on every rank, nothing was written. Also
            if `client_state` holds what cannot be pickled.
        SaveFailed: without `async_save`, on every rank, the save failed on any rank. With it, the first save of the
            engine raises on every rank if any could not lay its files out.
        SaveFailed: an earlier save failed in the background and `fail_training` is set.
    """
    if not save_dir:
        raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
    save_dir = checkpoint_engine.expanded(save_dir)
    settings, ranks = checkpoint_engine.settings, checkpoint_engine.ranks
    name = str(tag) if tag is not None else f"global_step{checkpoint_engine.engine.global_steps}"
    arguments: dict[str, Any] = {
        "client_state": client_state or {},
        "save_latest": False,  # we write it at the commit; versions without decoupled engines would write it as well
        "exclude_frozen_parameters": exclude_frozen_parameters,
    }
    with gate.entered(ranks, f"save {name} to {os.path.abspath(save_dir)}", settings.commit_timeout_s):
        save = _begin(checkpoint_engine, Path(save_dir), name, arguments["client_state"], save_latest)
        if save.begun:
            with pending.staging(ranks, save, first=not checkpoint_engine.has_staged):
                run_stock(checkpoint_engine, stock, save, save.attempt.directory, name, arguments)
            checkpoint_engine.has_staged = True
    if not save.begun:
        checkpoint_engine.saves.append(save)  # `fail_training` raises it at the next fence
        if not settings.async_save:
            save.wait()
        return False
    if not settings.async_save:
        pending.wait_on_all_ranks(ranks, save, uploaded=True)
    return True


def _begin(
    checkpoint_engine: RollCheckpointEngine, save_dir: Path, name: str, client_state: Mapping[str, Any], latest: bool
) -> Save:
    engine, settings, ranks = checkpoint_engine.engine, checkpoint_engine.settings, checkpoint_engine.ranks
    request = Request(
        save_dir,
        name,
        engine.global_steps,
        {checkpoint_engine.cluster: ranks.size},
        course=checkpoint_engine.course,
        save_latest=latest,
        host=True,
    )
    nbytes, problem = 0, None
    try:
        checkpoint_engine.fence(no_changes)
        names.check_name("tag", name)
        nbytes = estimate_bytes(engine)
        check_client_state(engine, client_state)
    except Exception as error:
        problem = str(error)  # `begin` raises it on every rank
    on_commit = AfterCommit(settings, checkpoint_engine.course)
    return begin(ranks, request, settings, nbytes=nbytes, problem=problem, on_commit=on_commit)


def check_client_state(engine: Any, client_state: Mapping[str, Any]) -> None:
    """Raise unless this rank can save `client_state`, if it is one that does. No collective; reads no tensor.

    Raises:
        SaveFailed: an entry cannot be pickled; the message names its key.
    """
    if client_state and (engine.save_non_zero_checkpoint or (engine.has_moe_layers and engine.global_rank == 0)):
        unsavable.check(dict(client_state), "client_state")


def run_stock(
    checkpoint_engine: RollCheckpointEngine,
    stock: Callable[..., Any],
    save: Save,
    directory: Path,
    tag: str,
    arguments: dict[str, Any],
) -> ClusterSave:
    """Let `stock`, a save method of DeepSpeed, write under `directory` as the engine's part of `save`.

    Every rank calls. Returns that part when everything but the overlappable tensors is copied; not durable.
    """
    with checkpoint_engine.staging(save) as cluster_save:
        try:
            stock(checkpoint_engine.engine, str(directory), tag=tag, **arguments)
        except Exception:
            if "save_latest" in arguments:  # not save_16bit_model, of which nobody knows how many gathers are left
                _take_part(checkpoint_engine, tag)
            raise
    return cluster_save


def _take_part(checkpoint_engine: RollCheckpointEngine, tag: str) -> None:
    """After stock `save_checkpoint` has raised on this rank: the collectives that are left of it.

    The other ranks wait there. Which are left follows from the hooks that it has called; see docs/deepspeed.md.
    """
    engine = checkpoint_engine.engine
    try:
        if checkpoint_engine.stage == Stage.BEFORE:
            if engine._optimizer_has_ckpt_event_prologue():
                return  # ZeRO-3 has not partitioned its parameters here, so its later gather cannot be taken part in
            dist.barrier()
            engine._checkpoint_tag_validation(tag)
        if checkpoint_engine.stage != Stage.AFTER:
            version.take_turns_left(engine, checkpoint_engine.dirs_made)
            if engine._optimizer_has_ckpt_event_epilogue():
                engine.optimizer.checkpoint_event_epilogue()
            dist.barrier()
    except Exception as problem:  # the first error is raised
        log.warning("rank %d: after an error in save_checkpoint, its collectives fail too: %s",
                    checkpoint_engine.ranks.rank, problem)  # fmt: skip


def save_16bit_model(
    checkpoint_engine: RollCheckpointEngine, stock: Callable[..., Any], save_dir: str, *args: Any, **kwargs: Any
) -> Any:
    """`engine.save_16bit_model`: every rank calls; blocks, and the file is durable on return.

    Raises:
        UnsupportedError: rank 0 holds only a part of the model. Nothing was written.
        SaveFailed: on every rank, the file could not be written; an older one is untouched.
    """
    ranks, timeout_s = checkpoint_engine.ranks, checkpoint_engine.settings.commit_timeout_s
    with gate.entered(ranks, "save_16bit_model", timeout_s):
        refuse_parts(checkpoint_engine.engine)
        checkpoint_engine.lone_problem = None
        result = stock(checkpoint_engine.engine, checkpoint_engine.expanded(save_dir), *args, **kwargs)

        def report() -> None:
            if checkpoint_engine.lone_problem is not None:
                raise SaveFailed(
                    f"save_16bit_model: rank {ranks.rank}: {checkpoint_engine.lone_problem}; an older file of that "
                    "name is untouched. Mend the cause and save again"
                )

        ranks.run_on_all_ranks(report, timeout_s, working=True)
    return result
