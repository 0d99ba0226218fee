"""Where a path on the command line leads: to an output directory, to one checkpoint, or to a part of one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.formats import manifests
from roll_ckpt.transaction import listing
from roll_ckpt.transaction.home import find_home

log = logging.getLogger("roll_ckpt")


@dataclass(frozen=True)
class Place:
    """An output directory, or the checkpoint `name` in it, or `part`, a path below that checkpoint."""

    output_dir: Path
    name: str | None = None
    part: str = ""

    @property
    def checkpoint_dir(self) -> Path:
        """The checkpoint's directory; the output directory where no checkpoint was named."""
        return self.output_dir / (self.name or "")

    def directory_of(self, name: str) -> Path:
        """The directory of the checkpoint whose manifest says `name`. A copy may have another name than it says."""
        return self.checkpoint_dir if self.name is not None else self.output_dir / name


def argument(given: str) -> Path:
    """The absolute path that an argument means. Shells expand `~` and `$NAME`, but not in `--upload-dir=~/x`.

    ConfigError for a variable that is not set, and for the home of no user.
    """
    path = Path(os.path.abspath(given))
    return path if tree.exists(path) else Path(os.path.abspath(names.expand(given)))


def locate(given: str) -> Place:
    """The place that a path leads to; a path inside a checkpoint leads to that checkpoint.

    NotFound, saying why, if it leads to no checkpoint and no directory of checkpoints.
    """
    path = argument(given)
    if not tree.exists(path):
        raise NotFound(f"{given} does not exist")
    for checkpoint_dir in (path, *path.parents):
        if names.parse_attempt_dir(checkpoint_dir.name):
            raise NotFound(
                f"{given} is being written, or was left by a crash: it is not a checkpoint yet. The next start of the "
                f"run in {checkpoint_dir.parent}, or `roll-ckpt recover`, finishes or discards it"
            )
        if names.parse_pull_dir(checkpoint_dir.name):
            raise NotFound(
                f"{given} is being pulled, or was left by a pull that was killed: it is not a checkpoint yet. Run the "
                "same `roll-ckpt pull` again to finish it, or remove it"
            )
        if _is_checkpoint(checkpoint_dir):
            part = path.relative_to(checkpoint_dir).as_posix()
            name = _name_of(checkpoint_dir)
            return Place(checkpoint_dir.parents[name.count("/")], name, "" if part == "." else part)
    if _holds_checkpoints(path):
        return Place(path)
    raise NotFound(
        f"{given}: no checkpoint of roll_ckpt is there. Give the output_dir of a run, the save_dir of a "
        "DeepSpeed script, or one checkpoint in it"
    )


def run_directory(given: str, command: str) -> Path:
    """The output directory that a path leads to; NotFound if it leads into one checkpoint."""
    place = locate(given)
    if place.name is not None:
        raise NotFound(f"{given} is one checkpoint; {command} works on a whole directory: {place.output_dir}")
    return place.output_dir


def is_foreign(path: Path) -> bool:
    """True if the directory is a DeepSpeed checkpoint that was not written by roll_ckpt."""
    if names.is_own(path.name) or not tree.is_dir(path) or _count_records(path):
        return False
    try:
        return any(entry.endswith("_states.pt") for entry in tree.list_dir(path))
    except PermissionError as error:
        log.debug("%s: not looked into: %s", path, error)
        return False


def _is_checkpoint(path: Path) -> bool:
    """True if the directory is a checkpoint, even if one of its three records is gone.

    One record is not enough: other programs write a manifest.json, too.
    """
    return _count_records(path) > 1


def _name_of(checkpoint_dir: Path) -> str:
    """The name of a checkpoint relative to its output directory: its manifest tells whether it lies in folders."""
    try:
        name = manifests.read(checkpoint_dir).name
    except (Damaged, OSError) as error:
        log.debug("%s: taken for a checkpoint that lies in no folder: %s", checkpoint_dir, error)
        return checkpoint_dir.name
    return name if "/" in name and checkpoint_dir.as_posix().endswith(f"/{name}") else checkpoint_dir.name


def _count_records(path: Path) -> int:
    """How many of the records manifest.json, votes/expected.json and decision are there."""
    try:
        return sum(tree.exists(path / record) for record in (names.MANIFEST, names.EXPECTED, names.DECISION))
    except PermissionError as error:
        log.debug("%s: not looked into, as it belongs to another user: %s", path, error)  # lost+found, for one
        return 0


def _holds_checkpoints(path: Path) -> bool:
    return (
        tree.is_dir(path)
        and any(
            entry == names.EPOCHS
            or names.parse_attempt_dir(entry) is not None
            or _is_checkpoint(path / entry)
            or is_foreign(path / entry)
            for entry in {*tree.list_dir(path), *listing.names_in(path)}
        )
    ) or (tree.is_dir(path) and find_home(path) != path)
