"""What can happen to the files of a checkpoint: each kind of harm, done to one file of a copy.

A `Patient` is a copy of a committed checkpoint by hard links, so harm replaces files and never writes into one.
`KINDS` maps the name of each harm to a function that does it and returns how it must be named: each path with the
kinds of `verify.Problem` that are right for it. None: it cannot happen to this file, or is no harm.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from roll_ckpt import names

BLOCK = 4096
Named = dict[str, set[str]]


@dataclass(frozen=True)
class Patient:
    """A copy of a checkpoint, and what else may get into it: another step of its run, its step of another run."""

    checkpoint_dir: Path
    sound: Path
    older: Path
    another: Path

    @classmethod
    def of(cls, folder: Path, sound: Path, older: Path, another: Path) -> Patient:
        made = cls(folder / sound.name, sound, older, another)
        made.heal()
        return made

    def heal(self) -> None:
        """Make it the checkpoint that was committed again."""
        if self.checkpoint_dir.exists():
            for folder, below, _ in os.walk(self.checkpoint_dir):
                for name in below:
                    os.chmod(os.path.join(folder, name), 0o700, follow_symlinks=True)
            shutil.rmtree(self.checkpoint_dir)
        shutil.copytree(self.sound, self.checkpoint_dir, copy_function=os.link)

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.sound).as_posix() for path in self.sound.rglob("*") if path.is_file())

    def bytes(self, path: str) -> bytes:
        return (self.sound / path).read_bytes()

    def put(self, path: str, data: bytes) -> None:
        (self.checkpoint_dir / path).unlink()
        (self.checkpoint_dir / path).write_bytes(data)

    def theirs(self, other: Path, path: str) -> Path:
        """The same file of another checkpoint, whose cluster folders bear its own name."""
        return other / path.replace(self.sound.name, other.name)


_READ_ANYTHING = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def plain_user() -> Iterator[None]:
    """Inside the block this thread, and those that it starts, may read what the modes of files let it, also as root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    kept = sets[0]
    try:
        sets[0] = kept & ~_READ_ANYTHING
        assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
        yield
    finally:
        sets[0] = kept
        assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


FILE_KINDS = {
    "manifest": r"manifest\.json",
    "decision": r"decision",
    "expected.json": r"votes/expected\.json",
    "vote": r"votes/.*",
    "digests": r"digests/.*",
    "tensor index": r"tensors/.*",
    "pipeline state": r"pipeline/worker_state_pipeline\.json",
    "random numbers": r"pipeline/rng_state.*",
    "component": r"pipeline/stateful_.*",
    "ZeRO-3 model states": r"(.*/)?zero_pp_rank_\d+_mp_rank_00_model_states\.pt",
    "model states and client state": r"(.*/)?mp_rank_00_model_states\.pt",
    "optimizer states": r"(.*/)?bf16_zero_pp_rank_\d+_mp_rank_00_optim_states\.pt",
    "latest of a cluster": r".*/latest",
    "helper script": r".*\.py",
    "companion": r".*/config\.json",
    "distcp": r"(.*/)?__\d+_\d+\.distcp",
    ".metadata": r"(.*/)?\.metadata",
    "common.pt": r"(.*/)?common\.pt",
    "metadata.json": r"(.*/)?metadata\.json",
}


def file_kind(path: str) -> str:
    """The first kind whose pattern the path matches; "" for a file that no checkpoint holds."""
    return next((kind for kind, pattern in FILE_KINDS.items() if re.fullmatch(pattern, path)), "")


def _staging_ended(path: str) -> bool:
    """Whether it is a record that holds its own digest; the size of the others stands in the manifest."""
    return path in (names.MANIFEST, names.DECISION) or (path.startswith(names.VOTES) and path != names.EXPECTED)


def _rewritten(change: Callable[[bytes], bytes]) -> Callable[[Patient, str], Named | None]:
    """Harm that gives the file other bytes."""

    def harm(patient: Patient, path: str) -> Named | None:
        before = patient.bytes(path)
        after = change(before)
        if after == before:
            return None
        patient.put(path, after)
        return {path: {"digest"} if _staging_ended(path) or len(after) == len(before) else {"size"}}

    return harm


