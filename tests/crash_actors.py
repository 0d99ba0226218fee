"""Three who act on one checkpoint at once, one step at a time, in every order up to a bound.

    python crash_actors.py SCENARIO FOLDER SWITCHES STRIDE     prints how many orders were tried

Two worlds save together, each with a lead that decides; a third run takes over and recovers. They are threads that
run the real functions and stop before every look at the disk and every change of it; who goes on is decided here.
A switch is one moment at which the one who acts is left standing, to go on when it is called or the others have ended,
or for good (it has crashed), and another one goes on. With one switch every step is such a moment; with more, the
links and renames are, which alone decide.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
import threading
from collections import Counter
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
    paused: set[str] = field(default_factory=set)
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
                (self.dead if switch.dies else self.paused).add(me)
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


def play(step: int, late: bool, template: Path, folder: Path, switches: tuple[Switch, ...]) -> Play:
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
        while late and cluster == WORLDS[-1] and not stage.clock:
            stage.sleep(0)
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


# What is there before, the step that is saved, and whether the last vote comes when the time is over.
SCENARIOS = {
    "save": ([1], 2, False),
    "again": ([1, 2], 2, False),
    "fallback": ([1, 2], 2, False),
    "late": ([1], 2, True),
}


def next_switches(stage: Play, only: tuple[str, ...]) -> Iterator[Switch]:
    """Every switch that can follow the last one of a play, before those steps that begin with one of `only`."""
    last = max(stage.switches, default=0)
    for step, (who, what) in enumerate(stage.steps[last:], last + 1):
        if what.startswith(only):
            for to, dies in itertools.product(stage.works, (False, True)):
                if to != who:
                    yield Switch(step, to, dies)


def sweep(name: str, folder: Path, switches: int, stride: int) -> str:
    """Play every order, or one of `stride`, with up to so many switches."""
    steps, step, late = SCENARIOS[name]
    if name == "fallback":
        no_exchange()
    template = folder / "template"
    runs.history(template, steps)
    only = ("",) if switches == 1 else ("link", "rename", "exchange")
    ends: Counter[str] = Counter()
    count = itertools.count()
    plays = 0
    todo: list[tuple[Switch, ...]] = [()]
    while todo:
        order = todo.pop()
        try:
            stage = play(step, late, template, folder, order)
        except BaseException:
            print(f"{name}: {order}", file=sys.stderr)
            raise
        plays += 1
        for result in stage.results.values():
            ends[f"{type(result).__name__} {getattr(result, 'committed', '')}".strip()] += 1
        if len(order) < switches:
            # Only the last level is thinned out: it is the widest, and the others lead to it.
            todo += [
                (*order, switch)
                for switch in next_switches(stage, only)
                if len(order) + 1 < switches or next(count) % stride == 0
            ]
    return f"{name}: {plays} orders with up to {switches} switches; {dict(ends)}"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(sweep(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
