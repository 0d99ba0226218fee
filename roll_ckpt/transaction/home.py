"""The home of an output directory: where the bookkeeping of its runs lies (epochs, trash, attempts).

In a pipeline it is the output directory itself. A host, such as a DeepSpeed script, may count, rotate or upload every
entry of its save_dir, so its bookkeeping lies in a hidden directory beside it. Users may delete either at any time:
nothing that is committed depends on it, and the run that owns it makes it again at its next save.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree, writes

log = logging.getLogger("roll_ckpt")

_LONGEST_ENTRY = 255
_PROBE = "probe"
_NO_RENAME = (errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


def find_home(output_dir: Path) -> Path:
    """The directory that holds the bookkeeping for `output_dir`; `output_dir` if there is none yet. Writes nothing."""
    beside = beside_of(output_dir)
    if beside is None or tree.exists(output_dir / names.EPOCHS) or not tree.exists(beside / names.EPOCHS):
        return output_dir
    return beside


def choose_home(output_dir: Path, *, host: bool) -> Path:
    """The directory for the bookkeeping of a run that is about to claim `output_dir`, which is made if it is missing.

    Where there is bookkeeping already, it stays there. Else it goes beside `output_dir` if that is a `host`'s. It goes
    inside if the file system cannot rename from beside, as where a volume was mounted.
    """
    writes.make_dirs(output_dir)
    home, beside = find_home(output_dir), beside_of(output_dir)
    wanted = home != output_dir or (host and not tree.exists(output_dir / names.EPOCHS))
    return beside if wanted and beside is not None and _can_rename(beside, output_dir) else output_dir


def beside_of(output_dir: Path) -> Path | None:
    """The directory beside `output_dir` for its bookkeeping; None where there can be none."""
    place = output_dir.resolve() if tree.is_link(output_dir) else output_dir.absolute()
    entry = names.beside(place.name)
    return place.parent / entry if place.name and len(os.fsencode(entry)) <= _LONGEST_ENTRY else None


def remove_probes(folder: Path) -> None:
    """Remove the probes that killed claims have left in a home or an output directory."""
    for entry in tree.list_dir(folder):
        if names.parse_temporary_file(entry) == _PROBE:
            writes.remove_tree(folder / entry)


def directory_of(home: Path) -> Path:
    """The output directory whose bookkeeping lies in `home`, for messages."""
    entry = names.parse_beside(home.name)
    return home.parent / entry if entry is not None else home


def _can_rename(beside: Path, output_dir: Path) -> bool:
    """Whether directories can be renamed from `beside`, which is made, into `output_dir`."""
    probe = names.temporary_file(_PROBE)
    try:
        writes.make_own_dir(beside)
        writes.make_dir(beside / probe)
        try:
            writes.rename(beside / probe, output_dir / probe)
        except OSError:
            writes.remove_dir(beside / probe)
            raise
        writes.remove_dir(output_dir / probe)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        log.info("%s: the bookkeeping lies inside, because it cannot lie in %s: %s", output_dir, beside, error.strerror)
        try:
            writes.remove_dir(beside)
        except OSError as left:
            log.debug("%s stays: %s", beside, left)
        return False
    return True
