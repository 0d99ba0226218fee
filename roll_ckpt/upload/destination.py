"""What a run asks of the place that its committed checkpoints are sent to.

Another destination is a class with these methods in a file of its own, and a row in `_KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from roll_ckpt.config import HubUpload, Upload
from roll_ckpt.transaction.retention import Owing
from roll_ckpt.upload.file_system import FileSystemDestination
from roll_ckpt.upload.hub.destination import HubDestination
from roll_ckpt.upload.hub.push_queue import RecordedQueue
from roll_ckpt.upload.hub.uploader import Ended


class Destination(Protocol):
    """One destination of one run's checkpoints. Rank 0 of a job calls, any thread."""

    in_background: ClassVar[bool]
    """Whether `upload` returns before the checkpoint is there."""

    def owed(self) -> list[str]:
        """The committed checkpoints that are not there yet, the oldest first: they must not be pruned."""

    def upload(self, name: str, *, again: bool = False) -> None:
        """Send a committed checkpoint. `again` also tries what the destination has refused before.

        Unless `in_background` it blocks, and the checkpoint is there, complete and durable, on return.
        """

    def wait(self, name: str, patience_s: float, check: Callable[[], None]) -> None:
        """Block until `name` is there, also if another job of the run sends it.

        `check` is called now and then and may raise.

        Raises:
            SaveFailed: it was refused, or nothing has moved for `patience_s` seconds. It stays owed.
        """

    def forget(self, name: str) -> None:
        """Drop what is kept here for sending `name`, which was pruned."""


_KINDS: dict[type[Any], Callable[..., Destination]] = {
    Upload: lambda section, output_dir, *_: FileSystemDestination(output_dir, section.output_dir),
    HubUpload: HubDestination,
}


def make(
    section: Upload | HubUpload, output_dir: Path, on_end: Callable[[Ended], None], exit_timeout_s: float
) -> Destination:
    """The destination that `checkpoint_config` asks for. Nothing is sent or written yet.

    `on_end` is called, on a thread of the destination, when a checkpoint sent in the background is there or was
    refused. `exit_timeout_s` is how long the interpreter's exit waits for what moves.
    """
    return _KINDS[type(section)](section, output_dir, on_end, exit_timeout_s)


def all_owing(output_dir: Path, configured: Destination | None = None) -> list[Owing]:
    """Everything that may still be owed checkpoints of `output_dir`: `configured`, and the repository that somebody
    named with `roll-ckpt push`."""
    return [*([configured] if configured is not None else []), RecordedQueue(output_dir)]
