"""Epochs: which run may write in an output directory.

`.epochs/<n>` in the directory's home (see `home`) is the sealed record of the job that claimed epoch n; jobs of the
same run that joined it later have left `.epochs/<n>.<cluster>`. The newest number owns the directory. Each record is
locked before it gets its name. On one host the lock shows whether its run is alive; across hosts its heartbeat does
(the record's mtime). Locks and times only report a user's mistake (two runs, one directory) early: the safety of what
is on disk does not depend on them. Somebody may delete the records at any time; the run makes its own again.
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
from roll_ckpt.transaction import listing
from roll_ckpt.transaction.home import choose_home, directory_of

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
    home: Path
    run_id: str
    clusters: Mapping[str, int]
    expected: Mapping[str, int] | None
    attempts: dict[str, int] = field(default_factory=dict)
    first: bool = False
    """Whether no record of another run was there when it was claimed; then none of its processes can come late."""
    begun: int = 0
    """How many attempts this epoch has begun; gives checkpoints of one epoch their order."""
    pid: int = field(default_factory=os.getpid)
    _records: dict[Path, Lock] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """EpochLost, naming the newer run, if this epoch does not own the directory any more."""
        check(self.home, self.number)

    def restore(self) -> None:
        """Make again what somebody has deleted: the directory, its home, and this job's record. Durable on return.

        Called before each save. EpochLost if another run has claimed the directory meanwhile.
        """
        self.check()
        if self.home != self.output_dir and tree.exists(self.output_dir / names.EPOCHS):
            raise EpochLost(
                f"{self.output_dir}: another run keeps its records there, and this run beside it, in {self.home}; this "
                "run may not write there any more. Stop one of the two, and give both the same path"
            )
        writes.make_dirs(self.output_dir)
        make_folders(self.home, self.number)
        for path, lock in list(self._records.items()):
            if locks.same_file(lock, path):
                continue
            if tree.exists(path) or not _enter(self, path.name):
                raise EpochLost(
                    f"{self.output_dir}: the record of this run, {path}, was removed, and another run has claimed the "
                    "directory since; this run may not write there any more. Stop one of the two"
                )
            lock.release()
            log.warning("%s: the record of this run was removed by somebody and is made again: %s",
                        self.output_dir, path)  # fmt: skip

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
        if self.home != self.output_dir and self.first:
            self._tidy()
        self._records.clear()

    def _tidy(self) -> None:
        """Remove the home of a host's directory if no other job or run needs it. What is there stays: rmdir refuses.

        The number of the newest epoch goes with it. So the home stays if there was an older run, which may wake up.
        """
        epochs_dir, own = self.home / names.EPOCHS, {path.name for path in self._records}
        mine = {e for e in tree.list_dir(epochs_dir) if (a := names.parse_aborted_file(e)) and a[1] == self.number}
        if {*tree.list_dir(epochs_dir)} - mine != own:
            return
        for entry in mine | own:
            writes.discard_file(epochs_dir / entry)
        for folder in (self.home / names.trash_dir(self.number), self.home / names.TRASH, epochs_dir, self.home):
            try:
                writes.remove_dir(folder)
            except OSError as error:
                log.debug("%s stays: %s", folder, error)

    def _keep(self, path: Path, lock: Lock) -> None:
        beating = bool(self._records)
        self._records[path] = lock
        if not beating:
            threading.Thread(target=self._beat, name="roll_ckpt-heartbeat", daemon=True).start()

    def _beat(self) -> None:
        """Touch the records every HEARTBEAT_S until release(). Logs when a record's beats begin to fail, and when they
        succeed again; the thread goes on, since the directory may be back at the next beat."""
        failing: set[Path] = set()
        while not self._ended.wait(HEARTBEAT_S):
            for path in list(self._records):
                try:
                    with not_found_ok():  # the next save makes it again
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


def check(home: Path, number: int) -> None:
    """EpochLost, naming the newer run, if a newer epoch than `number` owns the directory with this `home`.

    A record that somebody has deleted loses nothing: the run's next save makes it again.
    """
    newest = newest_number(home)
    if newest <= number:
        return
    holders = [member for member in members(home, newest).values() if isinstance(member, Member)]
    who = holders[0].who if holders else "a run whose record cannot be read"
    raise EpochLost(
        f"{directory_of(home)}: epoch {number} was taken over by epoch {newest}, {who}; this run may not write there "
        "any more. Stop one of the two. If one job of a run restarts, all of its jobs must restart"
    )


def newest_number(home: Path) -> int:
    """The newest epoch's number, 0 if the directory with this home has never been claimed."""
    parsed = (names.parse_epoch_file(entry) for entry in tree.list_dir(home / names.EPOCHS))
    return max((record[0] for record in parsed if record), default=0)


