"""The trash: what is thrown away is renamed into `.trash/<epoch>/` in one step, and deleted afterwards.

Each epoch has its own directory there. The recovery of the next epoch moves it away before anything else, so that a
late process of an older epoch finds its target gone (ENOENT) and removes nothing.
"""

from __future__ import annotations

from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree, writes
from roll_ckpt.disk.missing import not_found_ok


def trash(output_dir: Path, path: Path, epoch: int) -> Path:
    """Rename `path` into the trash of `epoch` and return its new path. Not durable; deletes nothing yet.

    FileNotFoundError if `path` is gone, or if the trash of `epoch` is: then a newer run owns the directory.
    """
    target = output_dir / names.trash_dir(epoch) / names.unique(path.name.lstrip("."))
    writes.rename(path, target)
    return target


def empty_trash(output_dir: Path, epoch: int) -> None:
    """Delete everything that this epoch has thrown away. Blocks while it deletes; OSError if the disk refuses."""
    folder = output_dir / names.trash_dir(epoch)
    for entry in tree.list_dir(folder):
        writes.remove_tree(folder / entry)


def retire_trash(output_dir: Path, epoch: int) -> None:
    """Move the trash directories of older epochs away, so that their late processes cannot remove anything."""
    folder = output_dir / names.TRASH
    for entry in tree.list_dir(folder):
        if not entry.isdecimal():
            writes.remove_tree(folder / entry)
        elif int(entry) < epoch:
            with not_found_ok():
                trash(output_dir, folder / entry, epoch)
