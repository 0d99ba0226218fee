"""Copies that are made at the last moment, so that what does not wait for them is found every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from roll_ckpt import arena, native, saver
from roll_ckpt.config import Settings


@contextmanager
def late_copies(settings: Settings) -> Iterator[None]:
    """Saves inside, in the arena that `settings` ask for, copy nothing by themselves that a fence waits for: the fence
    copies it. They have ended when the block ends."""
    staging = arena.mover(settings).arena
    late = native.Mover(staging, copy_threads=0, io_threads=settings.io.threads, direct=settings.io.direct)
    with mock.patch.object(arena, "_mover", late):
        try:
            yield
        finally:
            saver.fence()
            saver.wait_pending()
            late.shutdown(10)


def copied(save: saver.Save) -> bool:
    return all(staged.transfer.copied for ticket in save.tickets.values() for staged in ticket._staged)
