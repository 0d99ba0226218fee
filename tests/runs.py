"""A run in miniature, without torch: two clusters of two ranks, each rank a process, small files."""

from __future__ import annotations

import copy
import itertools
import os
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from crash_model import fingerprint, read_tree

from roll_ckpt import names
from roll_ckpt.disk import failpoints, tree, writes
from roll_ckpt.formats import manifests, records, sealed_json
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.records import Vote
from roll_ckpt.transaction import attempts, ballot, claims, listing, retention, settlement, verification
from roll_ckpt.transaction.attempts import Attempt
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.settlement import Outcome
from roll_ckpt.transaction.verification import Problem

CLUSTERS = {"actor": 2, "critic": 2}
RANKS = [(cluster, rank) for cluster in CLUSTERS for rank in range(CLUSTERS[cluster])]
RUN = "run-1"


def contents(salt: str, cluster: str, rank: int) -> bytes:
    return f"{salt} {cluster} {rank}\n".encode() * (rank + 1)


def write(attempt: Attempt, salt: str, cluster: str, rank: int) -> Vote:
    """Write one rank's files durably; return its vote."""
    writes.make_dirs(attempt.checkpoint_dir / cluster / "deep")
    files = {f"{cluster}/rank_{rank}.pt": contents(salt, cluster, rank)}
    if not rank:
        files[f"{cluster}/deep/empty"] = b""
    for path, data in files.items():
        writes.write_durable(attempt.checkpoint_dir / path, data)
    receipts = tuple(records.receipt_of_bytes(path, data) for path, data in files.items())
    return Vote(cluster, rank, attempt.epoch, attempt.attempt, receipts, facts={"framework": "none"})


def vote(attempt: Attempt, salt: str, cluster: str, rank: int) -> None:
    ballot.cast(attempt, write(attempt, salt, cluster, rank))


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child that exits 0, or 1 with a traceback; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    _leave(work)


def _leave(work: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def other_ranks(attempt: Attempt, salt: str, ranks: list[tuple[str, int]]) -> None:
    """Let other processes write and vote, and wait for them."""

    def work(cluster: str, rank: int) -> None:
        failpoints.observer = failpoints.listener = None
        vote(replace(attempt, pid=os.getpid()), salt, cluster, rank)

    pids = [forked(lambda c=c, r=r: work(c, r)) for c, r in ranks]  # type: ignore[misc]
    assert [ended(pid) for pid in pids] == [0] * len(pids)


def save(epoch: Epoch, step: int, salt: str, *, alone: bool = False) -> Outcome:
    """One whole checkpoint; this process is the first rank and the lead, and all other ranks if `alone`."""
    attempt = attempts.begin(epoch, names.checkpoint(step), step=step, expected=CLUSTERS)
    (attempt.directory / "helper.py").write_text(salt)
    if alone:
        for cluster, rank in RANKS[1:]:
            vote(attempt, salt, cluster, rank)
    else:
        other_ranks(attempt, salt, RANKS[1:])
    vote(attempt, salt, *RANKS[0])
    return settlement.settle(attempt, lead=True, timeout_s=10)


def claim(output_dir: Path, **options: object) -> Epoch:
    return claims.claim(output_dir, run_id=RUN, clusters=CLUSTERS, **options)  # type: ignore[arg-type]


def history(output_dir: Path, steps: list[int], salt: str = "old") -> None:
    """A run that has saved these steps and has ended."""

    def work() -> None:
        epoch = claim(output_dir)
        for step in steps:
            assert save(epoch, step, salt, alone=True).committed

    assert ended(forked(work)) == 0


def salts(output_dir: Path, *, whole: bool = True) -> dict[str, str]:
    """The salt of each committed checkpoint. Fails if one is not sound, or is a mixture of two saves."""
    found = {}
    for told in listing.committed(output_dir, report=_refuse):
        checkpoint_dir = output_dir / told.name
        assert not whole or verification.verify(checkpoint_dir) == []
        salt = (checkpoint_dir / "actor/rank_0.pt").read_text().split()[0]
        for cluster, rank in RANKS:
            assert (checkpoint_dir / cluster / f"rank_{rank}.pt").read_bytes() == contents(salt, cluster, rank), (
                told.name
            )
        found[told.name] = salt
    return found


def _refuse(problem: Exception) -> None:
    raise problem


def assert_sound(output_dir: Path) -> dict[str, str]:
    """What holds at every instant: whole checkpoints only, and `latest` names one of them."""
    found = salts(output_dir)
    latest = output_dir / names.LATEST
    assert not latest.exists() or latest.read_text() in found, (latest.read_text(), found)
    return found


def assert_clean(output_dir: Path, epoch: Epoch) -> None:
    """What holds after recovery: no garbage at all."""
    hidden = sorted(path.name for path in output_dir.iterdir() if path.name.startswith("."))
    assert hidden == [names.EPOCHS, names.TRASH], hidden
    assert tree.list_dir(output_dir / names.TRASH) == [str(epoch.number)]
    assert tree.list_dir(output_dir / names.trash_dir(epoch.number)) == []
    of_epoch = [str(epoch.number), names.first_dir(str(epoch.number))]
    assert [entry for entry in tree.list_dir(output_dir / names.EPOCHS) if entry not in of_epoch[1:]] == of_epoch[:1]
    assert verification.verify_run(output_dir) == []


@dataclass
class Owed:
    """A destination that is owed what `owed` returns; `forgotten` are the checkpoints that it was told to forget."""

    owed: Callable[[], Collection[str]]
    forgotten: list[str] = field(default_factory=list)

    def forget(self, name: str) -> None:
        self.forgotten.append(name)


def prune(epoch: Epoch, keep: int) -> list[str]:
    return retention.prune(epoch.output_dir, epoch, keep)


def unique_names(who: str) -> None:
    """Let `names.unique` tell the same names at every run of this test, and others than those of `who` else."""
    count = itertools.count(1)
    names.unique = lambda prefix: f"{prefix}.1.{who}.{next(count)}"


def think_once() -> None:
    """Let each record be parsed once, and each checkpoint verified once, however many states hold it: these are pure
    functions of its bytes."""
    unseal, parse, build, check = sealed_json.unseal, manifests.parse, manifests.build, verification.verify
    unsealed, parsed, built, verified = {}, {}, {}, {}

    def unseal_once(data: bytes, where: object) -> dict[str, Any]:
        if data not in unsealed:
            unsealed[data] = unseal(data, where)
        return copy.deepcopy(unsealed[data])

    def parse_once(data: bytes, where: object) -> Manifest:
        if data not in parsed:
            parsed[data] = parse(data, where)
        return parsed[data]

    def build_once(votes: Mapping[str, bytes], expected: bytes) -> bytes:
        key = (tuple(sorted(votes.items())), expected)
        if key not in built:
            built[key] = build(votes, expected)
        return built[key]

    def verify_once(checkpoint_dir: Path, *rest: Any) -> list[Problem]:
        key = (checkpoint_dir.name, rest, fingerprint(read_tree(checkpoint_dir)))
        if key not in verified:
            verified[key] = check(checkpoint_dir, *rest)
        return verified[key]

    sealed_json.unseal = sealed_json.unseal = unseal_once
    manifests.parse = parse_once
    manifests.build = manifests.build = build_once
    verification.verify = verify_once
