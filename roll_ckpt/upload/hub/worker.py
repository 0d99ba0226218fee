"""Pushes the checkpoints that are owed to the Hub. The uploader runs it as a child process, the command line calls it.

    python -m roll_ckpt.upload.hub.worker OUTPUT_DIR [--again]     pushes what is owed, the oldest first, then ends

The process prints its events on stdout, one JSON object a line, and ends when its parent does. Its parent gives it
the lowest priority. One process at a time pushes from an output directory. It may be killed at any instant: the next
one goes on, see `push_queue`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from roll_ckpt import names
from roll_ckpt.disk import failpoints, locks, writes
from roll_ckpt.errors import HubUnavailable, NotFound, RollCkptError
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.lock_file import make_lock_file
from roll_ckpt.upload.hub.push import push
from roll_ckpt.upload.hub.push_queue import Entry, Hashes, Repository

log = logging.getLogger("roll_ckpt")

OnEvent = Callable[[dict[str, Any]], None]
"""Called with each event of a push: {"event": "begin" | "progress" | "waiting" | "done" | "failed", "name", …}."""

_PROGRESS_S = 0.5
_POLL_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_OF_THIS_CHECKPOINT = (409, 412, 423, 500)  # the Hub answers, and may accept another checkpoint all the same
_TRIES = 3  # after so many of these answers, other checkpoints have their turn


def push_all_owed(output_dir: Path, on_event: OnEvent, *, again: bool = False, patient: bool = True) -> None:
    """Push every checkpoint that is owed, the oldest first, and record the state of each push.

    Blocks; first until no other process pushes from this directory. Failed pushes are retried only with `again`. While
    the Hub cannot be reached it waits, each time longer, and at least as long as the Hub asks for. A checkpoint that
    the Hub does not accept several times in a row lets the others go first.

    Raises:
        HubUnavailable: the Hub cannot be reached and `patient` is False. What is owed stays owed.
        Damaged: the record of where the run pushes to.
    """
    with _only_pusher(output_dir, on_event):
        round_ = _Round(output_dir, on_event, again, patient)
        while (owed := round_.next()) is not None:
            round_.push(*owed)


def push_one(output_dir: Path, name: str, to: Repository, on_event: OnEvent) -> str:
    """Push one checkpoint to the run's repository, whatever its recorded state; record it; return its commit's id.

    Blocks; first until no other process pushes from this directory. Raises NotFound, and what `push.push` raises.
    """
    with _only_pusher(output_dir, on_event):
        entry = push_queue.find(output_dir, name)
        commit = _push(output_dir, entry, to, on_event, {})
        done = replace(entry, state="done", detail="", commit=commit, attempts=entry.attempts + 1)
        push_queue.record(output_dir, done, to)
        return commit


_Key = tuple[str, str]


def _key(to: Repository, entry: Entry) -> _Key:
    """Identifies a push: the address, and the digest of the checkpoint's manifest."""
    return (to.remote.uri, entry.manifest_sha256)


