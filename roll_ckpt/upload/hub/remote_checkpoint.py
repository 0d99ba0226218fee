"""The checkpoint that a revision of a repository holds, looked up and checked before a pull writes anything."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

from roll_ckpt import names
from roll_ckpt.errors import Damaged, HubRefused, HubUnavailable, NotFound
from roll_ckpt.formats import manifests
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.client import head, read_file, sizes

log = logging.getLogger("roll_ckpt")

_TRIES = 3
_NAMED = 5  # so many files are named in an error
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint on the Hub: the commit that has it, its manifest, and the size of every other file."""

    remote: Remote
    commit: str
    record: bytes
    """The bytes of manifest.json."""
    manifest: Manifest
    sizes: dict[str, int]
    """The size in bytes of every file but manifest.json, by its path in the checkpoint."""

    @property
    def where(self) -> str:
        return f"{self.remote.uri} (commit {self.commit[:12]})"


def find_checkpoint(remote: Remote) -> RemoteCheckpoint:
    """The checkpoint of a revision; tried three times, with pauses, while the Hub cannot be reached.

    Raises:
        NotFound: the revision has no manifest.json. HubRefused: no such repository or revision, or no token.
        HubUnavailable: the Hub could not be reached three times.
        Damaged: the manifest cannot be trusted, or its commit lacks a file or has one of another size.
    """
    for failures in range(1, _TRIES):
        try:
            return _find(remote)
        except HubUnavailable as error:
            pause = pause_s(failures, error)
            log.info("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
    return _find(remote)


def _find(remote: Remote) -> RemoteCheckpoint:
    remote, commit = _resolve(remote)
    record = read_file(remote, names.MANIFEST, commit)
    if record is None:
        raise NotFound(
            f"{remote.uri}: it has no {names.MANIFEST}, so no checkpoint of roll_ckpt is there; name the tag of one: "
            f"{remote.repo_id}@checkpoint-N"
        )
    manifest = manifests.parse(record, f"{remote.uri}: {names.MANIFEST}")
    paths = [path for path in manifest.paths() if path != names.MANIFEST]
    on_hub = sizes(remote, commit)
    checkpoint = RemoteCheckpoint(remote, commit, record, manifest, {path: on_hub.get(path) or 0 for path in paths})
    missing = [f"{path} is missing" for path in paths if on_hub.get(path) is None]
    other = [
        f"{receipt.path} has {on_hub[receipt.path]} bytes instead of {receipt.nbytes}"
        for receipt in manifest.files
        if on_hub.get(receipt.path) not in (None, receipt.nbytes)
    ]
    refuse_damage(checkpoint, missing + other)
    return checkpoint


def _resolve(remote: Remote) -> tuple[Remote, str]:
    """The revision and its commit. A name that is no revision may be that of a checkpoint with another tag."""
    try:
        return remote, head(remote)
    except HubRefused as error:
        tag = names.hub_tag(remote.revision)
        if error.status != 404 or tag == remote.revision:
            raise
        try:
            tagged = replace(remote, revision=tag)
            return tagged, head(tagged)
        except HubRefused:
            raise error from None


def refuse_damage(checkpoint: RemoteCheckpoint, problems: list[str]) -> None:
    """Damaged, naming the first problems, if there are any."""
    if problems:
        more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise Damaged(
            f"{checkpoint.where}: {checkpoint.manifest.name} is not as it was committed: "
            f"{'; '.join(problems[:_NAMED])}{more}. Nothing was put under its name; pull another revision, or push "
            "the checkpoint again"
        )


def pause_s(failures: int, error: HubUnavailable) -> float:
    """How many seconds to wait after so many failures in a row; at least as long as the Hub asked for."""
    return max(min(_FIRST_PAUSE_S * 2.0 ** (failures - 1), _LONGEST_PAUSE_S), error.retry_after_s or 0)
