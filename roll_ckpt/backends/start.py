"""What rank 0 says when training starts: that checkpoints go through roll_ckpt, or why they do not.

`announce` and `leave_to_stock` are for the code that wires an engine or a strategy of a framework.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch.distributed as dist

import roll_ckpt
from roll_ckpt.config import Settings
from roll_ckpt.errors import ConfigError, RanksDisagree, UnsupportedError
from roll_ckpt.ranks.group import RankGroup

OPTIONAL = "ROLL_CKPT_OPTIONAL"
"""The environment variable that, set to 1, lets training go on where roll_ckpt cannot be switched on."""

log = logging.getLogger("roll_ckpt")


def announce(framework: str, what: str, settings: Settings, switched_on_by: str, *, async_save: bool | None) -> None:
    """Say on rank 0 in one line that checkpoints go through roll_ckpt. Every rank calls; no collective.

    `framework` is its name and version, such as "DeepSpeed 0.19.8, ZeRO-2"; `what` is "cluster actor", or
    "every torch_dist checkpoint of Megatron-core in this process". `async_save` is None where the caller decides for
    each save.

    Raises:
        ConfigError: on every rank, `staging.arena_bytes` is too small for the ranks of this host.
    """
    from roll_ckpt.save.arena import arena_bytes, local_world_size  # the rest of this module must load without it

    share = arena_bytes(settings)
    how = {True: "asynchronous", False: "synchronous", None: "synchronous and asynchronous"}[async_save]
    of = f", {local_world_size()} ranks on this host" if local_world_size() > 1 else ""
    tell(
        f"{what}: checkpoints go through roll_ckpt {roll_ckpt.__version__} ({framework}; {how} saves; "
        f"staging arena up to {share / (1 << 20):.0f} MiB per rank{of}; switched on by {switched_on_by})"
    )


_AGREE_S = 300.0
"""How long the ranks wait for each other at the start, in seconds; collectives of the framework come just before."""
_OF_ONE_RANK = {"staging", "io", "load"}
"""Settings that hosts may have each for itself."""


def agree(settings: Settings | None, what: str) -> None:
    """Make sure that `what` saves through roll_ckpt on every rank, with the same settings. Every rank calls; blocks.

    One rendezvous. None: this rank has left it to stock code.

    Raises, on every rank:
        ConfigError: two ranks have different settings.
        UnsupportedError: a rank has left it to stock code.
        RanksDisagree: a rank does not come; roll_ckpt may not be switched on there.
    """
    ranks = RankGroup.current()
    mine = {} if settings is None else settings.model_dump(mode="json", exclude=_OF_ONE_RANK)
    timeout_s = _AGREE_S if settings is None else min(settings.commit_timeout_s, _AGREE_S)

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        left = [rank for rank, post in enumerate(posts) if not post]
        if left and len(left) < len(posts):
            raise UnsupportedError(
                f"{what}: rank {', '.join(map(str, left))} cannot save through roll_ckpt and leaves it to stock code; "
                "see the reason in its log"
            )
        for rank, post in enumerate(posts):
            for key in sorted(post):
                if post[key] != posts[0].get(key):
                    raise ConfigError(
                        f"{what}: {key} is {posts[0].get(key)!r} on rank 0 and {post[key]!r} on rank {rank}; give "
                        "roll_ckpt the same settings on every rank, in ROLL_CKPT and in the config"
                    )
        return {}

    try:
        with ranks.call(f"the start of {what}", timeout_s):
            ranks.decide_on_rank0(mine, decide, timeout_s)
    except RanksDisagree as problem:
        raise RanksDisagree(
            f"{problem}. Or roll_ckpt is switched on for some ranks only: ROLL_CKPT and the installed packages must be "
            "the same for all"
        ) from None


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


def warn(line: str) -> None:
    """Log `line` on rank 0 as a warning."""
    if rank() == 0:
        log.warning("%s", line)


def is_optional() -> bool:
    """Whether training may go on without roll_ckpt where it cannot be switched on."""
    return os.environ.get(OPTIONAL, "").strip() == "1"


def leave_to_stock(problem: Exception, framework: str, what: str) -> None:
    """Raise `problem`, unless ROLL_CKPT_OPTIONAL=1: then this rank warns that stock code saves.

    `what` is what would have been saved, such as "this engine".
    """
    if not is_optional():
        raise problem
    log.warning(
        "%s does NOT save through roll_ckpt: %s. %s=1 is set, so training goes on and %s saves and loads by itself: "
        "no transaction, no digests, nothing in the background",
        *(what, problem, OPTIONAL, framework),
    )


def rank() -> int:
    """This process's rank in its job: torch's if it has a process group, else what the launcher says; else 0."""
    if dist.is_available() and dist.is_initialized():
        return int(dist.get_rank())
    told = os.environ.get("RANK", "0")
    return int(told) if told.isdigit() else 0