class _Round:
    """What one call of `push_all_owed` remembers from push to push."""

    def __init__(self, output_dir: Path, on_event: OnEvent, again: bool, patient: bool) -> None:
        self._output_dir, self._on_event, self._patient = output_dir, on_event, patient
        self._states = ("owed", "failed") if again else ("owed",)
        self._ended: set[_Key] = set()
        self._not_accepted: dict[_Key, int] = {}
        self._furthest: dict[tuple[str, _Key], int] = {}
        self._began: dict[_Key, float] = {}
        self._pause_s = _FIRST_PAUSE_S

    def next(self) -> tuple[Repository, Entry] | None:
        """The push to try next: the oldest, unless the Hub keeps refusing it for now; None if there is none."""
        to = push_queue.repository(self._output_dir)
        if to is None:
            return None
        entries = push_queue.list_entries(self._output_dir, to)
        owed = [e for e in entries if e.state in self._states and _key(to, e) not in self._ended]
        if not owed:
            return None
        return to, min(owed, key=lambda entry: self._not_accepted.get(_key(to, entry), 0) // _TRIES)

    def push(self, to: Repository, entry: Entry) -> None:
        """Try one push and record its state. HubUnavailable if the Hub cannot be reached and nobody wants to wait."""
        key = _key(to, entry)
        self._began.setdefault(key, time.monotonic())
        self._on_event({"event": "begin", "name": entry.name, "nbytes": entry.nbytes})
        entry = replace(entry, attempts=entry.attempts + 1, detail="")
        try:
            commit = _push(self._output_dir, entry, to, self._on_event, self._furthest)
        except HubUnavailable as problem:
            _record_unless_settled(self._output_dir, replace(entry, state="owed", detail=str(problem)), to)
            if problem.status in _OF_THIS_CHECKPOINT:
                self._not_accepted[key] = self._not_accepted.get(key, 0) + 1
            elif not self._patient:
                raise
            self._wait(key, entry.name, problem)
        except NotFound as problem:
            self._ended.add(key)
            log.debug("%s was pruned, or is being replaced: %s", entry.name, problem)
        except (RollCkptError, OSError) as problem:
            self._ended.add(key)
            _record_unless_settled(self._output_dir, replace(entry, state="failed", detail=str(problem)), to)
            self._on_event({"event": "failed", "name": entry.name, "detail": str(problem)})
        else:
            self._pause_s = _FIRST_PAUSE_S
            push_queue.record(self._output_dir, replace(entry, state="done", commit=commit), to)
            seconds = time.monotonic() - self._began.pop(key)
            self._furthest = {phase: done for phase, done in self._furthest.items() if phase[1] != key}
            self._on_event({"event": "done", "name": entry.name, "commit": commit, "seconds": seconds})

    def _wait(self, key: _Key, name: str, problem: HubUnavailable) -> None:
        """Pause before the next push. Unless patient, leave this checkpoint to a later call and do not pause."""
        pause_s = max(self._pause_s, problem.retry_after_s or 0.0) if self._patient else 0.0
        self._on_event({"event": "waiting", "name": name, "detail": str(problem), "pause_s": pause_s})
        if not self._patient:
            self._ended.add(key)
            return
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _push(
    output_dir: Path, entry: Entry, to: Repository, on_event: OnEvent, furthest: dict[tuple[str, _Key], int]
) -> str:
    """Push one checkpoint; return its commit's id.

    `furthest` holds how many bytes earlier tries got through, by phase: doing them once more is no progress.
    """
    reported_at = float("-inf")

    def progress(doing: str, done: int, total: int) -> None:
        nonlocal reported_at
        now = time.monotonic()
        if now - reported_at >= _PROGRESS_S or done == total:
            reported_at = now
            phase = (doing, _key(to, entry))
            moved = done > furthest.get(phase, -1)
            if moved:
                furthest[phase] = done
                writes.touch(output_dir / names.HUB_LOCK)  # other jobs of the run look at its time
            event = {"event": "progress", "name": entry.name, "doing": doing, "done": done, "total": total}
            on_event({**event, "moved": moved})

    # Keep the branch at the newest checkpoint; push an older one to a side branch.
    newest = max((e.age for e in push_queue.list_entries(output_dir, to) if e.state == "done"), default=entry.age)
    return push(
        output_dir / entry.name,
        to.remote,
        private=to.private,
        progress=progress,
        hashes=Hashes(output_dir, entry),
        on_side_branch=newest > entry.age,
    )


def _record_unless_settled(output_dir: Path, entry: Entry, to: Repository) -> None:
    """Record a push that failed or was postponed, unless it was cancelled or done meanwhile."""
    try:
        if push_queue.find(output_dir, entry.name).state not in ("cancelled", "done"):
            push_queue.record(output_dir, entry, to)
    except NotFound as problem:
        log.debug("no record of the push of %s: %s", entry.name, problem)


@contextmanager
def _only_pusher(output_dir: Path, on_event: OnEvent) -> Iterator[None]:
    """Hold the lock of the one process that pushes from `output_dir`; blocks while another one has it."""
    path = output_dir / names.HUB_LOCK
    writes.make_own_dir(path.parent)
    make_lock_file(path)
    lock = None
    waiting = False
    try:
        while (lock := locks.try_lock(path, exclusive=True)) is None:
            if not waiting:
                on_event({"event": "waiting", "name": None, "detail": f"another process pushes from {output_dir}"})
            waiting = True
            time.sleep(_POLL_S)
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise
        # Without locks two processes may push at once; each checkpoint is on the Hub once all the same.
        log.debug("%s: its file system has no locks: %s", path, error)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def main() -> None:
    """Push what is owed, then exit with 0. With any other exit code the parent starts the process again."""
    parser = argparse.ArgumentParser(prog="python -m roll_ckpt.upload.hub.worker")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--again", action="store_true", help="retry those that failed before, too")
    args = parser.parse_args()
    events, sys.stdout = sys.stdout, sys.stderr  # only events go to the parent
    # An interrupt of the job must not interrupt the upload. No session of its own: Linux's autogroups would then weigh
    # this process against the whole job, and its priority would count for nothing.
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    failpoints.failpoint("uploader.started", output_dir=args.output_dir)
    push_all_owed(args.output_dir, lambda event: _write_event(events, event), again=args.again)


def _write_event(events: TextIO, event: dict[str, Any]) -> None:
    try:
        events.write(json.dumps(event) + "\n")
        events.flush()
    except OSError as error:
        log.debug("the parent does not listen any more: %s", error)
        os._exit(1)


def _end_with(parent: int) -> None:
    """Exit when the parent has ended: when stdin is closed, or when this process has another parent.

    Both are checked, because forked children of the parent hold its end of the pipe open.
    """
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    os._exit(1)


if __name__ == "__main__":
    main()
