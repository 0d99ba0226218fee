"""The save corridor of one process: begin, stage, write, vote, commit.

A `Save` is this process's part of one checkpoint, a `Ticket` one cluster's part of it. Bytes are copied and
written by native threads; a short-lived Python thread for each save only waits for them, votes and settles.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from roll_ckpt import arena, commit, disk, errors, manifest, names, native, seal
from roll_ckpt.config import Check, Settings
from roll_ckpt.image import Extents, FileImage, TensorPiece, Until
from roll_ckpt.world import LONGEST_S, World

log = logging.getLogger("roll_ckpt")

_LOOK_S = 1.0  # between two looks whether a save that waits for its disk is still wanted

CommitHook = Callable[["Save"], None]
Changes = Callable[[Any], bool]
"""Whether the caller is about to change a leased source; it is given the owner of the memory."""


@dataclass
class _Staged:
    path: Path
    image: FileImage | None
    transfer: native.Transfer
    pieces: tuple[TensorPiece, ...]


@dataclass
class Timing:
    """Seconds of one cluster's part of a save on this rank; `None` until known."""

    stage_s: float = 0.0
    fence_s: float = 0.0
    write_s: float | None = None
    commit_s: float | None = None


class Ticket:
    """One cluster's part of one save on this rank: what the trainer keeps of it.

    The training thread stages and fences; the save's own thread finishes it and votes.
    """

    def __init__(self, save: Save, cluster: str, rank: int, facts: Mapping[str, Any]) -> None:
        self.save = save
        self.cluster = cluster
        self.rank = rank
        self.facts = dict(facts)
        self.parameters: dict[str, dict[str, Any]] = {}
        self.timing = Timing()
        self.nbytes = 0
        self.error: str | None = None
        self._staged: list[_Staged] = []
        self._adopted: list[Path] = []
        self._started = time.monotonic()

    def stage(self, path: Path, image: FileImage, *, overlap: bool) -> None:
        """Copy `image` towards `path`, a file in the unit, and start writing it.

        Blocks until everything but its stable extents has been copied; until everything has if `overlap` is
        false or the arena has too little room. Not durable on return.
        """
        began = time.monotonic()
        settings = self.save.settings
        staged = _stage(arena.mover(settings), path, image, overlap, settings.staging.check)
        self.timing.stage_s += time.monotonic() - began
        self.nbytes += image.nbytes
        self._staged.append(staged)

    def adopt(self, path: Path) -> None:
        """Count a file that somebody else wrote into the unit as ours: it is made durable and listed."""
        self._adopted.append(path)

    def holds(self, path: Path) -> bool:
        """Whether this rank's part has a file at `path`, written yet or not."""
        return path in self._adopted or any(staged.path == path for staged in self._staged)

    def fail(self, problem: BaseException) -> None:
        """Turn this rank's vote into a no. Never raises, so that no rank waits at a framework's barrier."""
        if self.error is None:
            self.error = f"{type(problem).__name__}: {problem}"

    def fence(self, changes: Changes = lambda owner: True) -> None:
        """Wait until every source has been copied, helping with it; then they may change.

        Not for the disk, but that leased sources which `changes` are written.
        """
        began = time.monotonic()
        for staged in self._staged:
            image = staged.image
            if image is None:
                continue
            staged.transfer.wait_copied()
            if not staged.transfer.released and any(changes(owner) for owner in _leased(image)):
                staged.transfer.wait_released()
            if staged.transfer.released:
                staged.image = None
        self.timing.fence_s += time.monotonic() - began

    def finish(self) -> manifest.Vote:
        """Wait for the bytes to be durable and return this rank's vote; runs on the save's thread."""
        attempt = self.save.attempt
        receipts: list[manifest.Receipt] = []
        try:
            if self.error is None:
                receipts = self._receipts()
        except Exception as problem:
            self.fail(problem)
        if self.error is not None:
            self.abandon()
            self._give_room_back()
            receipts = []
        self.timing.write_s = time.monotonic() - self._started
        return manifest.Vote(
            cluster=self.cluster,
            rank=self.rank,
            epoch=attempt.epoch,
            attempt=attempt.attempt,
            receipts=tuple(receipts),
            error=self.error,
            facts=self.facts,
        )

    def abandon(self) -> None:
        """Stop copying and writing, and give the arena's memory back."""
        for staged in self._staged:
            staged.transfer.abandon()
            staged.image = None

    def _give_room_back(self) -> None:
        """Before the no vote, which a full disk would not take; nobody can commit these files any more."""
        for staged in self._staged:
            with suppress(OSError):
                disk.discard_file(staged.path)

    def _receipts(self) -> list[manifest.Receipt]:
        unit = self.save.attempt.unit
        digests: dict[str, Any] = {}
        for staged in self._staged:
            digests[_relative(staged.path, unit)] = self._written(staged)
            staged.image = None
        for path in sorted(set(self._adopted)):
            disk.fsync_file(path)
            digests[_relative(path, unit)] = native.digest_file(str(path), manifest.BLOCK_BYTES)
        disk.reach("write.done", cluster=self.cluster, rank=self.rank, name=self.save.attempt.name)
        receipts = [
            manifest.Receipt(path, d.nbytes, d.block_bytes, manifest.root_of(d.nbytes, d.block_bytes, d.crcs))
            for path, d in digests.items()
        ]
        blocks = {
            path: {"nbytes": d.nbytes, "block_bytes": d.block_bytes, "crcs": list(d.crcs)}
            for path, d in digests.items()
        }
        pieces = [
            record for staged in self._staged for record in _piece_records(staged.pieces, _relative(staged.path, unit))
        ]
        index = {"parameters": self.parameters, "pieces": pieces}
        for relative, record in (
            (names.digest_file(self.cluster, self.rank), blocks),
            (names.tensor_file(self.cluster, self.rank), index),
        ):
            data = seal.canonical(record)
            disk.make_dirs((unit / relative).parent)
            disk.write_durable(unit / relative, data)
            receipts.append(manifest.receipt_of_bytes(relative, data))
        return receipts

    def _written(self, staged: _Staged) -> native.Digest:
        """Wait for one file, however long its disk takes, until the others have given this save up."""
        save, told = self.save, False
        while True:
            try:
                return _written(staged, _LOOK_S)
            except TimeoutError as problem:
                if problem.errno is not None:  # the disk's own answer
                    raise
            if not disk.is_dir(save.attempt.directory):
                raise commit.abandoned(save.attempt)
            if not told and time.monotonic() - self._started > save.settings.commit_timeout_s:
                told = True
                log.warning(
                    "%s: cluster %r rank %d still waits for the disk to take %s, after more than commit_timeout_s = "
                    "%g s", save.attempt.label, self.cluster, self.rank, staged.path, save.settings.commit_timeout_s
                )  # fmt: skip


