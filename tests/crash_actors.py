"""Three who act on one checkpoint at once, one step at a time, in every order up to a bound.

    python crash_actors.py SCENARIO FOLDER SWITCHES STEPS STRIDE     prints how many orders were tried
    python crash_actors.py SCENARIO FOLDER SWITCHES STEPS MUTANT     prints what was noticed, after how many orders

Two jobs save together, each with a lead that decides; a third run takes over and recovers. They are threads that
run the real functions and stop before every look at the disk and every change of it; who goes on is decided here.
A switch is one moment at which the one who acts is left standing, to go on when it is called or the others have ended,
or for good (it has crashed), and another one goes on. STEPS says before which steps: all, or the decisive ones, which
give a thing the name under which the others look for it.

A mutant (MUTANTS) is the protocol with one rule broken: some order must show it.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import runs
from crash_model import fingerprint, read_tree
from kill_points import no_exchange
from patches import replace

from roll_ckpt import names
from roll_ckpt.disk import failpoints, reads, tree, writes
from roll_ckpt.errors import EpochLost, SaveFailed
from roll_ckpt.formats import records
from roll_ckpt.formats.records import Decision, Vote
from roll_ckpt.transaction import attempts, ballot, claims, publication, recovery, settlement, verification
from roll_ckpt.transaction import epochs as epochs_module
from roll_ckpt.transaction.attempts import Attempt
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.settlement import Outcome

runs.CLUSTERS = {"actor": 1, "critic": 1}
runs.RANKS = [(cluster, 0) for cluster in runs.CLUSTERS]
JOBS, NEWCOMER = tuple(runs.CLUSTERS), "newcomer"
PATIENCE_S, ENOUGH = 1000.0, 5000
LOOKS = {"list_dir": tree, "read_bytes": reads, "exists": tree}
INNER = {"fsync", "fsync_dir", "write"}  # change nothing that another process sees
END = "end"
STEPS = {
    "all": re.compile(""),
    "decisive": re.compile(rf"({END}|link|rename|exchange|mkdir \.checkpoint)(?!.* (rank_0\.pt|empty)$)"),
}


class Ended(BaseException):
    """The play is over for those who were left standing for good."""


@dataclass(frozen=True)
class Switch:
    """Before step `step`, whoever was to do it stands still, or dies; `to` goes on."""

    step: int
    to: str
    dies: bool


@dataclass
class Play:
    """One run of all actors in one order."""

    works: dict[str, Callable[[], object]]
    switches: dict[int, Switch]
    clock: float = 0.0
    step: int = 0
    turn: str = ""
    over: bool = False
    steps: list[tuple[str, str]] = field(default_factory=list)
    results: dict[str, object] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    paused: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)
    decisions: list[bool] = field(default_factory=list)
    """Whether to commit, as it was linked."""
    started: set[str] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self) -> None:
        threads = [threading.Thread(target=self._act, args=(name,), name=name) for name in self.works]
        for thread in threads:
            thread.start()
        with self.changed:
            self._hand_on()
            ended = self.changed.wait_for(lambda: self.over, timeout=60)
            self.over = True
            self.changed.notify_all()
        for thread in threads:
            thread.join()
        assert ended, f"{self.turn} hangs; the last steps were {self.steps[-5:]}"

    def point(self, what: str) -> None:
        """An actor is about to do something that others can see, or to look at what they did."""
        me = threading.current_thread().name
        if me not in self.works or me in self.unseen:
            return
        with self.changed:
            if self.over:
                raise Ended
            self.step += 1
            assert self.step < ENOUGH, "they never end"
            self.steps.append((me, what))
            switch = self.switches.get(self.step)
            if switch is not None and switch.to != me and switch.to not in self.results and switch.to not in self.dead:
                (self.dead if switch.dies else self.paused).add(me)
                self._give(switch.to)
                self._await(me)

    def sleep(self, seconds: float) -> None:
        """An actor waits for the others. Once they have ended, the time only passes."""
        me = threading.current_thread().name
        if me not in self.works:
            self.clock += PATIENCE_S
            return
        with self.changed:
            self.waiting.add(me)
            self._hand_on()
            self._await(me)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What an actor does in here is the test's own, and no step."""
        self.unseen.add(me := threading.current_thread().name)
        try:
            yield
        finally:
            self.unseen.discard(me)

    def _act(self, me: str) -> None:
        try:
            with self.changed:
                self._await(me)
            try:
                result: object = self.works[me]()
            except (EpochLost, SaveFailed, FileNotFoundError) as problem:
                result = problem
            except Exception as problem:
                result = AssertionError(f"{me}: {type(problem).__name__}: {problem}")
            self.point(END)
            with self.changed:
                self.results[me] = result
                self._hand_on()
        except Ended:
            pass

    def _await(self, me: str) -> None:
        self.changed.wait_for(lambda: self.over or (self.turn == me and me not in self.dead))
        if self.over:
            raise Ended

    def _give(self, to: str) -> None:
        self.turn = to
        self.started.add(to)
        self.waiting.discard(to)
        self.paused.discard(to)
        self.changed.notify_all()

    def _hand_on(self) -> None:
        """The next who can act. If all wait, time passes; then come the paused, then a newcomer who was not called."""
        alive = [name for name in self.works if name not in self.dead and name not in self.results]
        here = [name for name in alive if name in self.started or name != NEWCOMER]
        active = [name for name in here if name not in self.paused]
        if active and all(name in self.waiting for name in active):
            self.waiting.clear()
            self.clock += PATIENCE_S
        ready = [name for name in active if name not in self.waiting] or here or alive
        if ready:
            self._give(ready[0])
        else:
            self.over = True
            self.changed.notify_all()


