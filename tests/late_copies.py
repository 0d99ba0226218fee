"""Copies that are made at the last moment, so that what does not wait for them is found every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.native.mover import Mover
from roll_ckpt.save import arena, hooks, pending
from roll_ckpt.save.save import Save


@contextmanager
def late_copies(settings: Settings) -> Iterator[None]:
    """Saves inside, in the arena that `settings` ask for, copy nothing by themselves that a fence waits for: the fence
    copies it. They have ended when the block ends."""
    staging = arena.mover(settings).arena
    late = Mover(staging, copy_threads=0, io_threads=settings.io.threads, direct=settings.io.direct)
    with mock.patch.object(process.part(arena.StagingArena), "_mover", late):
        try:
            yield
        finally:
            pending.fence()
            pending.wait_pending()
            late.shutdown(10)


@contextmanager
def hooks_off(off: bool = True) -> Iterator[None]:
    """What changes tensors inside, by torch's own functions, does not wait for copies."""
    with mock.patch.object(hooks, "_fence", (lambda tensors_of: None) if off else hooks._fence):
        yield


def copy_a_block(save: Save, timeout_s: float = 0) -> None:
    """Within `late_copies`, copy one block of each file of `save`; with a timeout, what can be copied until then."""
    for part in save.cluster_saves.values():
        for staged in part._staged:
            staged.transfer.wait_copied(timeout_s)


def copied(save: Save) -> bool:
    return all(
        staged.transfer.copied for cluster_save in save.cluster_saves.values() for staged in cluster_save._staged
    )
