"""What rank 0 says when training starts: that checkpoints go through roll_ckpt, or why they do not.

`announce` and `leave_to_stock` are for the code that wires an engine or a strategy of a framework.
"""

from __future__ import annotations

import logging
import os

import torch.distributed as dist

import roll_ckpt
from roll_ckpt.config import Settings
from roll_ckpt.save.arena import arena_bytes, local_world_size

OPTIONAL = "ROLL_CKPT_OPTIONAL"
"""The environment variable that, set to 1, lets training go on where roll_ckpt cannot be switched on."""

log = logging.getLogger("roll_ckpt")


def announce(framework: str, what: str, settings: Settings, switched_on_by: str, *, async_save: bool | None) -> None:
    """Say on rank 0 in one line that checkpoints go through roll_ckpt. Every rank calls; no collective.

    `framework` is its name and version, such as "DeepSpeed 0.19.8, ZeRO-2"; `what` is "cluster actor" or "every
    TorchDistSaveShardedStrategy of this process". `async_save` is None where the caller decides for each save.

    Raises:
        ConfigError: on every rank, `staging.arena_bytes` is too small for the ranks of this host.
    """
    share = arena_bytes(settings)
    how = {True: "asynchronous", False: "synchronous", None: "synchronous and asynchronous"}[async_save]
    of = f", {local_world_size()} ranks on this host" if local_world_size() > 1 else ""
    tell(
        f"{what}: checkpoints go through roll_ckpt {roll_ckpt.__version__} ({framework}; {how} saves; "
        f"staging arena up to {share / (1 << 20):.0f} MiB per rank{of}; switched on by {switched_on_by})"
    )


def tell(line: str) -> None:
    """Log `line` on rank 0 at level INFO, so that it is seen also where the host has configured no logging.

    Python hides INFO by default. A level above INFO that somebody gave the logger `roll_ckpt` itself, or one above
    WARNING that the root logger has, still hides it.
    """
    hidden = log.level > logging.INFO or log.getEffectiveLevel() > logging.WARNING
    if rank() != 0 or hidden or log.manager.disable >= logging.INFO:
        return
    record = log.makeRecord(log.name, logging.INFO, __file__, 0, "%s", (line,), None, "tell")
    if log.hasHandlers():
        log.handle(record)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    handler.handle(record)


def is_optional() -> bool:
    """Whether training may go on without roll_ckpt where it cannot be switched on."""
    return os.environ.get(OPTIONAL, "").strip() == "1"


def leave_to_stock(problem: Exception, framework: str, what: str) -> None:
    """Raise `problem`, unless ROLL_CKPT_OPTIONAL=1: then rank 0 warns that stock code saves. Every rank calls.

    Every rank raises, and rank 0 gives the reason; see `shortened`.
    """
    if not is_optional():
        raise problem
    if rank() == 0:
        log.warning(
            "%s is NOT saved through roll_ckpt: %s. %s=1 is set, so training goes on and %s saves and loads by itself: "
            "no transaction, no digests, nothing in the background",
            *(what, problem, OPTIONAL, framework),
        )


def rank() -> int:
    """This process's rank in its job: torch's if it has a process group, else what the launcher says; else 0."""
    if dist.is_available() and dist.is_initialized():
        return int(dist.get_rank())
    told = os.environ.get("RANK", "0")
    return int(told) if told.isdigit() else 0
