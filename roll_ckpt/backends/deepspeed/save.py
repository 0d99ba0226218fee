"""`engine.save_checkpoint` and `engine.save_16bit_model`: DeepSpeed's own methods, run inside our transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.backends.deepspeed.checkpoint_engine import RollCheckpointEngine, no_changes
from roll_ckpt.backends.deepspeed.refusals import refuse_parts
from roll_ckpt.backends.deepspeed.tensors import estimate_bytes
from roll_ckpt.errors import SaveFailed
from roll_ckpt.formats.torch_zip import unsavable
from roll_ckpt.save import pending
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit

_PATIENCE_S = 30.0


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
    checkpoint_engine.fence(no_changes)
    engine, settings, ranks = checkpoint_engine.engine, checkpoint_engine.settings, checkpoint_engine.ranks
    name = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    request = Request(
        Path(save_dir),
        name,
        engine.global_steps,
        {checkpoint_engine.cluster: ranks.size},
        course=checkpoint_engine.course,
        save_latest=save_latest,
        host=True,
    )
    nbytes, problem = 0, None
    try:
        names.check_name("tag", name)
        nbytes = estimate_bytes(engine)
        check_client_state(engine, client_state or {})
    except Exception as error:
        problem = str(error)  # `begin` raises it on every rank
    save = begin(
        ranks,
        request,
        settings,
        nbytes=nbytes,
        problem=problem,
        on_commit=AfterCommit(settings, checkpoint_engine.course),
    )
    if not save.begun:
        checkpoint_engine.saves.append(save)  # `fail_training` raises it at the next fence
        if not settings.async_save:
            save.wait()
        return False
    arguments = {
        "client_state": client_state or {},
        "save_latest": save_latest,
        "exclude_frozen_parameters": exclude_frozen_parameters,
    }
    first = settings.async_save and not checkpoint_engine.has_staged
    try:
        with save.staging():
            run_stock(checkpoint_engine, stock, save, save.attempt.directory, name, arguments)
    except Exception as problem:
        if first:  # with a short patience: other ranks may stand in a barrier of DeepSpeed instead
            pending.confirm_staged(ranks, save, problem, min(_PATIENCE_S, settings.commit_timeout_s))
        raise
    if not settings.async_save:
        pending.wait_on_all_ranks(ranks, save, uploaded=True)
    elif first:
        pending.confirm_staged(ranks, save)
    checkpoint_engine.has_staged = True
    return True


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
        stock(checkpoint_engine.engine, str(directory), tag=tag, **arguments)
    return cluster_save


def save_16bit_model(
    checkpoint_engine: RollCheckpointEngine, stock: Callable[..., Any], save_dir: str, *args: Any, **kwargs: Any
) -> Any:
    """`engine.save_16bit_model`: every rank calls; blocks, and the file is durable on return.

    Raises:
        UnsupportedError: rank 0 holds only a part of the model. Nothing was written.
        SaveFailed: on every rank, the file could not be written; an older one is untouched.
    """
    refuse_parts(checkpoint_engine.engine)
    checkpoint_engine.lone_problem = None
    result = stock(checkpoint_engine.engine, checkpoint_engine.expanded(save_dir), *args, **kwargs)

    def report() -> None:
        if checkpoint_engine.lone_problem is not None:
            raise SaveFailed(
                f"save_16bit_model: rank {checkpoint_engine.ranks.rank}: {checkpoint_engine.lone_problem}; an older "
                "file of that name is untouched. Mend the cause and save again"
            )

    checkpoint_engine.ranks.run_on_all_ranks(report, checkpoint_engine.settings.commit_timeout_s)
    return result
