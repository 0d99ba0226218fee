"""The save corridor of one process: begin, stage, write, vote, commit.

A `Save` is this process's part of one checkpoint, a `Ticket` one cluster's part of it. Bytes are copied and
written by native threads; a short-lived Python thread for each save only waits for them, votes and settles.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.config import Settings
from roll_ckpt.disk import tree
from roll_ckpt.errors import ConfigError, RunIsLive, SaveFailed
from roll_ckpt.save.pending import pending
from roll_ckpt.transaction import claims, recovery
from roll_ckpt.transaction.epochs import Epoch

log = logging.getLogger("roll_ckpt")

_EPOCHS_KEPT = 8
_epochs: dict[Path, Epoch] = {}


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
    key = output_dir.resolve()
    epoch = _epochs.pop(key, None)
    if epoch is None:
        epoch = claims.claim(
            output_dir,
            run_id=settings.run_id or "default",
            clusters=clusters,
            expected_clusters=expected_clusters,
            take_over=settings.take_over,
        )
        _release_unused()
    _epochs[key] = epoch  # the one used last stands last
    epoch.check()
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


def clear(output_dir: Path) -> bool:
    """Give back the room of saves that ended while the disk refused; what it still refuses is logged. False if this
    run has not claimed the directory yet."""
    epoch = _epochs.get(output_dir.resolve())
    if epoch is None:
        return False
    busy = {epoch.output_dir / save.attempt.directory.name for save in pending()}
    try:
        for found in recovery.clear(epoch, busy):
            log.warning("%s: attempt %d.%d, which had ended with an error of the disk, is %s now (%s)",
                        output_dir / found.name, found.epoch, found.attempt, found.action, found.reason)  # fmt: skip
    except (OSError, SaveFailed) as problem:
        log.warning("%s: what an earlier save has left there cannot be removed yet: %s", output_dir, problem)
    return True


def _release_unused() -> None:
    """Let go of directories of long ago: some hosts give every checkpoint a save directory of its own."""
    busy = {save.attempt.output_dir.resolve() for save in pending()}
    idle = [key for key in _epochs if key not in busy]
    for key in idle[: max(0, len(_epochs) - _EPOCHS_KEPT)]:
        _epochs.pop(key).release()


def epoch_of(output_dir: Path) -> Epoch:
    """The claim that this process made on `output_dir`; it must have made one."""
    return _epochs[output_dir.resolve()]
