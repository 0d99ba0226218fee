"""The saves of this process that have not ended: wait for them, fence them, and run background work after them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roll_ckpt import process
from roll_ckpt.errors import RollCkptError, SaveFailed
from roll_ckpt.ranks.group import LONGEST_S, RankGroup
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
            if not save.staged:
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
    ranks.run_on_all_ranks(lambda: save.wait(uploaded=uploaded), LONGEST_S)


def confirm_staged(
    ranks: RankGroup, save: Save, raised: Exception | None = None, timeout_s: float | None = None
) -> None:
    """End the staging of a first save: one rendezvous, after which every rank knows whether all could stage.

    What cannot be saved at all, such as a lock in a module's extra state, is then told at the first save, on every
    rank, and not only in a log. Every rank calls, after `save.staging()`. `raised` is what staging raised on this rank,
    `timeout_s` how long rank 0 waits for the others (default `commit_timeout_s`).

    Raises:
        SaveFailed: on every rank, if staging failed on any. The save was abandoned, and nothing of it is on disk. Where
            staging `raised`, that is raised instead, whatever comes of the rendezvous.
    """
    failed = any(part.error is not None for part in save.cluster_saves.values())

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"failed": any(post["failed"] for post in posts)}

    try:
        if ranks.decide_on_rank0({"failed": failed}, decide, timeout_s or save.settings.commit_timeout_s)["failed"]:
            wait_on_all_ranks(ranks, save, uploaded=False)
    except RollCkptError as outcome:
        if raised is None:
            raise
        log.debug("%s: abandoned on all ranks: %s", save.attempt.final, outcome)
    if raised is not None:
        raise raised


@contextmanager
def staging(ranks: RankGroup, save: Save, *, synchronous: bool, first: bool) -> Iterator[None]:
    """`Save.staging`, then `wait_on_all_ranks` if `synchronous`, or `confirm_staged` if it is the `first` save.

    They are called also if staging fails, for other ranks wait there. Every rank calls. What staging raised on this
    rank is raised again; the other ranks get SaveFailed.
    """
    try:
        with save.staging():
            yield
    except Exception as problem:
        if first and not synchronous:
            confirm_staged(ranks, save, problem)
        if synchronous:
            try:
                wait_on_all_ranks(ranks, save, uploaded=False)
            except RollCkptError as outcome:
                log.debug("%s: abandoned on all ranks: %s", save.attempt.final, outcome)
        raise
    if synchronous:
        wait_on_all_ranks(ranks, save, uploaded=True)
    elif first:
        confirm_staged(ranks, save)


def in_background(action: Callable[[], None], name: str, exit_timeout_s: float) -> None:
    """Run `action` on a daemon thread; the interpreter's exit waits for it, at most `exit_timeout_s` seconds.

    Does not block.
    """
    thread = threading.Thread(target=action, name=f"roll_ckpt {name}", daemon=True)
    process.part(PendingSaves).add_thread(thread, exit_timeout_s)
    thread.start()
