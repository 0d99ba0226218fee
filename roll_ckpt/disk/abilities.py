"""What a file system can do, found by doing it in a temporary directory: links, renames, direct I/O, fsync, locks."""

from __future__ import annotations

import errno
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import locks, reads, tree, writes

_PAGE = 4096


@dataclass(frozen=True)
class Mount:
    """The mount that a path lies on: the type of its file system, what is mounted, and where."""

    kind: str
    source: str
    place: Path


def mount_of(path: Path) -> Mount:
    """The mount that an existing path lies on. OSError if this system has no /proc."""
    real, best = path.resolve(), Mount("unknown", "", Path("/"))
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        place = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4]))
        if (place == real or place in real.parents) and len(place.parts) >= len(best.place.parts):
            kind, source = after.split()[:2]
            best = Mount(kind, source, place)  # the last one of several at one place hides the others
    return best


@contextmanager
def scratch_dir(parent: Path | None = None) -> Iterator[Path]:
    """A new directory in `parent`, or where the system has temporary files; removed at the end of the block."""
    path = (parent or Path(tempfile.gettempdir())) / names.temporary_file("doctor")
    writes.make_dir(path)
    try:
        path.chmod(0o700)  # what processes tell there quotes their settings and command lines
        yield path
    finally:
        writes.remove_tree(path)


def write_file(path: Path, data: bytes) -> None:
    """Create a file with these bytes. Not durable."""
    descriptor = writes.create(path)
    try:
        writes.write_all(descriptor, data, path)
    finally:
        os.close(descriptor)


def measure(directory: Path) -> dict[str, str]:
    """For each ability in `_TRIALS`: "" if the file system of `directory` has it, else what the system says.

    OSError if nothing can be written there. What is made there is removed again.
    """
    with scratch_dir(directory) as scratch:
        write_file(scratch / "first", b"x" * _PAGE)
        return {ability: _problem(trial, scratch / str(number)) for number, (ability, trial) in enumerate(_TRIALS)}


def _problem(trial: Callable[[Path, Path], bool], folder: Path) -> str:
    writes.make_dir(folder)
    one, other = folder / "one", folder / "other"
    try:
        write_file(one, b"one")
        return "" if trial(one, other) else "it has no effect"
    except OSError as error:
        return error.strerror or str(error)


def _exchange(one: Path, other: Path) -> bool:
    write_file(other, b"other")
    writes.exchange(one, other)
    return reads.read_bytes(one) == b"other" and reads.read_bytes(other) == b"one"


def _rename_new(one: Path, other: Path) -> bool:
    write_file(other, b"other")
    return not writes.rename_new(one, other) and reads.read_bytes(other) == b"other"


def _rename_dirs(one: Path, other: Path) -> bool:
    full, target = one.parent / "full", one.parent / "target"
    for folder in (full, target):
        writes.make_dir(folder)
        write_file(folder / folder.name, b"")
    try:
        writes.rename(full, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        writes.rename(full, other)
        return tree.list_dir(other) == ["full"] and tree.list_dir(target) == ["target"]
    return False


def _direct(one: Path, other: Path) -> bool:
    descriptor = os.open(other, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, 0o666)
    try:
        with mmap.mmap(-1, _PAGE) as page:  # aligned, as direct I/O demands
            return os.pwrite(descriptor, page, 0) == _PAGE
    finally:
        os.close(descriptor)


def _fsync_file(one: Path, other: Path) -> bool:
    writes.fsync_file(one)
    return True


def _fsync_dir(one: Path, other: Path) -> bool:
    return writes.fsync_dir(one.parent)


def _lock(one: Path, other: Path) -> bool:
    answers = []

    def contents(locked: bool) -> bytes:
        answers.append(locked)
        return b""

    locks.lock_new(other, contents).release()
    return answers == [True]


_TRIALS: tuple[tuple[str, Callable[[Path, Path], bool]], ...] = (
    ("whole directories renamed", _rename_dirs),
    ("fsync of files", _fsync_file),
    ("fsync of directories", _fsync_dir),
    ("hard links", writes.link),
    ("rename without replacing", _rename_new),
    ("exchange of two names", _exchange),
    ("direct I/O", _direct),
    ("locks", _lock),
)
ABILITIES = tuple(ability for ability, _ in _TRIALS)
