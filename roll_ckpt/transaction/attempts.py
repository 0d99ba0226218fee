"""An attempt to save a checkpoint: its directory, the checks before it begins, and where its checkpoint lies.

The steps of a transaction, and the modules that do them:

    claims      claim a directory; at a restart, `recovery` finishes or discards what an earlier run left
    attempts    begin an attempt; all ranks then write and fsync their files in its directory
    ballot      each rank casts its vote; the votes become a manifest and one decision
    settlement  wait for the decision and carry it out, by `publication`

Any process may carry out a decision, and two may do so at once: each step accepts that it was done before. Links and
renames decide, never a lock or a clock. A checkpoint under its final name is complete, and `latest` names no other.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints, reads, tree, writes
from roll_ckpt.errors import ConfigError, Damaged, NoRoom, NotFound, RanksDisagree, SaveFailed
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.manifests import read as read_manifest
from roll_ckpt.formats.records import NO_LINEAGE, SOFTWARE, Expected, Lineage, parse_decision, parse_expected
from roll_ckpt.transaction import epochs, listing
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.home import find_home

log = logging.getLogger("roll_ckpt")

_NAMES_KEPT = 1000


@dataclass(frozen=True)
class Attempt:
    """What every rank knows of one attempt. Rank 0 gets it from begin(); other ranks build it from the same values."""

    output_dir: Path
    name: str
    step: int | None
    run_id: str
    epoch: int
    attempt: int
    expected: Mapping[str, int]
    save_latest: bool
    home: Path
    """Where the bookkeeping of `output_dir` lies; see `transaction.home`."""
    pid: int = field(default_factory=os.getpid, compare=False, repr=False)

    @property
    def directory(self) -> Path:
        """The save directory that stock code is given. Files directly in it are moved to the output directory."""
        return self.home / names.attempt_dir(self.name, self.epoch, self.attempt)

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.final.name

    @property
    def checkpoint_dir(self) -> Path:
        """The checkpoint while it is being written."""
        return self.directory / self.name

    @property
    def final(self) -> Path:
        """The checkpoint once it is committed."""
        return self.output_dir / self.name

    @property
    def label(self) -> str:
        """The final path and the attempt's number, for messages."""
        return f"{self.final} (attempt {self.epoch}.{self.attempt})"

    def refuse_fork(self) -> None:
        """RuntimeError in a process that was forked from the one that made this attempt."""
        if self.pid != os.getpid():
            raise RuntimeError(
                f"{self.label}: this save belongs to process {self.pid}, from which process {os.getpid()} was forked; "
                "a forked child neither votes nor commits"
            )


def begin(
    claimed: Epoch,
    name: str,
    *,
    step: int | None,
    expected: Mapping[str, int],
    save_latest: bool = True,
    needed_bytes: int = 0,
    lineage: Lineage = NO_LINEAGE,
) -> Attempt:
    """Make the directory of a new attempt to save `name`. Rank 0 of each job calls it; durable on return.

    `expected` maps each cluster whose ranks must all vote to its world size. Jobs that save together call begin() the
    same number of times for each name, so that they meet in one directory. Whether a call succeeds or not, the next
    one begins another attempt.

    Raises:
        ConfigError, NoRoom, EpochLost: nothing was touched on disk.
        RanksDisagree: another job has begun the same attempt with other values.
        SaveFailed: another job has abandoned this attempt already.
        OSError: the disk refused; recovery.clear removes what was made.
    """
    _check_expected(name, expected)
    number = _next_number(claimed, name)
    attempt = Attempt(
        claimed.output_dir, name, step, claimed.run_id, claimed.number, number, dict(expected), save_latest,
        claimed.home, claimed.pid,
    )  # fmt: skip
    attempt.refuse_fork()
    claimed.restore()
    check_room(claimed.output_dir, name, needed_bytes)
    try:
        _make(attempt, replace(lineage, order=claimed.begun))
    except FileNotFoundError as error:
        raise abandoned(attempt) from error
    if abort_reason(attempt) is not None or epochs.newest_number(attempt.home) != attempt.epoch:
        # Another job, or a newer run, gave the attempt up before this process made the directory, perhaps a second
        # time. No other process will look for it now, so it is removed here.
        writes.remove_tree(attempt.directory)
        raise abandoned(attempt)
    failpoints.failpoint("begin.made", name=name, epoch=attempt.epoch, attempt=number)
    return attempt


def _check_expected(name: str, expected: Mapping[str, int]) -> None:
    names.check_name("tag", name)
    for cluster, world_size in expected.items():
        names.check_name("cluster", cluster)
        if world_size < 1:
            raise ConfigError(f"cluster {cluster!r}: its world size is {world_size}, and it must be at least 1")
    if not expected:
        raise ConfigError(f"checkpoint {name!r}: no cluster is expected to vote; name at least one")


def _next_number(claimed: Epoch, name: str) -> int:
    """The number of the next attempt to save `name` in this epoch. Only the newest _NAMES_KEPT names are remembered."""
    claimed.begun += 1
    number = claimed.attempts.pop(name, 0)
    if not number:
        # The name may have been forgotten. An attempt with the number of a committed one would take that checkpoint
        # for its own.
        manifest = sound_manifest(claimed.output_dir / name)
        number = manifest.attempt if manifest is not None and manifest.epoch == claimed.number else 0
    claimed.attempts[name] = number + 1
    while len(claimed.attempts) > _NAMES_KEPT:
        del claimed.attempts[next(iter(claimed.attempts))]
    return number + 1


def pass_over(claimed: Epoch, name: str) -> None:
    """Count an attempt that this job does not begin, so that its next one has the same number as in the other jobs."""
    _next_number(claimed, name)


