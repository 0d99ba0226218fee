"""What the machine itself can do: memory copies, raw direct writes and reads, and how steadily."""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

BLOCK_BYTES = 4 << 20
DEPTHS = (1, 2, 4)
_COPY_BYTES = 32 << 20  # above the size from which libc copies past the caches
_FADV_DONTNEED = os.POSIX_FADV_DONTNEED

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


class HugePages:
    """Warm memory in huge pages, where the machine gives them."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
        self.memory = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        ctypes.memset(self.address, 1, self.nbytes)


class Copier:
    """A copy of the state's bytes by all cores into warm huge pages: the unit *memcpy*."""

    def __init__(self, tensors: Sequence[torch.Tensor], target: HugePages) -> None:
        self._target = target
        pieces = []
        at = target.address
        for tensor in tensors:
            nbytes = tensor.numel() * tensor.element_size()
            for start in range(0, nbytes, _COPY_BYTES):
                size = min(_COPY_BYTES, nbytes - start)
                pieces.append((at + start, tensor.data_ptr() + start, size))
            at += nbytes
        self._shares: list[list[tuple[int, int, int]]] = [[] for _ in range(cores())]
        for piece in sorted(pieces, key=lambda piece: -piece[2]):
            min(self._shares, key=lambda share: sum(size for _, _, size in share)).append(piece)
        self._pool = ThreadPoolExecutor(len(self._shares))
        for _ in range(3):
            self()

    def __call__(self) -> float:
        """Seconds of one copy."""
        began = time.perf_counter()
        list(self._pool.map(_copy, self._shares))
        return time.perf_counter() - began


def _copy(pieces: list[tuple[int, int, int]]) -> None:
    for target, source, size in pieces:  # ctypes lets go of the GIL in each call
        ctypes.memmove(target, source, size)


class RawDisk:
    """Direct writes and reads of as many bytes as the state has, from and into warm memory."""

    def __init__(self, directory: Path, memory: HugePages) -> None:
        self._path = directory / "raw"
        self._memory = memory
        self._view = memoryview(memory.memory)
        self._pools = {depth: ThreadPoolExecutor(depth) for depth in DEPTHS}
        for depth, pool in self._pools.items():
            list(pool.map(time.sleep, [0.01] * depth))

    def write(self, depth: int) -> float:
        """Seconds until the bytes are durable, the file's allocation and fsync included; the file stays."""
        began = time.perf_counter()
        fd = os.open(self._path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_DIRECT)
        try:
            _libc.fallocate(fd, 0, 0, self._memory.nbytes)
            self._each(depth, lambda at: os.pwrite(fd, self._view[at : at + BLOCK_BYTES], at))
            os.fsync(fd)
        finally:
            os.close(fd)
        return time.perf_counter() - began

    def read(self, depth: int) -> float:
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        try:
            began = time.perf_counter()
            self._each(depth, lambda at: os.preadv(fd, [self._view[at : at + BLOCK_BYTES]], at))
            return time.perf_counter() - began
        finally:
            os.close(fd)

    def _each(self, depth: int, move: Callable[[int], int]) -> None:
        def share(number: int) -> None:
            for at in range(number * BLOCK_BYTES, self._memory.nbytes, depth * BLOCK_BYTES):
                if move(at) != BLOCK_BYTES:
                    raise OSError(f"{self._path}: a direct transfer at {at} was cut short")

        list(self._pools[depth].map(share, range(depth)))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


# --- files ---------------------------------------------------------------------------------------------------


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def fsync_tree(directory: Path) -> None:
    """Make durable what a peer only wrote into the page cache."""
    for path in [*files_of(directory), *(p for p in directory.rglob("*") if p.is_dir()), directory, directory.parent]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def drop_cache(directory: Path) -> float:
    """Ask for the files of `directory` to leave the page cache; returns the share of their pages that stayed."""
    stayed = total = 0
    for path in files_of(directory):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, _FADV_DONTNEED)
            pages = _resident(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        stayed, total = stayed + sum(pages), total + len(pages)
    return stayed / max(1, total)


def _resident(fd: int, nbytes: int) -> list[int]:
    if not nbytes:
        return []
    flags = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        if _libc.mincore(address, nbytes, flags) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        _libc.munmap(address, nbytes)
    return [byte & 1 for byte in flags.raw]


# --- this process and the machine around it ------------------------------------------------------------------


class Ticker:
    """A thread that wants to run every millisecond, as a heartbeat or a data loader's queue does."""

    _PERIOD_S = 0.001

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._stop.is_set():
            time.sleep(self._PERIOD_S)
            now = time.perf_counter()
            self.ticks.append((now, now - last - self._PERIOD_S))
            last = now

    def pauses(self, windows: Iterable[tuple[float, float]]) -> list[float]:
        """How late each tick within one of the windows came, in seconds."""
        within = list(windows)
        return [late for now, late in self.ticks if any(start <= now <= stop for start, stop in within)]


def reset_peak_rss() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def rss(key: str) -> int:
    """`VmRSS` or `VmHWM` (its highest since `reset_peak_rss`) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def processor_times() -> dict[str, int]:
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    values = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return dict(zip(names, map(int, values), strict=False))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, extremes and how many."""
    if not values:
        return {}
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if len(ordered) > 1:
        quartiles = statistics.quantiles(ordered, n=4, method="inclusive")
        low, high = quartiles[0], quartiles[2]
    return {
        "median": statistics.median(ordered),
        "q1": low,
        "q3": high,
        "min": ordered[0],
        "max": ordered[-1],
        "samples": len(ordered),
    }


def noise(values: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median."""
    found = spread(values)
    return (found["q3"] - found["q1"]) / 2 / found["median"] if found else 0.0
