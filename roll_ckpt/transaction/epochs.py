"""Epochs: which run may write in an output directory.

`.epochs/<n>` is the sealed record of the job that claimed epoch n; jobs of the same run that joined it later have left
`.epochs/<n>.<cluster>`. The newest number owns the directory. Each record is locked before it gets its name. On one
host the lock shows whether its run is alive; across hosts its heartbeat does (the record's mtime). Locks and times
only report a user's mistake (two runs, one directory) early: the safety of what is on disk does not depend on them.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import locks, reads, tree, writes
from roll_ckpt.disk.locks import Lock
from roll_ckpt.disk.missing import if_there, not_found_ok
from roll_ckpt.errors import Damaged, EpochLost, RunIsLive
from roll_ckpt.formats import manifests, records
from roll_ckpt.formats.sealed_json import Fields, seal, unseal

log = logging.getLogger("roll_ckpt")

HEARTBEAT_S = 5.0
SILENCE_S = 20.0  # a run whose heartbeat stands still for so long, by the claimant's own clock, is taken for dead
_RELEASED_NS = 0  # the mtime of a record whose run has released the directory


@dataclass(frozen=True)
class Member:
    """One job of a run, as its record in `.epochs/` describes it."""

    number: int
    run_id: str
    clusters: dict[str, int]
    expected_clusters: dict[str, int] | None
    host: str
    boot_id: str
    pid: int
    locked: bool

    def to_bytes(self) -> bytes:
        """The bytes of the record's file."""
        return seal(asdict(self))

    @property
    def who(self) -> str:
        """Process, host, run and clusters, for messages."""
        return f"process {self.pid} on host {self.host} (run_id {self.run_id!r}, {_list(self.clusters)})"


def parse_member(data: bytes, where: object) -> Member:
    """The record in a file of .epochs/. Damaged, naming `where`, if it cannot be trusted."""
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
    """This job's claim on an output directory, until release() or the end of the process.

    `attempts` holds the number of the newest attempt of this epoch for each checkpoint name, the newest name last.
    """

    number: int
    output_dir: Path
    run_id: str
    attempts: dict[str, int] = field(default_factory=dict)
    pid: int = field(default_factory=os.getpid)
    _records: dict[Path, Lock] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """EpochLost, naming the newer run, if this epoch does not own the directory any more."""
        check(self.output_dir, self.number)

    def release(self) -> None:
        """Give the directory back: another run, on any host, may claim it at once. Idempotent; no-op in a fork.

        Does not wait for the disk. OSError if the record cannot be marked as released.
        """
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
        """Touch the records every HEARTBEAT_S until release(). Logs when a record's beats begin to fail, and when they
        succeed again; the thread goes on, since the directory may be back at the next beat."""
        failing: set[Path] = set()
        while not self._ended.wait(HEARTBEAT_S):
            for path in list(self._records):
                try:
                    writes.touch(path)
                except OSError as error:
                    if path not in failing and not self._ended.is_set():
                        log.warning("%s: the heartbeat of this run fails: %s; it is tried again every %g s. A run on "
                                    "another host may take this one for dead and take the directory over",
                                    path, error.strerror, HEARTBEAT_S)  # fmt: skip
                        failing.add(path)
                else:
                    if path in failing:
                        log.warning("%s: the heartbeat of this run works again", path)
                    failing.discard(path)


def check(output_dir: Path, number: int) -> None:
    """EpochLost, naming the newer run, if epoch `number` does not own `output_dir` any more."""
    newest = newest_number(output_dir)
    if newest == number:
        return
    if newest < number:
        raise EpochLost(
            f"{output_dir}: the record of this run's epoch {number} is gone; someone has removed "
            f"{names.EPOCHS}. Start the run again"
        )
    holders = [member for member in members(output_dir, newest).values() if isinstance(member, Member)]
    who = holders[0].who if holders else "a run whose record cannot be read"
    raise EpochLost(
        f"{output_dir}: epoch {number} was taken over by epoch {newest}, {who}; this run may not write there "
        "any more. Stop one of the two. If one job of a run restarts, all of its jobs must restart"
    )


def newest_number(output_dir: Path) -> int:
    """The newest epoch's number, 0 if the directory has never been claimed."""
    parsed = (names.parse_epoch_file(entry) for entry in tree.list_dir(output_dir / names.EPOCHS))
    return max((record[0] for record in parsed if record), default=0)


def members(output_dir: Path, number: int) -> dict[Path, Member | Damaged]:
    """The records of one epoch by path, that of its first job first; a damaged one is there as its error."""
    folder = output_dir / names.EPOCHS
    records_by_path: dict[Path, Member | Damaged] = {}
    for entry in tree.list_dir(folder):
        parsed = names.parse_epoch_file(entry)
        if parsed is None or parsed[0] != number:
            continue
        with not_found_ok():
            try:
                records_by_path[folder / entry] = parse_member(reads.read_bytes(folder / entry), folder / entry)
            except Damaged as error:
                records_by_path[folder / entry] = error
    return records_by_path


