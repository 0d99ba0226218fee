"""Runs in miniature whose checkpoints are large enough to be sent to the Hub in parts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import runs

from roll_ckpt import commit, disk, manifest, names

ROOT = str(Path(__file__).parent.parent)
LARGE = random.Random(5).randbytes(3 << 20)
LIMIT_S = 60.0


def history(output_dir: Path, steps: list[int], salt: str = "old", extra: Mapping[str, bytes] | None = None) -> None:
    """A run that has saved these steps, each with one large file and one named after the step, and has ended."""

    def work() -> None:
        epoch = runs.claim(output_dir)
        for step in steps:
            attempt = commit.begin(epoch, names.checkpoint(step), step=step, expected=runs.CLUSTERS)
            for cluster, rank in runs.RANKS:
                vote = runs.write(attempt, salt, cluster, rank)
                if (cluster, rank) == runs.RANKS[0]:
                    more = {"actor/large.bin": LARGE, f"actor/only_{step}.txt": salt.encode(), **(extra or {})}
                    for path, data in more.items():
                        disk.write_durable(attempt.unit / path, data)
                    receipts = [manifest.receipt_of_bytes(path, data) for path, data in more.items()]
                    vote = replace(vote, receipts=(*vote.receipts, *receipts))
                commit.cast(attempt, vote)
            assert commit.settle(attempt, lead=True, timeout_s=10).committed

    assert runs.ended(runs.forked(work)) == 0


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, "it did not come to that in time"
        time.sleep(0.02)
