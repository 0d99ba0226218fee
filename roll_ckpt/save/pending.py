"""The saves of this process that have not ended: wait for them, fence them, and run background work after them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from roll_ckpt import process
from roll_ckpt.errors import RanksDisagree, RollCkptError, SaveFailed
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save.cluster_save import Changes
from roll_ckpt.save.save import Save

log = logging.getLogger("roll_ckpt")


class PendingSaves:
    """The part of the `process` registry that holds the saves that have not ended, and background threads."""

    exit = process.Exit.SAVES

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._saves: list[Save] = []
        self._background: list[tuple[threading.Thread, float]] = []

    def add(self, save: Save) -> None:
        """Hold `save` until it ends, and let it settle after the save before it in the same output directory."""
        save.on_end = self._remove
        with self._lock:
            output_dir = save.attempt.output_dir.resolve()
            same = [other for other in self._saves if other.attempt.output_dir.resolve() == output_dir]
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
        """Make the interpreter's exit wait for `thread`, at most `exit_timeout_s` seconds."""
        with self._lock:
            self._background = [(other, limit) for other, limit in self._background if other.is_alive()]
            self._background.append((thread, exit_timeout_s))

    def threads(self) -> list[tuple[threading.Thread, float]]:
        """The background threads, each with the longest time in seconds that the exit waits for it."""
        with self._lock:
            return list(self._background)

    def leave(self) -> None:
        """Wait for every save, then for each background thread, each for at most its own limit; log what failed."""
        for save in self.saves():
            try:
                save.wait(save.settings.exit_timeout_s, uploaded=True)
            except (RollCkptError, TimeoutError) as problem:
                if not save.reported:
                    log.error("at exit: %s", problem)
        for thread, limit_s in self.threads():
            thread.join(limit_s)


def pending() -> list[Save]:
    """The saves of this process that have not ended, oldest first. A forked child has none."""
    return process.part(PendingSaves).saves()


def wait_pending(output_dir: Path | None = None, name: str | None = None) -> None:
    """Block until the pending saves of this process are settled: each is then committed and durable, or has failed.

    Any rank may call alone. Waits for all of them, for those into `output_dir`, or for the one of `name` in it. Does
    not wait for uploads. A failure is not raised here, but logged and reported as for any save in the background; with
    `fail_training` the next fence of its engine or pipeline raises it.

    Raises:
        SaveFailed: the calling thread is inside the staging of one of these saves, and would wait for itself.
    """
    for save in pending():
        attempt = save.attempt
        if output_dir is not None and attempt.output_dir.resolve() != output_dir.resolve():
            continue
        if name is None or attempt.name == name:
            if save.staged_here:
                raise SaveFailed(
                    f"{attempt.label}: it is being staged by this very call; do not save or load inside of it"
                )
            save.wait_settled()


def fence(saves: Iterable[Save] | None = None) -> None:
    """Block until no pending save of this process reads training tensors any more; then they may be changed.

    Call it before code other than the attached optimizer changes parameters or optimizer state: loading weights, an
    EMA swap, a manual update. The attached optimizer's own step does this by itself.

    Any rank may call alone, between two optimizer steps. The calling thread helps with the copies. It does not wait
    for the disk, except for saves that write host memory in place (CPU-offloaded optimizer state). The saves are not
    durable on return. Raises nothing: a copy that fails becomes a failed save.

    Args:
        saves: fence only these saves; by default all that are pending.
    """
    for save in pending() if saves is None else saves:
        save.fence()


def wait_copied(saves: list[Save], changes: Changes = lambda owner: True) -> None:
    """Call `Save.fence` for each of `saves`, and remove those that are settled from the list.

    Raises:
        SaveFailed, EpochLost: one of them failed in the background, was not reported yet, and `fail_training` is set.
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
    """`Save.wait` on every rank of `ranks`, and one rendezvous: no rank returns before all know the outcome.

    Every rank calls. Durable on return.

    Raises:
        SaveFailed, EpochLost: on every rank, if the save failed on any.
    """
    meet_after(ranks, save, lambda: save.wait(uploaded=uploaded))


def meet_after(ranks: RankGroup, save: Save, action: Callable[[], object]) -> None:
    """Run `action`, which waits for `save` on this rank, and meet: what it raises on one rank is raised on all.

    Every rank calls; blocks. Other saves may begin meanwhile. A rank that gives no sign of life for `commit_timeout_s`
    seconds is given up.
    """
    timeout_s = save.settings.commit_timeout_s
    ranks.run_on_all_ranks(action, timeout_s, working=True, key=str(save.attempt.directory))


@contextmanager
def staging(ranks: RankGroup, save: Save, *, first: bool = False) -> Iterator[None]:
    """`Save.staging`, and one rendezvous at its end, so that no rank goes on with a save that another one has given up.

    Every rank calls. What the block raises on this rank is raised again, and the other ranks raise SaveFailed. With
    `first`, so do errors that only turned this rank's vote into a no: what cannot be saved at all, such as a lock in a
    module's extra state, is then told at the first save, and not only in a log. When it raises with `first` or without
    `async_save`, the save has been abandoned, and nothing of it is on disk.
    """
    problem: Exception | None = None
    try:
        with save.staging():
            yield
    except Exception as error:
        problem = error
    try:
        ranks.raise_together(problem or (_quiet_failure(save) if first else None), save.settings.commit_timeout_s)
    except RanksDisagree:
        raise  # the save goes on in the background
    except Exception:
        save.reported = True
        if first or not save.settings.async_save:
            save.wait_settled()
        raise


def _quiet_failure(save: Save) -> SaveFailed | None:
    """Why a part of this rank could not be staged, where that has only turned its vote into a no; else None."""
    for part in save.cluster_saves.values():
        if part.error is not None:
            return SaveFailed(
                f"{save.attempt.label}: abandoned: cluster {part.cluster!r} rank {part.rank} failed: {part.error}. "
                "Older checkpoints are untouched; the next save starts afresh"
            )
    return None


def in_background(action: Callable[[], None], name: str, exit_timeout_s: float) -> None:
    """Run `action` on a daemon thread; the interpreter's exit waits for it, at most `exit_timeout_s` seconds.

    Does not block, unless no thread can be started, as at the interpreter's exit: then `action` runs at once.
    """
    thread = threading.Thread(target=action, name=f"roll_ckpt {name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as problem:
        log.warning("%s: no thread can be started, so this blocks: %s", name, problem)
        action()
    else:
        process.part(PendingSaves).add_thread(thread, exit_timeout_s)
