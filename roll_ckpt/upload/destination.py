"""The interface of a destination of committed checkpoints, and the choice of the one that is configured.

To add a destination, write a class with the methods of `Destination` in its own file and add a row to `_KINDS`.
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
    """The destination of one run's checkpoints. Rank 0 of a job calls, from any thread."""

    in_background: ClassVar[bool]
    """True if `upload` returns before the checkpoint is uploaded."""

    def check(self) -> None:
        """Refuse before training what would fail at the first upload; writes nothing and makes no request.

        Raises:
            ConfigError: the settings do not fit what is there. UnsupportedError: a package that it needs is too old.
        """

    def owed(self) -> list[str]:
        """The committed checkpoints that are not uploaded yet, the oldest first. They must not be pruned.

        Reads records on the local disk, and for a file system the sizes of the copies.
        """

    def upload(self, name: str, *, again: bool = False) -> None:
        """Upload a committed checkpoint. With `again`, one that the destination has refused before is retried.

        If `in_background`, returns at once. Else blocks: on return the copy is complete and durable.

        Raises:
            Damaged, SaveFailed, OSError: an upload that is not in the background failed. The checkpoint stays owed.
        """

    def wait(self, name: str, patience_s: float, check: Callable[[], None]) -> None:
        """Block until `name` is uploaded, by this job or by another job of the run.

        `check` is called several times a second; what it raises ends the wait.

        Raises:
            SaveFailed: the destination refused it, or there was no progress for `patience_s` seconds. It stays owed.
        """

    def forget(self, name: str) -> None:
        """Remove what is stored for uploading `name`, which was pruned."""


_KINDS: dict[type[Any], Callable[..., Destination]] = {
    Upload: lambda section, output_dir, *_: FileSystemDestination(output_dir, section.output_dir),
    HubUpload: HubDestination,
}


def make(
    section: Upload | HubUpload, output_dir: Path, on_end: Callable[[Ended], None], exit_timeout_s: float
) -> Destination:
    """The destination that `checkpoint_config` describes. Nothing is uploaded or written yet.

    `on_end` is called, on a thread of the destination, when an upload in the background was done or refused.
    `exit_timeout_s` is how many seconds the exit of the interpreter waits for an upload that makes progress.
    """
    return _KINDS[type(section)](section, output_dir, on_end, exit_timeout_s)


def all_owing(output_dir: Path, configured: Destination | None = None) -> list[Owing]:
    """Every destination that checkpoints of `output_dir` may be owed to, for pruning: the `configured` one, and the
    repository that is recorded in the directory, perhaps by `roll-ckpt push`."""
    return [*([configured] if configured is not None else []), RecordedQueue(output_dir)]
