"""What killed runs have left beside the directories of hosts, where no later run would look for it."""

from __future__ import annotations

import logging
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import locks, reads, tree, writes
from roll_ckpt.errors import Damaged
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.epochs import Member

log = logging.getLogger("roll_ckpt")


def sweep_beside(home: Path) -> None:
    """Remove what killed runs have left beside directories that do not exist any more, such as rotated checkpoints."""
    try:
        entries = tree.list_dir(home.parent)
    except OSError as error:
        log.debug("%s: not looked through for what killed runs have left: %s", home.parent, error)
        return
    for entry in entries:
        name, other = names.parse_beside(entry), home.parent / entry
        if name is None or other == home:
            continue
        try:
            if not tree.exists(home.parent / name):
                _remove_dead(other, home.parent / name)
        except (OSError, Damaged) as error:  # another user's, say
            log.debug("%s: left as it is: %s", other, error)


def _remove_dead(home: Path, output_dir: Path) -> None:
    """Remove a home if its newest run has certainly ended: its records are unlocked, and stay locked meanwhile."""
    held = []
    try:
        for path, member in epochs.members(home, epochs.newest_number(home)).items():
            local = isinstance(member, Member) and member.locked and member.boot_id == reads.boot_id()
            lock = locks.try_lock(path, exclusive=True) if local else None
            if lock is None:
                return
            held.append(lock)
        if not held or tree.exists(output_dir):  # a run may have claimed it just now
            return
        log.info("%s is gone, and so is the run that saved there; removing what that run has left in %s",
                 output_dir, home)  # fmt: skip
        away = home.with_name(names.temporary_file(home.name))
        writes.rename(home, away)
    finally:
        for lock in held:
            lock.release()
    writes.remove_tree(away)
