"""The load corridor of one rank: find, read with every digest checked, parse."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from roll_ckpt import names
from roll_ckpt.config import Settings
from roll_ckpt.errors import Damaged
from roll_ckpt.formats.torch_zip import safe_pickle
from roll_ckpt.formats.torch_zip.read import parse
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.trust import allowed
from roll_ckpt.native.extension import Buffer
from roll_ckpt.transaction import reader_locks

log = logging.getLogger("roll_ckpt")


class Reader:
    """Loads files for one load of one checkpoint.

    DeepSpeed reads a file twice and only looks at the first result: the bytes of the last file are kept for one
    more load, whose state then shares memory with the first.
    """

    def __init__(self, directory: Path, settings: Settings, allow: Iterable[Any]) -> None:
        self.checkpoint = OpenedCheckpoint.around(directory)
        self._settings = settings
        self._allow = [*allow, *allowed(settings)]
        self._last: tuple[Path, Buffer] | None = None
        self.cached = False
        """Whether `check_bytes` has just read the checkpoint: then the disk need not be read once more."""

    def read_bytes(self, path: Path) -> bytes:
        """The bytes of a small file of a checkpoint of ours. Damaged: see `Unit.read`."""
        assert self.checkpoint is not None
        return bytes(self.checkpoint.read(path, self._settings, cached=self.cached))

    def load(self, path: Path, map_location: Any) -> Any:
        """The state in `path`; its tensors lie where `map_location` says, as `torch.load` does it.

        Raises:
            FileNotFoundError: no such file. Damaged: see `Unit.read` and `torch_zip.parse`.
        """
        if self.checkpoint is None:
            return _load_stock(path, map_location, self._allow)
        if self._last is not None and self._last[0] == path:
            buffer, self._last = self._last[1], None
        else:
            buffer = self.checkpoint.read(path, self._settings, cached=self.cached)
            self._last = (path, buffer)
        return parse(buffer, str(path), map_location, self._allow)


def _load_stock(path: Path, map_location: Any, allow: list[Any]) -> Any:
    try:
        with safe_pickle.safe_loads(allow):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as problem:
        raise Damaged(
            f"{path}: refused to load: {problem}. If you trust the file, add the name it needs to load.allow"
        ) from problem
    except OSError:
        raise
    except Exception as problem:  # a damaged pickle can raise anything
        raise Damaged(f"{path}: cannot be read, it is truncated or no torch file: {problem}") from problem


@contextmanager
def open_reader(directory: Path, settings: Settings, allow: Iterable[Any] = ()) -> Iterator[Reader]:
    """Open the checkpoint around `directory` for loading; nobody prunes it until the block is left."""
    with ExitStack() as stack:
        reader = enter_reader(stack, directory, settings, allow)
        warn_unverified(directory, reader)
        yield reader


def enter_reader(stack: ExitStack, directory: Path, settings: Settings, allow: Iterable[Any]) -> Reader:
    reader = Reader(directory, settings, allow)
    if reader.checkpoint is not None:
        stack.enter_context(reader_locks.reading(reader.checkpoint.directory))
    return reader


def warn_unverified(directory: Path, reader: Reader) -> None:
    if reader.checkpoint is None:
        log.warning(
            "%s has no %s of ours: it is loaded, but what it holds cannot be verified", directory, names.MANIFEST
        )
