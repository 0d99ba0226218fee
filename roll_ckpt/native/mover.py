"""Mover and Transfer: the native threads that copy, digest and write files, and one file on its way to disk.

A call that waits lets other Python threads run and answers to Ctrl-C. Arenas, movers and transfers belong to the
process that made them; in a forked child their methods raise RuntimeError. A failed operation on a file is an OSError
(of the subclass that fits errno) with errno and path, and the offset in its text.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from roll_ckpt import process
from roll_ckpt.errors import SourceChanged
from roll_ckpt.native.extension import Arena, Digest, _native
from roll_ckpt.native.image import NativeImage

if TYPE_CHECKING:
    from _typeshed import StrOrBytesPath

EXIT_TIMEOUT_S = 60.0


class Transfer:
    """One file on its way to disk, made by Mover.save. Any thread may call any method.

    A transfer that is garbage-collected while its sources may still be read is abandoned.
    """

    __slots__ = ("__weakref__", "_image", "_pid", "_transfer", "path")

    def __init__(self, path: str, transfer: _native.Transfer, image: NativeImage) -> None:
        self.path = path
        self._pid = os.getpid()
        self._transfer = transfer
        self._image: NativeImage | None = image
        self._release_sources()

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:  # bound early: at exit `os` may be cleared first
        # End all reads before the sources are freed: __slots__ are cleared in no guaranteed order.
        transfer = getattr(self, "_transfer", None)
        if transfer is None or self._image is None or getpid() != self._pid:
            return  # a forked child has no threads that could read the sources
        if not transfer.released:
            transfer.abandon()

    def _release_sources(self) -> None:
        if self._transfer.released:
            self._image = None

    @property
    def overlapped(self) -> bool:
        """Whether Mover.save returned before lazy extents were copied, because the whole file fitted into the arena."""
        return self._transfer.overlapped

    @property
    def copied(self) -> bool:
        """Whether no source byte will be read any more, except borrowed ones: all are copied, or the save failed."""
        return self._transfer.copied

    @property
    def released(self) -> bool:
        """Whether no source byte will be read any more, borrowed ones included."""
        return self._transfer.released

    @property
    def written(self) -> bool:
        """Whether the file is complete and durable. The caller syncs its directory entry."""
        return self._transfer.written

    @property
    def stats(self) -> dict[str, float]:
        """What was moved, and how long it took.

        Bytes: `nbytes` of the file; `eager_bytes` and `lazy_bytes` of its extents; and, as parts of `lazy_bytes`,
        `borrowed_bytes` and `zero_copy_bytes` (written from their source, never copied). Seconds since Mover.save
        began, each -1 until then: `save_s` until it could return, `copy_s` until the last byte that is not borrowed
        was copied, `write_s` until the file was durable. `direct`: whether direct I/O was used to the end.
        """
        return self._transfer.stats

    def wait_copied(self, timeout: float | None = None, *, helping: bool = True) -> bool:
        """Wait until no source byte will be read any more, except borrowed ones; `helping`, this thread copies too.

        True then, even if the transfer failed (wait_written raises the reason); False after `timeout` seconds.
        """
        done = self._transfer.wait_copied(timeout, helping)
        self._release_sources()
        return done

    def wait_released(self, timeout: float | None = None) -> bool:
        """Wait until no source byte will be read any more, borrowed ones included: all are written, or the transfer
        failed. Returns as wait_copied does.
        """
        done = self._transfer.wait_released(timeout)
        self._release_sources()
        return done

    def wait_written(self, timeout: float | None = None) -> Digest:
        """Wait until the file is durable (fsync has returned), and return the CRC-32s of its blocks.

        The caller still has to sync the directory entry.

        Raises (on every call, if the transfer failed):
            OSError: an operation on the file failed; ECANCELED after abandon or shutdown.
            SourceChanged: see `check` of Mover.save.
            TimeoutError: the file is not durable after `timeout` seconds.
        """
        try:
            return self._transfer.wait_written(timeout)
        except _native.SourceChanged as changed:
            raise SourceChanged(*changed.args) from None
        finally:
            self._release_sources()

    def abandon(self) -> None:
        """Stop early: on return no source byte is read any more. What was written stays on disk.

        Does nothing after the transfer has ended.
        """
        self._transfer.abandon()
        self._release_sources()


class Movers:
    """The movers of this process whose threads are running."""

    exit = process.Exit.THREADS

    def __init__(self) -> None:
        self.running: weakref.WeakSet[Mover] = weakref.WeakSet()

    def leave(self) -> None:
        """End their threads at exit, so that none reads memory that is being freed."""
        for mover in list(self.running):
            mover.shutdown()


class Mover:
    """The native threads that copy, digest and write. Any thread may save; transfers share the arena.

    direct=False writes through the page cache; so does True where the file system refuses direct I/O. With
    copy_threads=0 only the calls that wait copy host memory: `save` the bytes that it must, wait_copied the rest.
    """

    def __init__(self, arena: Arena, copy_threads: int = 2, io_threads: int = 4, direct: bool = True) -> None:
        self.arena = arena
        self._mover = _native.Mover(arena, copy_threads, io_threads, direct)
        process.part(Movers).running.add(self)

    def save(self, path: StrOrBytesPath, image: NativeImage, *, overlap: bool = True, check: str = "off") -> Transfer:
        """Begin to write `image` to `path` (created or truncated, mode 0666 & ~umask).

        Returns when all eager extents are copied: the caller may then change their memory. If the whole file fits into
        the free slots of the arena, the transfer is `overlapped`: lazy extents must stay alive and unchanged until
        wait_copied. Otherwise, or with overlap=False, save returns only when every byte is copied; it waits for the
        disk if the file is larger than the free slots.

        Blocks of the file that hold nothing but borrowed extents (and `bytes` among the owners of `NativeImage.of`)
        need no slot before save returns, unless overlap=False: those extents must stay alive and unchanged until
        wait_released. A block that lies in one borrowed extent whose address and file offset agree modulo 4096 is
        written from its source; the other blocks pass through the arena, a few at a time.

        `check` tells how much of the lazy extents is digested before save returns and again after the copy: with
        "sample" 512 bytes of each extent in each block (of a random selection where they are many and small), with
        "full" every byte, with "off" nothing. If the digests differ, wait_written raises SourceChanged. From a device
        these bytes are fetched before save returns.

        Raises:
            ValueError: extents, records or patches of the image overlap, are out of order or reach past the end of the
                file.
            RuntimeError: the mover was shut down, or a CUDA call failed.
        A file that cannot be created or written raises in wait_written, not here.
        """
        frozen = image._freeze()
        transfer = self._mover.save(os.fsencode(path), frozen, overlap, check)
        return Transfer(os.fsdecode(path), transfer, image)

    def shutdown(self, timeout_s: float = EXIT_TIMEOUT_S) -> bool:
        """Let running transfers end for `timeout_s` seconds, stop the others, and end the threads; save raises from
        then on.

        False if a thread hangs in the operating system and had to be left behind. Idempotent.
        """
        return self._mover.shutdown(timeout_s)
