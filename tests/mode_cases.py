"""What the ranks of a world do in tests/test_modes.py, each under a umask of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed_cases import OURS
from path_cases import settle
from pipeline_cases import pipeline
from tiny import engine

from roll_ckpt import Cluster, process
from roll_ckpt.config import Settings
from roll_ckpt.state import StateSaver


@contextmanager
def under(umask: int) -> Iterator[None]:
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def save_all_ways(out: str, umask: int) -> None:
    """A pipeline with uploads and pruning, a script with an abandoned save, a 16-bit model, and a StateSaver."""
    with under(umask):
        trained = engine(2, "bf16", None)
        upload = {"type": "file_system", "output_dir": f"{out}/copies"}
        made = pipeline(f"{out}/run", Cluster("actor", trained), checkpoint_config=upload, max_ckpt_to_keep=1)
        made.resume()
        for step in (1, 2):
            made.do_checkpoint(step)
        settle()
        script = engine(2, "bf16", {**OURS, "async_save": False})
        script.save_checkpoint(f"{out}/script", tag="one")
        script.save_16bit_model(f"{out}/weights")
        try:
            script.save_checkpoint(f"{out}/script", tag="two", client_state={"bad": lambda: None})
        except Exception as error:
            assert type(error).__name__ == "SaveFailed", error
        with process.installed(process.Process()):
            StateSaver(Settings()).save({"w": torch.ones(4), "rank": dist.get_rank()}, f"{out}/state/one")
        dist.barrier()
        assert Path(out, "state/one/manifest.json").exists()
