"""What is owed to the Hub is pushed by a process of its own, which the training process only listens to.

    python -m roll_ckpt.uploader OUTPUT_DIR [--again]      pushes what is owed, the oldest first, then ends

It tells what it does in JSON lines on stdout, runs at the lowest priority and ends when its parent does. One at a
time for an output directory. Killed at any instant, the next one goes on: see push_queue.py.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from roll_ckpt import names
from roll_ckpt.disk import failpoints, locks, reads, writes
from roll_ckpt.errors import HubUnavailable, NotFound, RollCkptError
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.push import push
from roll_ckpt.upload.hub.push_queue import Entry, Hashes, Repository

Tell = Callable[[dict[str, Any]], None]
_PROGRESS_S = 0.5
_POLL_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_OF_THIS_ONE = (409, 412, 423, 500)  # the Hub speaks, and may take another checkpoint all the same
_TRIES = 3  # so often one of those is heard before the others have their turn


def push_all_owed(output_dir: Path, tell: Tell, *, again: bool = False, patient: bool = True) -> None:
    """Push every checkpoint that is owed, the oldest first, and record what became of each.

    Blocks. Failed ones are tried only if `again`. While the Hub cannot be reached it waits, longer each time, and
    as long as the Hub asks for; unless `patient` it raises HubUnavailable instead. One that the Hub does not take
    again and again lets the others go first. Waits for another process that is at it. `tell` is told of events:
    {"event": "begin" | "progress" | "waiting" | "done" | "failed", "name", …}.
    """
    with _alone(output_dir, tell):
        pause_s = _FIRST_PAUSE_S
        tried: set[_Key] = set()
        not_taken: dict[_Key, int] = {}
        furthest: dict[tuple[str, _Key], int] = {}
        began: dict[_Key, float] = {}
        while (found := _next(output_dir, tried, again, not_taken)) is not None:
            to, entry = found
            key = _key(to, entry)
            began.setdefault(key, time.monotonic())
            tell({"event": "begin", "name": entry.name, "nbytes": entry.nbytes})
            entry = replace(entry, attempts=entry.attempts + 1, detail="")
            try:
                made = _push(output_dir, entry, to, tell, furthest)
            except HubUnavailable as problem:
                _note(output_dir, replace(entry, state="owed", detail=str(problem)), to)
                if problem.status in _OF_THIS_ONE:
                    not_taken[key] = not_taken.get(key, 0) + 1
                    if not patient:
                        tried.add(key)
                        tell({"event": "waiting", "name": entry.name, "detail": str(problem), "pause_s": 0.0})
                        continue
                elif not patient:
                    raise
                wait_s = max(pause_s, problem.retry_after_s or 0.0)
                tell({"event": "waiting", "name": entry.name, "detail": str(problem), "pause_s": wait_s})
                time.sleep(wait_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            except NotFound:
                tried.add(key)  # pruned, or being replaced by a save of the same name
            except (RollCkptError, OSError) as problem:
                tried.add(key)
                _note(output_dir, replace(entry, state="failed", detail=str(problem)), to)
                tell({"event": "failed", "name": entry.name, "detail": str(problem)})
            else:
                pause_s = _FIRST_PAUSE_S
                push_queue.record(output_dir, replace(entry, state="done", commit=made), to)
                seconds = time.monotonic() - began.pop(key)
                furthest = {what: done for what, done in furthest.items() if what[1] != key}
                tell({"event": "done", "name": entry.name, "commit": made, "seconds": seconds})


def push_one(output_dir: Path, name: str, to: Repository, tell: Tell) -> str:
    """Push one checkpoint to the run's destination, whatever is recorded of it, and record it; its commit's id.

    Blocks, and waits for another process that pushes. `tell` as for `drain`. Raises what `push.push` does.
    """
    with _alone(output_dir, tell):
        entry = push_queue.find(output_dir, name)
        made = _push(output_dir, entry, to, tell, {})
        done = replace(entry, state="done", detail="", commit=made, attempts=entry.attempts + 1)
        push_queue.record(output_dir, done, to)
        return made


_Key = tuple[str, str]


def _key(to: Repository, entry: Entry) -> _Key:
    """This very checkpoint, there."""
    return (to.remote.uri, entry.manifest_sha256)


def _next(
    output_dir: Path, tried: set[_Key], again: bool, not_taken: dict[_Key, int]
) -> tuple[Repository, Entry] | None:
    to = push_queue.repository(output_dir)
    if to is None:
        return None
    states = ("owed", "failed") if again else ("owed",)
    left = [e for e in push_queue.list_entries(output_dir, to) if e.state in states and _key(to, e) not in tried]
    if not left:
        return None
    return to, min(left, key=lambda entry: not_taken.get(_key(to, entry), 0) // _TRIES)


def _push(output_dir: Path, entry: Entry, to: Repository, tell: Tell, furthest: dict[tuple[str, _Key], int]) -> str:
    """Push one. `furthest` is how far earlier tries got: what is only done once more is no progress."""
    told = [float("-inf")]

    def progress(doing: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - told[0] >= _PROGRESS_S or done == total:
            told[0] = now
            what = (doing, _key(to, entry))
            moved = done > furthest.get(what, -1)
            if moved:
                furthest[what] = done
                writes.touch(output_dir / names.HUB_LOCK)  # other worlds of the run look at its time
            event = {"event": "progress", "name": entry.name, "doing": doing, "done": done, "total": total}
            tell({**event, "moved": moved})

    # The branch shall hold the newest: one that comes late goes beside it.
    newest = max((e.age for e in push_queue.list_entries(output_dir, to) if e.state == "done"), default=entry.age)
    return push(
        output_dir / entry.name,
        to.remote,
        private=to.private,
        progress=progress,
        hashes=Hashes(output_dir, entry),
        on_side_branch=newest > entry.age,
    )


def _note(output_dir: Path, entry: Entry, to: Repository) -> None:
    """Record a push that did not come about, unless somebody has cancelled or made it meanwhile."""
    with suppress(NotFound):
        if push_queue.find(output_dir, entry.name).state not in ("cancelled", "done"):
            push_queue.record(output_dir, entry, to)


@contextmanager
def _alone(output_dir: Path, tell: Tell) -> Iterator[None]:
    path = output_dir / names.HUB_LOCK
    writes.make_own_dir(path.parent)
    with suppress(FileExistsError):
        os.close(writes.create(path))
    lock = None
    told = False
    try:
        while (lock := locks.try_lock(path, exclusive=True)) is None:
            if not told:
                tell({"event": "waiting", "name": None, "detail": f"another process pushes from {output_dir}"})
            told = True
            time.sleep(_POLL_S)
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise  # where there are no locks, two may push at once: each checkpoint is there once all the same
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def last_moved_ns(output_dir: Path) -> int:
    """When a push from this directory last got further, by the file system's clock; 0 if none has begun."""
    try:
        return reads.mtime_ns(output_dir / names.HUB_LOCK)
    except FileNotFoundError:
        return 0


def main() -> None:
    """Push what is owed and exit 0; whatever else happens is a death, after which the parent starts another."""
    parser = argparse.ArgumentParser(prog="python -m roll_ckpt.uploader")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--again", action="store_true", help="try those that failed before, too")
    told = parser.parse_args()
    events, sys.stdout = sys.stdout, sys.stderr  # nobody else's words among ours
    # An interrupt of the job is not one of the upload; a session of its own would make Linux's autogroups weigh it
    # against the whole job, and nice would count for nothing.
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    failpoints.failpoint("uploader.started", output_dir=told.output_dir)
    push_all_owed(told.output_dir, lambda event: _tell(events, event), again=told.again)


def _tell(events: TextIO, event: dict[str, Any]) -> None:
    try:
        events.write(json.dumps(event) + "\n")
        events.flush()
    except OSError:
        os._exit(1)  # nobody listens any more


def _end_with(parent: int) -> None:
    """End this process when its parent has ended: its stdin is at its end, or another is its parent."""
    # Both are looked at: the parent's forked children hold its end of the pipe open.
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    os._exit(1)


if __name__ == "__main__":
    main()
