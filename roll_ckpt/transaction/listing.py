"""Commit: how the votes of all ranks become a checkpoint under its final name, or nothing.

    claim → begin → (write, fsync) → cast → settle            and, at the next start:  claim → recover

Any process may carry out a decision, and two may do so at once; what each step finds done is done. Links and
renames decide, never a lock or a time. A checkpoint under its final name is complete; `latest` names no
other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import reads, tree, writes
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import BY_HAND, Damaged, NotFound, Unreadable
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.manifests import read as read_manifest

log = logging.getLogger("roll_ckpt")


def _warn(problem: Damaged | Unreadable) -> None:
    log.warning("%s; this checkpoint is left out", problem)


def committed(output_dir: Path, report: Callable[[Damaged | Unreadable], None] = _warn) -> list[Manifest]:
    """The committed checkpoints, the oldest first (by step, epoch, attempt).

    `report` is told of each directory whose manifest is gone or cannot be trusted, or cannot be read although it was
    tried for two seconds. File contents are not read. OSError if `output_dir` cannot be listed.
    """
    found, retries = [], ReadRetries()
    for entry in retries.run(partial(tree.list_dir, output_dir)):
        checkpoint_dir = output_dir / entry
        if entry.startswith(".") or entry == names.LOST_AND_FOUND:
            continue
        try:
            manifest = retries.run(partial(_committed_in, checkpoint_dir))
        except Damaged as error:
            report(error)
            continue
        except OSError as error:
            problem = Unreadable(f"{checkpoint_dir / names.MANIFEST}: it cannot be read: {error.strerror}")
            problem.checkpoint_dir = checkpoint_dir
            report(problem)
            continue
        if manifest is not None:
            found.append(manifest)
    return sorted(found, key=lambda manifest: manifest.age)


def _committed_in(checkpoint_dir: Path) -> Manifest | None:
    """The checkpoint in a directory, None if it is something else. Damaged if it cannot be trusted."""
    if not tree.is_dir(checkpoint_dir):
        return None
    try:
        manifest = read_manifest(checkpoint_dir)
    except NotFound:
        if tree.exists(checkpoint_dir / names.DECISION) or tree.exists(checkpoint_dir / names.EXPECTED):
            raise Damaged(
                f"{checkpoint_dir}: its {names.MANIFEST} is missing, so nothing in it can be verified"
            ) from None
        return None
    real = tree.is_real_dir(checkpoint_dir)
    if manifest.name == checkpoint_dir.name and not real:
        raise Damaged(f"{checkpoint_dir}: a symbolic link; move the checkpoint itself there, or give its own path")
    if manifest.name != checkpoint_dir.name and real:
        raise Damaged(f"{checkpoint_dir}: its {names.MANIFEST} is the one of {manifest.name}; is it a copy?")
    return manifest if real else None


def newest_first(output_dir: Path) -> list[Manifest]:
    """The committed checkpoints, the newest first; a warning names those that are left out, as `committed` does.

    Damaged if there are only such: whoever finds nothing would start anew beside them. Unreadable if the disk does not
    tell of one: it may be the newest.
    """
    problems: list[Damaged | Unreadable] = []
    found = committed(output_dir, problems.append)
    if unread := [str(problem) for problem in problems if isinstance(problem, Unreadable)]:
        raise Unreadable(f"{'; '.join(unread)}. {BY_HAND}")
    if problems and not found:
        raise Damaged(f"{output_dir}: none of its checkpoints is sound: {'; '.join(map(str, problems))}")
    for problem in problems:
        _warn(problem)
    return found[::-1]


def read_latest(output_dir: Path) -> str | None:
    """What `latest` names, None if there is no such file. Damaged if it is no name."""
    path = output_dir / names.LATEST
    try:
        text = reads.read_bytes(path).decode()
        return names.check_name("tag", text)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Damaged(f"{path}: it does not name a checkpoint: {error}") from error


def named_by_latest(output_dir: Path) -> list[str]:
    """The checkpoint that `latest` names, if it names one; a damaged `latest` is logged."""
    try:
        latest = read_latest(output_dir)
    except Damaged as problem:
        log.warning("%s; pruning goes on without it", problem)
        return []
    return [] if latest is None else [latest]


def committed_at_s(checkpoint_dir: Path) -> float:
    """When a checkpoint was committed, or pulled or copied here: seconds since 1970, by the file system's clock."""
    return reads.mtime_ns(checkpoint_dir / names.MANIFEST) / 1e9


def write_latest(output_dir: Path, name: str, *, scratch: Path | None = None) -> None:
    """Let `latest` name a committed checkpoint, else NotFound; atomic, durable on return."""
    read_manifest(output_dir / name)
    writes.write_durable(output_dir / names.LATEST, name.encode(), scratch=scratch)
