"""What the ranks of a test world do in tests/test_faults.py: real engines, real saves, a disk that refuses."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import faults
import torch.distributed as dist
from deepspeed_cases import raised, settings
from pipeline_cases import pipeline
from tiny import engine, train

from roll_ckpt import Cluster, names
from roll_ckpt.disk import failpoints, tree
from roll_ckpt.save import arena, cluster_save, pending
from roll_ckpt.transaction import verification

CHECKED = 0.05
cluster_save._LOOK_S = CHECKED


def meet_a_fault(out: str, operations: str, code: int, times: int, ours: dict[str, Any]) -> dict[str, Any]:
    """Rank 1's disk refuses under the second of three saves, while training goes on."""
    made = engine(2, "bf16", settings(**ours))
    train(made, 1, seed=1)
    made.save_checkpoint(out, tag="good")
    pending.wait_pending()
    faults.log(out)
    if dist.get_rank() == 1:
        faults.rule(operations, "zero_pp_rank_1", code, times=times)
    made.save_checkpoint(out, tag="bad")
    (save,) = pending.pending() or [None]
    losses = [] if ours.get("fail_training") else train(made, 2, seed=2)
    pending.wait_pending()
    found: dict[str, Any] = {"losses": losses, "raised": raised(lambda: train(made, 1, seed=3))}
    found["told"] = "" if save is None or save.failure is None else str(save.failure)
    if code != faults.HANG:
        found["struck"] = faults.clear()
    made.save_checkpoint(out, tag="next")
    pending.wait_pending()
    found["struck"] = found.get("struck", 0) or faults.clear()
    used = arena.mover(made.checkpoint_engine.settings).arena
    waiting = threading.Event()
    for _ in range(500):
        if not used.used_bytes:
            break
        waiting.wait(0.01)
    found["used_bytes"] = used.used_bytes
    found["again"] = faults.synced_again(faults.logged())[0]
    dist.barrier()
    found["entries"] = tree.list_dir(Path(out))
    found["trash"] = [str(p) for p in (Path(out) / names.TRASH).rglob("*") if not p.is_dir()]
    found["latest"] = (Path(out) / names.LATEST).read_text()
    found["problems"] = [str(p) for name in ("good", "next") for p in verification.verify(Path(out) / name)]
    return found


def cannot_begin(out: str, fail_training: bool) -> dict[str, Any]:
    """The second of three saves finds a disk without room for its directory."""
    made = engine(2, "bf16", settings(fail_training=fail_training))
    assert made.save_checkpoint(out, tag="good")
    pending.wait_pending()
    faults.rule("mkdir", ".bad.", errno.ENOSPC, times=-1)
    found = {"saved": made.save_checkpoint(out, tag="bad"), "raised": raised(lambda: train(made, 1, seed=1))}
    faults.clear()
    made.save_checkpoint(out, tag="next")
    pending.wait_pending()
    dist.barrier()
    return {**found, "entries": tree.list_dir(Path(out)), "problems": len(verification.verify(Path(out) / "next"))}


def pipeline_without_room(out: str) -> dict[str, Any]:
    """A pipeline whose disk is full at its second save and at its last one."""
    trained = pipeline(out, Cluster("actor", engine(2, "bf16", None)))
    trained.do_checkpoint(1)
    real = tree.free_bytes
    tree.free_bytes = lambda path: 10  # type: ignore[assignment]
    second = trained.do_checkpoint(2)
    last = raised(lambda: trained.do_checkpoint(3, is_last_step=True))
    tree.free_bytes = real
    then = trained.do_checkpoint(4, is_last_step=True)
    return {"second": second["checkpoint/failed"], "last": last, "then": then["checkpoint/step"]}


_made: Any = None


def save_up_to(out: str, rank: int, point: str, timeout_s: float) -> None:
    """Save once, then again; `rank` stops for good in the second one, at a named point."""
    global _made
    _made = engine(2, "bf16", settings(commit_timeout_s=timeout_s))
    _made.save_checkpoint(out, tag="good")
    pending.wait_pending()
    stopped = threading.Event()

    def listener(reached: str, where: dict[str, object]) -> None:
        if reached == point:
            stopped.set()
            threading.Event().wait()

    if dist.get_rank() == rank:
        failpoints.listener = listener
    _made.save_checkpoint(out, tag="second")
    if dist.get_rank() == rank:
        assert stopped.wait(20)
    elif rank == 0:  # the others have voted before their lead dies
        for save in pending.pending():
            while not tree.exists(
                save.attempt.checkpoint_dir / names.VOTES / names.vote_file("model", dist.get_rank())
            ):
                stopped.wait(0.01)


def outcome(out: str) -> dict[str, Any]:
    """What became of the save that lost a rank, and what the next one says."""
    told = [raised(lambda: save.wait(30)) for save in pending.pending()]  # noqa: B023
    told.append(raised(lambda: _made.save_checkpoint(out, tag="third")))
    return {"told": told, "entries": tree.list_dir(Path(out)), "latest": (Path(out) / names.LATEST).read_text()}