def _piece_records(pieces: Iterable[TensorPiece], file: str) -> Iterator[dict[str, Any]]:
    for piece in pieces:
        yield {
            **{"name": piece.name, "dtype": piece.dtype, "shape": piece.shape},
            **{"offset": piece.offset, "nbytes": piece.nbytes, "file": file},
        }


def _stage(mover: native.Mover, path: Path, image: FileImage, overlap: bool, check: Check = "off") -> _Staged:
    transfer = mover.save(path, native_image(image), overlap=overlap, check=check)
    return _Staged(path, None if transfer.released else image, transfer, image.pieces)


def _leased(image: FileImage) -> Iterator[Any]:
    """The owners of the leased sources."""
    extents = image.extents
    for owner, stable in zip(extents.owners, extents.rows[3 :: Extents.WIDTH], strict=True):
        if stable == Until.WRITTEN:
            yield owner


def _written(staged: _Staged, timeout_s: float) -> native.Digest:
    try:
        return staged.transfer.wait_written(timeout_s)
    except errors.SourceChanged as changed:
        start, end = changed.start, changed.end
        tensors = [piece.name for piece in staged.pieces if piece.offset < end and start < piece.offset + piece.nbytes]
        raise errors.SourceChanged(
            f"{staged.path}: {', '.join(map(repr, tensors)) or 'a tensor'} (bytes {start} to {end} of the file) was "
            "changed while it was being copied; call roll_ckpt.fence() before changing it, or set "
            "staging.overlap: false",
            start,
            end,
        ) from None


def native_image(image: FileImage) -> native.NativeImage:
    """The image as the extension takes it: addresses and sizes."""
    extents, seals = image.extents, image.seals
    return native.NativeImage.of(
        image.nbytes, extents.rows, extents.owners, seals.records, seals.crcs, seals.serials, extents.streams
    )


def _relative(path: Path, unit: Path) -> str:
    return path.relative_to(unit).as_posix()


