"""The Hugging Face Hub: addresses, our client, its errors as ours. huggingface_hub is imported here alone.

The endpoint and the token come from where the Hub's own tools take them (HF_ENDPOINT, HF_TOKEN, `hf auth login`),
never from arguments or files of ours; what looks like a token is taken out of every message.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_ckpt.errors import Damaged, HubRefused
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.answers import speaking
from roll_ckpt.upload.hub.push_client import own_api

if TYPE_CHECKING:
    pass

_GROUP_BYTES = 8 << 30


@dataclass(frozen=True)
class HubFile:
    """One file of a commit: its path there, and its bytes or where they lie, with their digest."""

    path: str
    source: bytes | Path
    nbytes: int
    sha256: str


class Sending:
    """Files on their way into one commit. The large ones go first, by themselves; then the commit is one request."""

    def __init__(self, remote: Remote, uploads: Iterable[HubFile], sent: Callable[[int], None]) -> None:
        """`sent` is told of bytes as they leave: several threads call it, and a second try counts once."""
        own_api()
        self._remote = remote
        self._operations = [_addition(upload, sent) for upload in uploads]

    def send(self) -> None:
        """Send what goes by itself; what the Hub has is not sent again. Blocks.

        HubRefused: a `.gitignore` of the repository keeps files out.
        """
        with speaking(self._remote, "sending files"):
            for group in _groups(self._operations):
                own_api().preupload_lfs_files(
                    self._remote.repo_id, group, revision=self._remote.revision, free_memory=False, num_threads=4
                )
                for operation in group:
                    operation.arrived()
        if ignored := [op.path_in_repo for op in self._operations if op._should_ignore]:
            raise HubRefused(
                f"sending files: {self._remote.uri}: its .gitignore keeps out {ignored[0]} and "
                f"{len(ignored) - 1} more; take those patterns out of it"
            )

    def commit(self, more: Iterable[HubFile], deleted: Iterable[str], title: str, message: str, parent: str) -> str:
        """One commit of all files and of `more`, without `deleted`, on `parent`; its id. All or nothing.

        HubUnavailable: it may have been made all the same; with status 412, `parent` is not the newest any more.
        """
        from huggingface_hub import CommitOperationDelete

        for operation in self._operations:
            # What the Hub had at that path when the file was sent may have changed since: none is left out.
            operation._remote_oid = None
        additions = [*self._operations, *(_addition(upload, lambda _: None) for upload in more)]
        deletions = [CommitOperationDelete(path, is_folder=False) for path in deleted]
        with speaking(self._remote, f"committing {title}"):
            made = own_api().create_commit(
                self._remote.repo_id,
                [*additions, *deletions],
                commit_message=title,
                commit_description=message,
                revision=self._remote.revision,
                parent_commit=parent,
            )
        return made.oid


def _groups(operations: list[Any]) -> Iterator[list[Any]]:
    """Few at a time: what a group has brought over need not be sent again by whoever comes after a kill."""
    group: list[Any] = []
    for operation in operations:
        if group and (len(group) == 256 or sum(op.upload_info.size for op in group) > _GROUP_BYTES):
            yield group
            group = []
        group.append(operation)
    if group:
        yield group


def _addition(upload: HubFile, sent: Callable[[int], None]) -> Any:
    source = upload.source if isinstance(upload.source, bytes) else str(upload.source)
    made = _addition_class()(upload.path, source)
    if made.upload_info.size != upload.nbytes:
        raise Damaged(f"{upload.source!r}: it changed after it was checked")
    made.upload_info.sha256 = bytes.fromhex(upload.sha256)  # or else the client reads the whole file for it
    made.sent = sent
    return made


@cache
def _addition_class() -> Any:
    from huggingface_hub import CommitOperationAdd

    class Addition(CommitOperationAdd):
        """Tells how much of it has left."""

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
    """A file that tells how far it was read."""

    def __init__(self, path: str, reached: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._reached = reached

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._reached(self.tell())
        return data
