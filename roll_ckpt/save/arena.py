"""The staging memory of this process: one arena and its native threads, shared by all clusters."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.disk import reads
from roll_ckpt.errors import ConfigError
from roll_ckpt.native.extension import Arena
from roll_ckpt.native.mover import Mover

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class _Sizes:
    """What an arena and its threads are made for."""

    arena_bytes: int
    block_bytes: int
    io_threads: int
    direct: bool


class StagingArena:
    """The arena of this process and the native threads that fill and empty it; see `process`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mover: Mover | None = None
        self._sizes: _Sizes | None = None

    def mover(self, settings: Settings) -> Mover:
        """The mover, made at the first call.

        Raises:
            ConfigError: it was made for other sizes.
        """
        wanted = _Sizes(arena_bytes(settings), int(settings.io.block_bytes), settings.io.threads, settings.io.direct)
        with self._lock:
            if self._mover is None:
                copiers = max(1, (os.cpu_count() or 1) // local_world_size())
                arena = Arena(wanted.arena_bytes, wanted.block_bytes)
                self._mover = Mover(arena, copy_threads=copiers, io_threads=wanted.io_threads, direct=wanted.direct)
                self._sizes = wanted
            if wanted != self._sizes:
                raise ConfigError(
                    f"two configurations of one process ask for different staging: {self._sizes} and {wanted}; give "
                    "every engine and pipeline the same staging and io sections"
                )
            return self._mover


def mover(settings: Settings) -> Mover:
    """The process's mover, made at the first call. Does not block.

    Raises:
        ConfigError: this process already has an arena of other sizes; all engines of a process share one.
    """
    return process.part(StagingArena).mover(settings)


def warm(settings: Settings, nbytes: int, device: int = -1) -> None:
    """Make the arena and have it faulted in, and with a device pinned for CUDA, in the background.

    `nbytes` is what this rank's saves need; the cap stays the cap. `device` is the CUDA device this process works on:
    any other would get a context that takes its memory.
    """
    staging = mover(settings).arena
    staging.warm(min(nbytes + 2 * staging.block_bytes, staging.capacity_bytes), device)


def arena_bytes(settings: Settings) -> int:
    """This rank's share of the host's cap, in bytes; at least two blocks."""
    told = settings.staging.arena_bytes
    share = (_memory_bytes() // 4 if told is None else int(told)) // local_world_size()
    if share < 2 * settings.io.block_bytes:
        raise ConfigError(
            f"staging.arena_bytes gives each of {local_world_size()} local ranks {share} bytes, less than two "
            f"blocks of {int(settings.io.block_bytes)}; raise it, or lower io.block_bytes"
        )
    return share


def _memory_bytes() -> int:
    """The host's memory, or the container's limit where that is less."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = (reads.read_text_or_none(_CGROUP_LIMIT) or "max").strip()
    return min(host, int(limit)) if limit.isdigit() else host


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
