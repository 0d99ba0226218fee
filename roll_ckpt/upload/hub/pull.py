"""Pulls a checkpoint from the Hub. It appears under its name complete and verified, or not at all.

    look up (commit, manifest, sizes) → check room → download to staging → fsync → verify → rename

All files come from the one commit that the revision named at the start. Nothing that the Hub sends is trusted: the
manifest's paths stay below the staging directory, no file gets longer than its receipt says, and every byte is re-read
from disk and compared before the checkpoint gets its name. A killed pull leaves the staging directory, and the next
pull resumes each file there.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
from roll_ckpt.upload.hub.download import Progress, download
from roll_ckpt.upload.hub.remote_checkpoint import RemoteCheckpoint, find_checkpoint
from roll_ckpt.upload.hub.staging import locked

log = logging.getLogger("roll_ckpt")

_NAME_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def pull(remote: Remote, directory: Path, progress: Progress | None = None) -> Path:
    """Bring the checkpoint that `remote` holds to `<directory>/<name>`, and return that path.

    Blocks; durable and verified on return. If the checkpoint is there already, nothing is done. Resumes a pull that
    was killed or cut off. Any process may call; while another one pulls the same checkpoint, this one waits.

    Raises:
        NotFound: the revision has no manifest.json. HubRefused: no such repository or revision, or no token.
        HubUnavailable: offline, busy, or cut off too often; what was downloaded stays for the next pull.
        Damaged: a file on the Hub is not as it was committed, or the manifest cannot be trusted; names the files.
        NoRoom: the file system is too small. ConfigError: something else has the name. RunIsLive: a running job
            owns `directory`. After each of these nothing has changed under the final name.
    """
    checkpoint = find_checkpoint(remote)
    name = checkpoint.manifest.name
    target = directory / name
    if _is_pulled(checkpoint, target):
        return target
    _refuse_live(directory)
    staging = directory / names.pull_dir(name, sha256(checkpoint.record))
    _check_room(checkpoint, staging)
    writes.make_dirs(directory)
    with locked(staging):
        if not _is_pulled(checkpoint, target):
            download(checkpoint, staging / name, progress or (lambda done, total: None))
            with _claimed(directory, checkpoint.manifest):
                _publish(staging / name, target)
        _remove_leftovers(directory, name, staging)
    return target


def _is_pulled(checkpoint: RemoteCheckpoint, target: Path) -> bool:
    """True if the target is this checkpoint already. ConfigError if it is anything else, or incomplete."""
    if not tree.exists(target):
        return False
    occupied = (
        f"{target} already exists and is not {checkpoint.where}; it was left alone. Remove or rename it, or pull into "
        "another directory"
    )
    try:
        record = reads.read_bytes(target / names.MANIFEST)
    except (OSError, Damaged) as error:
        raise ConfigError(f"{occupied} (its {names.MANIFEST} cannot be read: {error})") from error
    if record != checkpoint.record:
        raise ConfigError(occupied)
    if not file_system.is_complete(target, target):
        raise ConfigError(
            f"{target} is {checkpoint.where}, but files of it are missing or too short; see `roll-ckpt verify`, "
            "remove it, and pull again"
        )
    return True


def _refuse_live(directory: Path) -> None:
    """RunIsLive if a run saves there: when it prunes, it would count the pulled checkpoint among its own."""
    for path, member in epochs.members(directory, epochs.newest_number(directory)).items():
        if isinstance(member, Member) and epochs.is_alive(path, member):
            raise RunIsLive(f"{directory}: {member.who} is running and saves there; pull into another directory")


@contextmanager
def _claimed(directory: Path, manifest: Manifest) -> Iterator[None]:
    """Own the directory of a run while the checkpoint is renamed into it.

    A run may have started meanwhile: then RunIsLive. The next run gets a greater epoch than the pulled checkpoint, so
    what it saves counts as newer.
    """
    if not tree.exists(directory / names.EPOCHS):
        yield
        return
    epoch = epochs.claim_number(
        directory, "roll-ckpt pull", {"command line": 1}, None, take_over=False, at_least=manifest.epoch
    )
    try:
        yield
    finally:
        epoch.release()


def _check_room(checkpoint: RemoteCheckpoint, staging: Path) -> None:
    begun = tree.walk_all(staging) if tree.is_real_dir(staging) else ()
    downloaded = sum(tree.file_bytes(staging / path) for path, regular in begun if regular)
    needed, free = sum(checkpoint.sizes.values()) - downloaded, tree.free_bytes(staging)
    if needed > free:
        raise NoRoom(
            f"{checkpoint.manifest.name} of {checkpoint.remote.uri} needs {needed} bytes in {staging.parent}, and its "
            f"file system has {free}; make room, or pull into another directory. Nothing was written"
        )


def _publish(checkpoint_dir: Path, target: Path) -> None:
    failpoints.failpoint("pull.verified", name=target.name)
    writes.make_dirs(target.parent)
    try:
        writes.rename(checkpoint_dir, target)
    except OSError as error:
        if error.errno not in _NAME_TAKEN:
            raise
        raise ConfigError(
            f"{target} appeared during the pull; it was left alone. Remove or rename it, and pull again"
        ) from None
    writes.fsync_dir(target.parent)
    failpoints.failpoint("pull.renamed", name=target.name)


def _remove_leftovers(directory: Path, name: str, own: Path) -> None:
    """Remove this pull's staging directory, `own`, and those of killed pulls of other checkpoints of this name."""
    for entry in tree.list_dir(directory):
        parsed = names.parse_pull_dir(entry)
        if parsed is None or parsed[0] != name:
            continue
        if entry == own.name or not _is_used(directory / entry):
            writes.remove_tree(directory / entry)


def _is_used(staging: Path) -> bool:
    """True if another process pulls into that staging directory, or if the file system has no locks to tell."""
    try:
        return locks.is_locked(staging / names.PULL_LOCK)
    except FileNotFoundError as error:
        log.debug("%s: left by a killed pull: %s", staging, error)
        return False
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise
        return True
