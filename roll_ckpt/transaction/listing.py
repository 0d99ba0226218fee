"""The committed checkpoints of an output directory, in order of age, and `latest`, which names one of them."""

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
    log.warning("%s; this checkpoint is skipped", problem)


def committed(output_dir: Path, report: Callable[[Damaged | Unreadable], None] = _warn) -> list[Manifest]:
    """The manifests of the committed checkpoints, the oldest first (by step, epoch, attempt).

    `report` is called with an error for each checkpoint that is skipped: its manifest is missing, cannot be trusted,
    or could not be read. Reads that the disk refuses are retried for two seconds in all. Only manifests are read.
    OSError if `output_dir` cannot be listed.
    """
    manifests, retries = [], ReadRetries()
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
            problem = Unreadable(f"{checkpoint_dir / names.MANIFEST}: it cannot be read: {error.strerror or error}")
            problem.checkpoint_dir = checkpoint_dir
            report(problem)
            continue
        if manifest is not None:
            manifests.append(manifest)
    return sorted(manifests, key=lambda manifest: manifest.age)


def _committed_in(checkpoint_dir: Path) -> Manifest | None:
    """The manifest of a directory, None if it is no checkpoint. Damaged if the manifest cannot be trusted."""
    if not tree.is_dir(checkpoint_dir):
        return None
    try:
        manifest = read_manifest(checkpoint_dir)
    except NotFound:
        if tree.exists(checkpoint_dir / names.DECISION) or tree.exists(checkpoint_dir / names.EXPECTED):
            raise Damaged(f"{checkpoint_dir}: its {names.MANIFEST} is missing, so it cannot be verified") from None
        return None
    real = tree.is_real_dir(checkpoint_dir)
    if manifest.name == checkpoint_dir.name and not real:
        raise Damaged(
            f"{checkpoint_dir}: a symbolic link; move the checkpoint itself there, or give the path it leads to"
        )
    if manifest.name != checkpoint_dir.name and real:
        raise Damaged(f"{checkpoint_dir}: its {names.MANIFEST} is that of {manifest.name}; is this directory a copy?")
    return manifest if real else None


def newest_first(output_dir: Path) -> list[Manifest]:
    """The manifests of the committed checkpoints, the newest first. A warning names each damaged one that is skipped.

    Raises:
        Damaged: there are checkpoints, and all of them are damaged: a caller that got [] would start training anew.
        Unreadable: the disk does not give the manifest of a checkpoint, which may be the newest.
        OSError: `output_dir` cannot be listed.
    """
    problems: list[Damaged | Unreadable] = []
    manifests = committed(output_dir, problems.append)
    if unread := [str(problem) for problem in problems if isinstance(problem, Unreadable)]:
        raise Unreadable(f"{'; '.join(unread)}. {BY_HAND}")
    if problems and not manifests:
        raise Damaged(f"{output_dir}: none of its checkpoints is sound: {'; '.join(map(str, problems))}")
    for problem in problems:
        _warn(problem)
    return manifests[::-1]


def read_latest(output_dir: Path) -> str | None:
    """The name in the file `latest`, None if there is no such file. Damaged if it cannot name a checkpoint."""
    path = output_dir / names.LATEST
    text = reads.read_text_or_none(path)
    try:
        return None if text is None else names.check_name("tag", text)
    except ValueError as error:
        raise Damaged(f"{path}: what it says cannot be the name of a checkpoint: {error}") from error


def named_by_latest(output_dir: Path) -> list[str]:
    """The name of the checkpoint that `latest` names, in a list; [] if there is none. A damaged `latest` is logged."""
    try:
        latest = read_latest(output_dir)
    except Damaged as problem:
        log.warning("%s; pruning goes on and protects no checkpoint as the latest", problem)
        return []
    return [] if latest is None else [latest]


def committed_at_s(checkpoint_dir: Path) -> float:
    """When a checkpoint was committed (or pulled or copied here), in seconds since 1970 by the file system's clock."""
    return reads.mtime_ns(checkpoint_dir / names.MANIFEST) / 1e9


def write_latest(output_dir: Path, name: str, *, scratch: Path | None = None) -> None:
    """Let `latest` name a committed checkpoint. Atomic; blocks, durable on return.

    NotFound or Damaged if `name` is no sound checkpoint; FileNotFoundError if `scratch`, the directory in which the
    file is prepared, is gone.
    """
    read_manifest(output_dir / name)
    writes.write_durable(output_dir / names.LATEST, name.encode(), scratch=scratch)
