"""Cut the power behind every operation of a run; see what lies there, and what the next start makes of it.

    LD_PRELOAD=crash_record.so python crash_points.py sweep FOLDER SCENARIO:STRIDE:STRIDE_AGAIN...  what was tried
    ...                                               unnoticed FOLDER    the fsyncs that nothing would miss
    ...                                               noticed FOLDER SCENARIO SITES...    of these, those one would
    ...                                               order FOLDER        whether a manifest that comes late is noticed

The runs are recorded once (`crash_record`), what a crash may leave is worked out (`crash_model`), and each such
state is put on a real disk, looked at, and recovered by the real `commit.claim`.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import runs
from crash_model import WHOLE, Trace, Tree, fingerprint, make_tree
from crash_record import note, record
from kill_points import no_exchange

from roll_ckpt import names
from roll_ckpt.config import Settings
from roll_ckpt.disk import tree, writes
from roll_ckpt.formats import manifests, sealed_json
from roll_ckpt.formats.image import FileImage
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import attempts, ballot, publication, settlement, verification
from roll_ckpt.transaction.attempts import Attempt
from roll_ckpt.transaction.ballot import Ballot
from roll_ckpt.transaction.epochs import Epoch

publication._PATIENCE_S = 0.0  # nobody else lives here
SETTINGS = Settings(commit_timeout_s=20, io={"block_bytes": 65536}, staging={"arena_bytes": 1 << 20})
RUN = "run"
FEWER = 5  # one of so many recoveries is recorded, to see whether it is a way of recovering not yet cut
runs.CLUSTERS = {"actor": 1, "critic": 1}
runs.RANKS = [(cluster, 0) for cluster in runs.CLUSTERS]
BEFORE, FIRST, SECOND, LATER = "beefbeef", "f1f1f1f1", "2ec02ec0", "1a7e1a7e"


# --- what is recorded ---------------------------------------------------------------------------------------


def save(epoch: Epoch, step: int, salt: str) -> None:
    """One checkpoint through the real corridor: each cluster writes, then each votes, then one settles."""
    attempt = attempts.begin(epoch, names.checkpoint(step), step=step, expected=runs.CLUSTERS)
    (attempt.directory / "helper.py").write_text(salt)
    one = Save(attempt, SETTINGS, 0, tuple(runs.CLUSTERS))
    with one.staging():
        for cluster in runs.CLUSTERS:
            stage(one.add_cluster(cluster, {}), salt)
            one.cluster_saves[cluster]._staged[
                -1
            ].transfer.wait_written()  # one after the other: the same order each time
    one.wait()


def stage(cluster_save: ClusterSave, salt: str) -> None:
    """One file of ours and one that stock code wrote, as the backends do."""
    folder = cluster_save.attempt.checkpoint_dir / cluster_save.cluster
    writes.make_dirs(folder)
    data = runs.contents(salt, cluster_save.cluster, cluster_save.rank)
    cluster_save.stage(folder / f"rank_{cluster_save.rank}.pt", FileImage.of_bytes(data), overlap=False)
    stock = folder / "stock" / f"rank_{cluster_save.rank}.json"
    stock.parent.mkdir(exist_ok=True)
    stock.write_text(salt)
    cluster_save.adopt(stock)


def saves(step: int, *, keep: int = 0) -> Callable[[Path], None]:
    def work(output_dir: Path) -> None:
        epoch = runs.claim(output_dir)
        note("may 1")
        save(epoch, step, "new")
        note("must 1")
        if keep:
            note("may 2")
            runs.prune(epoch, keep)
            note("must 2")
        epoch.release()

    return work


def without_exchange(work: Callable[[Path], None]) -> Callable[[Path], None]:
    def without(output_dir: Path) -> None:
        exchange = writes.exchange
        no_exchange()
        try:
            work(output_dir)
        finally:
            writes.exchange = exchange

    return without


def gives_up(output_dir: Path) -> None:
    """The last vote comes when the time is over: the attempt is abandoned, and stays so."""
    epoch = runs.claim(output_dir)
    attempt = attempts.begin(epoch, "checkpoint-3", step=3, expected=runs.CLUSTERS)
    for cluster, rank in runs.RANKS[1:]:
        runs.vote(attempt, "new", cluster, rank)
    late = runs.write(attempt, "new", *runs.RANKS[0])
    decision = ballot.decide(attempt, Ballot(), attempt.epoch, over=True)
    assert decision is not None and not decision.commit
    ballot.cast(attempt, late)
    assert not settlement.settle(attempt, lead=True, timeout_s=0).committed
    epoch.release()


def stepped_aside(output_dir: Path) -> None:
    """A save without exchange was cut after the old checkpoint had stepped aside, and its decision is damaged."""

    def work() -> None:
        rename = writes.rename

        def cut(source: Path, target: Path) -> None:
            rename(source, target)
            if ".old" in target.parts:
                (source.parent / ".checkpoint-2.2.1.tmp" / target.parts[-3] / "checkpoint-2/decision").write_text("{}")
                os._exit(0)

        writes.rename = cut
        without_exchange(lambda _: runs.save(runs.claim(output_dir), 2, "new", alone=True))(output_dir)

    runs.history(output_dir, [1, 2])
    assert runs.ended(runs.forked(work)) == 0


def recovers(output_dir: Path) -> None:
    runs.claim(output_dir).release()
    note("must 0")


@dataclass
class Scenario:
    """What is run, what lies there before, and the checkpoints before and after each of its steps."""

    work: Callable[[Path], None]
    prepare: Callable[[Path], None]
    stages: list[dict[str, str]]
    recover: Callable[[Path], None] = recovers


def history(*steps: int) -> Callable[[Path], None]:
    return lambda output_dir: runs.history(output_dir, list(steps)) if steps else None


OLD = {f"checkpoint-{step}": "old" for step in (1, 2)}
NEW = {"checkpoint-3": "new"}
AGAIN = {"checkpoint-2": "new"}
SCENARIOS = {
    "first": Scenario(saves(3), history(), [{}, NEW]),
    "save": Scenario(saves(3, keep=2), history(1, 2), [OLD, OLD | NEW, {"checkpoint-2": "old"} | NEW]),
    "again": Scenario(saves(2), history(1, 2), [OLD, OLD | AGAIN]),
    "fallback": Scenario(without_exchange(saves(2)), history(1, 2), [OLD, OLD | AGAIN], without_exchange(recovers)),
    "only": Scenario(
        without_exchange(saves(2)), history(2), [{"checkpoint-2": "old"}, AGAIN], without_exchange(recovers)
    ),
    "abort": Scenario(gives_up, history(1, 2), [OLD]),
    "undo": Scenario(recovers, stepped_aside, [OLD]),
}


# --- what is found ------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a crash left, and what the next start made of it."""

    problem: str = ""
    checkpoints: dict[str, str] = field(default_factory=dict)
    latest: str | None = None
    helper: str | None = None