def claim_number(
    output_dir: Path,
    run_id: str,
    clusters: Mapping[str, int],
    expected: Mapping[str, int] | None,
    take_over: bool,
    at_least: int = 1,
) -> Epoch:
    """Claim the next epoch, or join the one of this run's other jobs. Durable on return.

    The next epoch is at least `at_least` and newer than every checkpoint in the directory, pulled and copied ones
    included: otherwise new saves would sort before them. Blocks for up to SILENCE_S while it watches the heartbeat of
    a run on another host. RunIsLive if another run owns the directory.
    """
    while True:
        newest = newest_number(output_dir)
        join = bool(newest) and _may_join(output_dir, newest, run_id, clusters, expected, take_over)
        following = max(newest + 1, _newest_committed(output_dir) + 1, at_least)
        if following > names.LARGEST_NUMBER:
            raise Damaged(f"{output_dir / names.EPOCHS}: {newest} is too large for an epoch; remove that file")
        epoch = Epoch(newest if join else following, output_dir, run_id)
        _make(output_dir, epoch.number)
        entries = [names.epoch_file(epoch.number, c) for c in sorted(clusters)] if join else [str(epoch.number)]
        linked = all(_enter(epoch, entry, clusters, expected) for entry in entries)
        # A slow claimant may have linked the name of an epoch that has come and gone meanwhile.
        if linked and newest_number(output_dir) == epoch.number:
            return epoch
        for path, lock in list(epoch._records.items()):
            if locks.same_file(lock, path):
                writes.discard_file(path)
        epoch.release()


def _newest_committed(output_dir: Path) -> int:
    """The newest epoch of a checkpoint in `output_dir`, 0 if there is none whose manifest can be read."""
    newest = 0
    for entry in tree.list_dir(output_dir):
        if entry.startswith("."):
            continue
        try:
            manifest = if_there(partial(manifests.read, output_dir / entry))
        except Damaged as error:
            log.debug("its epoch is not known: %s", error)  # it is never resumed from, so its age does not matter
            continue
        except OSError as error:
            if entry != names.LOST_AND_FOUND:
                log.warning("%s: its epoch cannot be read (%s); new saves may sort before it",
                            output_dir / entry, error)  # fmt: skip
            continue
        if manifest is not None:
            newest = max(newest, manifest.epoch)
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
                raise RunIsLive(
                    f"{output_dir}: a live run owns it, and the record of that run is damaged: {member}. Stop that "
                    "run, or choose another output_dir. Nothing was touched"
                )
            dead += 1
        elif is_alive(path, member):
            alive.append(member)
        else:
            dead += 1
    if not alive:
        return False
    for member in alive:
        same_run = expected is not None and (member.run_id, member.expected_clusters) == (run_id, dict(expected))
        shared = sorted(set(clusters) & set(member.clusters))
        # All jobs of a run are started with take_over: the first one takes over, and the others join it.
        if take_over and (not same_run or shared):
            return False
        if not same_run:
            raise RunIsLive(
                f"{output_dir}: {member.who} is running and saves there. Stop it, choose another output_dir, "
                "or set take_over if you know that it is dead. Jobs of one run need the same run_id and the same "
                f"expected_clusters; this job has {run_id!r} and {expected and dict(expected)}, that one has "
                f"{member.run_id!r} and {member.expected_clusters}. Nothing was touched"
            )
        for cluster in shared:
            raise RunIsLive(
                f"{output_dir}: cluster {cluster!r} of run_id {run_id!r} is already running as {member.who}. "
                "Stop it, or set take_over if you know that it is dead. Nothing was touched"
            )
    # A run of which one job has died must restart as a whole: this job claims the next epoch.
    return not dead


def is_alive(path: Path, member: Member) -> bool:
    """Whether the process of a record lives. Blocks for up to SILENCE_S if only its heartbeat can tell."""
    with not_found_ok():
        if reads.mtime_ns(path) == _RELEASED_NS:
            return False
        if member.locked and member.boot_id == reads.boot_id():
            return locks.is_locked(path)
        before, began = reads.mtime_ns(path), time.monotonic()
        while time.monotonic() - began < SILENCE_S:
            time.sleep(min(0.5, SILENCE_S / 10))
            if reads.mtime_ns(path) != before:
                return reads.mtime_ns(path) != _RELEASED_NS
    return False


def _make(output_dir: Path, number: int) -> None:
    # The epoch's trash is made before the epoch has a name: a job that joins it must find where to throw things away.
    for folder in (names.EPOCHS, names.TRASH, names.trash_dir(number)):
        writes.make_own_dir(output_dir / folder)


def _enter(epoch: Epoch, entry: str, clusters: Mapping[str, int], expected: Mapping[str, int] | None) -> bool:
    """Put this job's locked record under `.epochs/<entry>`; False if another job was first."""
    folder = epoch.output_dir / names.EPOCHS
    temporary = folder / names.temporary_file(entry)

    def contents(locked: bool) -> bytes:
        return Member(
            number=epoch.number,
            run_id=epoch.run_id,
            clusters=dict(clusters),
            expected_clusters=None if expected is None else dict(expected),
            host=socket.gethostname(),
            boot_id=reads.boot_id(),
            pid=os.getpid(),
            locked=locked,
        ).to_bytes()

    lock = locks.lock_new(temporary, contents)
    first = False
    try:
        with not_found_ok():  # the recovery of a newer run may have removed the temporary file
            first = writes.give_name(temporary, folder / entry, folder)
    finally:
        if not first:
            lock.release()
        writes.discard_file(temporary)
    if not first:
        return False
    epoch._keep(folder / entry, lock)
    writes.fsync_dir(folder)
    return True


def _list(clusters: Mapping[str, int]) -> str:
    return ", ".join(f"cluster {name!r}" for name in sorted(clusters))
