"""What the ranks of a test world do in tests/test_offload.py: real engines whose state is offloaded when they save."""

from __future__ import annotations

import contextlib
import os
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed_cases import BLOCK, gathered, new_arena, settings
from stuck_disk import stuck
from tiny import engine, train

from roll_ckpt.backends.deepspeed import install, tensors
from roll_ckpt.config import DeepSpeedConfig
from roll_ckpt.native.mover import Transfer
from roll_ckpt.save import arena, pending

WIDE = 512
SMALL_ARENA = 32 * BLOCK


def offload(made: Any, *, by: str = "engine") -> None:
    """`offload_states` of the engine, or of its optimizer, as an RL pipeline calls it before its rollout, of all that
    can be offloaded here.

    ZeRO-3 refuses other optimizers than DeepSpeed's FusedAdam, which takes minutes to compile for a CPU, so it is told
    that torch's is one; and it cannot offload the 16-bit parameters of a model that has frozen ones.
    """
    stage3 = made.zero_optimization_stage() == 3
    kinds = [kind for kind in OffloadStateTypeEnum if not stage3 or kind is not OffloadStateTypeEnum.lp_params]
    real = deepspeed.ops.adam.fused_adam.FusedAdam
    deepspeed.ops.adam.fused_adam.FusedAdam = torch.optim.AdamW
    try:
        (made if by == "engine" else made.optimizer).offload_states(include=kinds)
    finally:
        deepspeed.ops.adam.fused_adam.FusedAdam = real


def reload_as_on_a_gpu(made: Any) -> None:
    """`reload_states` where the host is not the device: what it moves is copied."""
    real = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **kw: real(self, *args, **{**kw, "copy": True})  # type: ignore[method-assign]
    try:
        made.reload_states()
    finally:
        torch.Tensor.to = real  # type: ignore[method-assign]


def transfers() -> dict[str, Transfer]:
    """The files of this rank that are being saved, by name."""
    staged = [
        s for save in pending.pending() for cluster_save in save.cluster_saves.values() for s in cluster_save._staged
    ]
    return {s.path.name: s.transfer for s in staged}


def leasing() -> list[Transfer]:
    found = [transfer for transfer in transfers().values() if transfer.stats["leased_bytes"]]
    assert found
    return found


@contextlib.contextmanager
def small_arena(made: Any, out: str) -> Iterator[contextlib.ExitStack]:
    """Let `made` save through an arena much smaller than its state, to a disk that is stuck until the stack that this
    yields is closed."""
    ours = settings(staging={"arena_bytes": 2 * SMALL_ARENA})
    with new_arena(), contextlib.ExitStack() as disk:
        attached = install.attach(made, DeepSpeedConfig.parse(ours, "test"), "model")
        folder = Path(out) / f"stuck{attached.ranks.rank}"
        folder.mkdir()
        disk.enter_context(stuck(arena.mover(attached.settings), folder, attached.settings.io.threads))
        yield disk


def after(seconds: float, disk: contextlib.ExitStack) -> threading.Timer:
    timer = threading.Timer(seconds, disk.close)
    timer.start()
    return timer


def save_offloaded(out: str, stage: int) -> dict[str, Any]:
    """Save offloaded, and again when reloaded; train on, and from what was saved."""
    unsaved = engine(stage, "bf16", None)
    made = engine(stage, "bf16", settings())
    for each in (unsaved, made):
        train(each, 3, seed=1)
    offload(made)
    made.save_checkpoint(f"{out}/leased", tag="t")
    stats = {name: transfer.stats for name, transfer in transfers().items()}
    made.reload_states()
    made.save_checkpoint(f"{out}/copied", tag="t")
    assert not any(transfer.stats["leased_bytes"] for transfer in transfers().values())
    pending.wait_pending()
    found: dict[str, Any] = {
        "stats": stats,
        "same": {name: (Path(out) / "leased/t" / name).read_bytes() for name in stats}
        == {name: (Path(out) / "copied/t" / name).read_bytes() for name in stats},
        "losses": train(made, 3, seed=2),
        "unsaved": train(unsaved, 3, seed=2),
    }
    for name, ours in (("stock", None), ("ours", settings())):
        again = engine(stage, "bf16", ours, seed=7)
        again.load_checkpoint(f"{out}/leased")
        found[name] = train(again, 3, seed=2)
    return found


