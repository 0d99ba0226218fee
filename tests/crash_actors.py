"""Three who act on one checkpoint at once, one step at a time, in every order up to a bound.

    python crash_actors.py SCENARIO FOLDER STRIDE SWITCHES     prints how many orders were tried

Two worlds save together, each with a lead that decides; a third run takes over and recovers. They are threads that
run the real functions and stop before every look at the disk and every change of it; who goes on is decided here.
A switch is one moment at which the one who acts is left standing, to go on when the others have ended, or for good
(it has crashed), and another one goes on. All orders with one switch are tried, and those with two.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import runs
from kill_points import no_exchange

from roll_ckpt import commit, disk, names, verify
from roll_ckpt.errors import EpochLost, SaveFailed

runs.CLUSTERS = {"actor": 1, "critic": 1}
runs.RANKS = [(cluster, 0) for cluster in runs.CLUSTERS]
WORLDS, NEWCOMER = tuple(runs.CLUSTERS), "newcomer"
PATIENCE_S, STEPS = 1000.0, 5000
LOOKS = ("list_dir", "read_bytes", "exists")
INNER = {"fsync", "fsync_dir", "write"}  # change nothing that another process sees


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
    started: set[str] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self) -> None:
        threads = [threading.Thread(target=self._act, args=(name,), name=name) for name in self.works]
        for thread in threads:
            thread.start()
        with self.changed:
            self._hand_on()
            self.changed.wait_for(lambda: self.over, timeout=60)
            self.over = True
            self.changed.notify_all()
        for thread in threads:
            thread.join()

    def point(self, what: str) -> None:
        """An actor is about to do something that others can see, or to look at what they did."""
        me = threading.current_thread().name
        if me not in self.works:
            return
        with self.changed:
            if self.over:
                raise Ended
            self.step += 1
            assert self.step < STEPS, "they never end"
            self.steps.append((me, what))
            switch = self.switches.get(self.step)
            if switch is not None and switch.to != me and switch.to not in self.results and switch.to not in self.dead:
                if switch.dies:
                    self.dead.add(me)
                self.waiting.discard(switch.to)
                self._give(switch.to)
                self._await(me)

    def sleep(self, seconds: float) -> None:
        """An actor waits for the others."""
        me = threading.current_thread().name
        with self.changed:
            self.waiting.add(me)
            self._hand_on()
            self._await(me)

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
        self.changed.notify_all()

    def _hand_on(self) -> None:
        """The next of those who can act; if all wait, time passes; a newcomer who was not called comes last."""
        alive = [name for name in self.works if name not in self.dead and name not in self.results]
        here = [name for name in alive if name != NEWCOMER or name in self.started]
        if here and all(name in self.waiting for name in here):
            self.waiting.clear()
            self.clock += PATIENCE_S
        ready = [name for name in here if name not in self.waiting] or alive
        if ready:
            self._give(ready[0])
        else:
            self.over = True
            self.changed.notify_all()


def play(step: int, template: Path, folder: Path, switches: tuple[Switch, ...]) -> Play:
    """Let both worlds save `step` and the newcomer take over, in the order that `switches` make; check the end."""
    output_dir = folder / "run"
    shutil.rmtree(output_dir, ignore_errors=True)
    shutil.copytree(template, output_dir)
    epochs = {
        cluster: commit.claim(output_dir, run_id=runs.RUN, clusters={cluster: 1}, expected_clusters=runs.CLUSTERS)
        for cluster in WORLDS
    }
    claimed: list[commit.Epoch] = []

    def world(cluster: str) -> commit.Outcome:
        attempt = commit.begin(epochs[cluster], names.checkpoint(step), step=step, expected=runs.CLUSTERS)
        runs.vote(attempt, "new", cluster, 0)
        return commit.settle(attempt, lead=True, timeout_s=PATIENCE_S / 2, clock=lambda: stage.clock)

    def newcomer() -> None:
        claimed.append(runs.claim(output_dir, take_over=True))
        left["by the newcomer"] = sound(output_dir)

    left: dict[str, dict[str, str]] = {}
    stage = Play(
        {cluster: lambda c=cluster: world(c) for cluster in WORLDS} | {NEWCOMER: newcomer},  # type: ignore[misc]
        {switch.step: switch for switch in switches},
    )
    commit.time = SimpleNamespace(sleep=stage.sleep, monotonic=lambda: stage.clock)  # type: ignore[assignment]
    looks = {name: getattr(disk, name) for name in LOOKS}

    def watched(name: str) -> Callable[[Path], object]:
        def look(path: Path) -> object:
            stage.point(f"{name} {path.name}")
            return looks[name](path)

        return look

    def observe(operation: str, paths: tuple[str, ...]) -> None:
        if operation not in INNER:
            stage.point(f"{operation} {' '.join(Path(path).name for path in paths)}")

    for name in LOOKS:
        setattr(disk, name, watched(name))
    disk.observer = observe
    try:
        stage.run()
    finally:
        disk.observer = None
        for name, function in looks.items():
            setattr(disk, name, function)
    try:
        judge(stage, output_dir, names.checkpoint(step), left)
    finally:
        for epoch in (*epochs.values(), *claimed):
            epoch.release()
    return stage


def sound(output_dir: Path) -> dict[str, str]:
    problems = [p for p in verify.verify_run(output_dir) if (p.path, p.kind) != (names.LATEST, "missing")]
    assert not problems, problems
    return runs.salts(output_dir, whole=False)


def judge(stage: Play, output_dir: Path, name: str, left: dict[str, dict[str, str]]) -> None:
    """What must be true at the end, and after one more start."""
    found = sound(output_dir)
    told = [stage.results[cluster] for cluster in WORLDS if cluster in stage.results]
    for result in stage.results.values():
        assert not isinstance(result, AssertionError), result
    committed = {result.committed for result in told if isinstance(result, commit.Outcome)}
    assert len(committed) < 2, f"one world was told yes and the other no: {told}"
    last = runs.claim(output_dir, take_over=True)
    try:
        again = sound(output_dir)
        runs.assert_clean(output_dir, last)
        assert again.items() >= {k: v for k, v in found.items() if k != name or v == "new"}.items(), (found, again)
        for moment, before in left.items():
            assert before == again, f"{moment} there was {before}, now {again}"
        if committed:
            assert (again.get(name) == "new") == committed.pop(), (told, again)
    finally:
        last.release()


# What is there before, and the step that is saved.
SCENARIOS = {"save": ([1], 2), "again": ([1, 2], 2), "fallback": ([1, 2], 2)}


def orders(first: Play, switches: int, stride: int) -> Iterator[tuple[Switch, ...]]:
    """Every order with one switch, or every so-manieth with two."""
    actors = list(first.works)
    single = [
        Switch(step, to, dies)
        for step in range(1, len(first.steps) + 1)
        for to in actors
        for dies in (False, True)
        if to != first.steps[step - 1][0]
    ]
    yield from ((switch,) for switch in single[:: stride if switches == 1 else 1])
    if switches == 2:
        pairs = ((a, b) for a, b in itertools.combinations(single, 2) if a.step < b.step)
        yield from itertools.islice(pairs, 0, None, stride)


def sweep(name: str, folder: Path, stride: int, switches: int) -> str:
    steps, step = SCENARIOS[name]
    if name == "fallback":
        no_exchange()
    template = folder / "template"
    runs.history(template, steps)
    first = play(step, template, folder, ())
    assert [first.results[cluster] for cluster in WORLDS] == [commit.Outcome(True)] * 2
    tried = 0
    ends: set[str] = set()
    for order in orders(first, switches, stride):
        try:
            stage = play(step, template, folder, order)
        except BaseException:
            print(f"{name}: {order}, which are {[first.steps[s.step - 1] for s in order]}", file=sys.stderr)
            raise
        ends |= {
            type(r).__name__ + (str(r.committed) if isinstance(r, commit.Outcome) else "")
            for r in stage.results.values()
        }
        tried += 1
    return f"{name}: {len(first.steps)} steps, {tried} orders with up to {switches} switches; ends: {sorted(ends)}"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(sweep(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
