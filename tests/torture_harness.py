"""The torture of runs: start one, strike it, and judge what it has left; see torture.py.

A kind of run (`Kind`) forks its processes into a `Run`. A `Blow` strikes one of them, or all; `Torture` waits for it,
lets the others go on or not, and then looks at every byte that is left. The next run checks at its start that it has
found what it should.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from roll_ckpt import names
from roll_ckpt.disk import failpoints, reads, tree
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.formats import manifests, records
from roll_ckpt.transaction import claims, listing, verification
from roll_ckpt.upload import file_system

LIMIT_S = 60.0
QUIET_S = 1.2
VICTIMS = ("rank", "committer", "uploader", "job")
ANY, OPERATION = "any moment", "operation"

Age = tuple[int, int, int]
"""Of a checkpoint: epoch, step, attempt. The greatest is the newest."""
NEVER: Age = (0, 0, 0)


class Lost(AssertionError):
    """A checkpoint was lost, torn or mixed, or a run hangs."""


# --- blows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blow:
    """Whom to strike, and when: at the `nth` time that one of its processes comes to a point ("vote.cast"), or does an
    operation on the disk ("operation"), or after a while ("any moment")."""

    victim: str
    when: str
    nth: int
    how: signal.Signals = signal.SIGKILL


def arm(blow: Blow, tell: Callable[..., None]) -> None:
    """Let this process strike itself, or all of its run, when it gets there. It says so first."""
    left = blow.nth

    def strike(where: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            tell(struck=where)
            if blow.victim == "job":
                os.killpg(0, blow.how)
            os.kill(os.getpid(), blow.how)

    if blow.when == "operation":
        failpoints.observer = lambda operation, paths: strike(f"before {operation}")
    else:
        failpoints.listener = lambda point, where: strike(f"at {point}") if point == blow.when else None


# --- processes ----------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The processes of one run, in a group of their own, and what they have said."""

    number: int
    leads: int = 1
    """How many of them claim the output directory; each says `started` once it has."""
    role_of: dict[int, str] = field(default_factory=dict)
    said: list[dict[str, Any]] = field(default_factory=list)
    ended: dict[int, int] = field(default_factory=dict)
    _pipe: tuple[int, int] = field(default_factory=os.pipe)
    _rest: bytes = b""

    @property
    def group(self) -> int:
        return next(iter(self.role_of))

    @property
    def alive(self) -> list[int]:
        return [pid for pid in self.role_of if pid not in self.ended]

    @property
    def started(self) -> bool:
        return len(self.heard("started")) >= self.leads

    def tell(self, **told: Any) -> None:
        os.write(self._pipe[1], json.dumps(told).encode() + b"\n")

    def fork(self, role: str, work: Callable[[], object]) -> int:
        """Start a process of the run; it ends with `work`, with 1 and its traceback told if that raises."""
        pid = os.fork()
        if pid:
            self.role_of[pid] = role
            with suppress(PermissionError):
                os.setpgid(pid, self.group)
            return pid
        code = 1
        try:
            os.setpgid(0, self.group if self.role_of else 0)
            os.close(self._pipe[0])
            work()
            code = 0
        except BaseException:
            self.tell(problem=traceback.format_exc())
        finally:
            os._exit(code)

    def listen(self, until: Callable[[], object], limit_s: float) -> bool:
        """Hear what the processes say until that is so; False after `limit_s`."""
        limit = time.monotonic() + limit_s
        while True:
            self._reap()
            ready, _, _ = select.select([self._pipe[0]], [], [], 0.002)
            if ready:
                *lines, self._rest = (self._rest + os.read(self._pipe[0], 1 << 16)).split(b"\n")
                self.said += map(json.loads, lines)
            elif until():
                return True
            if time.monotonic() > limit:
                return bool(until())

    def heard(self, word: str) -> list[Any]:
        return [told[word] for told in self.said if word in told]

    def kill(self) -> None:
        """Kill all that are left, and wait for them."""
        for pid in self.alive:
            os.kill(pid, signal.SIGKILL)
        if not self.listen(lambda: not self.alive, LIMIT_S):
            raise Lost(f"processes {self.alive} do not die")

    def strike(self, pids: list[int], how: signal.Signals) -> None:
        """Send a signal, and wait until it has taken effect."""
        for pid in pids:
            os.kill(pid, how)
        if not self.listen(lambda: all(_is_down(pid) for pid in pids), LIMIT_S):
            raise Lost(f"{how.name} has no effect on {pids}")

    def freeze(self) -> None:
        """Stop all of it."""
        self.strike(self.alive, signal.SIGSTOP)

    def wake(self) -> None:
        """Let what stands still go on."""
        for pid in self.alive:
            os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        for descriptor in self._pipe:
            os.close(descriptor)

    def _reap(self) -> None:
        for pid in self.alive:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.ended[pid] = os.waitstatus_to_exitcode(status)


