"""Which committed checkpoints go, and how: decided by a pure function, then renamed away, then deleted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from roll_ckpt.disk import failpoints, writes
from roll_ckpt.errors import Damaged
from roll_ckpt.transaction import listing, reader_locks, trash
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.upload.hub import push_queue

log = logging.getLogger("roll_ckpt")


def doomed(names: Sequence[str], keep: int, protected: Collection[str] = ()) -> list[str]:
    """The names to remove, the oldest first, of `names` given newest last. Pure.

    The newest `keep` stay (0 keeps all), so the newest one always does; `protected` ones stay beside them.
    """
    if keep < 0:
        raise ValueError(f"cannot keep {keep} checkpoints; 0 keeps all")
    old = names[:-keep] if keep else []
    return [name for name in old if name not in protected]


def prune(output_dir: Path, epoch: Epoch, keep: int, protected: Callable[[], Collection[str]] = frozenset) -> list[str]:
    """Remove all but the newest `keep` committed checkpoints; return the names that are gone for good.

    Blocks while it deletes. What is protected, being read, named by `latest`, or owed to the Hub (whoever asked for
    the push) stays. `protected` is asked after the checkpoints were listed, so that none that it could not know yet is
    among those. One with a damaged manifest is neither counted nor touched.

    Raises:
        EpochLost: a newer run owns the directory. OSError: the disk refused; what is left is removed later.
        Damaged: the record of where the checkpoints are pushed to; nothing was removed.
    """
    try:
        latest = listing.read_latest(output_dir)
    except Damaged as error:
        log.warning("%s; pruning goes on without it", error)
        latest = None
    known = {found.name: found for found in listing.committed(output_dir)}
    going = doomed(list(known), keep, {*protected(), *push_queue.owed(output_dir), *([latest] if latest else [])})
    removed = []
    for name in going:
        with reader_locks.removing(output_dir / name) as allowed:
            if not allowed:
                log.info("%s is being read; it is pruned later", output_dir / name)
                continue
            epoch.check()
            try:
                place = trash.trash(output_dir, output_dir / name, epoch.number)
            except FileNotFoundError:
                epoch.check()  # or else another world of this run has pruned it
                continue
            writes.fsync_dir(output_dir)
        failpoints.failpoint("prune.renamed", name=name)
        writes.remove_tree(place)
        failpoints.failpoint("prune.deleted", name=name)
        removed.append(name)
    return removed
