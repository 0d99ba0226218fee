"""The output directories that this run has claimed; rank 0 only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

from roll_ckpt import names, process
from roll_ckpt.config import Settings
from roll_ckpt.disk import tree
from roll_ckpt.errors import ConfigError, RunIsLive, SaveFailed
from roll_ckpt.save.pending import pending
from roll_ckpt.transaction import claims, recovery
from roll_ckpt.transaction.epochs import Epoch

log = logging.getLogger("roll_ckpt")

_EPOCHS_KEPT = 8


class ClaimedDirectories:
    """The claims of this process by directory, the one used last at the end; see `process`."""

    exit = process.Exit.CLAIMS

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epochs: dict[Path, Epoch] = {}

    def find(self, output_dir: Path) -> Epoch | None:
        """The claim on `output_dir`, if this process has one."""
        with self._lock:
            return self._epochs.get(output_dir.resolve())

    def use(self, output_dir: Path, epoch: Epoch) -> None:
        """Keep `epoch` as the claim on `output_dir` that was used last."""
        with self._lock:
            self._epochs.pop(output_dir.resolve(), None)
            self._epochs[output_dir.resolve()] = epoch

    def release_unused(self, busy: Collection[Path]) -> None:
        """Release directories of long ago, but none in `busy`: some hosts give every checkpoint a directory."""
        with self._lock:
            idle = [key for key in self._epochs if key not in busy]
            old = [self._epochs.pop(key) for key in idle[: max(0, len(self._epochs) - _EPOCHS_KEPT)]]
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
) -> Epoch:
    """This run's claim on `output_dir`; rank 0 only. Recovers what an older run left, at the first call.

    Raises:
        RunIsLive: another live run owns the directory. EpochLost: one has taken it over since.
    """
    claimed = process.part(ClaimedDirectories)
    epoch = claimed.find(output_dir)
    if epoch is None:
        epoch = claims.claim(
            output_dir,
            run_id=settings.run_id or "default",
            clusters=clusters,
            expected_clusters=expected_clusters,
            take_over=settings.take_over,
        )
        claimed.release_unused({save.attempt.output_dir.resolve() for save in pending()})
    claimed.use(output_dir, epoch)
    epoch.check()
    return epoch


def find_claim(output_dir: Path) -> Epoch | None:
    """The claim that this process made on `output_dir`, None if it made none."""
    return process.part(ClaimedDirectories).find(output_dir)


def epoch_of(output_dir: Path) -> Epoch:
    """The claim that this process made on `output_dir`; it must have made one."""
    epoch = find_claim(output_dir)
    assert epoch is not None, f"{output_dir} is not claimed by this process"
    return epoch


def recover(output_dir: Path, settings: Settings, clusters: Mapping[str, int]) -> None:
    """Finish or discard what a killed run left in `output_dir`, if it left anything; rank 0 only.

    A directory of a live run, or one that may not be written, is left alone: it can still be loaded from.
    """
    if not any(names.parse_attempt_dir(entry) for entry in tree.list_dir(output_dir)):
        return
    try:
        claim(output_dir, settings, clusters)
    except (RunIsLive, ConfigError, OSError) as problem:
        log.warning("%s: an unfinished save lies there and is left alone: %s", output_dir, problem)


def clear(epoch: Epoch) -> None:
    """Free the disk space of saves that ended while the disk refused; what it still refuses is logged."""
    busy = {epoch.output_dir / save.attempt.directory.name for save in pending()}
    try:
        for done in recovery.clear(epoch, busy):
            log.warning("%s: attempt %d.%d, which had ended with an error of the disk, is %s now (%s)",
                        epoch.output_dir / done.name, done.epoch, done.attempt, done.action, done.reason)  # fmt: skip
    except (OSError, SaveFailed) as problem:
        log.warning("%s: what an earlier save left there cannot be removed yet: %s", epoch.output_dir, problem)
