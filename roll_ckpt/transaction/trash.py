"""What is thrown away: renamed into `.trash/<epoch>/` in one step, deleted afterwards.

Each epoch has its own directory there. The next epoch's recovery moves it away before anything else, so that
a late process of an older epoch finds its target gone (ENOENT) and removes nothing.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree, writes


def trash(output_dir: Path, path: Path, epoch: int) -> Path:
    """Rename `path` into the trash of `epoch` and return its new place. Not durable; deletes nothing yet.

    FileNotFoundError if `path` is gone, or if the epoch is.
    """
    target = output_dir / names.trash_dir(epoch) / names.unique(path.name.lstrip("."))
    writes.rename(path, target)
    return target


def empty_trash(output_dir: Path, epoch: int) -> None:
    """Delete all that this epoch has thrown away."""
    folder = output_dir / names.trash_dir(epoch)
    for entry in tree.list_dir(folder):
        writes.remove_tree(folder / entry)


def retire_trash(output_dir: Path, epoch: int) -> None:
    """Take the trash directories of older epochs away: their late processes can remove nothing any more."""
    folder = output_dir / names.TRASH
    for entry in tree.list_dir(folder):
        if not entry.isdecimal():
            writes.remove_tree(folder / entry)
        elif int(entry) < epoch:
            with suppress(FileNotFoundError):
                trash(output_dir, folder / entry, epoch)
