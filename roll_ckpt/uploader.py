"""What is owed to the Hub is pushed by a process of its own, which the training process only listens to.

    python -m roll_ckpt.uploader OUTPUT_DIR [--again]      pushes what is owed, the oldest first, then ends

It tells what it does in JSON lines on stdout, runs at the lowest priority and ends when its parent does. One at a
time for an output directory. Killed at any instant, the next one goes on: see push_queue.py.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import select
import site
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from . import disk, names, push, push_queue
from .errors import HubUnavailable, NotFound, RollCkptError
from .push_queue import Destination, Entry

log = logging.getLogger("roll_ckpt")

Tell = Callable[[dict[str, Any]], None]

_PROGRESS_S = 0.5
_POLL_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_OF_THIS_ONE = (409, 412, 423, 500)  # the Hub speaks, and may take another checkpoint all the same
_TRIES = 3  # so often one of those is heard before the others have their turn
_DEATHS = 5
_ENDED_KEPT = 100
_LOG_S = 30.0


# --- pushing what is owed -----------------------------------------------------------------------------------


def drain(output_dir: Path, tell: Tell, *, again: bool = False, patient: bool = True) -> None:
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


def push_one(output_dir: Path, name: str, to: Destination, tell: Tell) -> str:
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


def _key(to: Destination, entry: Entry) -> _Key:
    """This very checkpoint, there."""
    return (to.remote.uri, entry.manifest_sha256)


def _next(
    output_dir: Path, tried: set[_Key], again: bool, not_taken: dict[_Key, int]
) -> tuple[Destination, Entry] | None:
    to = push_queue.destination(output_dir)
    if to is None:
        return None
    states = ("owed", "failed") if again else ("owed",)
    left = [e for e in push_queue.entries(output_dir, to) if e.state in states and _key(to, e) not in tried]
    if not left:
        return None
    return to, min(left, key=lambda entry: not_taken.get(_key(to, entry), 0) // _TRIES)


def _push(output_dir: Path, entry: Entry, to: Destination, tell: Tell, furthest: dict[tuple[str, _Key], int]) -> str:
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
                disk.touch(output_dir / names.HUB_LOCK)  # other worlds of the run look at its time
            event = {"event": "progress", "name": entry.name, "doing": doing, "done": done, "total": total}
            tell({**event, "moved": moved})

    # The branch shall hold the newest: one that comes late goes beside it.
    newest = max((e.age for e in push_queue.entries(output_dir, to) if e.state == "done"), default=entry.age)
    return push.push(
        output_dir / entry.name,
        to.remote,
        private=to.private,
        progress=progress,
        hashes=push_queue.Hashes(output_dir, entry),
        aside=newest > entry.age,
    )


def _note(output_dir: Path, entry: Entry, to: Destination) -> None:
    """Record a push that did not come about, unless somebody has cancelled or made it meanwhile."""
    with suppress(NotFound):
        if push_queue.find(output_dir, entry.name).state not in ("cancelled", "done"):
            push_queue.record(output_dir, entry, to)


@contextmanager
def _alone(output_dir: Path, tell: Tell) -> Iterator[None]:
    path = output_dir / names.HUB_LOCK
    disk.make_own_dir(path.parent)
    with suppress(FileExistsError):
        os.close(disk.create(path))
    lock = None
    told = False
    try:
        while (lock := disk.try_lock(path, exclusive=True)) is None:
            if not told:
                tell({"event": "waiting", "name": None, "detail": f"another process pushes from {output_dir}"})
            told = True
            time.sleep(_POLL_S)
    except OSError as error:
        if error.errno not in disk.NO_LOCKS:
            raise  # where there are no locks, two may push at once: each checkpoint is there once all the same
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def last_moved_ns(output_dir: Path) -> int:
    """When a push from this directory last got further, by the file system's clock; 0 if none has begun."""
    try:
        return disk.mtime_ns(output_dir / names.HUB_LOCK)
    except FileNotFoundError:
        return 0


# --- the process --------------------------------------------------------------------------------------------


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
    disk.reach("uploader.started", output_dir=told.output_dir)
    drain(told.output_dir, lambda event: _tell(events, event), again=told.again)


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


# --- the parent's side --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """What became of one checkpoint's push: done, failed, cancelled, or owed still because nothing moved."""

    name: str
    state: push_queue.State
    detail: str = ""
    seconds: float = 0.0


