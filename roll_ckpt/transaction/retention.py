"""Retention: a pure function over records decides which committed checkpoints go; they are renamed away and deleted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from roll_ckpt.disk import failpoints, writes
from roll_ckpt.disk.missing import if_there
from roll_ckpt.transaction import listing, reader_locks, trash
from roll_ckpt.transaction.epochs import Epoch

log = logging.getLogger("roll_ckpt")


@dataclass(frozen=True)
class Record:
    """What a retention rule knows of one committed checkpoint.

    `committed_at_s` is in seconds since 1970 by the file system's clock; `nbytes` is the size of all its files. A
    `protected` checkpoint must stay: it is owed to a destination, `latest` names it, or the run resumed from it.
    """

    name: str
    step: int | None
    committed_at_s: float
    nbytes: int
    protected: bool = False


def doomed(records: Sequence[Record], keep: int) -> list[str]:
    """The names of the checkpoints to remove, the oldest first, as in `records`. A pure function.

    The newest `keep` checkpoints stay, and so do the protected ones; 0 keeps all. ValueError if `keep` is negative.
    """
    if keep < 0:
        raise ValueError(f"cannot keep {keep} checkpoints; 0 keeps all")
    old = records[:-keep] if keep else []
    return [record.name for record in old if not record.protected]


class Owing(Protocol):
    """A destination, as pruning sees it; see `upload.destination.Destination`."""

    def owed(self) -> Collection[str]:
        """The names of the checkpoints that must stay because they are still to be sent."""

    def forget(self, name: str) -> None:
        """Called when a checkpoint has been pruned."""


def records_of(output_dir: Path, owing: Iterable[Owing] = (), protected: Collection[str] = ()) -> list[Record]:
    """The records of the committed checkpoints in `output_dir`, the oldest first; a damaged one is skipped.

    The destinations in `owing` are asked after the checkpoints were listed: a checkpoint that is committed in between
    is not listed, so none is taken for not owed before its destination knows of it.
    """
    manifests = listing.committed(output_dir)
    protected_names = {
        *protected,
        *listing.named_by_latest(output_dir),
        *(name for destination in owing for name in destination.owed()),
    }
    records = []
    for manifest in manifests:
        committed_at_s = if_there(partial(listing.committed_at_s, output_dir / manifest.name))
        if committed_at_s is None:
            log.debug("%s: gone since it was listed, so another save or job has pruned it", manifest.name)
            continue
        protected_here = manifest.name in protected_names
        records.append(Record(manifest.name, manifest.step, committed_at_s, manifest.nbytes(), protected_here))
    return records


def prune(
    output_dir: Path, epoch: Epoch, keep: int, owing: Sequence[Owing] = (), protected: Collection[str] = ()
) -> list[str]:
    """Remove all but the newest `keep` committed checkpoints; return the names of those removed.

    Rank 0 calls it. Blocks while it deletes; the removal is durable on return. A checkpoint stays if it is in
    `protected`, owed to a destination, being read, or named by `latest`. A damaged one is neither counted nor touched.

    Raises:
        EpochLost: a newer run owns the directory.
        OSError: the disk refused; what is left is removed at the next save or start.
        Damaged: a destination's record of what it owes is damaged; nothing was removed.
    """
    removed = []
    for name in doomed(records_of(output_dir, owing, protected), keep):
        if _remove(output_dir, epoch, name):
            removed.append(name)
            for destination in owing:
                destination.forget(name)
    return removed


def _remove(output_dir: Path, epoch: Epoch, name: str) -> bool:
    """Remove one checkpoint; False if it is being read, or another job has removed it."""
    with reader_locks.removing(output_dir / name) as allowed:
        if not allowed:
            log.info("%s is being read; a later save prunes it", output_dir / name)
            return False
        epoch.check()
        try:
            place = trash.trash(output_dir, output_dir / name, epoch.number)
        except FileNotFoundError as error:
            epoch.check()
            log.debug("%s: gone, so another job of this run has pruned it", error.filename)
            return False
        writes.fsync_dir(output_dir)
    failpoints.failpoint("prune.renamed", name=name)
    writes.remove_tree(place)
    failpoints.failpoint("prune.deleted", name=name)
    return True
