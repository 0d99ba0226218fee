"""Runs a command and learns which of its processes import a training framework, and what they tell about themselves.

Two sources: what processes tell (`disk.witness`), and /proc, which also shows processes that cannot tell.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from roll_ckpt.disk import abilities, reads, witness

GRACE_S = 10.0
_EVERY_S = 0.2
_MAPS_EVERY_S = 1.0
_PROC = Path("/proc")


@dataclass
class Seen:
    """One process of the command, as /proc showed it last; `told` is what it told by itself, in its order."""

    pid: int
    start: str
    parent: int
    command: list[str] = field(default_factory=list)
    executable: str = ""
    has_torch: bool = False
    has_us: bool = False
    reached: bool | None = None
    looked_at_s: float = 0.0
    told: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Watched:
    """How the command ended: its exit code (negative: the signal), what stopped it, and its processes by id."""

    code: int
    seconds: float
    stopped: str
    processes: dict[int, Seen]
    left: list[int]


def watch(command: Sequence[str], limit_s: float | None, *, stdout_to_stderr: bool = False) -> Watched:
    """Run a command with our own stdin, stdout and stderr, and watch its processes until it ends.

    After `limit_s` seconds, or at a SIGTERM, all its processes get SIGTERM, and GRACE_S later SIGKILL. Ctrl-C is the
    command's own affair. FileNotFoundError or PermissionError if there is no such command.
    """
    with abilities.scratch_dir() as folder:
        source = Path(witness.__file__).read_bytes()
        abilities.write_file(folder / "sitecustomize.py", source)
        before = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(folder), before] if before else [str(folder)])
        environment = {**os.environ, "PYTHONPATH": path, witness.VARIABLE: str(folder)}
        with _signals() as asked_to_stop:
            began = time.monotonic()
            out = sys.stderr if stdout_to_stderr else None
            process = subprocess.Popen(command, env=environment, stdout=out)
            watcher = _Watcher(process.pid, str(folder))
            stopped = watcher.wait(process, began, limit_s, asked_to_stop)
            seconds = time.monotonic() - began
        left = [seen.pid for seen in watcher.alive()]
        _hear(folder, watcher.seen)
    return Watched(process.returncode, seconds, stopped, watcher.seen, left)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Inside the block, SIGTERM is noted in the list, and Ctrl-C, which the command gets too, does nothing here."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    def ignore(number: int, frame: FrameType | None) -> None:
        """Not SIG_IGN, which the command would inherit."""

    before = [(number, signal.signal(number, act)) for number, act in ((signal.SIGTERM, note), (signal.SIGINT, ignore))]
    try:
        yield received
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class _Watcher:
    """Keeps `seen`, the table of the processes that descend from `root` or have our variable in their environment."""

    def __init__(self, root: int, folder: str) -> None:
        self.seen: dict[int, Seen] = {}
        self._root, self._mark = root, f"{witness.VARIABLE}={folder}".encode()
        self._others: set[tuple[int, str]] = set()

    def wait(
        self, process: subprocess.Popen[bytes], began: float, limit_s: float | None, asked_to_stop: list[int]
    ) -> str:
        """Look at /proc until the process has ended; what stopped it, "" if it ended by itself."""
        while process.poll() is None:
            self.look()
            if asked_to_stop:
                self._stop(process)
                return "roll-ckpt doctor was asked to stop (SIGTERM)"
            if limit_s is not None and time.monotonic() - began > limit_s:
                self._stop(process)
                return f"stopped after {limit_s:g} s, as asked by --seconds"
            time.sleep(_EVERY_S)
        self.look()
        return ""

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
            until = time.monotonic() + patience_s
            for seen in self.alive():
                with _gone_ok():
                    os.kill(seen.pid, number)
            while (self.alive() or process.poll() is None) and time.monotonic() < until:
                time.sleep(_EVERY_S)
                self.look()
        process.wait()

    def alive(self) -> list[Seen]:
        """The processes that still run."""
        return [seen for seen in self.seen.values() if (now := _stat(seen.pid)) and now[1] == seen.start]

    def look(self) -> None:
        """Bring `seen` up to date. Parents come first: a process seen once stays, also when its parent dies."""
        stats = {int(entry): stat for entry in os.listdir(_PROC) if entry.isdigit() and (stat := _stat(int(entry)))}
        for pid in sorted(stats, key=lambda pid: (int(stats[pid][1]), pid)):
            parent, start = stats[pid]
            known = self.seen.get(pid)
            if known is None or known.start != start:
                if (pid, start) in self._others:
                    continue
                if pid != self._root and parent not in self.seen and not self._is_marked(pid):
                    self._others.add((pid, start))
                    continue
                known = self.seen[pid] = Seen(pid, start, parent)
            self._refresh(known)

    def _is_marked(self, pid: int) -> bool:
        return self._mark in (_read(pid, "environ") or b"").split(b"\0")

    def _refresh(self, seen: Seen) -> None:
        line = _read(seen.pid, "cmdline") or b""
        seen.command = [os.fsdecode(word) for word in line.rstrip(b"\0").split(b"\0")] if line else seen.command
        now = time.monotonic()
        if seen.has_us or now - seen.looked_at_s < _MAPS_EVERY_S:
            return
        seen.looked_at_s = now
        with _gone_ok():
            seen.executable = os.readlink(_PROC / str(seen.pid) / "exe")
        seen.reached = self._is_marked(seen.pid)
        maps = _read(seen.pid, "maps") or b""
        seen.has_torch |= b"libtorch_python" in maps
        seen.has_us |= b"/roll_ckpt/native/_native" in maps


def _gone_ok() -> AbstractContextManager[None, bool]:
    """A block that ends without an error if the process has gone, or belongs to another user."""
    return suppress(FileNotFoundError, ProcessLookupError, PermissionError)


def _read(pid: int, file: str) -> bytes | None:
    with _gone_ok():
        return (_PROC / str(pid) / file).read_bytes()
    return None


def _stat(pid: int) -> tuple[int, str] | None:
    """The parent and the start time of a process; None if it has gone or is a zombie."""
    text = _read(pid, "stat")
    if text is None:
        return None
    state, parent, *rest = text.rpartition(b")")[2].split()
    return None if state in (b"Z", b"X") else (int(parent), rest[17].decode())


def _hear(folder: Path, seen: dict[int, Seen]) -> None:
    """Add to each process what it told; one that was too short-lived to be seen is added too."""
    for path in folder.iterdir():
        if not path.name.isdigit():
            continue
        pid = int(path.name)
        told = [ast.literal_eval(line) for line in reads.read_bytes(path).decode(errors="replace").splitlines()]
        starts = [number for number, event in enumerate(told) if event["event"] == "starts"]
        told = told[starts[-1] :] if starts else told
        if told:
            first = Seen(pid, "", told[0]["parent"], told[0]["command"], reached=True)
            seen.setdefault(pid, first).told = told
