"""The training process's side of pushing: runs the process `worker` while something is owed, and hears its events.

The child's stdin is a pipe that this process holds open, so that the child ends when this process does.
"""

from __future__ import annotations

import json
import logging
import os
import site
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from roll_ckpt import process
from roll_ckpt.errors import NotFound
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.push_queue import State

log = logging.getLogger("roll_ckpt")

_DEATHS = 5  # after so many deaths in a row without a push in between, the process is not started again
_ENDED_KEPT = 100  # so many ended pushes are remembered
_POLL_S = 0.5


@dataclass(frozen=True)
class Ended:
    """The end of one checkpoint's push: "done", "failed", "cancelled", or "owed" if there was no progress in time.

    `detail` is the problem, for people; `seconds` the time from the first try to the end.
    """

    output_dir: Path
    name: str
    state: State
    detail: str = ""
    seconds: float = 0.0


class Uploaders:
    """The uploaders of this process; see `process`."""

    exit = process.Exit.UPLOADS

    def __init__(self) -> None:
        self.running: weakref.WeakSet[Uploader] = weakref.WeakSet()

    def leave(self) -> None:
        """At the interpreter's exit: stop every uploader that waits for the Hub."""
        for uploader in list(self.running):
            uploader.leave()


class Uploader:
    """Keeps a child process pushing while something is owed. Any thread may call."""

    def __init__(
        self,
        output_dir: Path,
        *,
        on_end: Callable[[Ended], None],
        background: Callable[[Callable[[], None], str], None],
    ) -> None:
        """`background` runs a function on a thread of that name, and waits for it at the interpreter's exit.

        `on_end` is called with each push that is done or failed, on that thread and before `wait` returns; it must not
        wait for another push.
        """
        self._output_dir = output_dir
        self._on_end = on_end
        self._background = background
        self._changed = threading.Condition()
        self._wanted = self._again = self._serving = self._stopping = False
        self._stuck = self._leaving = False
        self._process: subprocess.Popen[str] | None = None
        self._ended: dict[str, Ended] = {}  # the newest ones, for `wait`
        self._ends = 0
        self._progress: dict[str, dict[str, Any]] = {}
        self._trouble = ""
        self._moved = time.monotonic()
        process.part(Uploaders).running.add(self)

    def notify(self, name: str | None = None, *, again: bool = False) -> None:
        """Push what is owed, `name` or whatever else; with `again` also what failed before. Does not block."""
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
        """Block until the push of `name` has ended, or until there was no progress for `patience_s` seconds.

        Progress of any process that pushes from this directory counts. `show` is called with the newest progress event
        now and then.
        """
        self._moved = time.monotonic()
        seen = push_queue.last_moved_ns(self._output_dir)
        while True:
            if seen != (seen := push_queue.last_moved_ns(self._output_dir)):
                self._moved = time.monotonic()
            with self._changed:
                self._changed.wait(_POLL_S)
                ended, progress, serving = self._ended.get(name), self._progress.get(name), self._serving
            if ended is not None:
                return ended
            if not serving:
                return self._as_recorded(name)
            if time.monotonic() - self._moved > patience_s:
                return Ended(self._output_dir, name, "owed", self._trouble or f"no progress for {patience_s:g} s")
            if progress is not None:
                show(progress)

    def stop(self) -> None:
        """Kill the child process; what is owed stays owed. Does not block."""
        with self._changed:
            self._wanted, self._stopping = False, True
            if self._process is not None:
                self._process.kill()

    def leave(self) -> None:
        """At the interpreter's exit: a push that makes progress may finish, one that waits is left to the next start.

        Otherwise the rank of a crashed job would stay alive while the other ranks hang in its collectives.
        """
        with self._changed:
            self._leaving = True
            if self._stuck:
                self.stop()

    def _as_recorded(self, name: str) -> Ended:
        try:
            entry = push_queue.find(self._output_dir, name)
        except NotFound as problem:
            return Ended(self._output_dir, name, "failed", str(problem))
        return Ended(self._output_dir, name, entry.state, entry.detail or self._trouble)

    def _serve(self) -> None:
        try:
            self._keep_running()  # when it returns, another thread may serve already
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
                log.error("%s, %d times in a row; it is started again at the next checkpoint", self._trouble, deaths)
                continue
            log.warning("%s; starting it again (%d of %d)", self._trouble, deaths, _DEATHS)
            with self._changed:
                self._wanted, self._again = True, self._again or again

    def _claim_work(self) -> bool | None:
        """Whether to retry failed pushes; None if there is nothing more to do, and then no thread serves any more."""
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
                [
                    sys.executable,
                    "-m",
                    "roll_ckpt.upload.hub.worker",
                    str(self._output_dir),
                    *(["--again"] if again else []),
                ],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            _lower_priority(process)
        assert process.stdin and process.stdout
        with process.stdin, process.stdout:
            for line in process.stdout:
                try:
                    event = json.loads(line)
                except JSONDecodeError as error:
                    log.debug("the last line of a killed uploader was cut: %s", error)
                    continue
                self._handle(event)
        return process.wait()

    def _handle(self, event: dict[str, Any]) -> None:
        kind, name = event["event"], event["name"]
        ended: Ended | None = None
        if kind in ("done", "failed"):
            ended = Ended(self._output_dir, name, kind, event.get("detail", ""), event.get("seconds", 0.0))
            self._on_end(ended)
        elif kind == "waiting":
            log.warning("%s; what is owed stays on the local disk, and is retried", event["detail"])
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


def _lower_priority(process: subprocess.Popen[str]) -> None:
    """Give a child the lowest priority right after its start: its imports alone take half a second."""
    try:
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
    except OSError as error:
        log.debug("the uploader (process %d) keeps its priority: %s", process.pid, error)


def _environment() -> dict[str, str]:
    """This process's environment, with which the child finds roll_ckpt even if only sys.path leads to it here."""
    package = Path(__file__).resolve().parents[3]
    python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [*python_path, *site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    if package in [Path(folder).resolve() for folder in folders if folder]:
        return dict(os.environ)  # PYTHONPATH comes before the standard library: site-packages must not be put there
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), *filter(None, python_path)])}
