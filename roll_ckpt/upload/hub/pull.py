"""Pull: a checkpoint comes from the Hub, complete and checked under its name or not there.

    head → manifest → listing → room → fetch (staging) → fsync → verify → rename

All is read from the one commit that the revision named at first. What comes is trusted in nothing: the manifest's
paths stay below the staging directory, no file gets longer than its receipt, and every byte is read again there
and compared before the checkpoint gets its name. A killed pull leaves the staging directory, and the next one
goes on in it, byte by byte: that is why files come through disk.py and not through the client's downloads, which
begin a file anew and leave the old one.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints, locks, reads, tree, writes
from roll_ckpt.errors import ConfigError, Damaged, HubUnavailable, NoRoom, NotFound, RunIsLive
from roll_ckpt.formats import manifests
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.sealed_json import sha256
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.epochs import Member
from roll_ckpt.upload import file_system
from roll_ckpt.upload.hub import answers
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.client import api, head, read_file
from roll_ckpt.upload.hub.download import bring, pause_s
from roll_ckpt.upload.hub.staging import alone

log = logging.getLogger("roll_ckpt")

_TRIES_TO_LOOK = 3
_NAMED = 5  # files that an error names
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
Progress = Callable[[int, int], None]
"""Told now and then of the bytes that are here and of all bytes, by one thread at a time."""


def pull(remote: Remote, directory: Path, progress: Progress | None = None) -> Path:
    """Bring the checkpoint that `remote` holds to `<directory>/<name>`, and return that path.

    Blocks; durable and verified on return. If it is there already, nothing is done. A pull that was killed or cut
    off goes on where it was. Any process may call: while another pulls the same, this one waits.

    Raises:
        NotFound: the revision has no manifest.json of ours. HubRefused: no such repository or revision, no token.
        HubUnavailable: offline, cut off too often, busy; what has come stays for the next pull.
        Damaged: a file on the Hub is not as it was committed, or the manifest cannot be trusted; files are named.
        NoRoom: the file system is too small. ConfigError: something else has the name. RunIsLive: a running job
            owns `directory`. After each of these nothing has changed under the final name.
    """
    wanted = _look_patiently(remote)
    target = directory / wanted.told.name
    if _is_there(wanted, target):
        return target
    _refuse_live(directory)
    staging = directory / names.pull_dir(wanted.told.name, sha256(wanted.record))
    _check_room(wanted, staging)
    writes.make_dirs(directory)
    with alone(staging):
        if not _is_there(wanted, target):
            bring(wanted, staging / wanted.told.name, progress or (lambda here, of: None))
            with _claimed(directory, wanted.told):
                _publish(staging / wanted.told.name, target)
        _remove_leftovers(directory, wanted.told.name, staging)
    return target


@dataclass(frozen=True)
class Wanted:
    """A checkpoint on the Hub: the commit that has it, its manifest, and the size of every other file."""

    remote: Remote
    commit: str
    record: bytes
    told: Manifest
    sizes: dict[str, int]

    @property
    def where(self) -> str:
        return f"{self.remote.uri} (commit {self.commit[:12]})"


def _look_patiently(remote: Remote) -> Wanted:
    for failures in range(1, _TRIES_TO_LOOK):
        try:
            return _look(remote)
        except HubUnavailable as error:
            pause = pause_s(failures, error)
            log.info("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
    return _look(remote)


def _look(remote: Remote) -> Wanted:
    """The checkpoint of a revision. Damaged: its commit lacks a file, or has one in another size."""
    commit = head(remote)
    record = read_file(remote, names.MANIFEST, commit)
    if record is None:
        raise NotFound(
            f"{remote.uri}: it has no {names.MANIFEST}, so no checkpoint of roll_ckpt is there; name the tag of one, "
            f"{remote.repo_id}@checkpoint-N"
        )
    told = manifests.parse(record, f"{remote.uri}: {names.MANIFEST}")
    listed = {receipt.path: receipt.nbytes for receipt in told.files}
    records = {names.DECISION, *(f"{names.VOTES}/{file}" for file in told.votes)}
    with answers.speaking(remote, "listing its files"):
        tree = api().list_repo_tree(remote.repo_id, recursive=True, revision=commit)
        there = {entry.path: getattr(entry, "size", None) for entry in tree}
    wanted = Wanted(remote, commit, record, told, {path: there.get(path) or 0 for path in [*listed, *sorted(records)]})
    missing = [f"{path} is missing" for path in wanted.sizes if there.get(path) is None]
    other = [
        f"{path} has {there[path]} bytes instead of {nbytes}"
        for path, nbytes in listed.items()
        if there.get(path) not in (None, nbytes)
    ]
    refuse_damage(wanted, missing + other)
    return wanted


def _is_there(wanted: Wanted, target: Path) -> bool:
    """Whether the target is this checkpoint already. ConfigError or Damaged if it is anything else."""
    if not tree.exists(target):
        return False
    with suppress(OSError, Damaged):
        if reads.read_bytes(target / names.MANIFEST) == wanted.record:
            if file_system.is_complete(target, target):
                return True
            raise ConfigError(
                f"{target} is {wanted.where}, but files of it are missing or too short; see `roll-ckpt verify`, "
                "remove it, and pull again"
            )
    raise ConfigError(
        f"{target} is there already, and is not {wanted.where}; it was left alone. Remove or rename it, or pull into "
        "another directory"
    )


def _refuse_live(directory: Path) -> None:
    """A live run would count the newcomer among its own checkpoints when it prunes."""
    for path, member in epochs.members(directory, epochs.newest_number(directory)).items():
        if isinstance(member, Member) and epochs.is_alive(path, member):
            raise RunIsLive(f"{directory}: {member.who} is running and saves there; pull into another directory")


@contextmanager
def _claimed(directory: Path, told: Manifest) -> Iterator[None]:
    """In the directory of a run, own it for the moment of the rename: a run may have started meanwhile, and the next
    one shall count as newer than what was pulled."""
    if not tree.exists(directory / names.EPOCHS):
        yield
        return
    mine = epochs.claim_number(
        directory, "roll-ckpt pull", {"command line": 1}, None, take_over=False, at_least=told.epoch
    )
    try:
        yield
    finally:
        mine.release()


def refuse_damage(wanted: Wanted, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise Damaged(
            f"{wanted.where}: {wanted.told.name} is not as it was committed: {'; '.join(problems[:_NAMED])}{more}. "
            "Nothing was put under its name; pull another revision, or push the checkpoint again"
        )


def _check_room(wanted: Wanted, staging: Path) -> None:
    begun = tree.walk_all(staging) if tree.is_real_dir(staging) else ()
    here = sum(tree.file_bytes(staging / path) for path, regular in begun if regular)
    needed, free = sum(wanted.sizes.values()) - here, tree.free_bytes(staging)
    if needed > free:
        raise NoRoom(
            f"{wanted.told.name} of {wanted.remote.uri} needs {needed} bytes in {staging.parent}, and its file system "
            f"has {free}; make room, or pull into another directory. Nothing was written"
        )


def _publish(unit: Path, target: Path) -> None:
    failpoints.failpoint("pull.verified", name=target.name)
    try:
        writes.rename(unit, target)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        raise ConfigError(
            f"{target} appeared while it was pulled; it was left alone. Remove or rename it, and pull again"
        ) from None
    writes.fsync_dir(target.parent)
    failpoints.failpoint("pull.renamed", name=target.name)


def _remove_leftovers(directory: Path, name: str, own: Path) -> None:
    """Remove our staging directory, and those of killed pulls of other checkpoints of this name."""
    for entry in tree.list_dir(directory):
        parsed = names.parse_pull_dir(entry)
        if parsed is None or parsed[0] != name:
            continue
        if entry == own.name or not _is_used(directory / entry):
            writes.remove_tree(directory / entry)


def _is_used(staging: Path) -> bool:
    try:
        return locks.is_locked(staging / names.PULL_LOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise
        return True
