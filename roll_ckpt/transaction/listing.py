"""The committed checkpoints of an output directory, in order of age, and `latest`, which names one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import reads, tree, writes
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import BY_HAND, Damaged, NotFound, Unreadable
from roll_ckpt.formats import manifests as manifests_format
from roll_ckpt.formats import records
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.manifests import read as read_manifest

log = logging.getLogger("roll_ckpt")

_MOST_ENTRIES = 2000  # below the top; folders with more hold something else than checkpoints


def _warn(problem: Damaged | Unreadable) -> None:
    log.warning("%s; this checkpoint is skipped", problem)


def names_in(output_dir: Path) -> list[str]:
    """The names, relative to `output_dir`, of the directories below it that may be checkpoints of it, sorted.

    That is every directory at the top except our bookkeeping, and those in folders (`epoch1/step5`) whose records have
    that name. OSError if `output_dir` cannot be listed.
    """
    return sorted(name for name, _ in _scan(output_dir) if "/" not in name or _is_called(output_dir / name, name))


def nested_in(output_dir: Path, name: str) -> list[str]:
    """The paths, relative to `output_dir`, of the checkpoints in its folder `name`, whatever they are called."""
    if not tree.is_real_dir(output_dir / name):
        return []
    return sorted(f"{name}/{inner}" for inner, marked in _scan(output_dir / name) if marked)


def _scan(output_dir: Path) -> Iterator[tuple[str, bool]]:
    """The entries at the top of `output_dir`, and the directories in folders below that hold a record of a checkpoint;
    each with whether it holds one."""
    folders, left = [""], _MOST_ENTRIES
    while folders:
        folder = folders.pop(0)
        entries = tree.list_dir(output_dir / folder) if not folder else _entries_of(output_dir / folder)
        left -= len(entries) if folder else 0
        for entry in entries if left >= 0 else ():
            name = f"{folder}/{entry}" if folder else entry
            if names.is_own(entry) or name == names.LOST_AND_FOUND:
                continue
            marked = _has_record(output_dir / name)
            if marked or not folder:
                yield name, marked
            if not marked and name.count("/") + 1 < names.NAME_PARTS:
                folders.append(name)


def _has_record(checkpoint_dir: Path) -> bool:
    """Whether a directory holds a record of a checkpoint, or the disk does not tell."""
    try:
        return any(tree.exists(checkpoint_dir / record) for record in (names.MANIFEST, names.DECISION, names.EXPECTED))
    except OSError as error:
        log.debug("%s: taken for a checkpoint, because the disk does not tell: %s", checkpoint_dir, error)
        return True


def _is_called(checkpoint_dir: Path, name: str) -> bool:
    """Whether a record in a directory gives it this name; those of another run's checkpoints do not."""
    for record, parse in ((names.MANIFEST, manifests_format.parse), (names.EXPECTED, records.parse_expected)):
        try:
            return parse(reads.read_bytes(checkpoint_dir / record), record).name == name
        except (Damaged, OSError) as error:
            log.debug("%s does not tell the name of the checkpoint: %s", checkpoint_dir / record, error)
    return False


def _entries_of(folder: Path) -> list[str]:
    """The entries of a folder that may hold checkpoints; [] if it is a file or a link, or cannot be listed."""
    try:
        return tree.list_dir(folder) if tree.is_real_dir(folder) else []
    except OSError as error:
        log.debug("%s: not searched for checkpoints: %s", folder, error)
        return []


def committed(
    output_dir: Path, report: Callable[[Damaged | Unreadable], None] = _warn, *, copies: bool = False
) -> list[Manifest]:
    """The manifests of the committed checkpoints, the oldest first (see `Manifest.age`).

    `report` is called with an error for each checkpoint that is skipped: its manifest is missing, cannot be trusted,
    or could not be read. Reads that the disk refuses are retried for two seconds in all. Only manifests are read. With
    `copies`, checkpoints that somebody has copied or moved there under another name are listed too, by that name; they
    belong to whoever did it, so that no run prunes them. OSError if `output_dir` cannot be listed.
    """
    manifests, retries = [], ReadRetries()
    for name in retries.run(partial(names_in, output_dir)):
        checkpoint_dir = output_dir / name
        try:
            manifest = retries.run(partial(_committed_in, checkpoint_dir, name))
        except Damaged as error:
            report(error)
            continue
        except OSError as error:
            problem = Unreadable(f"{checkpoint_dir / names.MANIFEST}: it cannot be read: {error.strerror or error}")
            problem.checkpoint_dir = checkpoint_dir
            report(problem)
            continue
        if manifest is not None and (copies or manifest.name == name):
            manifests.append(replace(manifest, name=name))
    return sorted(manifests, key=lambda manifest: manifest.age)


def _committed_in(checkpoint_dir: Path, name: str) -> Manifest | None:
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
    if manifest.name == name and not real:
        raise Damaged(
            f"{checkpoint_dir}: a symbolic link; move the checkpoint itself there, or give the path it leads to"
        )
    if real and names.differ_in_number_only(checkpoint_dir.name, manifest.name.rpartition("/")[2]):
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
    manifests = committed(output_dir, problems.append, copies=True)
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
        return None if text is None else names.check_name("tag", text.strip())
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
