"""Kill a run before every operation on the disk, and at every named point; see what the next start finds.

    python kill_points.py SCENARIO DIRECTORY STRIDE     prints how many deaths were survived
    python kill_points.py recovery DIRECTORY STRIDE     die in a save, then die again in the recovery
    python kill_points.py zombies DIRECTORY STRIDE      stop, let another run take over and save, wake up

A stride of 1 means every operation. A process of its own, so that forking stays cheap whatever the test session
has imported.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import runs

from roll_ckpt import names
from roll_ckpt.disk import failpoints, tree, writes
from roll_ckpt.errors import EpochLost
from roll_ckpt.transaction import attempts, claims, publication, settlement
from roll_ckpt.transaction.attempts import Attempt

Job = Callable[[Path], object]


def no_exchange() -> None:
    def exchange(a: Path, b: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", str(a), None, str(b))

    writes.exchange = exchange


def job_save(output_dir: Path, *, alone: bool = False) -> None:
    """Saves step 3, prunes to two checkpoints."""
    epoch = runs.claim(output_dir)
    assert runs.save(epoch, 3, "new", alone=alone).committed
    assert runs.prune(epoch, 2) == ["checkpoint-1"]


def job_first(output_dir: Path) -> None:
    """Saves step 3 as the first one of all; dies at its beginning only."""
    epoch = runs.claim(output_dir)
    attempts.begin(epoch, "checkpoint-3", step=3, expected=runs.CLUSTERS)


def job_again(output_dir: Path, *, alone: bool = False) -> None:
    """Saves step 2, which is there, again."""
    epoch = runs.claim(output_dir)
    assert runs.save(epoch, 2, "new", alone=alone).committed


def job_again_without_exchange(output_dir: Path, *, alone: bool = False) -> None:
    no_exchange()
    job_again(output_dir, alone=alone)


def job_claim(output_dir: Path) -> None:
    """Only recovers."""
    claims.claim(output_dir, run_id=runs.RUN, clusters=runs.CLUSTERS)


def job_rank(output_dir: Path) -> None:
    """One rank dies while it writes and votes; the lead notices by the time limit."""
    epoch = runs.claim(output_dir)
    attempt = attempts.begin(epoch, "checkpoint-3", step=3, expected=runs.CLUSTERS)
    observer, failpoints.observer = failpoints.observer, None
    listener, failpoints.listener = failpoints.listener, None

    def rank() -> None:
        failpoints.observer, failpoints.listener = observer, listener
        runs.vote(
            Attempt(output_dir, "checkpoint-3", 3, attempt.run_id, attempt.epoch, attempt.attempt,
                           runs.CLUSTERS, True, output_dir), "new", *runs.RANKS[3])  # fmt: skip

    died = runs.ended(runs.forked(rank))
    runs.other_ranks(attempt, "new", runs.RANKS[1:3])
    runs.vote(attempt, "new", *runs.RANKS[0])
    outcome = settlement.settle(attempt, lead=True, timeout_s=0.01)
    voted = tree.list_dir(output_dir / "checkpoint-3/votes")
    assert outcome.committed == bool(voted), outcome
    assert outcome.committed or "cluster 'critic' rank 1" in outcome.reason or "no vote lists" in outcome.reason
    runs.assert_sound(output_dir)
    if died:
        os.kill(os.getpid(), signal.SIGKILL)


# The job, the steps saved before, and the point after which it dies before every operation: what comes before
# is the same in all.
SCENARIOS: dict[str, tuple[Job, list[int], str]] = {
    "first": (job_first, [], ""),
    "save": (job_save, [1, 2], "vote.cast"),
    "again": (job_again, [1, 2], "vote.cast"),
    "only": (job_again_without_exchange, [2], "vote.cast"),
    "fallback": (job_again_without_exchange, [1, 2], "vote.cast"),
    "rank": (job_rank, [1, 2], ""),
}


def interrupted(
    job: Job, output_dir: Path, blow: signal.Signals, at: int, point: str | None = None, after: str = ""
) -> int:
    """Run `job` in a process that sends itself `blow` before its operation number `at`, or at a point.

    Operations are counted from the start, or from the point `after`.
    """
    count = itertools.count()

    def strike(*_: object) -> None:
        if next(count) == at:
            os.kill(os.getpid(), blow)

    def listen(reached: str, _: object) -> None:
        if reached == point:
            strike()
        elif reached == after:
            failpoints.observer = strike

    def work() -> None:
        if point is None and not after:
            failpoints.observer = strike
        failpoints.listener = listen
        job(output_dir)

    return runs.forked(work)


def each_death(job: Job, template: Path, folder: Path, after: str, stride: int) -> Iterator[tuple[str, Path]]:
    """(where it died, what it left) for every operation after a point, and for every point."""
    for at in itertools.count(0, stride):
        output_dir = fresh(template, folder)
        code = runs.ended(interrupted(job, output_dir, signal.SIGKILL, at, after=after))
        if code == 0:
            break
        assert code == -signal.SIGKILL, f"before operation {at}: exit code {code}"
        yield f"before operation {at}", output_dir
    for point in POINTS if job is job_save else []:
        output_dir = fresh(template, folder)
        code = runs.ended(interrupted(job, output_dir, signal.SIGKILL, 0, point))
        assert code == -signal.SIGKILL, f"at {point}: exit code {code}"
        yield f"at {point}", output_dir


POINTS = [
    *("begin.made", "vote.before", "vote.cast", "manifest.before", "manifest.written", "decision.linked"),
    *("commit.renamed", "latest.written", "attempt.removed", "prune.renamed", "prune.deleted"),
]


def fresh(template: Path, folder: Path) -> Path:
    output_dir = folder / "run"
    shutil.rmtree(output_dir, ignore_errors=True)
    if template.exists():
        shutil.copytree(template, output_dir, symlinks=True)
    return output_dir


def check(output_dir: Path, before: dict[str, str]) -> None:
    """What the next start finds, and that it can go on."""
    absent = set(before) - set(runs.assert_sound(output_dir))
    assert absent <= {"checkpoint-1", "checkpoint-2"}
    epoch = runs.claim(output_dir)
    runs.assert_clean(output_dir, epoch)
    found = runs.salts(output_dir, whole=False)
    assert set(found) - set(before) <= {"checkpoint-3"}
    lost = set(before) - set(found)
    assert not lost or (lost == {"checkpoint-1"} and found.get("checkpoint-3") == "new"), (before, found)
    if found:
        assert (output_dir / names.LATEST).read_text() in found
    assert runs.save(epoch, 4, "next", alone=True).committed
    assert (output_dir / names.LATEST).read_text() == "checkpoint-4"
    runs.assert_clean(output_dir, epoch)
    assert set(runs.salts(output_dir, whole=False)) == {*found, "checkpoint-4"}


def sweep(name: str, folder: Path, stride: int) -> int:
    job, steps, after = SCENARIOS[name]
    template = folder / "template"
    if steps:
        runs.history(template, steps)
    before = runs.salts(template)
    deaths = 0
    for where, output_dir in each_death(job, template, folder, after, stride):
        assert runs.ended(runs.forked(lambda: check(output_dir, before))) == 0, f"{name}: {where}"  # noqa: B023
        deaths += 1
    return deaths


def sweep_recovery(folder: Path, stride: int) -> int:
    """Die in a save, then die in each step of the recovery, then recover."""
    template, left = folder / "template", folder / "left"
    runs.history(template, [1, 2])
    before = runs.salts(template)
    deaths = 0
    for name in ("again", "fallback"):
        job = SCENARIOS[name][0]
        for at in itertools.count(0, stride):
            shutil.rmtree(left, ignore_errors=True)
            shutil.copytree(template, left)
            if runs.ended(interrupted(job, left, signal.SIGKILL, at)) == 0:
                break
            if not any(entry.name.endswith(".tmp") for entry in left.iterdir()):
                continue
            for again in itertools.count(1, stride):
                output_dir = fresh(left, folder)
                if runs.ended(interrupted(job_claim, output_dir, signal.SIGKILL, again)) == 0:
                    break
                assert runs.ended(runs.forked(lambda: check(output_dir, before))) == 0, (name, at, again)  # noqa: B023
                deaths += 1
    return deaths


def zombies(folder: Path, stride: int) -> int:
    """Stop a run before each operation after its claim; another run takes over and saves; then wake it up."""
    template = folder / "template"
    runs.history(template, [1, 2])
    stops = 0
    for job, after, step in (
        (job_save, "decision.linked", 1),
        (job_save, "epoch.claimed", stride),
        (job_again, "epoch.claimed", stride),
        (job_again_without_exchange, "epoch.claimed", stride),
    ):
        for at in itertools.count(0, step):
            output_dir = fresh(template, folder)
            work = functools.partial(lose, functools.partial(job, alone=True))
            pid = interrupted(work, output_dir, signal.SIGSTOP, at, after=after)
            if os.WIFEXITED(os.waitpid(pid, os.WUNTRACED)[1]):
                break
            assert runs.ended(runs.forked(lambda: take_over(output_dir))) == 0  # noqa: B023
            left = snapshot(output_dir)
            os.kill(pid, signal.SIGCONT)
            code = runs.ended(pid)
            assert code in (0, 3), f"{job.__name__} woken before operation {at}: exit code {code}"
            differs = sorted(set(snapshot(output_dir).items()) ^ set(left.items()))
            assert not differs, f"{job.__name__} woken before operation {at}: {differs}"
            stops += 1
    return stops


def lose(job: Job, output_dir: Path) -> None:
    try:
        job(output_dir)
    except (EpochLost, FileNotFoundError):  # the latter while it still writes: its directory has vanished
        os._exit(3)


def take_over(output_dir: Path) -> None:
    epoch = runs.claim(output_dir, take_over=True)
    assert epoch.number == 3
    runs.assert_clean(output_dir, epoch)
    assert runs.save(epoch, 4, "next", alone=True).committed


def snapshot(output_dir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output_dir)): path.read_bytes() if path.is_file() else b""
        for path in output_dir.rglob("*")
    }


if __name__ == "__main__":
    kind, where, every = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    publication._PATIENCE_S = 0.05
    if kind == "zombies":
        print(zombies(where, every))
    elif kind == "recovery":
        print(sweep_recovery(where, every))
    else:
        print(sweep(kind, where, every))