def members(home: Path, number: int) -> dict[Path, Member | Damaged]:
    """The records of one epoch by path, that of its first job first; a damaged one is there as its error."""
    folder = home / names.EPOCHS
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
    *,
    host: bool = False,
) -> Epoch:
    """Claim the next epoch, or join the one of this run's other jobs. Durable on return.

    With `host`, the directory is that of a program around us, so the bookkeeping lies beside it; see `home`. The next
    epoch is at least `at_least` and newer than every checkpoint in the directory, pulled and copied ones
    included: otherwise new saves would sort before them. Blocks for up to SILENCE_S while it watches the heartbeat of
    a run on another host. RunIsLive if another run owns the directory.
    """
    home = choose_home(output_dir, host=host)
    while True:
        newest = newest_number(home)
        join = bool(newest) and _may_join(home, newest, run_id, clusters, expected, take_over)
        following = max(newest + 1, _newest_left(output_dir, home) + 1, at_least)
        if following > names.LARGEST_NUMBER:
            raise Damaged(f"{home / names.EPOCHS}: {newest} is too large for an epoch; remove that file")
        epoch = Epoch(newest if join else following, output_dir, home, run_id, dict(clusters), expected)
        epoch.first = not newest
        make_folders(home, epoch.number)
        entries = [names.epoch_file(epoch.number, c) for c in sorted(clusters)] if join else [str(epoch.number)]
        try:
            linked = all(_enter(epoch, entry) for entry in entries)
        except FileNotFoundError as error:
            log.debug("%s: a run that released the directory has just removed it; it is made again", error.filename)
            continue
        # A slow claimant may have linked the name of an epoch that has come and gone meanwhile.
        if linked and newest_number(home) == epoch.number:
            return epoch
        for path, lock in list(epoch._records.items()):
            if locks.same_file(lock, path):
                writes.discard_file(path)
        epoch.release()


def _newest_left(output_dir: Path, home: Path) -> int:
    """The newest known epoch of a checkpoint in `output_dir`, or of an attempt in `home`; 0 if there is none."""
    newest = max((parsed[1] for entry in tree.list_dir(home) if (parsed := names.parse_attempt_dir(entry))), default=0)
    for name in listing.names_in(output_dir):
        try:
            manifest = if_there(partial(manifests.read, output_dir / name))
        except Damaged as error:
            log.debug("its epoch is not known: %s", error)  # it is never resumed from, so its age does not matter
            continue
        except OSError as error:
            log.warning("%s: its epoch cannot be read (%s); new saves may sort before it",
                        output_dir / name, error)  # fmt: skip
            continue
        if manifest is not None:
            newest = max(newest, manifest.epoch)
    return newest


def _may_join(
    home: Path,
    number: int,
    run_id: str,
    clusters: Mapping[str, int],
    expected: Mapping[str, int] | None,
    take_over: bool,
) -> bool:
    """True: join epoch `number`. False: claim the next one. RunIsLive: neither."""
    alive, dead = [], 0
    for path, member in members(home, number).items():
        if isinstance(member, Damaged):
            if locks.is_locked(path):
                raise RunIsLive(
                    f"{directory_of(home)}: a live run owns it, and the record of that run is damaged: {member}. Stop "
                    "that run, or choose another output_dir. Nothing was touched"
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
                f"{directory_of(home)}: {member.who} is running and saves there. Stop it, choose another output_dir, "
                "or set take_over if you know that it is dead. Jobs of one run need the same run_id and the same "
                f"expected_clusters; this job has {run_id!r} and {expected and dict(expected)}, that one has "
                f"{member.run_id!r} and {member.expected_clusters}. Nothing was touched"
            )
        for cluster in shared:
            raise RunIsLive(
                f"{directory_of(home)}: cluster {cluster!r} of run_id {run_id!r} is already running as {member.who}. "
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


def make_folders(home: Path, number: int) -> None:
    """Make the folders of the bookkeeping that epoch `number` needs, unless they are there."""
    # The epoch's trash is made before the epoch has a name: a job that joins it must find where to throw things away.
    for folder in (names.EPOCHS, names.TRASH, names.trash_dir(number)):
        writes.make_own_dir(home / folder)


def _enter(epoch: Epoch, entry: str) -> bool:
    """Put this job's locked record under `.epochs/<entry>`; False if another job was first."""
    folder = epoch.home / names.EPOCHS
    temporary = folder / names.temporary_file(entry)

    def contents(locked: bool) -> bytes:
        return Member(
            number=epoch.number,
            run_id=epoch.run_id,
            clusters=dict(epoch.clusters),
            expected_clusters=None if epoch.expected is None else dict(epoch.expected),
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
