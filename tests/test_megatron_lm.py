"""Megatron-LM's unchanged `pretrain_gpt.py`, with its usual arguments, after `import roll_ckpt.megatron`.

MEGATRON_LM is the directory of a checkout; `make megatron-lm` says how to get one.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import megatron_lm_job as job
import pytest
import torch
from test_pipeline import kill_tree, wait_for
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

CHECKOUT = Path(os.environ.get("MEGATRON_LM", "")).resolve()
STOCK, OURS = "losses", "losses roll_ckpt.megatron"
LIMIT_S = 400.0
INTERVAL, STEPS = 2, 18

POINTS = {"files": 0, "metadata": 0, "complete": 0, "tracker": 0, "named": 1}
"""Where rank 0 stops in its second save, in the order of a save, and whether the tracker names that save then: before
`.metadata`, before `metadata.json`, after it, before the tracker gets its new text, after that."""

pytestmark = pytest.mark.skipif(
    "MEGATRON_LM" not in os.environ, reason="MEGATRON_LM names no checkout of Megatron-LM; see `make megatron-lm`"
)


@dataclass
class Run:
    """Checkpoints in a directory, and the losses of all processes that trained there."""

    folder: Path
    arguments: list[str]
    starts: int = 0
    losses: dict[int, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / f"log.{self.starts}"

    @property
    def tracked(self) -> int:
        """The step that the tracker names; 0 without a tracker."""
        tracker = self.folder / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"iter_{step:07d}"

    def start(self, steps: int = STEPS, imports: str = OURS, **extra: str) -> subprocess.Popen[bytes]:
        self.folder.mkdir(exist_ok=True)
        self.starts += 1
        where = ["--save", str(self.folder), "--load", str(self.folder), "--save-interval", str(INTERVAL)]
        return job.start(CHECKOUT, self.log, [*where, "--train-iters", str(steps), *self.arguments], imports, **extra)

    def train(self, steps: int = STEPS, imports: str = OURS, **extra: str) -> None:
        running = self.start(steps, imports, **extra)
        try:
            assert running.wait(LIMIT_S) == 0, self.log.read_text()[-6000:]
        finally:
            kill_tree(running.pid)
        self._remember()
        assert ("checkpoints go through roll_ckpt" in self.log.read_text()) == (imports != STOCK), "who has saved?"

    def train_until(self, reached: Path, **extra: str) -> None:
        """Train until something exists, and SIGKILL all processes of the job at once."""
        running = self.start(**extra)
        try:
            wait_for(lambda: reached.exists() or running.poll() is not None)
            assert running.poll() is None, self.log.read_text()[-6000:]
        finally:
            kill_tree(running.pid)
            running.wait()
        self._remember()

    def _remember(self) -> None:
        """A step that is made again has the same loss."""
        for step, loss in job.losses(self.log).items():
            assert self.losses.setdefault(step, loss) == loss, f"another loss in step {step}"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by torch alone."""
    reader = FileSystemReader(checkpoint)
    planned = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.empty(about.size, dtype=about.properties.dtype)
        for key, about in planned.items()
        if isinstance(about, TensorStorageMetadata)
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


def assert_same_checkpoint(one: Path, other: Path) -> None:
    assert (one / "metadata.json").read_bytes() == (other / "metadata.json").read_bytes()
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


SYNC = ["--ckpt-fully-parallel-save", "--dist-ckpt-optim-fully-reshardable"]
ASYNC = [*SYNC, *(job.async_arguments(CHECKOUT))]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An unbroken run of stock Megatron-LM."""
    run = Run(tmp_path_factory.mktemp("stock"), SYNC)
    run.train(imports=STOCK)
    assert len(run.losses) == STEPS and run.tracked == STEPS
    return run


@pytest.mark.parametrize("arguments", [SYNC, ASYNC], ids=["sync", "async"])
def test_killed_anywhere_in_a_save_it_resumes_on_the_same_losses(
    tmp_path: Path, stock: Run, arguments: list[str]
) -> None:
    run = Run(tmp_path / "run", arguments)
    for point, is_named in POINTS.items():
        stopped, at = tmp_path / point, run.tracked + 2 * INTERVAL
        run.train_until(stopped, imports=f"{OURS} stops", STOP=point, STOPPED=str(stopped))
        assert run.tracked == at - INTERVAL * (1 - is_named), f"killed at {point!r}"
        assert_same_checkpoint(run.checkpoint(run.tracked), stock.checkpoint(run.tracked))
    run.train_until(run.checkpoint(run.tracked + INTERVAL))  # as soon as a save begins, and nothing stops
    run.train(imports=STOCK if arguments is SYNC else OURS)
    assert run.losses == stock.losses and run.tracked == STEPS
    assert_same_checkpoint(run.checkpoint(STEPS), stock.checkpoint(STEPS))