@dataclass(frozen=True)
class Scenario:
    """What is there before, the step that is saved, and how the second job votes."""

    before: list[int]
    step: int
    late: bool = False
    """It votes when the time is over."""
    twice: bool = False
    """It votes again, otherwise."""
    exchange: bool = True
    """Whether the file system has an exchange."""


SCENARIOS = {
    "save": Scenario([1], 2),
    "again": Scenario([1, 2], 2),
    "fallback": Scenario([1, 2], 2, exchange=False),
    "late": Scenario([1], 2, late=True),
    "twice": Scenario([1], 2, twice=True),
}


def play(scenario: Scenario, template: Path, folder: Path, switches: tuple[Switch, ...]) -> Play:
    """Let both jobs save and the newcomer take over, in the order that `switches` make; check the end."""
    output_dir = folder / "run"
    shutil.rmtree(output_dir, ignore_errors=True)
    shutil.copytree(template, output_dir)
    runs.unique_names("ac70ac70")
    epochs = {
        cluster: claims.claim(output_dir, run_id=runs.RUN, clusters={cluster: 1}, expected_clusters=runs.CLUSTERS)
        for cluster in JOBS
    }
    claimed: list[Epoch] = []
    name = names.checkpoint(scenario.step)

    def job(cluster: str) -> Outcome:
        attempt = attempts.begin(epochs[cluster], name, step=scenario.step, expected=runs.CLUSTERS)
        second = cluster == JOBS[-1]
        while second and scenario.late and not stage.clock:
            stage.sleep(0)
        runs.vote(attempt, "new", cluster, 0)
        if second and scenario.twice:
            with suppress(SaveFailed):
                ballot.cast(attempt, Vote(cluster, 0, attempt.epoch, attempt.attempt, (), error="no, after all"))
        return settlement.settle(attempt, lead=True, timeout_s=PATIENCE_S / 2)

    def newcomer() -> None:
        claimed.append(runs.claim(output_dir, take_over=True))
        with stage.aside():
            left["by the newcomer"] = sound(output_dir)

    left: dict[str, dict[str, str]] = {}
    stage = Play(
        {cluster: lambda c=cluster: job(c) for cluster in JOBS} | {NEWCOMER: newcomer},  # type: ignore[misc]
        {switch.step: switch for switch in switches},
    )
    settlement.time = publication.time = recovery.time = SimpleNamespace(
        sleep=stage.sleep, monotonic=lambda: stage.clock
    )  # type: ignore[assignment]
    known = {name: getattr(module, name) for name, module in LOOKS.items()}
    known |= {name: getattr(writes, name) for name in ("link", "rename_new", "rename")}

    def watched(name: str) -> Callable[[Path], object]:
        def look(path: Path) -> object:
            stage.point(f"{name} {path.name}")
            return known[name](path)

        return look

    def moved(name: str) -> Callable[[Path, Path], object]:
        def move(source: Path, target: Path) -> object:
            done = known[name](source, target)
            if target.name == names.DECISION and names.step_of(target.parent.name) and done is not False:
                stage.decisions.append(records.parse_decision(target.read_bytes(), target).commit)
            return done

        return move

    def observe(operation: str, paths: tuple[str, ...]) -> None:
        if operation not in INNER:
            stage.point(f"{operation} {' '.join(Path(path).name for path in paths)}")

    for one, module in LOOKS.items():
        setattr(module, one, watched(one))
    for move in ("link", "rename_new", "rename"):
        setattr(writes, move, moved(move))
    failpoints.observer = observe
    try:
        stage.run()
    finally:
        failpoints.observer = None
        for one, function in known.items():
            setattr(LOOKS.get(one, writes), one, function)
    try:
        judge(stage, output_dir, name, left)
    finally:
        for held in (*epochs.values(), *claimed):
            held.release()
    return stage


