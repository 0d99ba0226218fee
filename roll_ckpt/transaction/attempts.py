"""One attempt to save a checkpoint, up to the last vote: begin, write (others do that), cast."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints, reads, tree, writes
from roll_ckpt.errors import ConfigError, Damaged, NoRoom, NotFound, RanksDisagree, SaveFailed
from roll_ckpt.formats.manifests import read as read_manifest
from roll_ckpt.formats.records import SOFTWARE, Expected, parse_decision
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.epochs import Epoch

_NAMES_KEPT = 1000


@dataclass(frozen=True)
class Attempt:
    """What every rank knows of one attempt. Rank 0 gets it from begin(), others make it from its values."""

    output_dir: Path
    name: str
    step: int | None
    run_id: str
    epoch: int
    attempt: int
    expected: Mapping[str, int]
    save_latest: bool
    pid: int = field(default_factory=os.getpid, compare=False, repr=False)

    @property
    def directory(self) -> Path:
        """What stock code gets as its save directory; files directly in it are moved beside the unit."""
        return self.output_dir / names.attempt_dir(self.name, self.epoch, self.attempt)

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
        """For messages."""
        return f"{self.final} (attempt {self.epoch}.{self.attempt})"

    def refuse_fork(self) -> None:
        """RuntimeError in a process that was forked from the one that made this attempt."""
        if self.pid != os.getpid():
            raise RuntimeError(
                f"{self.label}: process {os.getpid()} was forked from {self.pid}, whose save this is; "
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
) -> Attempt:
    """Make the directory of a new attempt to save `name`. Rank 0 of each world only; durable on return.

    `expected` are the clusters, with their world sizes, whose every rank must vote. Worlds that save together
    call this the same number of times for each name, so that they meet in one directory; whether the call
    succeeds or not, the next one makes another attempt.

    Raises:
        ConfigError, NoRoom, EpochLost: nothing was touched on disk.
        RanksDisagree: another world has begun the same attempt with other values.
        SaveFailed: another world has abandoned this attempt already.
        OSError: the disk refused; commit.clear removes what was made.
    """
    names.check_name("tag", name)
    for cluster, world_size in expected.items():
        names.check_name("cluster", cluster)
        if cluster == name:
            raise ConfigError(f"the checkpoint and a cluster have the same name {name!r}; rename the cluster")
        if world_size < 1:
            raise ConfigError(f"cluster {cluster!r}: a world size of {world_size} is no world")
    if not expected:
        raise ConfigError(f"{name}: no cluster is expected to vote")
    number = _next_number(claimed, name)
    attempt = Attempt(
        claimed.output_dir, name, step, claimed.run_id, claimed.number, number, dict(expected), save_latest,
        claimed.pid,
    )  # fmt: skip
    attempt.refuse_fork()
    claimed.check()
    check_room(claimed.output_dir, name, needed_bytes)
    try:
        _make(attempt)
    except FileNotFoundError as error:
        raise abandoned(attempt) from error
    if abort_reason(attempt) is not None or epochs.newest_number(attempt.output_dir) != attempt.epoch:
        # Another world, or a newer run, gave it up before we made the directory, perhaps anew: nobody else
        # will look for it now.
        writes.remove_tree(attempt.directory)
        raise abandoned(attempt)
    failpoints.failpoint("begin.made", name=name, epoch=attempt.epoch, attempt=number)
    return attempt


def _next_number(claimed: Epoch, name: str) -> int:
    """The number of the next attempt to save `name` in this epoch. Those of the newest names are kept."""
    number = claimed.attempts.pop(name, 0)
    if not number:
        # Long ago is not never: a number that was committed with would take that checkpoint for its own.
        with suppress(NotFound, Damaged):
            there = read_manifest(claimed.output_dir / name)
            number = there.attempt if there.epoch == claimed.number else 0
    claimed.attempts[name] = number + 1
    while len(claimed.attempts) > _NAMES_KEPT:
        del claimed.attempts[next(iter(claimed.attempts))]
    return number + 1


def pass_over(claimed: Epoch, name: str) -> None:
    """Count an attempt that this world does not begin: other worlds may have begun it, and the next one is the same
    for all."""
    _next_number(claimed, name)


def check_room(output_dir: Path, name: str, needed_bytes: int) -> None:
    """Refuse a checkpoint that the file system cannot hold; `output_dir` need not exist yet.

    Raises:
        NoRoom: with both figures.
    """
    free = tree.free_bytes(output_dir)
    if free < needed_bytes:
        raise NoRoom(
            f"{output_dir / name}: the checkpoint needs {needed_bytes:,} bytes and {output_dir} has "
            f"{free:,} left. Make room, or keep fewer checkpoints (max_ckpt_to_keep). Nothing was touched"
        )


def check_replaced(output_dir: Path, name: str) -> None:
    """Refuse to replace a directory that holds files which no save wrote; they would be deleted with it.

    Raises:
        SaveFailed: names the first of them. Nothing was touched.
    """
    checkpoint_dir = output_dir / name
    if not tree.exists(checkpoint_dir):
        return
    try:
        told = read_manifest(checkpoint_dir)
        known = {receipt.path for receipt in told.files} | {names.MANIFEST, names.DECISION}
    except NotFound:
        if tree.exists(checkpoint_dir / names.DECISION) or tree.exists(checkpoint_dir / names.EXPECTED):
            return  # ours, and to be replaced because it is damaged
        known = set()
    except (Damaged, OSError):
        return  # likewise
    foreign = [
        path
        for path, _ in tree.walk_all(checkpoint_dir)
        if path not in known and not path.startswith(names.VOTES + "/") and not path.endswith("_states.pt")
    ]
    if foreign:
        raise SaveFailed(
            f"{checkpoint_dir} exists and holds {len(foreign)} files that no save of ours wrote, such as {foreign[0]}. Saving "
            f"{name!r} would delete them: move them away, or save under another name. Nothing was touched"
        )


def _make(attempt: Attempt) -> None:
    for directory in (attempt.directory, attempt.checkpoint_dir, attempt.checkpoint_dir / names.VOTES):
        writes.make_dir(directory)  # the other world may have made it
    expected = Expected(
        name=attempt.name,
        step=attempt.step,
        run_id=attempt.run_id,
        epoch=attempt.epoch,
        attempt=attempt.attempt,
        clusters=dict(attempt.expected),
        save_latest=attempt.save_latest,
        software=SOFTWARE,
    ).to_bytes()
    path = attempt.checkpoint_dir / names.EXPECTED
    if not writes.link_durable(path, expected, scratch=attempt.directory) and reads.read_bytes(path) != expected:
        raise RanksDisagree(
            f"{attempt.label}: another world has begun it with another step, other clusters or world sizes, "
            f"another save_latest, or another roll_ckpt than {SOFTWARE}; compare {path} with "
            f"step {attempt.step}, clusters {dict(attempt.expected)}, save_latest {attempt.save_latest}"
        )
    for directory in (attempt.checkpoint_dir, attempt.directory, attempt.output_dir):
        writes.fsync_dir(directory)


def abort_reason(attempt: Attempt) -> str | None:
    """Why this attempt was aborted in this epoch; None if no process has recorded that."""
    path = attempt.output_dir / names.EPOCHS / names.aborted_file(attempt.name, attempt.epoch, attempt.attempt)
    try:
        return parse_decision(reads.read_bytes(path), path).reason
    except FileNotFoundError:
        return None
    except Damaged as error:
        return f"the record of the reason is damaged: {error}"


def abandoned(attempt: Attempt) -> SaveFailed:
    """The error of a process whose attempt has vanished under it; EpochLost is raised if that is why."""
    epochs.check(attempt.output_dir, attempt.epoch)
    reason = abort_reason(attempt) or "its directory is gone"
    return SaveFailed(f"{attempt.label} was abandoned: {reason}")


def places(attempt: Attempt) -> Iterator[Path]:
    """Where the unit may be: written, in the hands of a process that replaces a checkpoint, or committed."""
    entries = tree.list_dir(attempt.directory)
    if attempt.name in entries:
        yield attempt.checkpoint_dir
    yield from (attempt.directory / e / attempt.name for e in entries if e.startswith(names.SUPERSEDED))
    yield attempt.final


def carries(checkpoint_dir: Path, attempt: Attempt) -> bool:
    """Whether the checkpoint in `unit` is the one of this attempt."""
    try:
        found = read_manifest(checkpoint_dir)
    except (NotFound, Damaged):
        return False
    return (found.name, found.epoch, found.attempt) == (attempt.name, attempt.epoch, attempt.attempt)