@dataclass
class Save:
    """This process's part of one checkpoint, from `begin` to the outcome."""

    attempt: commit.Attempt
    settings: Settings
    rank: int
    clusters: tuple[str, ...]
    """The clusters of this world, whose votes this process casts."""
    replays: frozenset[str] = frozenset()
    """The clusters whose earlier plan fits again, on every rank; see `begin`."""
    on_commit: CommitHook | None = None
    tickets: dict[str, Ticket] = field(default_factory=dict)
    failure: errors.RollCkptError | None = None
    reported: bool = False
    durable_s: float | None = None
    _sealed: bool = False
    _threaded: bool = False
    _staged: threading.Event = field(default_factory=threading.Event)
    _after: Save | None = None
    _settled: threading.Event = field(default_factory=threading.Event)
    _finished: threading.Event = field(default_factory=threading.Event)
    _started: float = field(default_factory=time.monotonic)

    def ticket(self, cluster: str, facts: Mapping[str, Any]) -> Ticket:
        """The part of `cluster`; `facts` go into the manifest."""
        self.tickets[cluster] = Ticket(self, cluster, self.rank, facts)
        return self.tickets[cluster]

    @contextmanager
    def staging(self) -> Iterator[None]:
        """Stage every cluster inside the block; when it ends, vote and commit in the background.

        Whatever is raised in it, an interrupt too, turns all votes of this rank into a no.
        """
        self._start_thread()  # now: once there are copies to make, a thread waits long for a processor
        try:
            yield
        except BaseException as problem:
            for ticket in self.tickets.values():
                ticket.fail(problem)
            raise
        finally:
            self._seal()

    def _seal(self) -> None:
        for cluster in self.clusters:
            if cluster not in self.tickets:
                self.ticket(cluster, {}).fail(RuntimeError("the trainer failed before this cluster was staged"))
        self._sealed = True
        self._staged.set()
        if not self._threaded:  # no thread to be had: blocking beats a save that nobody finishes
            self._run()

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._run, name=f"roll_ckpt {self.attempt.name}", daemon=True).start()
            self._threaded = True
        except RuntimeError as problem:
            log.warning("%s: no thread can be started, this save blocks: %s", self.attempt.label, problem)

    @property
    def begun(self) -> bool:
        """Whether there is an attempt to stage; else it has failed already: `failure` says why."""
        return self.attempt.attempt > 0

    @property
    def lead(self) -> bool:
        """Whether this process collects the votes and decides: rank 0 of each world."""
        return self.rank == 0

    @property
    def settled(self) -> bool:
        """The outcome is known: committed, or `failure` says why not."""
        return self._settled.is_set()

    @property
    def finished(self) -> bool:
        """Settled, and what follows a commit (upload, prune) is done."""
        return self._finished.is_set()

    def fence(self, changes: Changes = lambda owner: True) -> None:
        """`Ticket.fence` of all tickets."""
        for ticket in self.tickets.values():
            ticket.fence(changes)

    def wait(self, timeout_s: float | None = None, *, uploaded: bool = False) -> None:
        """Block until the checkpoint is committed; with `uploaded`, until its upload and pruning are done.

        Raises:
            SaveFailed, EpochLost: the save was abandoned; the message says why.
            TimeoutError: not within `timeout_s`; the save goes on.
        """
        event = self._finished if uploaded else self._settled
        if not event.wait(timeout_s):
            raise TimeoutError(f"{self.attempt.label}: not done within {timeout_s} s; it goes on")
        if self.failure is not None:
            self.reported = True
            raise self.failure

    def _run(self) -> None:
        self._staged.wait()
        try:
            if self._after is not None:
                self._after._settled.wait()
            self._settle(self._vote())
        except errors.RollCkptError as problem:
            self._fail(problem)
        except Exception as problem:
            self._fail(errors.SaveFailed(f"{self.attempt.label}: {type(problem).__name__}: {problem}"))
        finally:
            for ticket in self.tickets.values():
                if self.failure is not None:
                    ticket.abandon()
            self._settled.set()
        try:
            if self.failure is None and self.on_commit is not None:
                self.on_commit(self)
        except Exception as problem:
            self._fail(
                errors.SaveFailed(f"{self.attempt.label}: committed and sound, but what follows failed: {problem}")
            )
        finally:
            self._finished.set()
            _forget(self)

    def _vote(self) -> str:
        """Cast the vote of each cluster; return why one could not be cast, "" if all were."""
        refusal = ""
        for ticket in self.tickets.values():
            try:
                commit.cast(self.attempt, ticket.finish())
            except errors.SaveFailed as problem:
                ticket.fail(problem)
                refusal = refusal or str(problem).removeprefix(f"{self.attempt.label}: ")
        return refusal

    def _settle(self, refusal: str) -> None:
        began = time.monotonic()
        outcome = commit.settle(self.attempt, lead=self.lead, timeout_s=self.settings.commit_timeout_s, refusal=refusal)
        now = time.monotonic()
        if not outcome.committed:
            untold = [
                f"cluster {t.cluster!r} rank {t.rank} failed: {t.error}" for t in self.tickets.values() if t.error
            ]
            reason = "; ".join([outcome.reason, *(here for here in untold if here not in outcome.reason)])
            raise errors.SaveFailed(
                f"{self.attempt.label}: abandoned: {reason}. Older checkpoints are untouched; the next save "
                "starts afresh"
            )
        if not outcome.durable or refusal:
            raise errors.SaveFailed(
                f"{self.attempt.label}: it is committed and whole, but the disk did not say that it is durable: "
                f"{'; '.join(filter(None, (refusal, outcome.reason)))}. It may not survive a power failure; older "
                "checkpoints are kept until a later save is durable. Look after the file system"
            )
        self.durable_s = now - self._started
        for ticket in self.tickets.values():
            ticket.timing.commit_s = now - began

    def _fail(self, problem: errors.RollCkptError) -> None:
        self.failure = problem
        log.error("%s", problem)