def sound(output_dir: Path) -> dict[str, str]:
    problems = [p for p in verification.verify_run(output_dir) if (p.path, p.kind) != (names.LATEST, "missing")]
    assert not problems, problems
    return runs.salts(output_dir, whole=False)


def judge(stage: Play, output_dir: Path, name: str, left: dict[str, dict[str, str]]) -> None:
    """What must be true at the end, and after one more start."""
    for result in stage.results.values():
        assert not isinstance(result, AssertionError), result
    found, again = after(output_dir)
    told = [stage.results[cluster] for cluster in JOBS if cluster in stage.results]
    answers = {result.committed for result in told if isinstance(result, Outcome)}
    assert len(answers) < 2, f"one job was told yes and the other no: {told}"
    assert again.items() >= {k: v for k, v in found.items() if k != name or v == "new"}.items(), (found, again)
    for moment, before in left.items():
        assert before == again, f"{moment} there was {before}, now {again}"
    for committed in (*answers, *stage.decisions[:1]):
        assert (again.get(name) == "new") == committed, f"told {told}, decided {stage.decisions}, there is {again}"


ENDS: dict[bytes, tuple[dict[str, str], dict[str, str]]] = {}


def after(output_dir: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The checkpoints that were left, and those after one more start; of equal states once."""
    end = fingerprint(read_tree(output_dir))
    if end not in ENDS:
        found = sound(output_dir)
        last = runs.claim(output_dir, take_over=True)
        try:
            ENDS[end] = found, sound(output_dir)
            runs.assert_clean(output_dir, last)
        finally:
            last.release()
    return ENDS[end]


def next_switches(stage: Play, steps: re.Pattern[str]) -> Iterator[Switch]:
    """Every switch before one of `steps` that can follow the last one of a play."""
    last = max(stage.switches, default=0)
    for step, (who, what) in enumerate(stage.steps[last:], last + 1):
        for to in stage.works if steps.match(what) else ():
            if to != who:
                yield Switch(step, to, dies=False)
                if not what.startswith((END, *LOOKS)):  # dead before a look or behind it is the same
                    yield Switch(step, to, dies=True)


def sweep(
    scenario: Scenario, folder: Path, switches: int, steps: re.Pattern[str], stride: int = 1
) -> tuple[int, Counter[str], str]:
    """Play every order, or one of `stride`, with up to so many switches, until one shows something wrong.

    Returns how many, how they ended, and what was wrong.
    """
    if not scenario.exchange:
        no_exchange()
    template = folder / "template"
    runs.history(template, scenario.before)
    ends: Counter[str] = Counter()
    count = itertools.count()
    plays, dice = 0, random.Random(5)
    todo: list[tuple[Switch, ...]] = [()]
    while todo:
        order = todo.pop(dice.randrange(len(todo)))
        plays += 1
        try:
            stage = play(scenario, template, folder, order)
        except Exception as problem:
            return plays, ends, f"{order}: {problem}"
        for result in stage.results.values():
            ends[f"{type(result).__name__} {getattr(result, 'committed', '')}".strip()] += 1
        if len(order) < switches:
            # Only the last level is thinned out: it is the widest, and the others lead to it.
            todo += [
                (*order, switch)
                for switch in next_switches(stage, steps)
                if len(order) + 1 < switches or next(count) % stride == 0
            ]
    return plays, ends, ""


# --- what if a rule were broken -------------------------------------------------------------------------------


def overwritten(is_it: Callable[[str], bool]) -> None:
    """Where the first one wins, the last one does."""
    link_durable = writes.link_durable

    def rename_durable(path: Path, data: bytes, *, scratch: Path | None = None) -> bool:
        if not is_it(path.name):
            return link_durable(path, data, scratch=scratch)
        writes.write_durable(path, data, scratch=scratch)
        return True

    replace(link_durable, rename_durable)


def own_decision() -> None:
    """Who comes second with a decision carries out its own."""
    decide, link_durable = ballot.decide, writes.link_durable
    mine = threading.local()

    def link(path: Path, data: bytes, *, scratch: Path | None = None) -> bool:
        if path.name == names.DECISION:
            mine.decision = records.parse_decision(data, path)
        return link_durable(path, data, scratch=scratch)

    def stubborn(*arguments: Any, **options: Any) -> Decision | None:
        mine.decision = None
        won = decide(*arguments, **options)
        return won and (mine.decision or won)

    replace(link_durable, link)
    replace(decide, stubborn)


def any_checkpoint() -> None:
    """What has the name is taken for what this attempt has written."""

    def carries(checkpoint_dir: Path, attempt: Attempt) -> bool:
        return tree.exists(checkpoint_dir / names.MANIFEST)

    replace(attempts.carries, carries)


def old_epoch() -> None:
    """A job does not notice that its epoch is over."""
    newest = epochs_module.newest_number

    def first_answer(output_dir: Path) -> int:
        return newest(output_dir) if threading.current_thread().name not in JOBS else 2

    replace(newest, first_answer)


def shared_place() -> None:
    """Who replaces a checkpoint leaves the new one where the others find it, too."""

    def take(attempt: Attempt, *, patient: bool) -> Path:
        if attempt.name not in tree.list_dir(attempt.directory):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(attempt.checkpoint_dir))
        return attempt.directory

    replace(publication._take, take)


MUTANTS = {
    "own decision": own_decision,
    "decision renamed": lambda: overwritten(lambda name: name == names.DECISION),
    "any checkpoint": any_checkpoint,
    "old epoch": old_epoch,
    "shared place": shared_place,
    "vote overwritten": lambda: overwritten(lambda name: names.parse_vote_file(name) is not None),
}


def main(name: str, folder: Path, switches: int, steps: str, how: str) -> None:
    logging.disable(logging.WARNING)
    runs.think_once()
    if how in MUTANTS:
        MUTANTS[how]()
        plays, _, problem = sweep(SCENARIOS[name], folder, switches, STEPS[steps])
        print(f"{plays} orders: {problem or 'nothing was noticed'}")
    else:
        plays, ends, problem = sweep(SCENARIOS[name], folder, switches, STEPS[steps], int(how))
        assert not problem, f"{name}: {problem}"
        print(f"{name}: {plays} orders with up to {switches} switches at {steps} steps; {dict(ends)}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