def _is_down(pid: int) -> bool:
    """Whether a process stands still, or has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZX"
    return True


# --- looking at what is left --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What lies in an output directory that nobody writes to: the age of each checkpoint."""

    ages: dict[str, Age] = field(default_factory=dict)
    complete: dict[str, Age] = field(default_factory=dict)
    """Attempts that only have to be finished: every vote is there and yes."""

    @property
    def newest(self) -> Age | None:
        return max([*self.ages.values(), *self.complete.values()], default=None)


def look(output_dir: Path) -> Found:
    """Every byte of what has a final name, and which attempts are complete; Lost if one is not sound."""
    found = Found()
    for entry in tree.list_dir(output_dir):
        path = output_dir / entry
        if attempt := names.parse_attempt_dir(entry):
            for checkpoint_dir in _units(path, attempt[0]):
                if age := _age_of_complete(checkpoint_dir):
                    found.complete[attempt[0]] = max(age, found.complete.get(attempt[0], NEVER))
        elif not entry.startswith(".") and tree.is_dir(path):
            if problems := verification.verify(path):
                raise Lost(f"{path}: {problems}")
            found.ages[entry] = age_of(manifests.read(path))
    latest = reads.read_text_or_none(output_dir / names.LATEST)
    if latest is not None and latest not in found.ages:
        raise Lost(f"latest names {latest}, and there is {sorted(found.ages)}")
    return found


def age_of(told: Any) -> Age:
    return (told.epoch, told.step or 0, told.attempt)


def _units(attempt: Path, name: str) -> Iterator[Path]:
    yield attempt / name
    yield from (attempt / e / name for e in tree.list_dir(attempt) if e.startswith(names.SUPERSEDED))


def _age_of_complete(checkpoint_dir: Path) -> Age | None:
    """The age of an attempt that only has to be finished: every vote is there and yes, and nothing says abort."""
    try:
        expected = records.parse_expected(reads.read_bytes(checkpoint_dir / names.EXPECTED), checkpoint_dir)
        votes = [records.parse_vote(reads.read_bytes(checkpoint_dir / names.VOTES / f), f) for f in expected.voters()]
    except (OSError, Damaged):
        return None
    with suppress(OSError):
        if not records.parse_decision(reads.read_bytes(checkpoint_dir / names.DECISION), checkpoint_dir).commit:
            return None
    return age_of(expected) if all(vote.error is None for vote in votes) else None


def journaled(folder: Path) -> dict[Age, set[str]]:
    """What the processes of all runs said of each attempt."""
    told: dict[Age, set[str]] = {}
    for journal in folder.iterdir():
        for line in journal.read_text().splitlines():
            epoch, step, attempt, word = line.split()
            told.setdefault((int(epoch), int(step), int(attempt)), set()).add(word)
    return told


def check_start(output_dir: Path, number: int, found: Found, *, alone: bool) -> None:
    """AssertionError unless a start has kept all that was there, has finished what was complete, and has left nothing
    of what was not. If it is not alone, another world may still be at that."""
    known = {told.name: age_of(told) for told in listing.committed(output_dir)}
    newest = max(known.values(), default=None)
    assert newest == found.newest, f"the newest is {newest}, and should be {found.newest}"
    for name, age in found.ages.items():
        assert known.get(name, (0, 0, 0)) >= age, f"{name} was there with {age}, now {known.get(name)}"
    for entry in tree.list_dir(output_dir):
        attempt = names.parse_attempt_dir(entry)
        ours = entry in (names.EPOCHS, names.TRASH, names.LATEST, names.HUB, names.COPIES) or entry in known
        assert ours or (attempt and attempt[1] == number), f"{entry} is left over"
    assert tree.list_dir(output_dir / names.TRASH) == [str(number)], tree.list_dir(output_dir / names.TRASH)
    for entry in tree.list_dir(output_dir / names.EPOCHS):
        told = names.parse_epoch_file(entry) or names.parse_aborted_file(entry)
        assert names.parse_temporary_file(entry) or number in (told or ()), f"{names.EPOCHS}/{entry} is left over"
    latest = listing.read_latest(output_dir)
    assert latest == max(known, key=lambda name: known[name], default=None) or not alone, (latest, known)


# --- the torture --------------------------------------------------------------------------------------------


