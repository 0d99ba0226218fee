"""A repository of the Hugging Face Hub as a destination of a run's checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from roll_ckpt import names
from roll_ckpt.config import HubUpload
from roll_ckpt.disk import writes
from roll_ckpt.errors import SaveFailed
from roll_ckpt.save import pending
from roll_ckpt.upload.hub import push_queue, version
from roll_ckpt.upload.hub.progress import progress_bar
from roll_ckpt.upload.hub.uploader import Ended, Uploader

_POLL_S = 0.2


class HubDestination:
    """Pushes checkpoints by a child process; implements `destination.Destination`.

    `_sends` tells whether this job pushes. If another job of the run does, `wait` reads the records on disk.
    """

    in_background: ClassVar[bool] = True

    def __init__(
        self, section: HubUpload, output_dir: Path, on_end: Callable[[Ended], None], exit_timeout_s: float
    ) -> None:
        self._output_dir = output_dir
        self._to = push_queue.Repository(section.repo_id, section.revision, section.private)
        self._sends = False
        self._uploader = Uploader(
            output_dir,
            on_end=on_end,
            background=lambda work, name: pending.in_background(work, name, exit_timeout_s),
        )

    def check(self) -> None:
        version.warn_if_newer()
        version.check_push()

    def owed(self) -> list[str]:
        return push_queue.owed(self._output_dir, self._to)

    def upload(self, name: str, *, again: bool = False) -> None:
        push_queue.set_repository(self._output_dir, self._to)
        self._sends = True
        self._uploader.notify(name, again=again)

    def wait(self, name: str, patience_s: float, check: Callable[[], None]) -> None:
        if self._sends:
            self._wait_here(name, patience_s)
        else:
            self._wait_for_other_job(name, patience_s, check)

    def forget(self, name: str) -> None:
        writes.discard_file(self._output_dir / names.hub_hashes(name))

    def _wait_here(self, name: str, patience_s: float) -> None:
        with progress_bar() as bar:
            ended = self._uploader.wait(name, patience_s, bar)
        if ended.state == "owed":
            self._uploader.stop()  # otherwise the exit of the interpreter would wait just as long again
        if ended.state in ("owed", "failed"):
            raise SaveFailed(not_pushed(self._output_dir, name, ended.detail))

    def _wait_for_other_job(self, name: str, patience_s: float, check: Callable[[], None]) -> None:
        push_queue.set_repository(self._output_dir, self._to)
        limit, moved_ns = time.monotonic() + patience_s, 0
        while name in self.owed():
            if moved_ns != (moved_ns := push_queue.last_moved_ns(self._output_dir)):
                limit = time.monotonic() + patience_s
            if time.monotonic() > limit:
                raise SaveFailed(
                    f"{self._output_dir / name}: committed, but the job that uploads made no progress within "
                    f"{patience_s:g} s (exit_timeout_s); see the log of that job"
                )
            if (entry := push_queue.find(self._output_dir, name)).state == "failed":
                raise SaveFailed(not_pushed(self._output_dir, name, entry.detail))
            check()
            time.sleep(_POLL_S)


def not_pushed(output_dir: Path, name: str, detail: str) -> str:
    """The message about a checkpoint that was not pushed, for the reason `detail`."""
    return (
        f"{output_dir / name} is not on the Hub: {detail}. It stays on the local disk, unpruned; the next start "
        f"tries again, and so does `roll-ckpt push {output_dir}`"
    )
