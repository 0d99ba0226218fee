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
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import HubUnavailable, NoRoom
from roll_ckpt.transaction import verification
from roll_ckpt.upload.hub.client import stream
from roll_ckpt.upload.hub.staging import make_real_dir
from roll_ckpt.upload.hub.wanted import Wanted, pause_s, refuse_damage

log = logging.getLogger("roll_ckpt")

_STREAMS = 8  # files that come at once: one connection alone seldom fills a line
_TRIES = 6  # failures in a row without a byte between them
_PROGRESS_S = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


Progress = Callable[[int, int], None]
"""Called now and then with the bytes that are here and all bytes, by one thread at a time."""


def bring(wanted: Wanted, checkpoint_dir: Path, progress: Progress) -> None:
    """Make `unit` the whole checkpoint, durable and verified. Damaged: the staging directory is gone."""
    for patient in (True, False):
        resumed = _sweep(checkpoint_dir, wanted.sizes)
        _fetch_all(wanted, checkpoint_dir, progress)
        writes.write_durable(checkpoint_dir / names.MANIFEST, wanted.record)
        _fsync_dirs(checkpoint_dir, wanted.sizes)
        problems = verification.verify(checkpoint_dir)
        if not problems:
            return
        bad = {problem.path for problem in problems}
        if not (patient and bad & resumed):
            writes.remove_tree(checkpoint_dir.parent)
            refuse_damage(wanted, [f"{problem.path}: {problem.kind}: {problem.detail}" for problem in problems])
        # A host that went down may have left a file with its length and without its bytes: once more from the Hub.
        for path in bad:
            writes.discard_file(checkpoint_dir / path)


def _sweep(checkpoint_dir: Path, sizes: Mapping[str, int]) -> set[str]:
    """Remove what cannot be of this checkpoint, links above all; the paths that a killed pull has begun."""
    begun = set()
    make_real_dir(checkpoint_dir)
    for path, regular in list(tree.walk_all(checkpoint_dir)):
        if regular and tree.file_bytes(checkpoint_dir / path) <= sizes.get(path, -1):
            begun.add(path)
        else:
            writes.discard_file(checkpoint_dir / path)
    return begun


def _fetch_all(wanted: Wanted, checkpoint_dir: Path, progress: Progress) -> None:
    for folder in {(checkpoint_dir / path).parent for path in wanted.sizes}:
        writes.make_dirs(folder, durable=False)
    tally = _Tally(sum(wanted.sizes.values()), progress)
    largest_first = sorted(wanted.sizes, key=lambda path: (-wanted.sizes[path], path))
    with ThreadPoolExecutor(_STREAMS, "roll_ckpt-pull") as pool:
        try:
            running = [pool.submit(_fetch, wanted, path, checkpoint_dir, tally) for path in largest_first]
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


def _fetch(wanted: Wanted, path: str, checkpoint_dir: Path, tally: _Tally) -> None:
    """Bring one file, from where it ends here; durable on return, never longer than it shall be."""
    file, nbytes, failures = checkpoint_dir / path, wanted.sizes[path], 0
    descriptor = writes.append(file)
    try:
        here = os.fstat(descriptor).st_size
        tally.add(here)
        while here < nbytes and not tally.stop.is_set():
            before = here
            try:
                for block in _blocks(wanted, path, here, nbytes):
                    _write(descriptor, block, file, checkpoint_dir)
                    here += len(block)
                    tally.add(len(block))
                    if tally.stop.is_set():
                        return
            except HubUnavailable as error:
                failures = 1 if here > before else failures + 1
                if failures >= _TRIES:
                    raise HubUnavailable(
                        f"{error}. What has come lies in {checkpoint_dir.parent}; pull again, and it goes on there"
                    ) from None
                pause = pause_s(failures, error)
                log.info("%s; trying again in %.0f s", error, pause)
                tally.stop.wait(pause)
        writes.fsync(descriptor, file)
    finally:
        os.close(descriptor)


def _blocks(wanted: Wanted, path: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes [start, stop) of a file on the Hub. HubUnavailable where they end too early."""
    with stream(wanted.remote, path, wanted.commit, start=start) as blocks:
        for block in blocks:
            yield block[: stop - start]
            start += len(block)
            if start >= stop:
                return
    raise HubUnavailable(f"reading {path}: {wanted.remote.uri}: the connection ended after byte {start} of {stop}")


def _write(descriptor: int, block: bytes, file: Path, checkpoint_dir: Path) -> None:
    try:
        writes.write_all(descriptor, block, file)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoRoom(
            f"{file}: {error.strerror}. Make room and pull again: it goes on there. Or remove {checkpoint_dir.parent}"
        ) from error


def _fsync_dirs(checkpoint_dir: Path, paths: Iterable[str]) -> None:
    folders = {checkpoint_dir}
    for path in paths:
        folders.update(parent for parent in (checkpoint_dir / path).parents if checkpoint_dir in parent.parents)
    for folder in sorted(folders, reverse=True):  # what refers to something becomes durable after it
        writes.fsync_dir(folder)
    writes.fsync_dir(checkpoint_dir.parent)