class Kind(Protocol):
    """What is tortured."""

    points: Mapping[str, tuple[str, ...]]
    """The named points that each victim comes to."""
    patience_s: float
    """A blow that has not struck by then comes at once."""

    def start(self, torture: Torture, run: Run, blow: Blow, *, take_over: bool) -> None:
        """Fork a run that goes on from the newest checkpoint until it is killed. Whoever finds something wrong says
        `problem`."""

    def start_uploader(self, torture: Torture, run: Run, blow: Blow | None) -> None:
        """Fork the one that uploads, if that is a process of its own."""

    def pids(self, run: Run, victim: str) -> list[int]:
        """The living processes that a blow may strike."""

    def uploaded(self, torture: Torture) -> dict[str, Age]:
        """What has been uploaded whole."""

    def drain(self, torture: Torture) -> None:
        """Upload what is owed, while nobody else does; AssertionError if anything is left over, or not as it was."""

    def check(self, checkpoint_dir: Path, step: int | None) -> None:
        """AssertionError unless `unit` holds what was saved at `step`, and nothing else."""


@dataclass
class Torture:
    """Runs in one folder, one after the other."""

    kind: Kind
    folder: Path
    noise: random.Random
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each victim was struck, and where."""
    runs: int = 0
    found: Found = field(default_factory=Found)
    uploaded: dict[str, Age] = field(default_factory=dict)
    committed: int = 0

    def __post_init__(self) -> None:
        for part in (self.output_dir, self.upload_dir, self.journals):
            part.mkdir(parents=True)

    @property
    def output_dir(self) -> Path:
        return self.folder / "run"

    @property
    def upload_dir(self) -> Path:
        return self.folder / "uploads"

    @property
    def journals(self) -> Path:
        return self.folder / "journals"

    def strike(self) -> None:
        """Start one run, strike whom chance will have it, and judge what is left; Lost if anything is wrong."""
        victim = self.noise.choice(VICTIMS)
        when = self.noise.choices([ANY, OPERATION, "point"], [2, 2, 4])[0]
        if when == "point":
            when = self.noise.choice(self.kind.points[victim])
        nth = 1 + int(self.noise.expovariate(0.01 if when == OPERATION else 1.2))
        stop = self.noise.random() < 0.06
        if stop and victim == "committer":
            self.stop_committer(Blow(victim, when, nth, signal.SIGSTOP))
        elif stop and victim == "job":
            self.stop_job(Blow(victim, when, nth, signal.SIGSTOP))
        else:
            self.kill(Blow(victim, when, nth))

    def finish(self) -> None:
        """One more start, after which everything is as if there had never been a kill."""
        self.runs += 1
        run = Run(self.runs)
        run.fork("committer", self._finish)
        if not run.listen(lambda: not run.alive, LIMIT_S):
            raise Lost("the last start hangs")
        self._end(run, "at the end")

    def _finish(self) -> None:
        epoch = claims.claim(self.output_dir, run_id="torture", clusters={"actor": 2, "critic": 2})
        check_start(self.output_dir, epoch.number, self.found, alone=True)
        self.kind.drain(self)
        assert not (problems := verification.verify_run(self.output_dir)), problems
        epoch.release()

    def kill(self, blow: Blow) -> None:
        """One run that is killed, and what it leaves."""
        run = self._start(blow)
        where = self._struck(run, blow)
        victim = blow.victim if where else "job"  # nobody uploaded just then
        if blow.victim == "uploader":
            self.kind.start_uploader(self, run, None)
            run.listen(lambda: run.heard("problem"), self.noise.random() * self.kind.patience_s / 3)
        elif blow.victim != "job" and self.noise.random() < 0.5:
            self._let_others_end(run)
        self._end(run, f"{victim} was killed {where or ANY}")
        self.kills[where or ANY, victim] += 1

    def stop_committer(self, blow: Blow) -> None:
        """Let a committer stand still until another rank has taken over, and wake it up."""
        run = self._start(blow)
        where = self._struck(run, blow)
        run.listen(lambda: run.heard("problem"), QUIET_S)
        before = look(self.output_dir).ages
        run.wake()
        run.listen(lambda: run.heard("problem"), QUIET_S / 2)
        self._end(run, f"the committer stood still {where}")
        for name, age in before.items():
            kept = max(self.found.ages.get(name, NEVER), self.uploaded.get(name, NEVER))
            if kept < age:
                raise Lost(f"{name} of {age} was there while the committer stood still; after it woke up {kept}")
        self.kills["stopped; others went on; woken", blow.victim] += 1

    def stop_job(self, blow: Blow) -> None:
        """Let a whole run stand still until another one has taken over and saved, and wake it up."""
        run = self._start(blow)
        where = self._struck(run, blow)
        other = self._start(Blow("job", ANY, 0), take_over=True)
        if not other.listen(lambda: other.started or other.heard("problem"), LIMIT_S):
            raise Lost("a run that takes over does not start")
        other.listen(lambda: other.heard("problem"), self.kind.patience_s / 2)
        other.freeze()
        left = _contents(self.output_dir)
        run.wake()
        self._let_others_end(run)
        run.kill()
        changed = sorted({path for path, _ in _contents(self.output_dir) ^ left})
        if changed:
            raise Lost(f"run {run.number} stood still {where}, was taken over, and has then changed {changed}")
        run.close()
        self._end(other, f"it took over from one that stood still {where}")
        self.kills["stopped; another run took over; woken", blow.victim] += 1

    def _start(self, blow: Blow, *, take_over: bool = False) -> Run:
        self.runs += 1
        run = Run(self.runs)
        self.kind.start(self, run, blow, take_over=take_over)
        return run

    def _struck(self, run: Run, blow: Blow) -> str:
        """Wait for the blow, or strike now; where it hit, "" if there was nobody to hit."""
        if self.noise.random() < 0.8:  # the others are struck while they start
            run.listen(lambda: run.started or run.heard("struck") or run.heard("problem"), LIMIT_S)
        patience_s = self.kind.patience_s * (self.noise.random() if blow.when == ANY else 1)
        run.listen(lambda: run.heard("struck") or run.heard("problem"), patience_s)
        if struck := run.heard("struck"):
            run.listen(lambda: any(_is_down(pid) for pid in run.role_of), LIMIT_S)
            return str(struck[0])
        run.listen(lambda: self.kind.pids(run, blow.victim), self.kind.patience_s)
        victims = self.kind.pids(run, blow.victim)
        run.strike(victims if blow.victim == "job" else victims[:1], blow.how)
        return ANY if victims else ""

    @staticmethod
    def _let_others_end(run: Run) -> None:
        run.listen(lambda: all(run.role_of[pid] == "uploader" for pid in run.alive), QUIET_S)

    def _end(self, run: Run, what: str) -> None:
        """Kill what is left of a run, and judge what it has left."""
        run.kill()
        try:
            assert not (problems := run.heard("problem")), "; ".join(problems)
            self._judge()
        except (AssertionError, OSError, Damaged, NotFound) as problem:
            raise Lost(f"run {run.number}, {what}: {type(problem).__name__}: {problem}") from problem
        finally:
            run.close()

    def _judge(self) -> None:
        self.found = look(self.output_dir)
        for name, age in self.found.ages.items():
            assert age[1] == names.step_of(name), f"{name} says that it is step {age[1]}"
            self.kind.check(self.output_dir / name, age[1])
        for name, age in self.kind.uploaded(self).items():
            self.uploaded[name] = max(self.uploaded.get(name, NEVER), age)
        told = journaled(self.journals)
        torn = {age: words for age, words in told.items() if len(words) > 1}
        assert not torn, f"one rank was told yes and another no: {torn}"
        committed = [age for age, words in told.items() if words == {"committed"}]
        self.committed = len(committed)
        assert not committed or (self.found.newest or NEVER) >= max(committed), (self.found.newest, max(committed))
        for age in committed:
            name = names.checkpoint(age[1])
            kept = max(
                self.found.ages.get(name, NEVER), self.uploaded.get(name, NEVER), self.found.complete.get(name, NEVER)
            )
            assert kept >= age, f"{name} of {age} was committed; now it is neither here nor uploaded"


class Copies:
    """The part of a kind that uploads into a directory."""

    def uploaded(self, torture: Torture) -> dict[str, Age]:
        ages = {}
        for name in tree.list_dir(torture.upload_dir):
            if not name.startswith("."):
                copy = torture.upload_dir / name
                assert not (problems := verification.verify(copy)), problems
                ages[name] = age_of(manifests.read(copy))
                torture.kind.check(copy, ages[name][1])
                if name not in torture.found.ages:
                    shutil.rmtree(copy)  # looked at, and owed no more
        return ages

    def drain(self, torture: Torture) -> None:
        for name in file_system.owed(torture.output_dir, torture.upload_dir):
            file_system.upload(torture.output_dir / name, torture.upload_dir)
        newest = torture.found.newest or NEVER
        for entry in tree.list_dir(torture.upload_dir):
            attempt = names.parse_attempt_dir(entry)  # killed when all was done; the next newer upload removes it
            assert not attempt or attempt[1] >= newest[0], f"{torture.upload_dir / entry} is left over"


def _contents(folder: Path) -> set[tuple[str, bytes]]:
    return {(str(p.relative_to(folder)), p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
