"""OpenRLHF, which rotates its checkpoints itself and writes a file into each: its own code, with real engines.

`make test` puts the package alone, without what needs a GPU, into a folder of its own in .venv, for this test only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import kill_tree, wait_for
from worlds import ROOT, environment

from roll_ckpt.transaction import verification

INSTALLED = ROOT / ".venv" / "openrlhf"
JOB = str(ROOT / "tests" / "openrlhf_job.py")
LIMIT_S = 150.0
AT_ONCE_S = 10.0

pytestmark = pytest.mark.skipif(
    not INSTALLED.is_dir() and not importlib.util.find_spec("openrlhf"),
    reason="OpenRLHF is not installed; `make .venv/openrlhf/.installed` does it",
)


@dataclass
class Played:
    """What the ranks of both runs said."""

    folder: Path

    def told(self, run: str, variant: str, fact: str, rank: int = 0) -> list[Any]:
        """All facts of this kind, in their order; for losses and times, by step."""
        lines = map(json.loads, (self.folder / f"{run}.{rank}").read_text().splitlines())
        return [(line.get("step"), line[fact]) for line in lines if line["variant"] == variant and fact in line]

    def left(self, run: str, variant: str) -> dict[str, bool]:
        """The directories that are there at the end; True if OpenRLHF's file is in it."""
        return dict(self.told(run, variant, "left")[-1][1])


def job(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(INSTALLED)])
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [*launcher, JOB, str(folder), *arguments],
            env={**environment(), "PYTHONPATH": f"{environment()['PYTHONPATH']}{os.pathsep}{path}"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def play(folder: Path, variants: list[str], inside: int) -> Played:
    """Let all variants train to the end; train again, SIGKILL the whole job in the last save, and resume."""
    stopped = [folder / f"stopped.{rank}" for rank in range(2)]
    running = job(folder, *variants, "--inside", str(inside))
    try:
        wait_for(lambda: all(path.exists() for path in stopped) or running.poll() is not None)
        assert running.poll() is None, (folder / "log").read_text()[-6000:]
    finally:
        kill_tree(running.pid)
        running.wait()
    resumed = job(folder, *variants, "--resume")
    try:
        assert resumed.wait(LIMIT_S) == 0, (folder / "log").read_text()[-6000:]
    finally:
        kill_tree(resumed.pid)
    return Played(folder)


def stock_of(variant: str) -> str:
    """The same without roll_ckpt."""
    return variant.replace("zero", "stock").replace("-async", "")


def assert_as_an_unbroken_stock_run(played: Played, variant: str) -> None:
    stock = stock_of(variant)
    for rank in range(2):
        whole = dict(played.told("whole", variant, "loss", rank))
        assert whole == dict(played.told("whole", stock, "loss", rank)) and len(whole) == 13
        assert dict(played.told("killed", variant, "loss", rank)) == whole, "other losses after the kill"
    assert played.left("whole", variant) == played.left("whole", stock), "the rotation left something else"
    took = [seconds for run in ("whole", "killed") for _, seconds in played.told(run, variant, "took_s")]
    assert max(took) < AT_ONCE_S, f"a save waited: {took}"
    resumed = played.left("killed", variant)  # fewer where an unfinished save counts, as with stock
    assert {"global_step10", "global_step12"} <= set(resumed) <= set(played.left("whole", stock)), resumed
    for run in ("whole", "killed"):
        out = played.folder / run / variant
        assert (out / "latest").read_text() == "global_step12"
        for tag, has_metric in played.left(run, variant).items():
            if not tag.endswith("_hf"):
                assert has_metric and (variant == stock or verification.verify(out / tag) == []), tag


def beside_stock(*variants: str) -> list[str]:
    return [*variants, *sorted({stock_of(variant) for variant in variants} - set(variants))]


@pytest.mark.parametrize(
    ("variants", "inside"),
    [
        (["zero2-async-metric", "zero3"], 2),
        pytest.param(["zero2", "zero3-async"], 2, marks=pytest.mark.long),
        pytest.param(["zero2-async", "zero3-async", "zero2-metric", "zero2-model", "zero3"], 3, marks=pytest.mark.long),
        pytest.param(["zero2-model", "zero2-async-metric", "zero2-async"], 1, marks=pytest.mark.long),
        pytest.param(["stock2", "zero3-async-model"], 1, marks=pytest.mark.long),
        pytest.param(["stock2", "stock3", "stock2-metric", "stock2-model"], 1, marks=pytest.mark.long),
    ],
    ids=lambda value: f"{value} inside" if isinstance(value, int) else "+".join(value),
)
def test_a_killed_run_resumes_on_the_same_losses_and_its_rotation_leaves_what_it_leaves_of_stock(
    tmp_path: Path, variants: list[str], inside: int
) -> None:
    played = play(tmp_path, beside_stock(*variants), inside)
    for variant in beside_stock(*variants):
        assert_as_an_unbroken_stock_run(played, variant)