# --- beginning -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What every rank of a world must agree on before the first byte."""

    output_dir: Path
    name: str
    step: int | None
    clusters: Mapping[str, int]
    expected_clusters: Mapping[str, int] | None = None
    save_latest: bool = True


@dataclass(frozen=True)
class Share:
    """What this rank is about to write for one cluster: about how many bytes, and the name of an earlier save's plan
    that fits, if one does."""

    nbytes: int
    plan: str | None = None


def begin(
    world: World,
    request: Request,
    settings: Settings,
    *,
    nbytes: int,
    problem: str | None = None,
    plans: Mapping[str, str | None] | None = None,
    on_commit: CommitHook | None = None,
) -> Save:
    """Agree on a new attempt and make its directory. Every rank of `world` calls; one rendezvous.

    `nbytes` is what this rank is about to write; `problem` an error that this rank already has, which then is
    raised on all. `plans` names, for each cluster that has one, the plan of an earlier save that fits what this
    rank saves now: `Save.replays` has those clusters for which every rank named the same. Waits for a pending save
    of the same name.

    A disk that is full or refuses does not end a training run that has saved there: the save that is returned is then
    not `begun`, on every rank, and to be staged by nobody.

    Raises:
        RanksDisagree, RunIsLive, EpochLost, ConfigError: on every rank, with nothing on disk touched.
        NoRoom, SaveFailed: the same, if this run has not claimed the directory yet.
    """
    request = replace(request, output_dir=request.output_dir.absolute())
    wait_pending(request.output_dir, request.name)
    wish = {
        "output_dir": str(request.output_dir),
        "name": request.name,
        "step": request.step,
        "clusters": dict(request.clusters),
        "save_latest": request.save_latest,
    }

    def begin_here(needed_bytes: int) -> commit.Attempt:
        try:
            commit.check_room(request.output_dir, request.name, needed_bytes)
            commit.check_replaced(request.output_dir, request.name)
        except Exception:
            if (claimed := _epochs.get(request.output_dir.resolve())) is not None:
                commit.pass_over(claimed, request.name)
            raise
        return commit.begin(
            claim(request.output_dir, settings, request.clusters, request.expected_clusters),
            request.name,
            step=request.step,
            expected=request.expected_clusters or request.clusters,
            save_latest=request.save_latest,
            needed_bytes=needed_bytes,
        )

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        _check_agreement(posts)
        claimed = _clear(request.output_dir)
        try:
            made = begin_here(sum(post["nbytes"] for post in posts))
        except OSError as problem:
            if not claimed:
                raise
            return {"failure": _told(problem, request.output_dir / request.name), "room": _lacks_room(problem)}
        replays = [
            cluster
            for cluster, plan in posts[0]["plans"].items()
            if plan and all(post["plans"].get(cluster) == plan for post in posts)
        ]
        return {"epoch": made.epoch, "attempt": made.attempt, "run_id": made.run_id, "replays": replays}

    mine = {"wish": wish, "nbytes": nbytes, "problem": problem, "plans": dict(plans or {})}
    verdict = world.agree(mine, decide, settings.commit_timeout_s)
    attempt = commit.Attempt(
        output_dir=request.output_dir,
        name=request.name,
        step=request.step,
        run_id=verdict.get("run_id", ""),
        epoch=verdict.get("epoch", 0),
        attempt=verdict.get("attempt", 0),
        expected=dict(request.expected_clusters or request.clusters),
        save_latest=request.save_latest,
    )
    replays = frozenset(verdict.get("replays", ()))
    save = Save(attempt, settings, world.rank, tuple(request.clusters), replays, on_commit=on_commit)
    if save.begun:
        _remember(save)
    else:
        save._fail((errors.NoRoom if verdict["room"] else errors.SaveFailed)(verdict["failure"]))
        save._settled.set()
        save._finished.set()
    return save


