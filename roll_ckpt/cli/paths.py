"""Where a path on the command line leads."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree
from roll_ckpt.errors import NotFound


@dataclass(frozen=True)
class Place:
    """What a path means: an output directory, perhaps one checkpoint in it, perhaps a part of that."""

    output_dir: Path
    name: str | None = None
    part: str = ""

    @property
    def checkpoint_dir(self) -> Path:
        """The checkpoint's directory; the output directory where no checkpoint was named."""
        return self.output_dir / (self.name or "")


def locate(given: str) -> Place:
    """The place a path leads to; any path inside a checkpoint leads to it. NotFound, saying why."""
    path = Path(os.path.abspath(given))
    if not tree.exists(path):
        raise NotFound(f"{given} does not exist")
    for checkpoint_dir in (path, *path.parents):
        if names.parse_attempt_dir(checkpoint_dir.name):
            raise NotFound(
                f"{given} is being written, or was left by a crash: no checkpoint yet. See {checkpoint_dir.parent}; "
                "the next start of the run, or `roll-ckpt recover`, finishes or discards it"
            )
        if names.parse_pull_dir(checkpoint_dir.name):
            raise NotFound(
                f"{given} is being pulled, or a pull that was killed left it: no checkpoint yet. The same "
                "`roll-ckpt pull` goes on there; or remove it"
            )
        if _is_checkpoint(checkpoint_dir):
            part = path.relative_to(checkpoint_dir).as_posix()
            return Place(checkpoint_dir.parent, checkpoint_dir.name, "" if part == "." else part)
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


def _is_checkpoint(path: Path) -> bool:
    """Whether a directory is one, perhaps with a record gone. Others have a manifest.json, too."""
    return _records(path) > 1


def _records(path: Path) -> int:
    with suppress(PermissionError):  # of somebody else, as lost+found is
        return sum(tree.exists(path / record) for record in (names.MANIFEST, names.EXPECTED, names.DECISION))
    return 0


def _holds_checkpoints(path: Path) -> bool:
    return tree.is_dir(path) and any(
        entry == names.EPOCHS
        or names.parse_attempt_dir(entry) is not None
        or _is_checkpoint(path / entry)
        or is_foreign(path / entry)
        for entry in tree.list_dir(path)
    )


def is_foreign(path: Path) -> bool:
    """Whether it is a DeepSpeed checkpoint that somebody else wrote."""
    if path.name.startswith(".") or not tree.is_dir(path) or _records(path):
        return False
    with suppress(PermissionError):
        return any(entry.endswith("_states.pt") for entry in tree.list_dir(path))
    return False
