"""Runs in miniature whose checkpoints are large enough to be sent to the Hub in parts."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import runs
from roll_ckpt_hub_dev import LocalHub

from roll_ckpt import names
from roll_ckpt.disk import reads, tree, writes
from roll_ckpt.formats import records, sealed_json
from roll_ckpt.transaction import attempts, ballot, settlement, verification

ROOT = str(Path(__file__).parent.parent)
PYTHON_PATH = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
"""For processes of the tests: roll_ckpt, and what stands before the installed packages, such as another version."""
LARGE = random.Random(5).randbytes(3 << 20)
LIMIT_S = 60.0
TOKEN = "hf_writesAndIsKeptSecret0123456789abcdef"
PERSONS = (".gitattributes", "README.md", "NOTES.md", "actor/mine.txt")


def history(
    output_dir: Path,
    steps: list[int],
    salt: str = "old",
    extra: Mapping[str, bytes] | None = None,
    called: Sequence[str] = (),
) -> None:
    """A run that has saved these steps, each with one large file and one named after the step, and has ended.

    `called` has the names of the checkpoints; else they are called after their steps.
    """
    titles = dict(zip(steps, called, strict=False))

    def work() -> None:
        epoch = runs.claim(output_dir)
        for step in steps:
            attempt = attempts.begin(epoch, titles.get(step, names.checkpoint(step)), step=step, expected=runs.CLUSTERS)
            for cluster, rank in runs.RANKS:
                vote = runs.write(attempt, salt, cluster, rank)
                if (cluster, rank) == runs.RANKS[0]:
                    more = {"actor/large.bin": LARGE, **(extra or {})}
                    more |= {f"actor/{word}_{step}.txt": salt.encode() for word in ("only", "also")}
                    for path, data in more.items():
                        writes.make_dirs((attempt.checkpoint_dir / path).parent)
                        writes.write_durable(attempt.checkpoint_dir / path, data)
                    receipts = [records.receipt_of_bytes(path, data) for path, data in more.items()]
                    vote = replace(vote, receipts=(*vote.receipts, *receipts))
                ballot.cast(attempt, vote)
            assert settlement.settle(attempt, lead=True, timeout_s=10).committed

    assert runs.ended(runs.forked(work)) == 0


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, "it did not come to that in time"
        time.sleep(0.02)


def mark(checkpoint_dir: Path) -> str:
    return sealed_json.sha256((checkpoint_dir / "manifest.json").read_bytes())


def landed(hub: LocalHub, repo: str, checkpoint_dir: Path, revision: str | None = None) -> list[str]:
    """The commits that brought this very checkpoint: on a branch, or anywhere."""
    if not tree.exists(hub.store.root / "repos" / repo / "repo.json"):
        return []
    found = hub.store.repo(repo)
    places = [revision] if revision is not None else [*found.branches.values(), *found.tags.values()]
    commits = {c.id: c for place in places for c in hub.store.history(found, place)}
    return [c.id for c in commits.values() if mark(checkpoint_dir) in c.message]


def contents(hub: LocalHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    commit = hub.store.resolve(hub.store.repo(repo), revision)
    return {path: reads.read_bytes(hub.store.contents(file)) for path, file in commit.files.items()}


def assert_there_once(hub: LocalHub, repo: str, checkpoint_dir: Path, tmp_path: Path) -> str:
    """One commit, the tag on it, and every byte under the tag."""
    (commit,) = landed(hub, repo, checkpoint_dir)
    assert hub.store.repo(repo).tags[checkpoint_dir.name] == commit
    copy = tmp_path / "copy" / checkpoint_dir.name
    for path, data in contents(hub, repo, checkpoint_dir.name).items():
        if path not in PERSONS:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes(data)
    assert verification.verify(copy) == []
    shutil.rmtree(copy.parent)
    return commit
