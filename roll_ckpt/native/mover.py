"""The native half: staging arena, copies, digests, direct I/O. Sole importer of the extension; no torch.

Every call that waits lets other Python threads run and still answers to Ctrl-C. Arenas, movers and transfers
belong to the process that made them; a forked child that calls one gets a RuntimeError. A failed operation on
a file is an OSError (of the subclass that fits errno) with errno and path, and the offset in the text.
"""

from __future__ import annotations

import os
import weakref
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

    A transfer that is dropped before its copies ended is abandoned.
    """

    __slots__ = ("__weakref__", "_image", "_transfer", "path")

    def __init__(self, path: str, transfer: _native.Transfer, image: NativeImage) -> None:
        self.path = path
        self._transfer = transfer
        self._image: NativeImage | None = image
        self._release_sources()

    def __del__(self) -> None:
        # The sources must outlive what reads them; slots are cleared in no promised order.
        transfer = getattr(self, "_transfer", None)
        if transfer is not None and self._image is not None:
            try:
                if not transfer.released:
                    transfer.abandon()
            except RuntimeError:
                pass  # a forked child: nothing runs here that could read them

    def _release_sources(self) -> None:
        if self._transfer.released:
            self._image = None

    @property
    def overlapped(self) -> bool:
        """Whether save returned while lazy extents were still to be copied (the whole file fitted)."""
        return self._transfer.overlapped

    @property
    def copied(self) -> bool:
        """Whether every source byte that is not leased was read (or none will be any more)."""
        return self._transfer.copied

    @property
    def released(self) -> bool:
        """Whether no source byte will be read any more, a leased one neither."""
        return self._transfer.released

    @property
    def written(self) -> bool:
        """Whether the file is whole and durable. Its directory entry is the caller's to sync."""
        return self._transfer.written

    @property
    def stats(self) -> dict[str, float]:
        """nbytes, eager_bytes, lazy_bytes; of the latter leased_bytes, and straight_bytes, which are never copied;
        direct: whether direct I/O held to the end; and seconds since save began until it could return (save_s), the
        last byte that is not leased was copied (copy_s), the file was durable (write_s), each -1 until then."""
        return self._transfer.stats

    def wait_copied(self, timeout: float | None = None) -> bool:
        """Waits until no source byte but leased ones will be read any more, copying on the calling thread meanwhile.

        True then, also if the transfer failed (wait_written tells); False after `timeout` seconds.
        """
        done = self._transfer.wait_copied(timeout)
        self._release_sources()
        return done

    def wait_released(self, timeout: float | None = None) -> bool:
        """wait_copied, and then until no leased byte will be read any more: all are written, or none will be."""
        done = self._transfer.wait_released(timeout)
        self._release_sources()
        return done

    def wait_written(self, timeout: float | None = None) -> Digest:
        """Waits until the file is durable (fsync done) and returns its digest.

        Raises what ended the transfer, each time it is asked: OSError with errno and path, ECANCELED after
        abandon or shutdown; SourceChanged, see Mover.save; TimeoutError after `timeout` seconds.
        """
        try:
            return self._transfer.wait_written(timeout)
        except _native.SourceChanged as changed:
            raise SourceChanged(*changed.args) from None
        finally:
            self._release_sources()

    def abandon(self) -> None:
        """Stops early: on return no source byte is read any more. What was written stays on disk. After the
        transfer has ended it does nothing."""
        self._transfer.abandon()
        self._release_sources()


class Movers:
    """The movers of this process whose threads run."""

    exit = process.Exit.THREADS

    def __init__(self) -> None:
        self.running: weakref.WeakSet[Mover] = weakref.WeakSet()

    def leave(self) -> None:
        """End their threads, so that none reads memory that is being torn down."""
        for mover in list(self.running):
            mover.shutdown()


class Mover:
    """The native threads that copy, digest and write. Any thread may save; transfers share the arena.

    direct=False writes through the page cache; with True a file system that refuses direct I/O is served too.
    With copy_threads=0 whoever waits copies: save what it must, and nothing but wait_copied the rest. digests=False is
    for the benchmark that shows what they cost: the files then hold zeros for CRC-32s.
    """

    def __init__(
        self, arena: Arena, copy_threads: int = 2, io_threads: int = 4, direct: bool = True, digests: bool = True
    ) -> None:
        self.arena = arena
        self._mover = _native.Mover(arena, copy_threads, io_threads, direct, digests)
        process.part(Movers).running.add(self)

    def save(self, path: StrOrBytesPath, image: NativeImage, *, overlap: bool = True, check: str = "off") -> Transfer:
        """Begins to write `image` to `path` (created or emptied, mode 0644 & umask).

        Returns when all eager extents were copied: the caller may then change their memory. If the whole file
        fits into what is free of the arena, the transfer is `overlapped`: lazy extents must stay alive and
        unchanged until wait_copied. Otherwise, or with overlap=False, save returns only when every byte was
        copied, which waits for the disk if the file is larger than what is free.

        Blocks of the file that hold leased extents only (and the `bytes` among the owners of `NativeImage.of`) need no
        room, and save does not copy them, unless overlap=False: those extents must stay alive and unchanged until
        wait_released. A block that lies in one extent whose address and offset agree modulo 4096 is written from
        there; the others pass through the arena, a few at a time.

        With `check` "sample" or "full", 512 bytes of each lazy extent in each block (of a random part of them where
        they are many and small), or every lazy byte, are digested before save returns and again when they were
        copied; wait_written raises SourceChanged if they differ. Memory of a device is not looked at.

        A file that cannot be made or written is no error here but in wait_written. ValueError: an image whose
        extents, records or patches overlap, leave the file or stand out of order.
        """
        frozen = image._freeze()
        transfer = self._mover.save(os.fsencode(path), frozen, overlap, check)
        return Transfer(os.fsdecode(path), transfer, image)

    def shutdown(self, timeout_s: float = EXIT_TIMEOUT_S) -> bool:
        """Lets running transfers end for timeout_s, stops the others and ends the threads; then save raises.

        False: a thread hangs in the operating system and was left behind. Idempotent.
        """
        return self._mover.shutdown(timeout_s)
