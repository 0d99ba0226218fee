"""The save corridor of one process: begin, stage, write, vote, commit.

A `Save` is this process's part of one checkpoint, a `Ticket` one cluster's part of it. Bytes are copied and
written by native threads; a short-lived Python thread for each save only waits for them, votes and settles.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from roll_ckpt.errors import RollCkptError, SaveFailed
from roll_ckpt.ranks.group import LONGEST_S, RankGroup
from roll_ckpt.save.claims import _epochs
from roll_ckpt.save.cluster_save import Changes
from roll_ckpt.save.save import Save

log = logging.getLogger("roll_ckpt")


def wait_together(world: RankGroup, save: Save, *, uploaded: bool) -> None:
    """`Save.wait` on every rank of `world`: none returns before all know the outcome; one rendezvous.

    Raises:
        SaveFailed: on every rank, if it failed on any.
    """
    world.together(lambda: save.wait(uploaded=uploaded), LONGEST_S)


_pending: list[Save] = []
_pending_lock = threading.Lock()
_pid = os.getpid()


def _forget_in_child() -> None:
    global _pending_lock
    _pending_lock = threading.Lock()  # another thread may have held it just then


os.register_at_fork(after_in_child=_forget_in_child)


def remember(save: Save) -> None:
    global _pid
    with _pending_lock:
        if _pid != os.getpid():
            _pending.clear()
            _pid = os.getpid()
        same = [s for s in _pending if s.attempt.output_dir == save.attempt.output_dir]
        save._after = same[-1] if same else None
        _pending.append(save)


def forget(save: Save) -> None:
    save._after = None
    with _pending_lock:
        if save in _pending:
            _pending.remove(save)


def pending() -> list[Save]:
    """Saves of this process that are not finished, oldest first; none in a forked child."""
    with _pending_lock:
        return list(_pending) if _pid == os.getpid() else []


def wait_pending(output_dir: Path | None = None, name: str | None = None) -> None:
    """Block until pending saves (of one directory, of one name) are settled; failures stay with their saves."""
    for save in pending():
        attempt = save.attempt
        if output_dir is not None and attempt.output_dir.resolve() != output_dir.resolve():
            continue
        if name is None or attempt.name == name:
            if not save._sealed:
                raise SaveFailed(
                    f"{attempt.label}: it is being staged by this very call; do not save or load inside of it"
                )
            save._settled.wait()


def fence(saves: Iterable[Save] | None = None) -> None:
    """Wait until no pending save reads training tensors any more; for the disk only if a save leases some.

    Call it before changing parameters by other means than the optimizer that was wired.
    """
    for save in pending() if saves is None else saves:
        save.fence()


def wait_copied(saves: list[Save], changes: Changes = lambda owner: True) -> None:
    """`Save.fence` of these saves; those that are settled leave the list.

    Raises:
        SaveFailed, EpochLost: one of them failed in the background and its settings say `fail_training`.
    """
    for save in list(saves):
        save.fence(changes)
        if not save.settled:
            continue
        saves.remove(save)
        if save.failure is not None and not save.reported and save.settings.fail_training:
            save.reported = True
            raise save.failure


_background: list[tuple[threading.Thread, float]] = []


def in_background(action: Callable[[], None], name: str, exit_timeout_s: float) -> None:
    """Run `action` on a thread that the interpreter's exit waits for, at most `exit_timeout_s`."""
    thread = threading.Thread(target=action, name=f"roll_ckpt {name}", daemon=True)
    _background[:] = [(other, limit) for other, limit in _background if other.is_alive()]
    _background.append((thread, exit_timeout_s))
    thread.start()


def _finish_at_exit() -> None:
    if _pid != os.getpid():
        return
    for save in pending():
        try:
            save.wait(save.settings.exit_timeout_s, uploaded=True)
        except (RollCkptError, TimeoutError) as problem:
            if not save.reported:
                log.error("at exit: %s", problem)
    for thread, limit_s in list(_background):
        thread.join(limit_s)
    for epoch in _epochs.values():
        epoch.release()


atexit.register(_finish_at_exit)
