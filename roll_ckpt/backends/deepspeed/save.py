"""`engine.save_checkpoint` and `engine.save_16bit_model` as stock code makes them, with our checkpoint engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.backends.deepspeed.checkpoint_engine import RollCheckpointEngine, nothing
from roll_ckpt.backends.deepspeed.refusals import refuse_parts
from roll_ckpt.backends.deepspeed.tensors import estimate_bytes
from roll_ckpt.errors import SaveFailed
from roll_ckpt.save import pending
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit


def save_checkpoint(
    ours: RollCheckpointEngine,
    stock: Callable[..., Any],
    save_dir: str,
    tag: object = None,
    client_state: Mapping[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """`engine.save_checkpoint` as one transaction on `save_dir/tag`; every rank calls.

    With `async_save` it returns once all but the overlappable tensors are copied, otherwise when committed and
    durable. False: the disk refused before the first byte.

    Raises:
        ValueError: no save_dir. As `begin`; without `async_save` also SaveFailed, on every rank.
    """
    if not save_dir:
        raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
    ours.fence(nothing)
    engine, settings = ours.engine, ours.settings
    name = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    request = Request(Path(save_dir), name, engine.global_steps, {ours.cluster: ours.ranks.size}, None, save_latest)
    nbytes, problem = 0, None
    try:
        names.check_name("tag", name)
        nbytes = estimate_bytes(engine)
    except Exception as error:
        problem = str(error)
    save = begin(ours.ranks, request, settings, nbytes=nbytes, problem=problem, on_commit=AfterCommit(settings))
    if not save.begun:
        ours.saves.append(save)  # `fail_training` raises it at the next fence
        if not settings.async_save:
            save.wait()
        return False
    with save.staging():
        arguments = {
            "client_state": client_state or {},
            "save_latest": save_latest,
            "exclude_frozen_parameters": exclude_frozen_parameters,
        }
        run_stock(ours, stock, save, save.attempt.directory, name, arguments)
    if not settings.async_save:
        pending.wait_on_all_ranks(ours.ranks, save, uploaded=True)
    return True


def run_stock(
    ours: RollCheckpointEngine,
    stock: Callable[..., Any],
    save: Save,
    directory: Path,
    tag: str,
    arguments: dict[str, Any],
) -> ClusterSave:
    """Let stock `save_checkpoint` write into `directory`, inside the attempt of `save`. Every rank calls."""
    with ours.staging(save) as cluster_save:
        stock(ours.engine, str(directory), tag=tag, **arguments)
    return cluster_save


def save_16bit_model(ours: RollCheckpointEngine, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`engine.save_16bit_model`: every rank calls; blocks, durable on return.

    Raises:
        UnsupportedError: rank 0 holds a part of the model only; nothing was written. SaveFailed: on every rank.
    """
    refuse_parts(ours.engine)
    ours.lone_problem = None
    result = stock(ours.engine, *args, **kwargs)

    def report() -> None:
        if ours.lone_problem is not None:
            raise SaveFailed(
                f"save_16bit_model: rank {ours.ranks.rank}: {ours.lone_problem}; an older file is untouched"
            )

    ours.ranks.run_on_all_ranks(report, ours.settings.commit_timeout_s)
    return result