def look(output_dir: Path) -> dict[str, str]:
    """The checkpoints, and what holds at every instant, under any crash, before anything is recovered."""
    found = runs.salts(output_dir, whole=False)
    visible = {name for name in tree.list_dir(output_dir) if not name.startswith(".")}
    assert visible <= {*found, names.LATEST, "helper.py"}, visible
    problems = [p for p in verification.verify_run(output_dir) if (p.path, p.kind) != (names.LATEST, "missing")]
    assert not problems, problems
    return found


def recovered(output_dir: Path) -> Found:
    """Look, recover, look again."""
    if output_dir.exists():
        look(output_dir)
    epoch = runs.claim(output_dir)
    try:
        found = look(output_dir)
        runs.assert_clean(output_dir, epoch)
        latest, helper = output_dir / names.LATEST, output_dir / "helper.py"
        return Found(
            "",
            found,
            latest.read_text() if latest.exists() else None,
            helper.read_text() if helper.exists() else None,
        )
    finally:
        epoch.release()


class Disk:
    """Where states are put to be recovered; each only once."""

    def __init__(self, folder: Path, recover: Callable[[Path], None]) -> None:
        self.folder = folder
        self.recover = recover
        self.known: dict[bytes, Found] = {}

    def put(self, tree: Tree) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        make_tree(self.folder, tree)
        return self.folder / RUN

    def find(self, tree: Tree) -> Found:
        key = fingerprint(tree)
        if key not in self.known:
            output_dir = self.put(tree)
            runs.unique_names(LATER)
            try:
                self.known[key] = recovered(output_dir)
            except Exception:
                self.known[key] = Found(traceback.format_exc(limit=-3))
        return self.known[key]

    def recovery(self, tree: Tree) -> Trace:
        """The operations of the recovery of a state."""
        output_dir = self.put(tree)
        runs.unique_names(SECOND)
        return record(self.folder, lambda: self.recover(output_dir))


