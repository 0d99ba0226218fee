"""Which committed checkpoints go, decided by a pure function over records of them; then renamed away, then deleted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from roll_ckpt.disk import failpoints, writes
from roll_ckpt.transaction import listing, reader_locks, trash
from roll_ckpt.transaction.epochs import Epoch

log = logging.getLogger("roll_ckpt")


@dataclass(frozen=True)
class Record:
    """What a rule knows of one committed checkpoint.

    `committed_at_s` is seconds since 1970 by the file system's clock, `nbytes` the bytes of all its files. A
    `protected` one must stay: it is owed to a destination, named by `latest`, or the run resumed from it.
    """

    name: str
    step: int | None
    committed_at_s: float
    nbytes: int
    protected: bool = False


def doomed(records: Sequence[Record], keep: int) -> list[str]:
    """The names of the checkpoints to remove, the oldest first; `records` come oldest first. Pure.

    The newest `keep` stay (0 keeps all), so the newest one always does; protected ones stay beside them.
    """
    if keep < 0:
        raise ValueError(f"cannot keep {keep} checkpoints; 0 keeps all")
    old = records[:-keep] if keep else []
    return [record.name for record in old if not record.protected]


class Owing(Protocol):
    """A destination, as pruning sees it; see `upload.destination.Destination`."""

    def owed(self) -> Collection[str]: ...

    def forget(self, name: str) -> None: ...


def records_of(output_dir: Path, owing: Iterable[Owing] = (), protected: Collection[str] = ()) -> list[Record]:
    """A record of each committed checkpoint in `output_dir`, the oldest first.

    One with a damaged manifest is left out. `owing` is asked after the checkpoints were listed, so that nothing is
    listed of which a destination could not know yet.
    """
    committed = listing.committed(output_dir)
    stay = {*protected, *listing.named_by_latest(output_dir), *(name for one in owing for name in one.owed())}
    return [
        Record(
            name=manifest.name,
            step=manifest.step,
            committed_at_s=listing.committed_at_s(output_dir / manifest.name),
            nbytes=manifest.nbytes(),
            protected=manifest.name in stay,
        )
        for manifest in committed
    ]


def prune(
    output_dir: Path, epoch: Epoch, keep: int, owing: Sequence[Owing] = (), protected: Collection[str] = ()
) -> list[str]:
    """Remove all but the newest `keep` committed checkpoints; return the names that are gone for good.

    Blocks while it deletes. What is protected, owed to a destination, being read, or named by `latest` stays. One
    with a damaged manifest is neither counted nor touched.

    Raises:
        EpochLost: a newer run owns the directory. OSError: the disk refused; what is left is removed later.
        Damaged: the record of where the checkpoints are pushed to; nothing was removed.
    """
    removed = []
    for name in doomed(records_of(output_dir, owing, protected), keep):
        if _remove(output_dir, epoch, name):
            removed.append(name)
            for destination in owing:
                destination.forget(name)
    return removed


def _remove(output_dir: Path, epoch: Epoch, name: str) -> bool:
    """Remove one checkpoint; False if somebody reads it, or another job has removed it."""
    with reader_locks.removing(output_dir / name) as allowed:
        if not allowed:
            log.info("%s is being read; it is pruned later", output_dir / name)
            return False
        epoch.check()
        try:
            place = trash.trash(output_dir, output_dir / name, epoch.number)
        except FileNotFoundError:
            epoch.check()  # or else another job of this run has pruned it
            return False
        writes.fsync_dir(output_dir)
    failpoints.failpoint("prune.renamed", name=name)
    writes.remove_tree(place)
    failpoints.failpoint("prune.deleted", name=name)
    return True
