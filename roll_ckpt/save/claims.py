"""The output directories that this process has claimed for its run. Used on rank 0 only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.errors import SaveFailed
from roll_ckpt.save.pending import pending
from roll_ckpt.transaction import claims, recovery
from roll_ckpt.transaction.epochs import Epoch

log = logging.getLogger("roll_ckpt")

_MOST_CLAIMS = 8


class ClaimedDirectories:
    """The part of the `process` registry that holds this process's claims, least recently used first."""

    exit = process.Exit.CLAIMS

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epochs: dict[Path, Epoch] = {}
        self.claiming = threading.Lock()
        """Held while a directory is looked up and claimed: two threads that save there first make one claim."""

    def find(self, output_dir: Path) -> Epoch | None:
        """This process's claim on `output_dir`, None if it has none."""
        with self._lock:
            return self._epochs.get(output_dir.resolve())

    def use(self, output_dir: Path, epoch: Epoch) -> None:
        """Store `epoch` as the claim on `output_dir`, and mark it as the most recently used."""
        with self._lock:
            self._epochs.pop(output_dir.resolve(), None)
            self._epochs[output_dir.resolve()] = epoch

    def release_unused(self, busy: Collection[Path]) -> None:
        """Release the least recently used claims beyond a limit, but none in `busy`.

        Some trainers give every checkpoint an output directory of its own, so claims would pile up.
        """
        with self._lock:
            idle = [key for key in self._epochs if key not in busy]
            old = [self._epochs.pop(key) for key in idle[: max(0, len(self._epochs) - _MOST_CLAIMS)]]
        for epoch in old:
            epoch.release()

    def leave(self) -> None:
        """Release every directory, so that another run may claim it at once."""
        with self._lock:
            epochs, self._epochs = list(self._epochs.values()), {}
        for epoch in epochs:
            epoch.release()


def claim(
    output_dir: Path,
    settings: Settings,
    clusters: Mapping[str, int],
    expected_clusters: Mapping[str, int] | None = None,
    *,
    host: bool = False,
) -> Epoch:
    """This run's claim on `output_dir`, made on the first call. Rank 0 only.

    With `host`, the directory belongs to a program around us, and our bookkeeping lies beside it.

    Blocks. The first call also finishes or discards the saves that an older run left unfinished, and may wait about
    20 s to see whether an earlier run on another host still lives.

    Raises:
        RunIsLive: another live run owns the directory.
        EpochLost: a newer run has taken it over since this process claimed it.
        ConfigError, OSError: the directory cannot be claimed.
    """
    claimed = process.part(ClaimedDirectories)
    with claimed.claiming:
        epoch = claimed.find(output_dir)
        if epoch is None:
            epoch = claims.claim(
                output_dir,
                run_id=settings.run_id or "default",
                clusters=clusters,
                expected_clusters=expected_clusters,
                take_over=settings.take_over,
                host=host,
            )
            claimed.release_unused({save.attempt.output_dir.resolve() for save in pending()})
        claimed.use(output_dir, epoch)
    epoch.check()
    return epoch


def find_claim(output_dir: Path) -> Epoch | None:
    """The claim that this process has made on `output_dir`; None if it has made none."""
    return process.part(ClaimedDirectories).find(output_dir)


def epoch_of(output_dir: Path) -> Epoch:
    """The claim that this process has made on `output_dir`. Call it only after `claim`."""
    epoch = find_claim(output_dir)
    assert epoch is not None, f"{output_dir} is not claimed by this process"
    return epoch


def clear(epoch: Epoch) -> None:
    """Remove what is left of saves that ended while the disk returned errors. Rank 0 only; blocks.

    What cannot be removed yet is logged; the next save tries again.
    """
    busy = {epoch.home / save.attempt.directory.name for save in pending()}
    try:
        for done in recovery.clear(epoch, busy):
            log.warning("%s: attempt %d.%d had ended with a disk error and is %s now (%s)",
                        epoch.output_dir / done.name, done.epoch, done.attempt, done.action, done.reason)  # fmt: skip
    except (OSError, SaveFailed) as problem:
        log.warning("%s: what an earlier save left there cannot be removed yet; the next save tries again: %s",
                    epoch.output_dir, problem)  # fmt: skip
