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
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import disk, epoch, hub, manifest, names, uploads, verify
from .errors import ConfigError, Damaged, HubUnavailable, NoRoom, NotFound, RunIsLive
from .hub import Remote
from .seal import sha256

log = logging.getLogger("roll_ckpt")

_STREAMS = 8  # files that come at once: one connection alone seldom fills a line
_TRIES = 6  # failures in a row without a byte between them
_TRIES_TO_LOOK = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_POLL_S = 0.2
_PROGRESS_S = 0.1
_NAMED = 5  # files that an error names
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    disk.make_dirs(directory)
    with _alone(staging):
        if not _is_there(wanted, target):
            _bring(wanted, staging / wanted.told.name, progress or (lambda here, of: None))
            with _claimed(directory, wanted.told):
                _publish(staging / wanted.told.name, target)
        _remove_leftovers(directory, wanted.told.name, staging)
    return target


# --- what is asked for --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """A checkpoint on the Hub: the commit that has it, its manifest, and the size of every other file."""

    remote: Remote
    commit: str
    record: bytes
    told: manifest.Manifest
    sizes: dict[str, int]

    @property
    def where(self) -> str:
        return f"{self.remote.uri} (commit {self.commit[:12]})"


def _look_patiently(remote: Remote) -> _Wanted:
    for failures in range(1, _TRIES_TO_LOOK):
        try:
            return _look(remote)
        except HubUnavailable as error:
            pause = _pause_s(failures, error)
            log.info("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
    return _look(remote)


def _pause_s(failures: int, error: HubUnavailable) -> float:
    return max(min(_FIRST_PAUSE_S * 2.0 ** (failures - 1), _LONGEST_PAUSE_S), error.retry_after_s or 0)


def _look(remote: Remote) -> _Wanted:
    """The checkpoint of a revision. Damaged: its commit lacks a file, or has one in another size."""
    commit = hub.head(remote)
    record = hub.read_file(remote, names.MANIFEST, commit)
    if record is None:
        raise NotFound(
            f"{remote.uri}: it has no {names.MANIFEST}, so no checkpoint of roll_ckpt is there; name the tag of one, "
            f"{remote.repo_id}@checkpoint-N"
        )
    told = manifest.parse_manifest(record, f"{remote.uri}: {names.MANIFEST}")
    listed = {receipt.path: receipt.nbytes for receipt in told.files}
    records = {names.DECISION, *(f"{names.VOTES}/{file}" for file in told.votes)}
    with hub.speaking(remote, "listing its files"):
        tree = hub.api().list_repo_tree(remote.repo_id, recursive=True, revision=commit)
        there = {entry.path: getattr(entry, "size", None) for entry in tree}
    wanted = _Wanted(remote, commit, record, told, {path: there.get(path) or 0 for path in [*listed, *sorted(records)]})
    missing = [f"{path} is missing" for path in wanted.sizes if there.get(path) is None]
    other = [
        f"{path} has {there[path]} bytes instead of {nbytes}"
        for path, nbytes in listed.items()
        if there.get(path) not in (None, nbytes)
    ]
    _refuse_damage(wanted, missing + other)
    return wanted


def _is_there(wanted: _Wanted, target: Path) -> bool:
    """Whether the target is this checkpoint already. ConfigError or Damaged if it is anything else."""
    if not disk.exists(target):
        return False
    with suppress(OSError, Damaged):
        if disk.read_bytes(target / names.MANIFEST) == wanted.record:
            if uploads.is_complete(target, target):
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
    for path, member in epoch.members(directory, epoch.newest_number(directory)).items():
        if isinstance(member, epoch.Member) and epoch.is_alive(path, member):
            raise RunIsLive(f"{directory}: {member.who} is running and saves there; pull into another directory")


@contextmanager
def _claimed(directory: Path, told: manifest.Manifest) -> Iterator[None]:
    """In the directory of a run, own it for the moment of the rename: a run may have started meanwhile, and the next
    one shall count as newer than what was pulled."""
    if not disk.exists(directory / names.EPOCHS):
        yield
        return
    mine = epoch.claim_number(
        directory, "roll-ckpt pull", {"command line": 1}, None, take_over=False, at_least=told.epoch
    )
    try:
        yield
    finally:
        mine.release()


def _refuse_damage(wanted: _Wanted, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise Damaged(
            f"{wanted.where}: {wanted.told.name} is not as it was committed: {'; '.join(problems[:_NAMED])}{more}. "
            "Nothing was put under its name; pull another revision, or push the checkpoint again"
        )


def _check_room(wanted: _Wanted, staging: Path) -> None:
    begun = disk.walk_all(staging) if disk.is_real_dir(staging) else ()
    here = sum(disk.file_bytes(staging / path) for path, regular in begun if regular)
    needed, free = sum(wanted.sizes.values()) - here, disk.free_bytes(staging)
    if needed > free:
        raise NoRoom(
            f"{wanted.told.name} of {wanted.remote.uri} needs {needed} bytes in {staging.parent}, and its file system "
            f"has {free}; make room, or pull into another directory. Nothing was written"
        )


# --- the staging directory ----------------------------------------------------------------------------------


@contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """Own the staging directory, made if it is missing, inside the block; waits for whoever has it."""
    told = False
    while (lock := _lock(staging)) is False:
        if not told:
            log.warning("%s: another process is pulling that just now; waiting for it", staging)
        told = True
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _lock(staging: Path) -> disk.Lock | Literal[False] | None:
    """A lock, False if another process has it or removes the directory just now, None if there are no locks."""
    _make_real_dir(staging)
    path = staging / names.PULL_LOCK
    try:
        with suppress(FileExistsError):
            os.close(disk.create(path))
        lock = disk.try_lock(path, exclusive=True)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in disk.NO_LOCKS:
            raise
        return None
    if lock is None:
        return False
    if not disk.same_file(lock, path):
        lock.release()
        return False
    return lock


def _make_real_dir(path: Path) -> None:
    """Make a directory; a symbolic link of that name goes, so that nothing is written where it leads."""
    if disk.exists(path) and not disk.is_real_dir(path):
        disk.discard_file(path)
    disk.make_dir(path)


def _publish(unit: Path, target: Path) -> None:
    disk.reach("pull.verified", name=target.name)
    try:
        disk.rename(unit, target)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        raise ConfigError(
            f"{target} appeared while it was pulled; it was left alone. Remove or rename it, and pull again"
        ) from None
    disk.fsync_dir(target.parent)
    disk.reach("pull.renamed", name=target.name)


def _remove_leftovers(directory: Path, name: str, own: Path) -> None:
    """Remove our staging directory, and those of killed pulls of other checkpoints of this name."""
    for entry in disk.list_dir(directory):
        parsed = names.parse_pull_dir(entry)
        if parsed is None or parsed[0] != name:
            continue
        if entry == own.name or not _is_used(directory / entry):
            disk.remove_tree(directory / entry)


def _is_used(staging: Path) -> bool:
    try:
        return disk.is_locked(staging / names.PULL_LOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in disk.NO_LOCKS:
            raise
        return True


# --- the bytes ----------------------------------------------------------------------------------------------


def _bring(wanted: _Wanted, unit: Path, progress: Progress) -> None:
    """Make `unit` the whole checkpoint, durable and verified. Damaged: the staging directory is gone."""
    for patient in (True, False):
        resumed = _sweep(unit, wanted.sizes)
        _fetch_all(wanted, unit, progress)
        disk.write_durable(unit / names.MANIFEST, wanted.record)
        _fsync_dirs(unit, wanted.sizes)
        problems = verify.verify(unit)
        if not problems:
            return
        bad = {problem.path for problem in problems}
        if not (patient and bad & resumed):
            disk.remove_tree(unit.parent)
            _refuse_damage(wanted, [f"{problem.path}: {problem.kind}: {problem.detail}" for problem in problems])
        # A host that went down may have left a file with its length and without its bytes: once more from the Hub.
        for path in bad:
            disk.discard_file(unit / path)


def _sweep(unit: Path, sizes: Mapping[str, int]) -> set[str]:
    """Remove what cannot be of this checkpoint, links above all; the paths that a killed pull has begun."""
    begun = set()
    _make_real_dir(unit)
    for path, regular in list(disk.walk_all(unit)):
        if regular and disk.file_bytes(unit / path) <= sizes.get(path, -1):
            begun.add(path)
        else:
            disk.discard_file(unit / path)
    return begun


def _fetch_all(wanted: _Wanted, unit: Path, progress: Progress) -> None:
    for folder in {(unit / path).parent for path in wanted.sizes}:
        disk.make_dirs(folder, durable=False)
    tally = _Tally(sum(wanted.sizes.values()), progress)
    largest_first = sorted(wanted.sizes, key=lambda path: (-wanted.sizes[path], path))
    with ThreadPoolExecutor(_STREAMS, "roll_ckpt-pull") as pool:
        try:
            running = [pool.submit(_fetch, wanted, path, unit, tally) for path in largest_first]
            for ended in as_completed(running):
                ended.result()
        except BaseException:  # Ctrl-C, too: the others shall not go on for hours
            tally.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Tally:
    """What has come so far, of all files together; and whether to stop."""

    def __init__(self, nbytes: int, progress: Progress) -> None:
        self.stop = threading.Event()
        self._here, self._all, self._progress = 0, nbytes, progress
        self._told = float("-inf")
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._here += nbytes
            now = time.monotonic()
            if now - self._told >= _PROGRESS_S or self._here == self._all:
                self._told = now
                self._progress(self._here, self._all)


def _fetch(wanted: _Wanted, path: str, unit: Path, tally: _Tally) -> None:
    """Bring one file, from where it ends here; durable on return, never longer than it shall be."""
    file, nbytes, failures = unit / path, wanted.sizes[path], 0
    descriptor = disk.append(file)
    try:
        here = os.fstat(descriptor).st_size
        tally.add(here)
        while here < nbytes and not tally.stop.is_set():
            before = here
            try:
                for block in _blocks(wanted, path, here, nbytes):
                    _write(descriptor, block, file, unit)
                    here += len(block)
                    tally.add(len(block))
                    if tally.stop.is_set():
                        return
            except HubUnavailable as error:
                failures = 1 if here > before else failures + 1
                if failures >= _TRIES:
                    raise HubUnavailable(
                        f"{error}. What has come lies in {unit.parent}; pull again, and it goes on there"
                    ) from None
                pause = _pause_s(failures, error)
                log.info("%s; trying again in %.0f s", error, pause)
                tally.stop.wait(pause)
        disk.fsync(descriptor, file)
    finally:
        os.close(descriptor)


def _blocks(wanted: _Wanted, path: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes [start, stop) of a file on the Hub. HubUnavailable where they end too early."""
    with hub.stream(wanted.remote, path, wanted.commit, start=start) as blocks:
        for block in blocks:
            yield block[: stop - start]
            start += len(block)
            if start >= stop:
                return
    raise HubUnavailable(f"reading {path}: {wanted.remote.uri}: the connection ended after byte {start} of {stop}")


def _write(descriptor: int, block: bytes, file: Path, unit: Path) -> None:
    try:
        disk.write_all(descriptor, block, file)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoRoom(
            f"{file}: {error.strerror}. Make room and pull again: it goes on there. Or remove {unit.parent}"
        ) from error


def _fsync_dirs(unit: Path, paths: Iterable[str]) -> None:
    folders = {unit}
    for path in paths:
        folders.update(parent for parent in (unit / path).parents if unit in parent.parents)
    for folder in sorted(folders, reverse=True):  # what refers to something becomes durable after it
        disk.fsync_dir(folder)
    disk.fsync_dir(unit.parent)
