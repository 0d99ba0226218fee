"""Retention: a pure function over records decides which committed checkpoints go; they are renamed away and deleted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from roll_ckpt import names
from roll_ckpt.disk import failpoints, writes
from roll_ckpt.disk.missing import if_there
from roll_ckpt.formats.records import NO_LINEAGE, Lineage
from roll_ckpt.transaction import listing, reader_locks, trash
from roll_ckpt.transaction.epochs import Epoch

log = logging.getLogger("roll_ckpt")


@dataclass(frozen=True)
class Record:
    """What a retention rule knows of one committed checkpoint.

    `committed_at_s` is in seconds since 1970 by the file system's clock; `nbytes` is the size of all its files. A
    `protected` checkpoint must stay: it is owed to a destination, `latest` names it, or the run resumed from it. `age`
    is "epoch.order", by which another one's `lineage` may say that it continues this one.
    """

    name: str
    step: int | None
    committed_at_s: float
    nbytes: int
    protected: bool = False
    age: str = ""
    lineage: Lineage = NO_LINEAGE


def doomed(records: Sequence[Record], keep: int, series: str | None = None) -> list[str]:
    """The names of the checkpoints to remove, those to remove first coming first. A pure function.

    `records` come oldest first. Of each series, and in it of each kind of name (`best`, `step10` and `step20`), `keep`
    checkpoints stay: the newest of those that its newest one continues. Checkpoints of branches that were given up,
    because a run went back to an older one, go before all others. Protected ones stay; 0 keeps all. With `series`,
    only that series is pruned. ValueError if `keep` is negative.
    """
    if keep < 0:
        raise ValueError(f"cannot keep {keep} checkpoints; 0 keeps all")
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records if keep else ():
        if series is None or record.lineage.series == series:
            groups.setdefault((record.lineage.series, names.pattern(record.name)), []).append(record)
    continued = {of: _continued([r for r in records if r.lineage.series == of]) for of, _ in groups}
    names_to_remove = []
    for (of, _), group in groups.items():
        ordered = sorted(group, key=lambda record: record.name in continued[of])  # stable: the oldest first in each
        names_to_remove += [record.name for record in ordered[:-keep] if not record.protected]
    return names_to_remove


def _continued(series: Sequence[Record]) -> set[str]:
    """The names of the newest checkpoint of a series, and of those that it continues; the records come oldest first."""
    continued: set[str] = set()
    place = {record.age: index for index, record in enumerate(series)}
    last = len(series) - 1
    while last >= 0:
        tip = series[last]
        continued |= {record.name for record in series[: last + 1] if record.lineage.segment == tip.lineage.segment}
        before = place.get(tip.lineage.continues, -1)
        last = before if before < last else -1
    return continued


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
        age = f"{manifest.epoch}.{manifest.lineage.order}"
        facts = (committed_at_s, manifest.nbytes(), protected_here, age, manifest.lineage)
        records.append(Record(manifest.name, manifest.step, *facts))
    return records


def prune(
    output_dir: Path,
    epoch: Epoch,
    keep: int,
    owing: Sequence[Owing] = (),
    protected: Collection[str] = (),
    *,
    series: str | None = None,
) -> list[str]:
    """Remove what `doomed` names, of all series or of one; return the names of those removed.

    Rank 0 calls it. Blocks while it deletes; the removal is durable on return. A checkpoint stays if it is in
    `protected`, owed to a destination, being read, or named by `latest`. A damaged one is neither counted nor touched.

    Raises:
        EpochLost: a newer run owns the directory.
        OSError: the disk refused; what is left is removed at the next save or start.
        Damaged: a destination's record of what it owes is damaged; nothing was removed.
    """
    removed = []
    for name in doomed(records_of(output_dir, owing, protected), keep, series):
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
            place = trash.trash(epoch.home, output_dir / name, epoch.number)
        except FileNotFoundError as error:
            epoch.check()
            log.debug("%s: gone, so another job of this run has pruned it", error.filename)
            return False
        writes.fsync_dir((output_dir / name).parent)
    failpoints.failpoint("prune.renamed", name=name)
    writes.remove_tree(place)
    failpoints.failpoint("prune.deleted", name=name)
    return True