def _told(problem: OSError, final: Path) -> str:
    if isinstance(problem, errors.NoRoom):
        return str(problem)
    return (
        f"{final}: the save could not begin: rank 0: {problem.strerror} ({problem.filename}). Older checkpoints are "
        "untouched; the next save tries again"
    )


def _lacks_room(problem: OSError) -> bool:
    return isinstance(problem, errors.NoRoom) or problem.errno in (errno.ENOSPC, errno.EDQUOT)


def wait_together(world: World, save: Save, *, uploaded: bool) -> None:
    """`Save.wait` on every rank of `world`: none returns before all know the outcome; one rendezvous.

    Raises:
        SaveFailed: on every rank, if it failed on any.
    """
    world.together(lambda: save.wait(uploaded=uploaded), LONGEST_S)


def _check_agreement(posts: list[dict[str, Any]]) -> None:
    problems = [f"rank {rank}: {post['problem']}" for rank, post in enumerate(posts) if post["problem"]]
    if problems:
        raise errors.SaveFailed("the save was not begun: " + "; ".join(problems))
    first = posts[0]["wish"]
    for rank, post in enumerate(posts):
        differing = [key for key in first if post["wish"][key] != first[key]]
        if differing:
            raise errors.RanksDisagree(
                f"rank {rank} and rank 0 ask for different saves: "
                + ", ".join(f"{key} {post['wish'][key]!r} and {first[key]!r}" for key in differing)
                + "; nothing was written. Call the save with the same arguments on every rank"
            )


_EPOCHS_KEPT = 8
_epochs: dict[Path, commit.Epoch] = {}


def claim(
    output_dir: Path,
    settings: Settings,
    clusters: Mapping[str, int],
    expected_clusters: Mapping[str, int] | None = None,
) -> commit.Epoch:
    """This run's claim on `output_dir`; rank 0 only. Recovers what an older run left, at the first call.

    Raises:
        RunIsLive: another live run owns the directory. EpochLost: one has taken it over since.
    """
    key = output_dir.resolve()
    epoch = _epochs.pop(key, None)
    if epoch is None:
        epoch = commit.claim(
            output_dir,
            run_id=settings.run_id or "default",
            clusters=clusters,
            expected_clusters=expected_clusters,
            take_over=settings.take_over,
        )
        _release_unused()
    _epochs[key] = epoch  # the one used last stands last
    epoch.check()
    return epoch


def recover(output_dir: Path, settings: Settings, clusters: Mapping[str, int]) -> None:
    """Finish or discard what a killed run left in `output_dir`, if it left anything; rank 0 only.

    A directory of a live run, or one that may not be written, is left alone: it can still be loaded from.
    """
    if not any(names.parse_attempt_dir(entry) for entry in disk.list_dir(output_dir)):
        return
    try:
        claim(output_dir, settings, clusters)
    except (errors.RunIsLive, errors.ConfigError, OSError) as problem:
        log.warning("%s: an unfinished save lies there and is left alone: %s", output_dir, problem)


def _clear(output_dir: Path) -> bool:
    """Give back the room of saves that ended while the disk refused; what it still refuses is logged. False if this
    run has not claimed the directory yet."""
    epoch = _epochs.get(output_dir.resolve())
    if epoch is None:
        return False
    busy = {epoch.output_dir / save.attempt.directory.name for save in pending()}
    try:
        for found in commit.clear(epoch, busy):
            log.warning("%s: attempt %d.%d, which had ended with an error of the disk, is %s now (%s)",
                        output_dir / found.name, found.epoch, found.attempt, found.action, found.reason)  # fmt: skip
    except (OSError, errors.SaveFailed) as problem:
        log.warning("%s: what an earlier save has left there cannot be removed yet: %s", output_dir, problem)
    return True


