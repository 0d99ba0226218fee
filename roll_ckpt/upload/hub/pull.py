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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints, locks, reads, tree, writes
from roll_ckpt.errors import ConfigError, Damaged, NoRoom, RunIsLive
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.sealed_json import sha256
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.epochs import Member
from roll_ckpt.upload import file_system
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.download import Progress, bring
from roll_ckpt.upload.hub.staging import alone
from roll_ckpt.upload.hub.wanted import Wanted, look_patiently

log = logging.getLogger("roll_ckpt")

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


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
    wanted = look_patiently(remote)
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


def _check_room(wanted: Wanted, staging: Path) -> None:
    begun = tree.walk_all(staging) if tree.is_real_dir(staging) else ()
    here = sum(tree.file_bytes(staging / path) for path, regular in begun if regular)
    needed, free = sum(wanted.sizes.values()) - here, tree.free_bytes(staging)
    if needed > free:
        raise NoRoom(
            f"{wanted.told.name} of {wanted.remote.uri} needs {needed} bytes in {staging.parent}, and its file system "
            f"has {free}; make room, or pull into another directory. Nothing was written"
        )


def _publish(checkpoint_dir: Path, target: Path) -> None:
    failpoints.failpoint("pull.verified", name=target.name)
    try:
        writes.rename(checkpoint_dir, target)
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
