"""What the ranks of a world do in tests/test_paths.py: they change their working directory all the time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed_cases import OURS
from pipeline_cases import pipeline
from tiny import engine, train

import roll_ckpt
from roll_ckpt import Cluster, process
from roll_ckpt.save import pending


@contextmanager
def wandering(home: str) -> Iterator[Any]:
    """Inside the block HOME is `home`, and RUNS a part of a path; the yielded function goes to another directory."""
    before, count = (os.getcwd(), dict(os.environ)), iter(range(100))
    os.environ.update(HOME=home, RUNS="runs")

    def go() -> None:
        folder = Path(home) / f"elsewhere/{dist.get_rank()}.{next(count)}"
        folder.mkdir(parents=True)
        os.chdir(folder)

    os.chdir(home)
    try:
        yield go
    finally:
        os.chdir(before[0])
        os.environ.clear()
        os.environ.update(before[1])


def settle() -> None:
    pending.wait_pending()
    for thread, _ in process.part(pending.PendingSaves).threads():
        thread.join()
    dist.barrier()


def run_a_pipeline(home: str) -> list[int | None]:
    upload = {"type": "file_system", "output_dir": "~/$RUNS/copies"}
    with wandering(home) as go:
        made = pipeline("$RUNS/a", Cluster("actor", engine(2, "bf16", None)), checkpoint_config=upload)
        steps = []
        for call in (made.resume, lambda: made.do_checkpoint(1), lambda: made.do_checkpoint(2), settle):
            go()
            steps.append(call())
        os.chdir(home)
        by_path, by_name = (
            pipeline("${RUNS}/a", Cluster("actor", engine(2, "bf16", None)), resume_from_checkpoint=given)
            for given in ("$RUNS/a/checkpoint-1", "checkpoint-2")
        )
        for again in (by_path, by_name):
            go()
            steps.append(again.resume())
        settle()
        return [step for step in steps if not isinstance(step, dict)]


def run_a_script(home: str) -> list[str | None]:
    with wandering(home) as go:
        made = engine(2, "bf16", {**OURS, "async_save": True})
        told: list[str | None] = []
        for save_dir, tag in (("~/scripts", "one"), ("$HOME/scripts", "two"), ("$UNKNOWN/scripts", "three")):
            os.chdir(home)
            train(made, 1, seed=1)
            made.save_checkpoint(save_dir, tag=tag)
            go()
            roll_ckpt.fence()
            settle()
            if tag != "three":
                told.append(made.load_checkpoint(save_dir, tag=tag)[0])
        os.chdir(home)
        return told
