"""OpenedCheckpoint: a committed checkpoint opened for reading; every byte is checked against its digests."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from roll_ckpt import errors, names
from roll_ckpt.config import Settings
from roll_ckpt.disk import reads, tree
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import Damaged, NotFound, RollCkptError, Unreadable
from roll_ckpt.formats import manifests, records, sealed_json
from roll_ckpt.formats.tensor_index.reader import TensorIndex, parse
from roll_ckpt.native import extension, files
from roll_ckpt.native.extension import Buffer

_LEVELS_UP = 2  # a caller may give checkpoint-N/actor_train/checkpoint-N


@contextmanager
def as_unreadable(where: Path) -> Iterator[None]:
    """Inside the block, which only reads, turn OSError into Unreadable, naming its path, or `where` if it has none."""
    try:
        yield
    except RollCkptError:
        raise
    except OSError as problem:
        path, reason = problem.filename or where, problem.strerror or problem
        raise Unreadable(f"{path}: it cannot be read: {reason}. {errors.BY_HAND}") from problem


@dataclass(frozen=True)
class Blocks:
    """A file of a committed checkpoint as its digests describe it: its size, and the CRC-32 of each block."""

    path: Path
    nbytes: int
    block_bytes: int
    crcs: list[int]

    def length(self, index: int) -> int:
        """The size of one block in bytes; only the last may be shorter than `block_bytes`."""
        return min(self.block_bytes, self.nbytes - index * self.block_bytes)

    def read(self, index: int, target: memoryview) -> None:
        """Read one block into `target`, which must have its length. Blocks.

        Raises:
            Damaged: the bytes are not those that were written. OSError: the disk returns an error.
        """
        start = index * self.block_bytes
        nbytes = ReadRetries().run(partial(reads.read_into, self.path, start, target))
        if nbytes != len(target) or extension.crc32(target) != self.crcs[index]:
            raise Damaged(
                f"{self.path}: block {index} (bytes {start} to {start + len(target)}) is not as it was written"
            )


class OpenedCheckpoint:
    """A committed checkpoint opened for reading: its manifest, and the digests of its files, read when needed.

    Raises:
        NotFound: the directory has no manifest. Damaged: the manifest is not as it was written.
        Unreadable: the disk does not return it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with as_unreadable(directory / names.MANIFEST):
            self.manifest = ReadRetries().run(partial(manifests.read, directory))
        self._files = {receipt.path: receipt for receipt in self.manifest.files}
        self._digests: dict[str, dict[str, Any]] | None = None

    @classmethod
    def around(cls, path: Path) -> OpenedCheckpoint | None:
        """The checkpoint that contains `path`; None for files that roll_ckpt has not saved.

        Raises:
            Damaged: other records of a checkpoint exist, but its manifest is missing, so nothing can be verified.
            Unreadable: the disk does not tell what is there.
        """
        marks, retries = (names.MANIFEST, names.DECISION, names.EXPECTED), ReadRetries()
        for folder, enough in [(path, 1), *((parent, 2) for parent in list(path.absolute().parents)[:_LEVELS_UP])]:
            with as_unreadable(folder):
                present = sum(retries.run(partial(tree.exists, folder / record)) for record in marks)
            if present < enough:
                continue
            try:
                return cls(folder)
            except NotFound as problem:
                raise Damaged(
                    f"{folder}: its {names.MANIFEST} is missing, so nothing in it can be verified. Load another "
                    f"checkpoint, or, to load this one all the same, remove its {names.DECISION} and {names.VOTES}"
                ) from problem
        return None

    def read(self, path: Path, settings: Settings, *, cached: bool = False) -> Buffer:
        """The bytes of a file of this checkpoint; each block is checked as it is read. Blocks.

        `cached`: the file was just read through the page cache, so direct I/O would only read the disk again.

        Raises:
            Damaged: the manifest does not list the file, or its bytes are not those that were written.
            OSError: the disk returns an error, also after about two seconds of retries.
        """
        blocks = self.blocks(path)
        return ReadRetries().run(
            partial(
                files.read_file,
                str(path),
                blocks.nbytes,
                blocks.block_bytes,
                blocks.crcs,
                threads=max(4, settings.io.threads),
                direct=settings.io.direct and not cached,
            )
        )

    def blocks(self, path: Path) -> Blocks:
        """The size and digests of a file of this checkpoint; its bytes are not read.

        Raises:
            Damaged: the manifest does not list the file, or its digests do not match the manifest.
            Unreadable: the disk does not return the digests.
        """
        relative = path.absolute().relative_to(self.directory.absolute()).as_posix()
        receipt = self._files.get(relative)
        if receipt is None or (tree.exists(path) and not tree.is_file(path, follow=True)):
            raise Damaged(
                f"{path}: not listed in {self.directory / names.MANIFEST} as a regular file; it does not belong there"
            )
        crcs = self._crcs(relative)
        try:
            root = records.root_of(receipt.nbytes, receipt.block_bytes, crcs)
        except (TypeError, ValueError, struct.error) as problem:
            raise Damaged(f"{path}: its record in {names.DIGESTS}/ is not a list of digests: {problem}") from problem
        if root != receipt.root:
            raise Damaged(f"{path}: its digests do not match the manifest of {self.directory}")
        return Blocks(path, receipt.nbytes, receipt.block_bytes, crcs)

    def parameters(self, cluster: str, rank: int) -> dict[str, Any]:
        """The parameters that `rank` of `cluster` saved: dtype and shape by name; empty if they were not recorded."""
        for candidate in (rank, 0):
            index = self.tensor_index(cluster, candidate)
            if index is not None:
                return index.parameters
            relative = names.old_tensor_file(cluster, candidate)
            if relative in self._files:
                return _parameters(self._json(relative).get("parameters"), self.directory / relative)
        return {}

    def tensor_index(self, cluster: str, rank: int) -> TensorIndex | None:
        """Where the tensors of the model lie that `rank` of `cluster` saved; None in checkpoints of format 1.

        Raises:
            Damaged: its bytes are not those that were written, or it describes what cannot be. Unreadable: the disk.
        """
        relative = names.tensor_file(cluster, rank)
        if relative not in self._files:
            return None
        sizes = {path: receipt.nbytes for path, receipt in self._files.items()}
        return parse(self._bytes(relative), self.directory / relative, sizes)

    def _crcs(self, relative: str) -> list[int]:
        if self._digests is None:
            self._digests = {}
            for listed in self._files:
                if listed.startswith(names.DIGESTS + "/"):
                    self._digests.update(self._json(listed))
        if relative not in self._digests:
            raise Damaged(f"{self.directory / relative}: {names.DIGESTS}/ has no digests for it")
        record = self._digests[relative]
        crcs = record.get("crcs") if isinstance(record, dict) else None
        if not isinstance(crcs, list):
            raise Damaged(f"{self.directory / relative}: {names.DIGESTS}/ has no valid list of CRCs for it")
        return crcs

    def _json(self, relative: str) -> dict[str, Any]:
        return sealed_json.parse_json(self._bytes(relative), self.directory / relative)

    def _bytes(self, relative: str) -> bytes:
        """The bytes of a small file of this checkpoint. Damaged if they are not those that were written."""
        path = self.directory / relative
        with as_unreadable(path):
            try:
                data = ReadRetries().run(partial(reads.read_bytes, path))
            except FileNotFoundError as problem:
                raise Damaged(f"{path}: it was committed and is not there") from problem
        if records.receipt_of_bytes(relative, data) != self._files[relative]:
            raise Damaged(f"{path}: its bytes are not those that were written")
        return data


def _parameters(record: Any, where: Path) -> dict[str, Any]:
    sound = isinstance(record, dict) and all(
        isinstance(parameter, dict) and isinstance(parameter.get("shape"), list) for parameter in record.values()
    )
    if not sound:
        raise Damaged(f"{where}: its parameters are not a mapping of names to shapes")
    parameters: dict[str, Any] = record
    return parameters
