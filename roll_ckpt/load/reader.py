"""Reader: loads torch files; those of a checkpoint of ours with every block checked. None of their code runs."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from roll_ckpt import names
from roll_ckpt.config import Settings
from roll_ckpt.disk import reads, tree
from roll_ckpt.errors import Damaged, UnsupportedError
from roll_ckpt.formats.torch_zip import safe_pickle
from roll_ckpt.formats.torch_zip.read import parse
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.trust import allowed
from roll_ckpt.native.extension import Buffer
from roll_ckpt.transaction import reader_locks

log = logging.getLogger("roll_ckpt")

_ZIP = b"PK\3\4"  # how a file of torch.save begins


class Reader:
    """Reads the files of one checkpoint during one load, on one rank and thread.

    `checkpoint` is None if roll_ckpt did not save the files in `directory`; then nothing can be verified. `allow` are
    objects that pickles may refer to, beside those of `settings.load.allow`.

    DeepSpeed loads the same file twice in a row and only inspects the first result. So the bytes of the last file are
    kept for one more load; both states then share memory.
    """

    def __init__(self, directory: Path, settings: Settings, allow: Iterable[Any]) -> None:
        self.checkpoint = OpenedCheckpoint.around(directory)
        self._settings = settings
        self._allow = [*allow, *allowed(settings)]
        self._last: tuple[Path, Buffer] | None = None
        self.cached = False
        """Set by the caller after `check_bytes`: the files are in the page cache, so direct I/O is not used."""

    def read_bytes(self, path: Path) -> bytes:
        """The bytes of a small file of a checkpoint of ours. Blocks. Errors as `OpenedCheckpoint.read`."""
        assert self.checkpoint is not None
        return bytes(self.checkpoint.read(path, self._settings, cached=self.cached))

    def load(self, path: Path, map_location: Any) -> Any:
        """The state in the torch file `path`; `map_location` places its tensors, as in `torch.load`. Blocks.

        Raises:
            FileNotFoundError: there is no such file.
            Damaged: it is not as it was written, or is no torch file.
            UnsupportedError: it holds objects that are not allowed; the message names them.
            OSError: the disk returns an error.
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
    """The state in a torch file that no checkpoint of ours lists; it may be a link. Errors as `Reader.load`."""
    target = Path(os.path.realpath(path))
    if reads.read_range(target, 0, len(_ZIP)) != _ZIP:
        return _load_legacy(path, map_location, allow)
    buffer = torch.empty(tree.file_bytes(target), dtype=torch.uint8).numpy()  # not filled with zeros first
    nbytes = reads.read_into(target, 0, memoryview(buffer.data))
    return parse(buffer[:nbytes], str(path), map_location, allow)


def _load_legacy(path: Path, map_location: Any, allow: list[Any]) -> Any:
    """The state in a file in the format before torch 1.6, which torch itself reads."""
    try:
        with safe_pickle.safe_loads(allow):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as problem:
        refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(problem))
        if refused is None:
            raise Damaged(f"{path}: refused to load: {problem}") from problem
        raise UnsupportedError(
            f"{path}: it holds {refused[1]}, which a safe load of a file in the format before torch 1.6 refuses; if "
            f"you trust the file, set load.allow: [{refused[1]}], or save it anew with torch.save"
        ) from problem
    except OSError:
        raise
    except Exception as problem:  # unpickling damaged bytes can raise anything
        raise Damaged(f"{path}: cannot be read: it is truncated, or not a torch file: {problem}") from problem


@contextmanager
def open_reader(directory: Path, settings: Settings, allow: Iterable[Any] = ()) -> Iterator[Reader]:
    """Open the checkpoint that contains `directory` for loading; no process prunes it inside the block.

    This rank alone. Warns if there is no checkpoint of ours: then nothing can be verified.

    Raises:
        NotFound: it is being removed just now. Damaged, Unreadable: see `OpenedCheckpoint.around`.
    """
    with ExitStack() as stack:
        reader = enter_reader(stack, directory, settings, allow)
        warn_unverified(directory, reader)
        yield reader


def enter_reader(stack: ExitStack, directory: Path, settings: Settings, allow: Iterable[Any]) -> Reader:
    """Like `open_reader`, but held open by `stack`, and without the warning."""
    reader = Reader(directory, settings, allow)
    if reader.checkpoint is not None:
        stack.enter_context(reader_locks.reading(reader.checkpoint.directory))
    return reader


def warn_unverified(directory: Path, reader: Reader) -> None:
    """Warn in the log if `reader` reads files that roll_ckpt did not save."""
    if reader.checkpoint is None:
        log.warning(
            "%s has no %s of ours: it is loaded, but its contents cannot be verified", directory, names.MANIFEST
        )