def _flip(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if data else data


def _zero_run(data: bytes) -> bytes:
    at = max(0, len(data) // 2 - BLOCK // 2)
    count = min(BLOCK, len(data) - at)
    return data[:at] + bytes(count) + data[at + count :]


def _swap_blocks(data: bytes) -> bytes:
    """Two blocks that differ change places: pages, or the halves of a small file."""
    size = BLOCK if len(data) >= 2 * BLOCK else len(data) // 2
    blocks = [data[at : at + size] for at in range(0, len(data) // size * size, size)] if size else []
    for one, first in enumerate(blocks):
        for two in range(len(blocks) - 1, one, -1):
            if blocks[two] != first:
                blocks[one], blocks[two] = blocks[two], first
                return b"".join(blocks) + data[len(blocks) * size :]
    return data


def _swapped(patient: Patient, path: str) -> Named | None:
    """It and another file of its kind, of the same size if there is one, change places."""
    mine = patient.bytes(path)
    others = [
        other for other in patient.files() if file_kind(other) == file_kind(path) and patient.bytes(other) != mine
    ]
    if not others:
        return None
    other = min(others, key=lambda found: (len(patient.bytes(found)) != len(mine), found))
    theirs = patient.bytes(other)
    patient.put(path, theirs)
    patient.put(other, mine)
    right = {"digest"} if _staging_ended(path) or len(mine) == len(theirs) else {"size"}
    return {path: right, other: right}


def _from(which: str) -> Callable[[Patient, str], Named | None]:
    """The same file of another checkpoint, if it holds other bytes."""

    def harm(patient: Patient, path: str) -> Named | None:
        theirs = patient.theirs(getattr(patient, which), path).read_bytes()
        if theirs == patient.bytes(path):
            return None
        patient.put(path, theirs)
        same = _staging_ended(path) or len(theirs) == len(patient.bytes(path))
        right = {"digest"} if same else {"size"}
        return {path: right | {"name"} if path == names.MANIFEST else right}

    return harm


def _gone(patient: Patient, path: str) -> Named:
    (patient.checkpoint_dir / path).unlink()
    return {path: {"missing"}}


def _renamed(patient: Patient, path: str) -> Named:
    (patient.checkpoint_dir / path).rename(patient.checkpoint_dir / f"{path}.bak")
    return {path: {"missing"}}  # the new name is that of a file of others


def _other_case(patient: Patient, path: str) -> Named:
    folder, _, name = path.rpartition("/")
    strange = f"{folder}/{name.swapcase()}".lstrip("/")
    (patient.checkpoint_dir / path).rename(patient.checkpoint_dir / strange)
    return {path: {"missing"}}


def _doubled(patient: Patient, path: str) -> Named | None:
    """A copy that stock code would load, too: it knows these files by the ends of their names."""
    if not path.endswith(("_states.pt", ".distcp")):
        return None
    folder, _, name = path.rpartition("/")
    extra = f"{folder}/copy_of_{name}".lstrip("/")
    os.link(patient.sound / path, patient.checkpoint_dir / extra)
    return {extra: {"extra"}}


def _instead(make: Callable[[Path, Patient, str], object]) -> Callable[[Patient, str], Named]:
    """Harm that leaves something else than a file there."""

    def harm(patient: Patient, path: str) -> Named:
        (patient.checkpoint_dir / path).unlink()
        make(patient.checkpoint_dir / path, patient, path)
        return {path: {"link"}}

    return harm


def _full_directory(place: Path, patient: Patient, path: str) -> None:
    place.mkdir()
    os.link(patient.sound / path, place / place.name)


def _unreadable(patient: Patient, path: str) -> Named | None:
    patient.put(path, patient.bytes(path))
    (patient.checkpoint_dir / path).chmod(0)
    return {path: {"unreadable"}}


def _unreadable_directory(patient: Patient, path: str) -> Named | None:
    if "/" not in path:
        return None
    folder = (patient.checkpoint_dir / path).parent
    away = folder.with_name("away")
    folder.rename(away)
    folder.mkdir(mode=0)
    shutil.rmtree(away)
    return {path: {"unreadable"}}


KINDS: dict[str, Callable[[Patient, str], Named | None]] = {
    "one bit flipped": _rewritten(lambda data: _flip(data, len(data) // 3, 2)),
    "one bit of the first byte": _rewritten(lambda data: _flip(data, 0, 0)),
    "one bit of the last byte": _rewritten(lambda data: _flip(data, len(data) - 1, 7)),
    "4 KiB of zeros": _rewritten(_zero_run),
    "all zeros": _rewritten(lambda data: bytes(len(data))),
    "cut by one byte": _rewritten(lambda data: data[:-1]),
    "cut to nothing": _rewritten(lambda data: b""),
    "cut at a block": _rewritten(lambda data: data[: (len(data) - 1) // BLOCK * BLOCK]),
    "extended by one byte": _rewritten(lambda data: data + b"\n"),
    "extended by a block": _rewritten(lambda data: data + bytes(BLOCK)),
    "one byte slipped in": _rewritten(lambda data: data[: len(data) // 2] + b" " + data[len(data) // 2 :]),
    "two blocks swapped": _rewritten(_swap_blocks),
    "swapped with another rank's": _swapped,
    "of another step": _from("older"),
    "of another run": _from("another"),
    "missing": _gone,
    "renamed": _renamed,
    "of another case": _other_case,
    "a copy beside it": _doubled,
    "a directory": _instead(lambda place, patient, path: place.mkdir()),
    "a directory that holds it": _instead(_full_directory),
    "a dangling link": _instead(lambda place, patient, path: place.symlink_to("nowhere")),
    "a pipe": _instead(lambda place, patient, path: os.mkfifo(place)),
    "unreadable": _unreadable,
    "in an unreadable directory": _unreadable_directory,
}


# --- harm to a whole checkpoint ------------------------------------------------------------------------------


def _records_of(which: str, *records: str) -> Callable[[Patient], Named]:
    """The named records are those of another checkpoint, each sound in itself."""

    def harm(patient: Patient) -> Named:
        other = getattr(patient, which)
        for path in patient.files():
            if path in records or (names.VOTES in records and path.startswith(names.VOTES)):
                patient.put(path, patient.theirs(other, path).read_bytes())
        data = next(path for path in patient.files() if file_kind(path) in ("optimizer states", "distcp"))
        return {data: {"digest", "size"}} if which == "another" else {names.MANIFEST: {"name"}}

    return harm


def _older_under_its_name(patient: Patient) -> Named:
    shutil.rmtree(patient.checkpoint_dir)
    shutil.copytree(patient.older, patient.checkpoint_dir, copy_function=os.link)
    return {names.MANIFEST: {"name"}}


def _without_records(patient: Patient) -> Named:
    for path in (names.MANIFEST, names.DECISION):
        (patient.checkpoint_dir / path).unlink()
    shutil.rmtree(patient.checkpoint_dir / names.VOTES)
    return {names.MANIFEST: {"missing"}}


def _votes_of_another_run(patient: Patient) -> Named:
    shutil.rmtree(patient.checkpoint_dir / names.VOTES)
    shutil.copytree(patient.another / names.VOTES, patient.checkpoint_dir / names.VOTES)
    votes = [path for path in patient.files() if file_kind(path) == "vote"]
    return {path: {"digest"} for path in votes if patient.bytes(path) != (patient.checkpoint_dir / path).read_bytes()}


WHOLE: dict[str, Callable[[Patient], Named]] = {
    "manifest, votes and decision of another step": _records_of("older", names.MANIFEST, names.VOTES, names.DECISION),
    "manifest, votes and decision of another run": _records_of("another", names.MANIFEST, names.VOTES, names.DECISION),
    "an older checkpoint under its name": _older_under_its_name,
    "votes of another run": _votes_of_another_run,
    "no record at all": _without_records,
}
