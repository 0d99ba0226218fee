"""A disk that does not answer: every I/O thread of a mover waits in the kernel, until the block ends."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hand_made import HandMadeImage

from roll_ckpt.native.mover import Mover


@contextlib.contextmanager
def stuck(mover: Mover, folder: Path, threads: int) -> Iterator[None]:
    """Opening a pipe to write to waits for a reader; each of these files keeps one I/O thread or two there."""
    pipes = Path(tempfile.mkdtemp(dir=folder))
    transfers = []
    for i in range(threads):
        os.mkfifo(pipes / str(i))
        image = HandMadeImage(1)
        image.add_bytes(0, b"x")
        transfers.append(mover.save(pipes / str(i), image))
    try:
        yield
    finally:
        readers = [os.open(pipe, os.O_RDONLY | os.O_NONBLOCK) for pipe in pipes.iterdir()]
        for transfer in transfers:
            with contextlib.suppress(OSError):
                transfer.wait_written()
        for reader in readers:
            os.close(reader)
        for pipe in list(pipes.iterdir()):
            pipe.unlink()
        pipes.rmdir()
