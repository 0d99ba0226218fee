"""Files of others in a checkpoint's directory: a tokenizer, notes, what a file manager or a download leaves.

They are neither damage nor ours to delete: `verify` lists them, and a save that replaces the checkpoint keeps them.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Collection
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree, writes
from roll_ckpt.disk.missing import not_found_ok

log = logging.getLogger("roll_ckpt")

_STATES = ("*_states.pt", "*.distcp")
"""What stock DeepSpeed and Megatron-core pick up from a checkpoint's directory, whoever put it there."""
_RECORDS = (names.MANIFEST, names.DECISION, names.EXPECTED)
_FOLDERS = (names.VOTES, names.DIGESTS, names.TENSORS)


def read_by_stock(path: str) -> bool:
    """Whether stock code would load an additional file at `path` as a part of the checkpoint."""
    return any(fnmatch.fnmatchcase(path.rpartition("/")[2], pattern) for pattern in _STATES)


def foreign_files(checkpoint_dir: Path, written: Collection[str]) -> list[str]:
    """The paths below `checkpoint_dir` that are not in `written`, sorted."""
    written = {*written}
    return sorted(path for path, _ in tree.walk_all(checkpoint_dir) if path not in written)


def _like_ours(path: str, folders: Collection[str]) -> bool:
    """Whether a file that nobody is known to have written is one of a save, by its name and place."""
    folder, _, entry = path.rpartition("/")
    if path in _RECORDS or (folder == names.VOTES and names.parse_vote_file(entry)):
        return True
    if names.parse_digest_file(path) or names.parse_tensor_file(path):
        return True
    return read_by_stock(path) and (not folder or folder in folders)


def move_foreign(old: Path, new: Path, written: Collection[str], suffix: str) -> list[str]:
    """Move the files of others from a replaced checkpoint to the one that took its place; durable. Their new paths.

    `written` are the files that the save of the old checkpoint wrote. A path that exists in the new one gets `suffix`.
    Idempotent; another process may do the same at once.
    """
    moved: dict[str, str] = {}
    folders = {*_FOLDERS, *(folder for path in written for folder in _folders_of(path))}
    for path in foreign_files(old, written):
        if _like_ours(path, folders):
            continue
        unit = next((folder for folder in _folders_of(path) if folder not in folders), path)  # a folder of others whole
        if unit not in moved:
            moved[unit] = unit + suffix if tree.exists(new / unit) else unit
    for source, target in moved.items():
        writes.make_dirs((new / target).parent)
        with not_found_ok():
            writes.rename(old / source, new / target)
    for folder in {(new / target).parent for target in moved.values()}:
        writes.fsync_dir(folder)
    return sorted(moved.values())


def _folders_of(path: str) -> list[str]:
    """The folders that lead to `path`, the highest first."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]