def objection(found: Found, allowed: list[dict[str, str]]) -> str:
    """Why what was found is not what may be there, "" if it is."""
    if found.problem:
        return found.problem
    if found.checkpoints not in allowed:
        return f"found {found.checkpoints}, which is none of {allowed}"
    if (found.latest is None) != (not found.checkpoints):
        return f"latest is {found.latest}, of {found.checkpoints}"
    new = [name for name, salt in found.checkpoints.items() if salt == "new"]
    if new and (found.latest, found.helper) != (new[0], "new"):
        return f"{new[0]} is new, but latest names {found.latest} and helper.py holds {found.helper!r}"
    if found.helper not in (None, "old", "new"):
        return f"helper.py is torn: {found.helper!r}"
    return ""


@dataclass
class Crash:
    """One crash: behind which operation, what it left, and the checkpoints that may be found."""

    where: str
    tree: Tree
    allowed: list[dict[str, str]]


def crashes(trace: Trace, stages: list[dict[str, str]], stride: int = 1, base: Trace | None = None) -> Iterator[Crash]:
    """The crashes of a run that lose all or nothing, and one of `stride` others; only those that `base`, the same run
    with more fsyncs, has not."""
    low = high = 0
    count = itertools.count(1)
    for end in range(len(trace.ops) + 1):
        op = trace.ops[end - 1] if end else None
        if op is not None and op.kind == "note":
            what, at = op.about.split()
            low, high = (low, int(at)) if what == "may" else (int(at), high)
        for what, lost, damaged in trace.losses(end, base):
            if what in WHOLE or next(count) % stride == 0:
                behind = f"behind #{end - 1} {op.kind} {op.about}" if op else "before the first operation"
                yield Crash(f"{behind}; {what}", trace.tree(end, lost, damaged), stages[low : high + 1])


def shape(trace: Trace) -> tuple[tuple[str, str], ...]:
    """What a recovery did, however many files there were to be removed."""
    return tuple(key for key, _ in itertools.groupby((op.kind, op.site) for op in trace.ops))


def recorded(name: str, folder: Path) -> Trace:
    """The operations of a scenario."""
    scenario = SCENARIOS[name]
    root = folder / f"record-{name}"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    runs.unique_names(BEFORE)
    scenario.prepare(root / RUN)
    runs.unique_names(FIRST)
    return record(root, lambda: scenario.work(root / RUN))


