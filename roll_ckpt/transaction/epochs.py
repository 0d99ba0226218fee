"""Epochs: who may write in an output directory.

`.epochs/<n>` is a sealed record of the run that claimed epoch n; worlds that joined it later have left
`.epochs/<n>.<cluster>`. The newest number owns the directory. Each record is locked before it gets its name,
so a live run is known by its lock on one host, and by its heartbeat (the record's mtime) across hosts. No
byte that is written rests on locks or times: they only tell a user's mistake (two runs, one directory) early.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import locks, reads, tree, writes
from roll_ckpt.disk.locks import Lock
from roll_ckpt.errors import Damaged, EpochLost, NotFound, RunIsLive
from roll_ckpt.formats import manifests, records
from roll_ckpt.formats.sealed_json import Fields, seal, unseal

HEARTBEAT_S = 5.0
SILENCE_S = 20.0  # a heartbeat unchanged for so long, by the claimant's own clock, is a dead run's
_RELEASED_NS = 0  # the mtime of a record whose run has ended in good order


@dataclass(frozen=True)
class Member:
    """One world of a run, as `.epochs/` tells it."""

    number: int
    run_id: str
    clusters: dict[str, int]
    expected_clusters: dict[str, int] | None
    host: str
    boot_id: str
    pid: int
    locked: bool

    def to_bytes(self) -> bytes:
        """The record's bytes."""
        return seal(asdict(self))

    @property
    def who(self) -> str:
        """The process, for a message."""
        return f"process {self.pid} on host {self.host} (run_id {self.run_id!r}, {_list(self.clusters)})"


def parse_member(data: bytes, where: object) -> Member:
    """The record in a file of .epochs/."""
    fields = Fields(unseal(data, where), where)
    member = Member(
        number=fields.count("number"),
        run_id=fields.take("run_id", str),
        clusters=fields.take("clusters", dict, records.are_world_sizes),
        expected_clusters=fields.optional("expected_clusters", dict, records.are_world_sizes),
        host=fields.take("host", str),
        boot_id=fields.take("boot_id", str),
        pid=fields.count("pid"),
        locked=fields.take("locked", bool),
    )
    fields.end()
    return member


