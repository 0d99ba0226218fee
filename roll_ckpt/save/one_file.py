"""Writes one file that belongs to no checkpoint through the staging arena."""

from __future__ import annotations

from pathlib import Path

from roll_ckpt import names
from roll_ckpt.config import Settings
from roll_ckpt.disk import writes
from roll_ckpt.formats.image import FileImage
from roll_ckpt.save import arena
from roll_ckpt.save.cluster_save import stage_file


def write_file(path: Path, image: FileImage, settings: Settings) -> None:
    """Write one file: a temporary file beside it, fsync, rename. One rank calls. Blocks; durable on return.

    Raises:
        OSError: the write failed; the temporary file is removed and an older file at `path` is untouched. NotDurable
            if only the fsync of the directory failed: then the new file is there and may not survive a power failure.
    """
    temporary = path.with_name(names.temporary_file(path.name))
    staged = stage_file(arena.mover(settings), temporary, image, overlap=False)
    try:
        staged.transfer.wait_written()
        writes.rename(temporary, path)
    except BaseException:
        staged.transfer.abandon()
        writes.discard_file(temporary)
        raise
    writes.fsync_dir(path.parent)
