"""Real torchrun worlds that tests send work to, started once and reused.

`World(2).call("module:function", ...)` runs a function of a module in tests/ on every rank and returns the ranks'
results; an exception on any rank fails the test with that rank's traceback. The caller imports no framework.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CALL_TIMEOUT_S = 180.0
START_TIMEOUT_S = 240.0


def environment(**extra: str) -> dict[str, str]:
    """The environment of a torchrun job on CPU and gloo."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "ignore",
        "DEEPSPEED_LOG_LEVEL": "error",
        **extra,
    }


def _as_torchrun_tells(size: int) -> list[dict[str, str]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


class RankFailed(AssertionError):
    """A rank of the world raised; its traceback is the message."""


class World:
    """A torchrun job of `size` ranks that waits for calls. Without `torchrun` nobody ends the others when one dies."""

    def __init__(self, size: int, *, torchrun: bool = True, preload: str = "") -> None:
        self.size = size
        self._calls = 0
        self._folder = tempfile.TemporaryDirectory(prefix="roll_ckpt_world_")
        self._log = open(Path(self._folder.name) / "log", "w+b")  # noqa: SIM115
        self._listener = Listener(str(Path(self._folder.name) / "socket"), "AF_UNIX")
        worker = [str(ROOT / "tests" / "worker.py"), self._listener.address]
        extra = {"LD_PRELOAD": preload} if preload else {}
        if torchrun:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
            self._jobs = [self._start([*launcher, *worker], extra)]
        else:
            self._jobs = [self._start(worker, {**extra, **told}) for told in _as_torchrun_tells(size)]
        self._ranks: dict[int, Connection] = {}
        self._accept()

    def _start(self, arguments: list[str], extra: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(**extra),
            cwd=self._folder.name,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def kill(self, rank: int) -> None:
        """SIGKILL one rank of a world without torchrun; `call` then asks the others."""
        self._jobs[rank].kill()
        self._jobs[rank].wait()
        self._ranks.pop(rank).close()

    def _accept(self) -> None:
        self._listener._listener._socket.settimeout(START_TIMEOUT_S)  # type: ignore[attr-defined]
        for _ in range(self.size):
            connection = self._listener.accept()
            self._ranks[connection.recv()] = connection

    def call(self, function: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Run `function`, given as "module:name", on every rank; results in the order of ranks."""
        module, _, name = function.partition(":")
        self._calls += 1
        for connection in self._ranks.values():
            connection.send((self._calls, module, name, args, kwargs))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        limit = time.monotonic() + CALL_TIMEOUT_S
        for rank in sorted(self._ranks):
            fine, value = self._answer(rank, limit)
            (results if fine else failures)[rank] = value
        if failures:
            told = "\n".join(f"--- rank {rank}: {text}" for rank, text in failures.items())
            raise RankFailed(f"{function}:\n{told}\n--- log\n{self.log()[-6000:]}")
        return [results[rank] for rank in sorted(self._ranks)]

    def _answer(self, rank: int, limit: float) -> tuple[bool, Any]:
        """What the rank says of the current call; late answers to earlier ones are passed over."""
        while self._ranks[rank].poll(max(0.0, limit - time.monotonic())):
            try:
                call, fine, value = self._ranks[rank].recv()
            except EOFError:
                return False, "the process died"
            if call == self._calls:
                return fine, value
        return False, f"no answer within {CALL_TIMEOUT_S} s"

    def log(self) -> str:
        """What the ranks printed so far."""
        return (Path(self._folder.name) / "log").read_text(errors="replace")

    def close(self) -> None:
        for connection in self._ranks.values():
            connection.close()
        patience_s = 20 if len(self._ranks) == self.size else 0  # for a dead rank they would wait for ever
        for job in self._jobs:
            try:
                job.wait(patience_s)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
        self._listener.close()
        self._log.close()
        self._folder.cleanup()
