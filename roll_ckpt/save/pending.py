"""The saves of this process that have not ended, and the work that follows them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from roll_ckpt import process
from roll_ckpt.errors import RollCkptError, SaveFailed
from roll_ckpt.ranks.group import LONGEST_S, RankGroup
from roll_ckpt.save.cluster_save import Changes
from roll_ckpt.save.save import Save

log = logging.getLogger("roll_ckpt")


class PendingSaves:
    """Saves that have not ended, oldest first, and threads of background work; see `process`."""

    exit = process.Exit.SAVES

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._saves: list[Save] = []
        self._background: list[tuple[threading.Thread, float]] = []

    def add(self, save: Save) -> None:
        """Keep `save` until it ends; it settles after the one before it in the same directory."""
        save.on_end = self._remove
        with self._lock:
            same = [other for other in self._saves if other.attempt.output_dir == save.attempt.output_dir]
            save.after = same[-1] if same else None
            self._saves.append(save)

    def _remove(self, save: Save) -> None:
        with self._lock:
            self._saves.remove(save)

    def saves(self) -> list[Save]:
        """The saves that have not ended, oldest first."""
        with self._lock:
            return list(self._saves)

    def add_thread(self, thread: threading.Thread, exit_timeout_s: float) -> None:
        """Let the interpreter's exit wait for `thread`, at most `exit_timeout_s` seconds."""
        with self._lock:
            self._background = [(other, limit) for other, limit in self._background if other.is_alive()]
            self._background.append((thread, exit_timeout_s))

    def threads(self) -> list[tuple[threading.Thread, float]]:
        """Threads of background work, each with the seconds that the exit waits for it."""
        with self._lock:
            return list(self._background)

    def leave(self) -> None:
        """Wait for every save, then for background work, each within its own limit; log what failed."""
        for save in self.saves():
            try:
                save.wait(save.settings.exit_timeout_s, uploaded=True)
            except (RollCkptError, TimeoutError) as problem:
                if not save.reported:
                    log.error("at exit: %s", problem)
        for thread, limit_s in self.threads():
            thread.join(limit_s)


def pending() -> list[Save]:
    """Saves of this process that have not ended, oldest first; none in a forked child."""
    return process.part(PendingSaves).saves()


def wait_pending(output_dir: Path | None = None, name: str | None = None) -> None:
    """Block until pending saves are settled: all, those into `output_dir`, or those of `name` in it.

    Any rank may call by itself. On return each is committed and durable, or has failed; a failure is not raised here
    but by the save's own `wait()`, or at the next fence with `fail_training`.

    Raises:
        SaveFailed: the caller is inside the staging of one of them.
    """
    for save in pending():
        attempt = save.attempt
        if output_dir is not None and attempt.output_dir.resolve() != output_dir.resolve():
            continue
        if name is None or attempt.name == name:
            if not save.staged:
                raise SaveFailed(
                    f"{attempt.label}: it is being staged by this very call; do not save or load inside of it"
                )
            save.wait_settled()


def fence(saves: Iterable[Save] | None = None) -> None:
    """Block until no pending save of this process reads training tensors any more; then they may change.

    Any rank may call by itself, between two optimizer steps. It helps with the copies. It does not wait for the disk,
    except for a save that borrows memory of the host. What is copied is not yet durable. Raises nothing.

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


def wait_on_all_ranks(ranks: RankGroup, save: Save, *, uploaded: bool) -> None:
    """`Save.wait` on every rank of `ranks`: none returns before all know the outcome; one rendezvous.

    Raises:
        SaveFailed: on every rank, if it failed on any.
    """
    ranks.run_on_all_ranks(lambda: save.wait(uploaded=uploaded), LONGEST_S)


def in_background(action: Callable[[], None], name: str, exit_timeout_s: float) -> None:
    """Run `action` on a thread that the interpreter's exit waits for, at most `exit_timeout_s` seconds."""
    thread = threading.Thread(target=action, name=f"roll_ckpt {name}", daemon=True)
    process.part(PendingSaves).add_thread(thread, exit_timeout_s)
    thread.start()