def _release_unused() -> None:
    """Let go of directories of long ago: some hosts give every checkpoint a save directory of its own."""
    busy = {save.attempt.output_dir.resolve() for save in pending()}
    idle = [key for key in _epochs if key not in busy]
    for key in idle[: max(0, len(_epochs) - _EPOCHS_KEPT)]:
        _epochs.pop(key).release()


def epoch_of(output_dir: Path) -> commit.Epoch:
    """The claim that this process made on `output_dir`; it must have made one."""
    return _epochs[output_dir.resolve()]


# --- what is pending -----------------------------------------------------------------------------------------

_pending: list[Save] = []
_pending_lock = threading.Lock()
_pid = os.getpid()


def _forget_in_child() -> None:
    global _pending_lock
    _pending_lock = threading.Lock()  # another thread may have held it just then


os.register_at_fork(after_in_child=_forget_in_child)


def _remember(save: Save) -> None:
    global _pid
    with _pending_lock:
        if _pid != os.getpid():
            _pending.clear()
            _pid = os.getpid()
        same = [s for s in _pending if s.attempt.output_dir == save.attempt.output_dir]
        save._after = same[-1] if same else None
        _pending.append(save)


def _forget(save: Save) -> None:
    save._after = None
    with _pending_lock:
        if save in _pending:
            _pending.remove(save)


def pending() -> list[Save]:
    """Saves of this process that are not finished, oldest first; none in a forked child."""
    with _pending_lock:
        return list(_pending) if _pid == os.getpid() else []


def wait_pending(output_dir: Path | None = None, name: str | None = None) -> None:
    """Block until pending saves (of one directory, of one name) are settled; failures stay with their saves."""
    for save in pending():
        attempt = save.attempt
        if output_dir is not None and attempt.output_dir.resolve() != output_dir.resolve():
            continue
        if name is None or attempt.name == name:
            if not save._sealed:
                raise errors.SaveFailed(
                    f"{attempt.label}: it is being staged by this very call; do not save or load inside of it"
                )
            save._settled.wait()


def fence(saves: Iterable[Save] | None = None) -> None:
    """Wait until no pending save reads training tensors any more; for the disk only if a save leases some.

    Call it before changing parameters by other means than the optimizer that was wired.
    """
    for save in pending() if saves is None else saves:
        save.fence()


def wait_copied(saves: list[Save], changes: Changes = lambda owner: True) -> None:
    """`Save.fence` of these saves; those that are settled leave the list.

    Raises:
        SaveFailed, EpochLost: one of them failed in the background and its settings say `fail_training`.
    """
    for save in list(saves):
        save.fence(changes)
        if not save.settled:
            continue
        saves.remove(save)
        if save.failure is not None and not save.reported and save.settings.fail_training:
            save.reported = True
            raise save.failure


_background: list[tuple[threading.Thread, float]] = []


def in_background(action: Callable[[], None], name: str, exit_timeout_s: float) -> None:
    """Run `action` on a thread that the interpreter's exit waits for, at most `exit_timeout_s`."""
    thread = threading.Thread(target=action, name=f"roll_ckpt {name}", daemon=True)
    _background[:] = [(other, limit) for other, limit in _background if other.is_alive()]
    _background.append((thread, exit_timeout_s))
    thread.start()


def _finish_at_exit() -> None:
    if _pid != os.getpid():
        return
    for save in pending():
        try:
            save.wait(save.settings.exit_timeout_s, uploaded=True)
        except (errors.RollCkptError, TimeoutError) as problem:
            if not save.reported:
                log.error("at exit: %s", problem)
    for thread, limit_s in list(_background):
        thread.join(limit_s)
    for epoch in _epochs.values():
        epoch.release()


atexit.register(_finish_at_exit)


# --- one file by itself --------------------------------------------------------------------------------------


def write_file(path: Path, image: FileImage, settings: Settings) -> None:
    """Write one file: temporary beside it, fsync, rename. Blocks; durable on return.

    Raises:
        OSError: the write failed; the temporary is removed and an older file of that name is untouched.
    """
    temporary = path.with_name(names.temporary_file(path.name))
    staged = _stage(arena.mover(settings), temporary, image, overlap=False)
    try:
        staged.transfer.wait_written()
        disk.rename(temporary, path)
    except BaseException:
        staged.transfer.abandon()
        disk.discard_file(temporary)
        raise
    disk.fsync_dir(path.parent)
