"""One torchrun job as a child process: started, watched, and killed with all that descends from it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from examples.rlvr.journal import Place

RANKS = 2
TAIL_LINES = 25
POLL_S = 0.05


class JobFailed(Exception):
    """The job ended badly or took too long; the message holds the end of its logs."""


class Job:
    """`examples.rlvr.train` under torchrun. Use it as a context: on the way out no process of it is left."""

    def __init__(self, arguments: Sequence[str], work_dir: Path, world: str = "rlvr", limit_s: float = 300) -> None:
        self._places = [Place(work_dir, world, rank) for rank in range(RANKS)]
        self._agent_log = work_dir / "logs" / f"{world}.torchrun.log"
        self._arguments = arguments
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s

    def __enter__(self) -> Job:
        # --standalone finds a free port, so that jobs side by side do not meet.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(RANKS), "-m", "examples.rlvr.train", *self._arguments]
        self._agent_log.parent.mkdir(parents=True, exist_ok=True)
        with self._agent_log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the driver alone, which then ends the job by its pids.
            self._agent = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def command(self) -> str:
        """As a person would type it."""
        parts = ["torchrun", "--standalone", "--nproc-per-node", str(RANKS), "-m", "examples.rlvr.train"]
        return shlex.join([*parts, *self._arguments])

    def ended(self) -> bool:
        """Whether the job has ended well. Raises: JobFailed: it has not, or its time is up."""
        code = self._agent.poll()
        if code:
            raise JobFailed(f"the job ended with exit code {code}.\n{self._tails()}")
        if code is None and time.monotonic() > self._deadline:
            raise JobFailed(f"the job was not done within {self._limit_s:.0f} s.\n{self._tails()}")
        return code == 0

    def wait_until_stopped(self) -> None:
        """Block until every rank stands at the point of `--stop-at`."""
        while not all(place.stopped.exists() for place in self._places):
            if self.ended():
                raise JobFailed(f"the job ended before it came to the point to stop at.\n{self._tails()}")
            time.sleep(POLL_S)

    def kill(self) -> list[int]:
        """SIGKILL torchrun's agent and everything below it, by pid; returns the pids. None is left."""
        if self._agent.poll() is not None:
            return []
        agent = psutil.Process(self._agent.pid)
        workers = agent.children(recursive=True)
        # The agent first, or it would see a worker die and end the others in its own, gentle way.
        agent.kill()
        killed = [agent]
        for worker in workers:
            try:
                below = worker.children(recursive=True)
                worker.kill()
            except psutil.NoSuchProcess:
                continue
            killed.append(worker)
            workers.extend(child for child in below if child not in workers)
        self._agent.wait()
        psutil.wait_procs(killed[1:], timeout=30)
        return [process.pid for process in killed]

    def _tails(self) -> str:
        parts = []
        for log in [*(place.log for place in self._places), self._agent_log]:
            if log.exists():
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
                parts.append("\n".join([f"--- the end of {log}", *lines]))
        return "\n".join(parts)


def wait(*jobs: Job) -> None:
    """Block until all have ended well. Raises: JobFailed: at once when one has not."""
    while not all([job.ended() for job in jobs]):
        time.sleep(POLL_S)