def sweep(name: str, folder: Path, stride: int, stride_again: int) -> str:
    """Crash everywhere in a scenario; then, for each way of recovering that is met, everywhere in the recovery.

    See `crashes` for `stride`, and for `stride_again` in a recovery; 0 leaves the second ones out.
    """
    scenario, store = SCENARIOS[name], Disk(folder / "disk", SCENARIOS[name].recover)
    trace = recorded(name, folder)
    kinds = Counter(op.kind for op in trace.ops)
    shapes: set[tuple[tuple[str, str], ...]] = set()
    seconds = 0

    def check(crash: Crash, where: str) -> None:
        problem = objection(store.find(crash.tree), crash.allowed)
        assert not problem, f"{name}: {where}: {problem}"

    for crash in crashes(trace, scenario.stages, stride):
        new = fingerprint(crash.tree) not in store.known
        check(crash, crash.where)
        if not new or not stride_again or len(store.known) % FEWER:
            continue
        recovery = store.recovery(crash.tree)
        if shape(recovery) in shapes:
            continue
        shapes.add(shape(recovery))
        before = len(store.known)
        for second in crashes(recovery, [], stride_again):
            check(replace(second, allowed=crash.allowed), f"{crash.where}; then, recovering, {second.where}")
        seconds += len(store.known) - before
    return (
        f"{name}: {len(trace.ops)} operations ({', '.join(sorted(kinds))}), {len(store.known) - seconds} states after "
        f"one crash; {len(shapes)} ways of recovering, {seconds} states after a second"
    )


# --- what if an order were not kept -------------------------------------------------------------------------


def is_seen(name: str, store: Disk, trace: Trace, base: Trace | None) -> bool:
    """Whether some crash of a run that was tampered with is found out."""
    stages = SCENARIOS[name].stages
    return any(objection(store.find(crash.tree), crash.allowed) for crash in crashes(trace, stages, base=base))


def unnoticed(folder: Path) -> list[str]:
    """The fsyncs of the package, by who asks for them and of what, that no crash of any scenario misses.

    Not those of disk/ that the tests themselves ask for.
    """
    left: dict[str, list[str]] = {}
    for name, scenario in SCENARIOS.items():
        store, trace = Disk(folder / "disk", scenario.recover), recorded(name, folder)
        for site in dict.fromkeys(op.site for op in trace.ops if op.kind == "fsync"):
            if left.get(site) != [] and not is_seen(name, store, trace.without(site), trace):
                left.setdefault(site, []).append(name)
            else:
                left[site] = []
    missed = {_unnumbered(site) for site, names_ in left.items() if names_}
    return sorted(site for site in missed if re.search(r" (?!writes\.)\w+\.\w+ of ", site))


def noticed(folder: Path, name: str, asked: list[str]) -> list[str]:
    """Those of `asked` whose sites' fsyncs some crash of this scenario misses, if all that match are left out."""
    store, trace = Disk(folder / "disk", SCENARIOS[name].recover), recorded(name, folder)
    sites = {op.site for op in trace.ops if op.kind == "fsync"}

    def missed(one: str) -> bool:
        left_out = [site for site in sites if re.search(one, _unnumbered(site))]
        return is_seen(name, store, trace.without(*left_out), trace)

    return [one for one in asked if missed(one)]


def _unnumbered(site: str) -> str:
    return re.sub(r":[0-9]+", "", site)


def manifest_after_rename(folder: Path) -> bool:
    """Whether it is found out when the manifest is written only after the checkpoint has got its name."""
    publish, prepared = publication._publish, {}

    def write(attempt: Attempt, votes: Mapping[str, bytes], expected: bytes) -> str:
        prepared[attempt.name] = manifests.build(votes, expected)
        return sealed_json.sha256(prepared[attempt.name])

    def late(attempt: Attempt, number: int) -> None:
        publish(attempt, number)
        writes.write_durable(attempt.final / names.MANIFEST, prepared[attempt.name])

    ballot._write_manifest, keep = write, ballot._write_manifest
    publication._publish = late
    try:
        trace = recorded("save", folder)
    finally:
        ballot._write_manifest, publication._publish = keep, publish
    return is_seen("save", Disk(folder / "disk", recovers), trace, None)


def main(what: str, folder: Path, asked: list[str]) -> None:
    logging.disable(logging.WARNING)
    runs.think_once()
    if what == "unnoticed":
        print(*unnoticed(folder), sep="\n")
    elif what == "noticed":
        print(*noticed(folder, asked[0], asked[1:]), sep="\n")
    elif what == "order":
        print(manifest_after_rename(folder))
    else:
        for name in asked:
            scenario, stride, stride_again = name.split(":")
            print(sweep(scenario, folder, int(stride), int(stride_again)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
