"""What is owed to the Hub is pushed by a process of its own, which the training process only listens to.

    python -m roll_ckpt.uploader OUTPUT_DIR [--again]      pushes what is owed, the oldest first, then ends

It tells what it does in JSON lines on stdout, runs at the lowest priority and ends when its parent does. One at a
time for an output directory. Killed at any instant, the next one goes on: see push_queue.py.
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
from contextlib import suppress
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from roll_ckpt import process
from roll_ckpt.errors import NotFound
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.push_queue import State
from roll_ckpt.upload.hub.worker import _POLL_S, last_moved_ns

log = logging.getLogger("roll_ckpt")

_DEATHS = 5
_ENDED_KEPT = 100


@dataclass(frozen=True)
class Ended:
    """What became of one checkpoint's push: done, failed, cancelled, or owed still because nothing moved."""

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
        """Tell them that the interpreter ends."""
        for uploader in list(self.running):
            uploader.leave()


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
        self._process: subprocess.Popen[str] | None = None
        self._ended: dict[str, Ended] = {}  # the newest ones, for those who wait for them
        self._ends = 0
        self._progress: dict[str, dict[str, Any]] = {}
        self._trouble = ""
        self._moved = time.monotonic()
        process.part(Uploaders).running.add(self)

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
                return Ended(self._output_dir, name, "owed", self._trouble or f"nothing has moved for {patience_s:g} s")
            if progress is not None:
                show(progress)

    def stop(self) -> None:
        """Let the process end now; what is owed stays owed."""
        with self._changed:
            self._wanted, self._stopping = False, True
            if self._process is not None:
                self._process.kill()

    def leave(self) -> None:
        """The interpreter ends: a push that moves may finish, one that waits for the Hub is left to the next start.

        The rank of a job that has crashed must not stay while the others hang in its collectives.
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
            ended = Ended(self._output_dir, name, kind, event.get("detail", ""), event.get("seconds", 0.0))
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
    package = Path(__file__).resolve().parents[3]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found = [*given, *site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    if package in [Path(path).resolve() for path in found if path]:
        return dict(os.environ)  # PYTHONPATH comes before the standard library, where site-packages must not
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), *filter(None, given)])}