def check_room(output_dir: Path, name: str, needed_bytes: int) -> None:
    """Refuse a checkpoint that the file system cannot hold; `output_dir` need not exist yet.

    Raises:
        NoRoom: fewer than `needed_bytes` bytes are free; the message has both figures. Nothing was touched.
    """
    free_bytes = tree.free_bytes(output_dir)
    if free_bytes < needed_bytes:
        raise NoRoom(
            f"{output_dir / name}: the checkpoint needs {needed_bytes:,} bytes and {output_dir} has "
            f"{free_bytes:,} left. Make room, or keep fewer checkpoints (max_ckpt_to_keep). Nothing was touched"
        )


def check_replaced(output_dir: Path, name: str) -> None:
    """Refuse a name in whose place, on the way to which, or below which there is another checkpoint or a file.

    A checkpoint of this name is replaced, and files that others have put into its directory are kept.

    Raises:
        SaveFailed: the message names what is in the way. Nothing was touched.
    """
    final = output_dir / name
    folders = [final, *final.parents][: name.count("/") + 1]
    for folder in folders:
        if tree.is_link(folder) and folder != final:
            raise SaveFailed(f"{folder} is a link, and checkpoints are not looked for there. Choose another name")
        if tree.exists(folder) and not tree.is_dir(folder):
            raise SaveFailed(f"{folder} is a file, so {name!r} cannot be saved there. Choose another name")
        if folder != final and tree.exists(folder / names.MANIFEST):
            raise SaveFailed(f"{folder} is a checkpoint, and {name!r} would lie inside of it. Choose another name")
        if tree.exists(folder / names.EPOCHS) or find_home(folder) != folder:
            raise SaveFailed(
                f"{folder} is the output directory of a run, so {name!r} cannot be saved there. Choose another name"
            )
    if not tree.exists(final / names.MANIFEST) and (inner := listing.nested_in(output_dir, name)):
        raise SaveFailed(
            f"{final} is the folder of other checkpoints, such as {inner[0]!r}, so {name!r} cannot be saved there. "
            "Choose another name. Nothing was touched"
        )


def _make(attempt: Attempt, lineage: Lineage) -> None:
    writes.make_dir(attempt.directory)  # another job may have made it already
    writes.make_dirs(attempt.checkpoint_dir, durable=attempt.leaf != attempt.name)
    writes.make_dir(attempt.checkpoint_dir / names.VOTES)
    expected = Expected(
        name=attempt.name,
        step=attempt.step,
        run_id=attempt.run_id,
        epoch=attempt.epoch,
        attempt=attempt.attempt,
        clusters=dict(attempt.expected),
        save_latest=attempt.save_latest,
        software=SOFTWARE,
        lineage=lineage,
    )
    path = attempt.checkpoint_dir / names.EXPECTED
    if not writes.link_durable(path, expected.to_bytes(), scratch=attempt.directory) and not _same(path, expected):
        raise RanksDisagree(
            f"{attempt.label}: another job has begun it with another step, other clusters or world sizes, "
            f"another save_latest, or another roll_ckpt than {SOFTWARE}; compare {path} with "
            f"step {attempt.step}, clusters {dict(attempt.expected)}, save_latest {attempt.save_latest}"
        )
    for directory in (attempt.checkpoint_dir, attempt.directory, attempt.home):
        writes.fsync_dir(directory)


def _same(path: Path, expected: Expected) -> bool:
    """Whether another job has begun the attempt with the same values, but for the lineage: the first job's is kept."""
    other = parse_expected(reads.read_bytes(path), path)
    return replace(other, lineage=expected.lineage) == expected


def abort_reason(attempt: Attempt) -> str | None:
    """Why this attempt was aborted in this epoch; None if no process has recorded a reason."""
    path = attempt.home / names.EPOCHS / names.aborted_file(attempt.name, attempt.epoch, attempt.attempt)
    try:
        return parse_decision(reads.read_bytes(path), path).reason
    except FileNotFoundError:
        log.debug("%s: there is no record that this attempt was aborted", path)
        return None
    except Damaged as error:
        return f"the record of the reason is damaged: {error}"


def abandoned(attempt: Attempt) -> SaveFailed:
    """The error to raise in a process whose attempt has vanished. Raises EpochLost instead if that is the cause."""
    epochs.check(attempt.home, attempt.epoch)
    reason = abort_reason(attempt) or f"{attempt.directory} is gone"
    return SaveFailed(f"{attempt.label} was abandoned: {reason}")


def places(attempt: Attempt) -> Iterator[Path]:
    """Where the attempt's checkpoint may lie: as it was written, held by a process that replaces one, or committed."""
    entries = tree.list_dir(attempt.directory)
    if attempt.leaf in (entries if attempt.leaf == attempt.name else tree.list_dir(attempt.checkpoint_dir.parent)):
        yield attempt.checkpoint_dir
    yield from (attempt.directory / e / attempt.leaf for e in entries if e.startswith(names.SUPERSEDED))
    yield attempt.final


def carries(checkpoint_dir: Path, attempt: Attempt) -> bool:
    """Whether the checkpoint in `checkpoint_dir` was written by this attempt."""
    manifest = sound_manifest(checkpoint_dir)
    return manifest is not None and (
        (manifest.name, manifest.epoch, manifest.attempt) == (attempt.name, attempt.epoch, attempt.attempt)
    )


def sound_manifest(checkpoint_dir: Path) -> Manifest | None:
    """The manifest of a checkpoint, None if it is missing or damaged. OSError if the disk does not give it."""
    try:
        return read_manifest(checkpoint_dir)
    except (NotFound, Damaged) as error:
        log.debug("no attempt is known to have written this checkpoint: %s", error)
        return None