class Uploader:
    """Keeps a process pushing while something is owed. Any thread may call."""

    def __init__(
        self,
        output_dir: Path,
        *,
        on_end: Callable[[Ended], None],
        background: Callable[[Callable[[], None], str], None],
    ) -> None:
        """`on_end` is told of each push that ended, before those who wait for it, on the thread that `background`
        started: it must not wait for another push."""
        self._output_dir = output_dir
        self._on_end = on_end
        self._background = background
        self._changed = threading.Condition()
        self._wanted = self._again = self._serving = self._stopping = False
        self._stuck = self._leaving = False
        self._pid = os.getpid()
        self._process: subprocess.Popen[str] | None = None
        self._ended: dict[str, Ended] = {}  # the newest ones, for those who wait for them
        self._ends = 0
        self._progress: dict[str, dict[str, Any]] = {}
        self._trouble = ""
        self._moved = time.monotonic()
        # Registered after the one that joins the background's threads, so it comes before that.
        atexit.register(self._leave)

    def notify(self, name: str | None = None, *, again: bool = False) -> None:
        """Something may be owed: `name`, or whatever lies there; `again` includes what failed before."""
        with self._changed:
            if name is not None:
                self._ended.pop(name, None)
            self._wanted, self._again, self._stopping = True, self._again or again, False
            if self._serving:
                return
            self._serving = True
        try:
            self._background(self._serve, "uploads")
        except BaseException:
            self._serve_no_more()
            raise

    def wait(self, name: str, patience_s: float, show: Callable[[dict[str, Any]], None]) -> Ended:
        """Block until the push of `name` has ended, or nothing has moved for `patience_s`, here or in another process.

        `show` is given the newest progress event now and then.
        """
        self._moved = time.monotonic()
        seen = last_moved_ns(self._output_dir)
        while True:
            if seen != (seen := last_moved_ns(self._output_dir)):
                self._moved = time.monotonic()
            with self._changed:
                self._changed.wait(_POLL_S)
                ended, progress, serving = self._ended.get(name), self._progress.get(name), self._serving
            if ended is not None:
                return ended
            if not serving:
                return self._as_recorded(name)
            if time.monotonic() - self._moved > patience_s:
                return Ended(name, "owed", self._trouble or f"nothing has moved for {patience_s:g} s")
            if progress is not None:
                show(progress)

    def stop(self) -> None:
        """Let the process end now; what is owed stays owed."""
        with self._changed:
            self._wanted, self._stopping = False, True
            if self._process is not None:
                self._process.kill()

    def _leave(self) -> None:
        """The interpreter ends: a push that moves may finish, one that waits is for the next start.

        The rank of a job that has crashed must not stay while the others hang in its collectives.
        """
        if self._pid != os.getpid():
            return
        with self._changed:
            self._leaving = True
            if self._stuck:
                self.stop()

    def _as_recorded(self, name: str) -> Ended:
        try:
            entry = push_queue.find(self._output_dir, name)
        except NotFound as problem:
            return Ended(name, "failed", str(problem))
        return Ended(name, entry.state, entry.detail or self._trouble)

    def _serve(self) -> None:
        try:
            self._keep_running()  # at its end another may serve already
        except BaseException:
            self._serve_no_more()
            raise

    def _serve_no_more(self) -> None:
        with self._changed:
            self._serving = False
            self._changed.notify_all()

    def _keep_running(self) -> None:
        deaths = 0
        while (again := self._claim_work()) is not None:
            ends = self._ends
            try:
                code = self._run(again)
            except OSError as problem:
                code, how = 1, f"could not be started: {problem}"
            else:
                how = f"died with signal {-code}" if code < 0 else f"died with exit code {code}, see standard error"
            if not code or self._stopping:
                continue
            deaths = 1 if self._ends > ends else deaths + 1
            self._trouble = f"the uploader of {self._output_dir} {how}"
            if deaths > _DEATHS:
                log.error("%s; after %d times it stays so until the next checkpoint", self._trouble, deaths)
                continue
            log.warning("%s; it is started again (%d of %d)", self._trouble, deaths, _DEATHS)
            with self._changed:
                self._wanted, self._again = True, self._again or again

    def _claim_work(self) -> bool | None:
        """Whether to try failed ones again; None if there is nothing more to do, and then nobody serves."""
        with self._changed:
            self._serving = self._wanted and not self._stopping
            again, self._wanted, self._again = self._again, False, False
            self._changed.notify_all()
            return again if self._serving else None

    def _run(self, again: bool) -> int:
        with self._changed:
            if self._stopping:
                return 0
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "roll_ckpt.uploader", str(self._output_dir), *(["--again"] if again else [])],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            with suppress(OSError):  # from the first instruction on: its imports alone take half a second
                os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        assert process.stdin and process.stdout
        with process.stdin, process.stdout:
            for line in process.stdout:
                with suppress(JSONDecodeError):  # a kill may cut the last line
                    self._hear(json.loads(line))
        return process.wait()

    def _hear(self, event: dict[str, Any]) -> None:
        kind, name = event["event"], event["name"]
        ended: Ended | None = None
        if kind in ("done", "failed"):
            ended = Ended(name, kind, event.get("detail", ""), event.get("seconds", 0.0))
            self._on_end(ended)
        elif kind == "waiting":
            log.warning("%s; what is owed stays here, and is tried again", event["detail"])
        with self._changed:
            if ended is not None:
                self._ends += 1
                self._ended.pop(name, None)
                self._ended[name] = ended
                if len(self._ended) > _ENDED_KEPT:
                    del self._ended[next(iter(self._ended))]
                self._progress.pop(name, None)
            elif kind == "progress":
                self._progress[name] = event
            elif kind == "waiting":
                self._trouble = event["detail"]
            if ended is not None or event.get("moved"):
                self._moved, self._stuck = time.monotonic(), False
            self._stuck = self._stuck or kind == "waiting"
            if self._stuck and self._leaving:
                self.stop()
            self._changed.notify_all()


def _environment() -> dict[str, str]:
    """Ours, in which the process finds this package even where only a script's folder or a changed sys.path has it."""
    package = Path(__file__).resolve().parent.parent
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found = [*given, *site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    if package in [Path(path).resolve() for path in found if path]:
        return dict(os.environ)  # PYTHONPATH comes before the standard library, where site-packages must not
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), *filter(None, given)])}


class Bar:
    """Shows one push to a person: a line on a terminal that is written anew, else a line in the log now and then."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._last = time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        done, total = event["done"], event["total"]
        text = f"{event['name']}: {event['doing']} {done / 1e9:.2f} of {total / 1e9:.2f} GB"
        share = done / total if total else 1.0
        if self._tty:
            line = "#" * int(30 * share)
            print(f"\r\033[K[{line:<30}] {100 * share:3.0f} %  {text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last > _LOG_S:
            self._last = time.monotonic()
            log.info("%s (%.0f %%)", text, 100 * share)

    def end(self) -> None:
        """Take the line away."""
        if self._tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