@dataclass
class Epoch:
    """This world's claim on an output directory, until release() or the end of the process."""

    number: int
    output_dir: Path
    run_id: str
    attempts: dict[str, int] = field(default_factory=dict)  # of this epoch, by name, the newest last; see begin
    pid: int = field(default_factory=os.getpid)
    _records: dict[Path, Lock] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """EpochLost, naming the newer run, if this epoch is not the newest any more."""
        check(self.output_dir, self.number)

    def release(self) -> None:
        """Give the directory back: another run, on any host, may claim it at once."""
        if self.pid != os.getpid() or self._ended.is_set():
            return
        self._ended.set()
        for path, lock in self._records.items():
            if locks.same_file(lock, path):
                writes.touch(path, at_ns=_RELEASED_NS)
            lock.release()
        self._records.clear()

    def _keep(self, path: Path, lock: Lock) -> None:
        self._records[path] = lock
        if len(self._records) == 1:
            threading.Thread(target=self._beat, name="roll_ckpt-heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            for path in list(self._records):
                try:
                    writes.touch(path)
                except OSError:
                    # A missed beat must not end the thread: the directory may be back at the next one, and
                    # a lost epoch is told by check().
                    continue


def check(output_dir: Path, number: int) -> None:
    """EpochLost, naming the newer run, if epoch `number` does not own `output_dir` any more."""
    newest = newest_number(output_dir)
    if newest == number:
        return
    if newest < number:
        raise EpochLost(
            f"{output_dir}: the record of this run's epoch {number} is gone; somebody removed "
            f"{names.EPOCHS}. Start the run again"
        )
    holders = [found for found in members(output_dir, newest).values() if isinstance(found, Member)]
    who = holders[0].who if holders else "a run whose record cannot be read"
    raise EpochLost(
        f"{output_dir}: epoch {number} was taken over by epoch {newest}, {who}; this run may not write there "
        "any more. Stop one of the two; worlds of one run must all restart when one of them did"
    )


def newest_number(output_dir: Path) -> int:
    """The newest epoch's number, 0 if there was none."""
    found = (names.parse_epoch_file(entry) for entry in tree.list_dir(output_dir / names.EPOCHS))
    return max((parsed[0] for parsed in found if parsed), default=0)


def members(output_dir: Path, number: int) -> dict[Path, Member | Damaged]:
    """The records of one epoch by path, its founder first."""
    folder = output_dir / names.EPOCHS
    found: dict[Path, Member | Damaged] = {}
    for entry in tree.list_dir(folder):
        parsed = names.parse_epoch_file(entry)
        if parsed is None or parsed[0] != number:
            continue
        try:
            found[folder / entry] = parse_member(reads.read_bytes(folder / entry), folder / entry)
        except Damaged as error:
            found[folder / entry] = error
        except FileNotFoundError:
            continue
    return found


def claim_number(
    output_dir: Path,
    run_id: str,
    clusters: Mapping[str, int],
    expected: Mapping[str, int] | None,
    take_over: bool,
    at_least: int = 1,
) -> Epoch:
    """Claim the next epoch, or join the one of this run's other worlds. RunIsLive if another run owns it.

    The next one is newer than every checkpoint that lies there, also one that was pulled or copied from another
    run, or else what is saved now would count as older than that; and `at_least` this.
    """
    while True:
        number = newest_number(output_dir)
        join = False
        if number:
            join = _may_join(output_dir, number, run_id, clusters, expected, take_over)
        next_one = max(number + 1, _newest_committed(output_dir) + 1, at_least)
        if next_one > names.LARGEST_NUMBER:
            raise Damaged(f"{output_dir / names.EPOCHS}: {number} is no epoch of any run; remove that file")
        mine = Epoch(number if join else next_one, output_dir, run_id)
        _make(output_dir, mine.number)
        entries = [names.epoch_file(mine.number, c) for c in sorted(clusters)] if join else [str(mine.number)]
        linked = all(_enter(mine, entry, clusters, expected) for entry in entries)
        # A slow claimant may have linked the name of an epoch that has come and gone meanwhile.
        if linked and newest_number(output_dir) == mine.number:
            return mine
        for path, lock in list(mine._records.items()):
            if locks.same_file(lock, path):
                writes.discard_file(path)
        mine.release()


def _newest_committed(output_dir: Path) -> int:
    """The newest epoch of a checkpoint in `output_dir`, 0 if there is none whose record can be read."""
    newest = 0
    for entry in tree.list_dir(output_dir):
        with suppress(Damaged, NotFound, OSError):
            if not entry.startswith("."):
                newest = max(newest, manifests.read(output_dir / entry).epoch)
    return newest


def _may_join(
    output_dir: Path,
    number: int,
    run_id: str,
    clusters: Mapping[str, int],
    expected: Mapping[str, int] | None,
    take_over: bool,
) -> bool:
    """True: join epoch `number`. False: claim the next one. RunIsLive: neither."""
    alive, dead = [], 0
    for path, member in members(output_dir, number).items():
        if isinstance(member, Damaged):
            if locks.is_locked(path):
                raise RunIsLive(f"{output_dir}: a live run owns it, and its record is damaged: {member}")
            dead += 1
        elif is_alive(path, member):
            alive.append(member)
        else:
            dead += 1
    if not alive:
        return False
    for member in alive:
        ours = expected is not None and (member.run_id, member.expected_clusters) == (run_id, dict(expected))
        # All worlds of a run are told to take over: the first one does, and the others join it.
        if take_over and (not ours or set(clusters) & set(member.clusters)):
            return False
        if not ours:
            raise RunIsLive(
                f"{output_dir}: {member.who} is running and saves there. Stop it, choose another output_dir, "
                "or set take_over if it is known to be dead. Worlds of one run need the same run_id and the "
                f"same expected_clusters; here they are {run_id!r} and {expected and dict(expected)}, there "
                f"{member.run_id!r} and {member.expected_clusters}. Nothing was touched"
            )
        for cluster in sorted(set(clusters) & set(member.clusters)):
            raise RunIsLive(
                f"{output_dir}: cluster {cluster!r} of run_id {run_id!r} is already running as {member.who}. "
                "Stop it, or set take_over if it is known to be dead. Nothing was touched"
            )
    # A run of which one world died must restart as a whole: a newcomer founds the next epoch.
    return not dead


def is_alive(path: Path, member: Member) -> bool:
    """Whether the process of a record lives; may watch its heartbeat for SILENCE_S."""
    try:
        if reads.mtime_ns(path) == _RELEASED_NS:
            return False
        if member.locked and member.boot_id == reads.boot_id():
            return locks.is_locked(path)
        before, began = reads.mtime_ns(path), time.monotonic()
        while time.monotonic() - began < SILENCE_S:
            time.sleep(min(0.5, SILENCE_S / 10))
            if reads.mtime_ns(path) != before:
                return reads.mtime_ns(path) != _RELEASED_NS
    except FileNotFoundError:
        return False
    return False


def _make(output_dir: Path, number: int) -> None:
    # The trash is made before the epoch has a name, so that whoever joins it finds where to throw things away.
    for folder in (names.EPOCHS, names.TRASH, names.trash_dir(number)):
        writes.make_own_dir(output_dir / folder)


def _enter(mine: Epoch, entry: str, clusters: Mapping[str, int], expected: Mapping[str, int] | None) -> bool:
    """Put this world's locked record under `.epochs/<entry>`; False if another world was first."""
    folder = mine.output_dir / names.EPOCHS
    temporary = folder / names.temporary_file(entry)

    def contents(locked: bool) -> bytes:
        return Member(
            number=mine.number,
            run_id=mine.run_id,
            clusters=dict(clusters),
            expected_clusters=None if expected is None else dict(expected),
            host=socket.gethostname(),
            boot_id=reads.boot_id(),
            pid=os.getpid(),
            locked=locked,
        ).to_bytes()

    lock = locks.lock_new(temporary, contents)
    try:
        first = writes.link(temporary, folder / entry)
    except FileNotFoundError:
        first = False  # a newer claimant's recovery has swept the temporary away
    writes.discard_file(temporary)
    if not first:
        lock.release()
        return False
    mine._keep(folder / entry, lock)
    writes.fsync_dir(folder)
    return True


def _list(clusters: Mapping[str, int]) -> str:
    return ", ".join(f"cluster {name!r}" for name in sorted(clusters))
