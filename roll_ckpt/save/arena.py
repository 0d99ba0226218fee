"""The staging memory of a process: one arena and the native threads that fill and empty it, shared by all clusters."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.disk import reads
from roll_ckpt.errors import ConfigError
from roll_ckpt.native.extension import Arena
from roll_ckpt.native.mover import Mover

_OWN_CGROUPS, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Sizes:
    """The settings that an arena and its threads were made with."""

    arena_bytes: int
    block_bytes: int
    io_threads: int
    direct: bool


class StagingArena:
    """The part of the `process` registry that makes the arena and its `Mover` on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mover: Mover | None = None
        self._sizes: _Sizes | None = None

    def mover(self, settings: Settings) -> Mover:
        """See the function `mover`."""
        sizes = _Sizes(arena_bytes(settings), int(settings.io.block_bytes), settings.io.threads, settings.io.direct)
        with self._lock:
            if self._mover is None:
                copiers = max(1, len(os.sched_getaffinity(0)) // local_world_size())
                arena = Arena(sizes.arena_bytes, sizes.block_bytes)
                self._mover = Mover(arena, copy_threads=copiers, io_threads=sizes.io_threads, direct=sizes.direct)
                self._sizes = sizes
            if sizes != self._sizes:
                first, now = asdict(self._sizes) if self._sizes else {}, asdict(sizes)
                unlike = [f"{key} {first[key]} first and {now[key]} now" for key in first if first[key] != now[key]]
                raise ConfigError(
                    f"two configurations of one process ask for different staging: {', '.join(unlike)}; give every "
                    "engine and pipeline the same staging and io sections"
                )
            return self._mover


def mover(settings: Settings) -> Mover:
    """The `Mover` of this process, made on the first call. Does not block; any thread may call.

    Raises:
        ConfigError: the settings give other sizes than the arena that this process already has (all its engines and
            pipelines share one), or less than two blocks for each rank of the host.
    """
    return process.part(StagingArena).mover(settings)


def warm(settings: Settings, nbytes: int, device: int = -1) -> None:
    """Make the arena and fault its pages in on a background thread; with `device` >= 0 also pin them for CUDA.

    `nbytes` is what one save of this rank writes, in bytes; no more than the arena's cap is faulted in. `device` must
    be the CUDA device that this process uses: on any other, pinning would create a context that takes GPU memory.
    """
    staging = mover(settings).arena
    staging.warm(min(nbytes + 2 * staging.block_bytes, staging.capacity_bytes), device)


def arena_bytes(settings: Settings) -> int:
    """This rank's share, in bytes, of the host's cap: `staging.arena_bytes`, or a quarter of the memory if unset.

    Raises:
        ConfigError: the share is less than two blocks.
    """
    cap = settings.staging.arena_bytes
    share = (memory_bytes() // 4 if cap is None else int(cap)) // local_world_size()
    if share < 2 * settings.io.block_bytes:
        raise ConfigError(
            f"staging.arena_bytes gives each of {local_world_size()} local ranks {share} bytes, less than two "
            f"blocks of {int(settings.io.block_bytes)}; raise it, or lower io.block_bytes"
        )
    return share


def memory_bytes() -> int:
    """The memory of the host, or the least limit of the cgroups around this process if that is less, in bytes."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (reads.read_text_or_none(path) or "max" for path in _limit_files(_OWN_CGROUPS, _CGROUPS))
    return min([host, *(int(limit) for limit in limits if limit.strip().isdigit())])


def _limit_files(own_cgroups: Path, root: Path) -> Iterator[Path]:
    """Where the memory limits of this process's cgroup and of all around it are, for cgroups of version 2 and 1.

    A container may see its own cgroup as the root while `own_cgroups` names it from outside; the root is always looked
    at, and what does not exist is no limit.
    """
    for line in (reads.read_text_or_none(own_cgroups) or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, file = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        inside = Path(path.lstrip("/"))
        yield from (top / folder / file for folder in (inside, *inside.parents))


def local_world_size() -> int:
    """How many ranks of this job run on this host: LOCAL_WORLD_SIZE, which torchrun sets; else 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
