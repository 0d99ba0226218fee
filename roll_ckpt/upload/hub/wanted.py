"""What a pull is asked for: the checkpoint that a revision of a repository holds, looked up before a byte is written."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from roll_ckpt import names
from roll_ckpt.errors import Damaged, HubUnavailable, NotFound
from roll_ckpt.formats import manifests
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.client import head, read_file, sizes

log = logging.getLogger("roll_ckpt")


_TRIES_TO_LOOK = 3


_NAMED = 5  # files that an error names


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


def look_patiently(remote: Remote) -> Wanted:
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
    there = sizes(remote, commit)
    wanted = Wanted(remote, commit, record, told, {path: there.get(path) or 0 for path in [*listed, *sorted(records)]})
    missing = [f"{path} is missing" for path in wanted.sizes if there.get(path) is None]
    other = [
        f"{path} has {there[path]} bytes instead of {nbytes}"
        for path, nbytes in listed.items()
        if there.get(path) not in (None, nbytes)
    ]
    refuse_damage(wanted, missing + other)
    return wanted


def refuse_damage(wanted: Wanted, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise Damaged(
            f"{wanted.where}: {wanted.told.name} is not as it was committed: {'; '.join(problems[:_NAMED])}{more}. "
            "Nothing was put under its name; pull another revision, or push the checkpoint again"
        )


_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


def pause_s(failures: int, error: HubUnavailable) -> float:
    return max(min(_FIRST_PAUSE_S * 2.0 ** (failures - 1), _LONGEST_PAUSE_S), error.retry_after_s or 0)
