"""Sends the files of one commit to the Hub and makes the commit. For a push only: it uses `push_client.own_api`."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from roll_ckpt.errors import Damaged, HubRefused, HubUnavailable
from roll_ckpt.upload.hub import version
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.answers import hub_errors
from roll_ckpt.upload.hub.push_client import own_api
from roll_ckpt.upload.hub.remote_checkpoint import pause_s

log = logging.getLogger("roll_ckpt")

_TRIES = 4  # so often a group is sent with a client that does not try again by itself
_GROUP_BYTES, _GROUP_FILES = 8 << 30, 256


@dataclass(frozen=True)
class HubFile:
    """One file of a commit: its path in the repository, its bytes or the local file with them, and their SHA-256."""

    path: str
    source: bytes | Path
    nbytes: int
    sha256: str


class Sending:
    """The files of one commit. The large ones are sent first, one request each; then the commit is one request."""

    def __init__(self, remote: Remote, uploads: Iterable[HubFile], sent: Callable[[int], None]) -> None:
        """`sent` is called with the number of bytes sent, by several threads. A retry does not count again."""
        own_api()
        self._remote = remote
        self._operations = [_addition(upload, sent) for upload in uploads]

    def send(self) -> None:
        """Send the large files that the Hub does not have yet. Blocks.

        Raises:
            HubRefused: the Hub refuses, or a `.gitignore` of the repository excludes files. HubUnavailable.
        """
        for group in _groups(self._operations):
            self._send(group)
            for operation in group:
                operation.arrived()
        if ignored := [op.path_in_repo for op in self._operations if op._should_ignore]:
            raise HubRefused(
                f"sending files: {self._remote.uri}: its .gitignore excludes {ignored[0]} and "
                f"{len(ignored) - 1} more; remove those patterns from it"
            )

    def _send(self, group: list[Any]) -> None:
        for failures in count(1):
            try:
                with hub_errors(self._remote, "sending files"):
                    own_api().preupload_lfs_files(
                        self._remote.repo_id, group, revision=self._remote.revision, free_memory=False, num_threads=4
                    )
                    return
            except HubUnavailable as error:
                if failures == _TRIES or version.retries_questions():
                    raise
                pause = pause_s(failures, error)
                log.info("%s; trying again in %.0f s", error, pause)
                time.sleep(pause)

    def commit(self, more: Iterable[HubFile], deleted: Iterable[str], title: str, message: str, parent: str) -> str:
        """Make one commit on `parent` that adds all files and `more` and removes `deleted`; return its id.

        Raises:
            HubUnavailable: it may have been made all the same; with status 412, `parent` is not the newest any more.
        """
        from huggingface_hub import CommitOperationDelete

        for operation in self._operations:
            # The client leaves out a file that the Hub already had at that path when it was sent, but that may have
            # changed since.
            operation._remote_oid = None
        additions = [*self._operations, *(_addition(upload, lambda _: None) for upload in more)]
        deletions = [CommitOperationDelete(path, is_folder=False) for path in deleted]
        with hub_errors(self._remote, f"committing {title}"):
            commit = own_api().create_commit(
                self._remote.repo_id,
                [*additions, *deletions],
                commit_message=title,
                commit_description=message,
                revision=self._remote.revision,
                parent_commit=parent,
            )
        return commit.oid


def _groups(operations: list[Any]) -> Iterator[list[Any]]:
    """Small groups: the Hub keeps each group that was sent whole, so a push after a kill does not send it again."""
    group: list[Any] = []
    for operation in operations:
        if group and (len(group) == _GROUP_FILES or sum(op.upload_info.size for op in group) > _GROUP_BYTES):
            yield group
            group = []
        group.append(operation)
    if group:
        yield group


def _addition(upload: HubFile, sent: Callable[[int], None]) -> Any:
    source = upload.source if isinstance(upload.source, bytes) else str(upload.source)
    addition = _addition_class()(upload.path, source)
    if addition.upload_info.size != upload.nbytes:
        raise Damaged(f"{upload.source!r}: it changed after it was checked")
    addition.upload_info.sha256 = bytes.fromhex(upload.sha256)  # otherwise the client would read the file for it
    addition.sent = sent
    return addition


@cache
def _addition_class() -> Any:
    from huggingface_hub import CommitOperationAdd

    class Addition(CommitOperationAdd):
        """A file of a commit that reports how many of its bytes were sent."""

        sent: Callable[[int], None]
        _furthest = 0

        def reached(self, position: int) -> None:
            if position > self._furthest:
                self.sent(position - self._furthest)
                self._furthest = position

        def arrived(self) -> None:
            self.reached(self.upload_info.size)

        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            if isinstance(self.path_or_fileobj, bytes):
                yield io.BytesIO(self.path_or_fileobj)
            else:
                with _Counted(str(self.path_or_fileobj), self.reached) as file:
                    yield file

    return Addition


class _Counted(io.FileIO):
    """A file that reports how far it was read."""

    def __init__(self, path: str, reached: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._reached = reached

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._reached(self.tell())
        return data
