"""A small real training job for the kill tests: two clusters, or one of two worlds, under torchrun.

    torchrun ... tests/job.py OUT LOSSES [--stop-at POINT:NAME[:CLUSTER]] [--only CLUSTER] [--upload DIR] …

Appends "step loss ..." to LOSSES.<rank> as it trains. At the named point a rank writes LOSSES.stopped.<rank>
and waits there to be killed.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from tiny import engine

from roll_ckpt import BasePipeline, Cluster, PipelineConfig
from roll_ckpt.disk import failpoints

STEPS, SAVE_STEPS = 9, 2


class Cursor:
    """Draws the next batch's seed; without its state a resumed run sees other data."""

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Job(BasePipeline):
    def __init__(self, config: PipelineConfig, clusters: str, only: str | None, restore_rng: bool = True) -> None:
        super().__init__(config)
        self.cursor = Cursor()
        self.restore_rng = restore_rng
        self.engines = {
            name: engine(int(stage), "bf16", None, seed=seed)
            for seed, (name, stage) in enumerate(cluster.split("=") for cluster in clusters.split(","))
            if only in (None, name)
        }
        self.set_checkpoint_clusters(*(Cluster(name, made) for name, made in self.engines.items()))
        self.register_stateful("cursor", self.cursor)
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(dist.get_rank())

    def _restore_rng(self, state: dict[str, Any], where: Path) -> None:
        if self.restore_rng:
            super()._restore_rng(state, where)

    def step(self) -> list[float]:
        """Data from the cursor, noise from the three generators, dropout inside."""
        losses = []
        for trained in self.engines.values():
            self.cursor.at += 1
            tokens = (torch.arange(32).view(4, 8) * self.cursor.at + random.randrange(50)) % 50
            tokens = (tokens + int(np.random.randint(50))) % 50
            loss = trained(tokens)
            trained.backward(loss)
            trained.step()
            losses.append(float(loss))
        return losses


def stop_at(spec: str, losses: str) -> None:
    point, name, *cluster = spec.split(":")

    def listener(reached: str, where: dict[str, Any]) -> None:
        if reached != point or where.get("name") != name or (cluster and where.get("cluster") != cluster[0]):
            return
        Path(f"{losses}.stopped.{dist.get_rank()}").write_text(reached)
        time.sleep(600)

    failpoints.listener = listener


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("losses")
    parser.add_argument("--stop-at")
    parser.add_argument("--clusters", default="actor=2,critic=3", help="names, each with its ZeRO stage")
    parser.add_argument("--only")
    parser.add_argument("--upload")
    parser.add_argument("--resume-from")
    parser.add_argument("--hub", help="push to this repository")
    parser.add_argument("--expect", type=int)
    parser.add_argument("--forget-rng", action="store_true")
    parser.add_argument("--keep", type=int, default=2)
    told = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    values: dict[str, Any] = {
        "output_dir": told.out,
        "save_steps": SAVE_STEPS,
        "max_steps": STEPS,
        "max_ckpt_to_keep": told.keep,
        "commit_timeout_s": 120,
        "io": {"block_bytes": 65536},
        "staging": {"arena_bytes": 64 << 20, "check": "full"},
    }
    if told.resume_from:
        values["resume_from_checkpoint"] = told.resume_from
    if told.upload:
        values["checkpoint_config"] = {"type": "file_system", "output_dir": told.upload}
    if told.hub:
        values["checkpoint_config"] = {"type": "hub", "repo_id": told.hub}
    if told.expect:
        values |= {"run_id": "test", "expected_clusters": {"actor": told.expect, "critic": told.expect}}
    job = Job(PipelineConfig.parse(values, "job"), told.clusters, told.only, not told.forget_rng)
    if told.stop_at:
        stop_at(told.stop_at, told.losses)
    step = job.resume()
    with open(f"{told.losses}.{dist.get_rank()}", "a") as curve:
        print("resumed", step, file=curve, flush=True)
        for at in range(0 if step is None else step + 1, STEPS):
            losses = job.step()
            job.state.log_history.append({"losses": losses})
            print(at, *losses, file=curve, flush=True)
            job.do_checkpoint(at)
    assert job.state.log_history[-1]["system/step"] == STEPS - 1
    assert len(job.state.log_history) == STEPS
    assert job.cursor.at == STEPS * len(job.engines)


if __name__ == "__main__":
    main()