def train_on_what_is_leased(out: str, stage: int) -> dict[str, Any]:
    """Save offloaded, then reload and train at once; where the host is the device, that is what the save reads."""
    unsaved = engine(stage, "bf16", None, width=WIDE)
    made = engine(stage, "bf16", None, width=WIDE)
    for each in (unsaved, made):
        train(each, 2, seed=1)
    with small_arena(made, out) as disk:
        offload(made)
        made.save_checkpoint(out, tag="t")
        made.reload_states()
        released = any(transfer.released for transfer in leasing())
        timer = after(0.5, disk)
        losses = train(made, 2, seed=2)
        timer.join()
        pending.wait_pending()
        used = arena.mover(install.attached(made).settings).arena  # type: ignore[union-attr]
        found = {"state": tensors.estimate_bytes(made), "peak": used.peak_bytes}
    again = engine(stage, "bf16", None, seed=3, width=WIDE)
    again.load_checkpoint(out)
    return {
        **found,
        "state": max(gathered(found["state"])),
        "released_at_reload": released,
        "losses": losses,
        "unsaved": train(unsaved, 2, seed=2),
        "again": train(again, 2, seed=2),
    }


def train_beside_what_is_leased(out: str, stage: int, by: str) -> dict[str, Any]:
    """The same where the host is not the device: the disk answers only when training is done and offloads again."""
    made = engine(stage, "bf16", None, width=WIDE)
    train(made, 2, seed=1)
    with small_arena(made, out) as disk:
        offload(made)
        made.save_checkpoint(out, tag="t")
        reload_as_on_a_gpu(made)
        waiting = leasing()
        too_late = after(30, disk)
        losses = train(made, 2, seed=2)
        found = {"released_after_training": any(transfer.released for transfer in waiting)}
        too_late.cancel()
        timer = after(0.5, disk)
        offload(made, by=by)
        found["released_after_offload"] = all(transfer.released for transfer in waiting)
        timer.join()
        pending.wait_pending()
    again = engine(stage, "bf16", None, seed=3, width=WIDE)
    again.load_checkpoint(out)
    return {**found, "losses": losses, "again": train(again, 2, seed=2)}


def what_is_leased() -> list[int]:
    """How many storages of an offloaded state a save may lease: as it is, where somebody replaced `offload_states` of
    the engine or of its optimizer, and where DeepSpeed pins memory by itself."""
    made = engine(2, "bf16", None)
    train(made, 1, seed=1)
    offload(made)
    counted = [len(tensors.offloaded_storages(made))]
    for owner in (made, made.optimizer):
        owner.offload_states = types.MethodType(lambda self, *args, **kwargs: None, owner)
        counted.append(len(tensors.offloaded_storages(made)))
        del owner.offload_states
    os.environ["DS_PIN_MEMORY_BACKEND"] = "native"
    try:
        return [*counted, len(tensors.offloaded_storages(made))]
    finally:
        del os.environ["DS_PIN_MEMORY_BACKEND"]


def memory_beside_the_state(out: str) -> list[int]:
    """In a world of this process: bytes of the offloaded state, what the process needs beside it while it is saved
    through an arena of 64 MiB, and bytes that were leased."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=0, world_size=1)
    ours = settings(io={}, staging={"arena_bytes": 64 << 20})
    made = engine(2, "bf16", ours, width=3072)
    train(made, 1, seed=1)
    offload(made)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    made.save_checkpoint(f"{out}/run", tag="t")
    leased = sum(int(transfer.stats["leased_bytes"]) for transfer in transfers().values())
    pending.wait_pending()
    return [tensors.estimate_bytes(made), resident("VmHWM") - before, leased]


def resident(what: str) -> int:
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told[what].split()[0]) << 10
