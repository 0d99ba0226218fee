"""The tracker file, which names the checkpoint to resume from: replaced in one step, durable, and never ahead of it.

Megatron-core does not know it. Megatron-LM writes it when a save is finished, after `metadata.json`, and may then
delete the checkpoint that it named before. ms-swift writes it when an asynchronous save has begun.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core import msc_utils

from roll_ckpt import process
from roll_ckpt.backends.megatron.files import Unfinished
from roll_ckpt.disk import writes

NAME = "latest_checkpointed_iteration.txt"
_TRAINING = "megatron.training.checkpointing"


def openers() -> Iterator[tuple[Any, str]]:
    """The functions, as owner and name, by which hosts open the tracker file.

    `open_file` of Megatron-core 0.14 to 0.18, also under the name by which Megatron-LM has imported it, if it runs in
    this process; `maybe_msc.open` from 0.19 on. Python's own `open`, which other hosts use, stays as it is.
    """
    for module in (msc_utils, sys.modules.get(_TRAINING)):
        if hasattr(module, "open_file"):
            yield module, "open_file"
    if hasattr(msc_utils, "maybe_msc"):
        yield msc_utils.maybe_msc, "open"


def opened(original: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    """What `original`, one of `openers()`, opens; for a tracker file that is about to be written, a replacement."""
    if mode != "w" or not isinstance(file, str | os.PathLike) or Path(file).name != NAME:
        return original(file, mode, *args, **kwargs)
    return _Replacement(Path(file))


class _Replacement(io.StringIO):
    """The new text of a tracker file.

    The file has it, durably, when the `with` block around it ends without an error; or, if a save through us to the
    checkpoint that it names is not finished, when that is finished. If that save fails, the file stays as it is.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._dropped = False
        self._descriptor: int | None = None

    def fileno(self) -> int:
        """A descriptor for the host's own `os.fsync`, which has nothing to do: `close` makes the file durable."""
        if self._descriptor is None:
            self._descriptor = os.memfd_create(NAME)
        return self._descriptor

    def __exit__(self, *raised: Any) -> None:
        self._dropped = raised[0] is not None
        super().__exit__(*raised)

    def close(self) -> None:  # also where a host calls it without a `with` block
        if self.closed:
            return
        text = self.getvalue()
        super().close()
        if self._descriptor is not None:
            os.close(self._descriptor)
        if not self._dropped:
            self._put(text)

    def _put(self, text: str) -> None:
        path = Path(os.path.realpath(self._path))  # stock code writes to the target of a link
        named = self._path.parent / f"iter_{int(text):07d}" if text.strip().isdigit() else None
        for files in process.part(Unfinished).of(named) if named else ():
            files.when_complete.append(lambda: writes.write_durable(path, text.encode()))
            return
        writes.write_durable(path, text.encode())
