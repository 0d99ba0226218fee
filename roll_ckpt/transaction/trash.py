"""The trash: what is thrown away is renamed into `.trash/<epoch>/` in one step, and deleted afterwards.

Each epoch has its own directory there. The recovery of the next epoch moves it away before anything else, so that a
late process of an older epoch finds its target gone (ENOENT) and removes nothing.
"""

from __future__ import annotations

from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree, writes
from roll_ckpt.disk.missing import not_found_ok
from roll_ckpt.errors import EpochLost
from roll_ckpt.transaction import epochs


def trash(home: Path, path: Path, epoch: int) -> Path:
    """Rename `path` into the trash of `epoch` and return its new path. Not durable; deletes nothing yet.

    Raises:
        FileNotFoundError: `path` is gone. EpochLost: a newer run has retired the trash of `epoch`.
    """
    folder = home / names.trash_dir(epoch)
    target = folder / names.unique(path.name.lstrip("."))
    try:
        writes.rename(path, target)
    except FileNotFoundError:
        if tree.is_dir(folder) or not tree.exists(path):
            raise
        # Somebody has deleted it, or a newer run has retired it. The order makes a late process harmless: a run that
        # claims the directory after this look moves the folder away, so that the rename finds it gone.
        epochs.make_folders(home, epoch)
        try:
            epochs.check(home, epoch)
        except EpochLost:
            with not_found_ok():
                writes.remove_dir(folder)
            raise
        writes.rename(path, target)
    return target


def empty_trash(home: Path, epoch: int) -> None:
    """Delete everything that this epoch has thrown away. Blocks while it deletes; OSError if the disk refuses."""
    folder = home / names.trash_dir(epoch)
    for entry in tree.list_dir(folder):
        writes.remove_tree(folder / entry)


def retire_trash(home: Path, epoch: int) -> None:
    """Move the trash directories of older epochs away, so that their late processes cannot remove anything."""
    folder = home / names.TRASH
    for entry in tree.list_dir(folder):
        if not entry.isdecimal():
            writes.remove_tree(folder / entry)
        elif int(entry) < epoch:
            with not_found_ok():
                trash(home, folder / entry, epoch)
