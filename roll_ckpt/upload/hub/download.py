"""Downloads the files of one checkpoint into a staging directory, resuming each at its current length; then verifies.

The room `disk` writes the files, not the download functions of huggingface_hub: those start a file again from the
beginning and leave the half of a killed download behind.
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
from roll_ckpt.upload.hub.remote_checkpoint import RemoteCheckpoint, pause_s, refuse_damage
from roll_ckpt.upload.hub.staging import make_real_dir

log = logging.getLogger("roll_ckpt")

_STREAMS = 8  # so many files are downloaded at once: one connection alone seldom fills a line
_TRIES = 6  # so many failures in a row, without a byte between them, end a download
_PROGRESS_S = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int], None]
"""Called now and then, by one thread at a time, with the bytes on disk and the bytes of the whole checkpoint."""


def download(checkpoint: RemoteCheckpoint, checkpoint_dir: Path, progress: Progress) -> None:
    """Download what `checkpoint_dir` still lacks of the checkpoint. On return it is complete, durable and verified.

    Blocks. The caller owns the staging directory, the parent of `checkpoint_dir`; see `staging.locked`.

    Raises:
        Damaged: a file on the Hub is not as it was committed; the staging directory is removed.
        HubRefused, HubUnavailable, NoRoom: what was downloaded stays for the next pull.
    """
    for first_try in (True, False):
        resumed = _sweep(checkpoint_dir, checkpoint.sizes)
        _fetch_all(checkpoint, checkpoint_dir, progress)
        writes.write_durable(checkpoint_dir / names.MANIFEST, checkpoint.record)
        _fsync_dirs(checkpoint_dir, checkpoint.sizes)
        problems = verification.verify(checkpoint_dir)
        if not problems:
            return
        bad = {problem.path for problem in problems}
        if not (first_try and bad & resumed):
            writes.remove_tree(checkpoint_dir.parent)
            refuse_damage(checkpoint, [f"{problem.path}: {problem.kind}: {problem.detail}" for problem in problems])
        # A crash of the host may have left a file with its full length but not its bytes: download it once more.
        for path in bad:
            writes.discard_file(checkpoint_dir / path)


def _sweep(checkpoint_dir: Path, sizes: Mapping[str, int]) -> set[str]:
    """Remove what cannot belong to this checkpoint, links above all; return the paths that a killed pull has begun."""
    begun = set()
    make_real_dir(checkpoint_dir)
    for path, regular in list(tree.walk_all(checkpoint_dir)):
        if regular and tree.file_bytes(checkpoint_dir / path) <= sizes.get(path, -1):
            begun.add(path)
        else:
            writes.discard_file(checkpoint_dir / path)
    return begun


def _fetch_all(checkpoint: RemoteCheckpoint, checkpoint_dir: Path, progress: Progress) -> None:
    for folder in {(checkpoint_dir / path).parent for path in checkpoint.sizes}:
        writes.make_dirs(folder, durable=False)
    tally = _Tally(sum(checkpoint.sizes.values()), progress)
    largest_first = sorted(checkpoint.sizes, key=lambda path: (-checkpoint.sizes[path], path))
    with ThreadPoolExecutor(_STREAMS, "roll_ckpt-pull") as pool:
        try:
            running = [pool.submit(_fetch, checkpoint, path, checkpoint_dir, tally) for path in largest_first]
            for ended in as_completed(running):
                ended.result()
        except BaseException:  # Ctrl-C too: the other downloads must not go on for hours
            tally.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Tally:
    """Counts the bytes of all files that are on disk, and tells the downloading threads to `stop`."""

    def __init__(self, nbytes: int, progress: Progress) -> None:
        self.stop = threading.Event()
        self._done, self._total, self._progress = 0, nbytes, progress
        self._reported_at = float("-inf")
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._reported_at >= _PROGRESS_S or self._done == self._total:
                self._reported_at = now
                self._progress(self._done, self._total)


def _fetch(checkpoint: RemoteCheckpoint, path: str, checkpoint_dir: Path, tally: _Tally) -> None:
    """Download one file, resuming at its current length; fsynced on return and never longer than expected."""
    file, nbytes, failures = checkpoint_dir / path, checkpoint.sizes[path], 0
    descriptor = writes.append(file)
    try:
        done = os.fstat(descriptor).st_size
        tally.add(done)
        while done < nbytes and not tally.stop.is_set():
            before = done
            try:
                for block in _blocks(checkpoint, path, done, nbytes):
                    _write(descriptor, block, file, checkpoint_dir)
                    done += len(block)
                    tally.add(len(block))
                    if tally.stop.is_set():
                        return
            except HubUnavailable as error:
                failures = 1 if done > before else failures + 1
                if failures >= _TRIES:
                    raise HubUnavailable(
                        f"{error}. What was downloaded lies in {checkpoint_dir.parent}; pull again to resume there"
                    ) from None
                pause = pause_s(failures, error)
                log.info("%s; trying again in %.0f s", error, pause)
                tally.stop.wait(pause)
        writes.fsync(descriptor, file)
    finally:
        os.close(descriptor)


def _blocks(checkpoint: RemoteCheckpoint, path: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes [start, stop) of a file on the Hub. HubUnavailable if they end too early."""
    with stream(checkpoint.remote, path, checkpoint.commit, start=start) as blocks:
        for block in blocks:
            yield block[: stop - start]
            start += len(block)
            if start >= stop:
                return
    raise HubUnavailable(f"reading {path}: {checkpoint.remote.uri}: the connection ended after byte {start} of {stop}")


def _write(descriptor: int, block: bytes, file: Path, checkpoint_dir: Path) -> None:
    try:
        writes.write_all(descriptor, block, file)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoRoom(
            f"{file}: {error.strerror}. Make room and pull again to resume, or remove {checkpoint_dir.parent}"
        ) from error


def _fsync_dirs(checkpoint_dir: Path, paths: Iterable[str]) -> None:
    folders = {checkpoint_dir}
    for path in paths:
        folders.update(parent for parent in (checkpoint_dir / path).parents if checkpoint_dir in parent.parents)
    for folder in sorted(folders, reverse=True):  # a directory becomes durable after what is in it
        writes.fsync_dir(folder)
    writes.fsync_dir(checkpoint_dir.parent)
