"""What the ranks of a test world do in tests/test_hub_pipeline.py."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from deepspeed_cases import raised
from pipeline_cases import pipeline
from tiny import engine

from roll_ckpt import BasePipeline, Cluster, process
from roll_ckpt.save import pending


def made(out: str, environment: dict[str, str], repo: str, **more: Any) -> BasePipeline:
    os.environ.update(environment)
    upload = {"type": "hub", "repo_id": repo, "async_upload": more.pop("async_upload", True)}
    pipe = pipeline(out, Cluster("actor", engine(2, "bf16", None)), checkpoint_config=upload, **more)
    pipe.resume()
    return pipe


def settle() -> None:
    """Wait for what the interpreter's exit waits for."""
    for save in pending.pending():
        save.wait(uploaded=True)
    for thread, _ in process.part(pending.PendingSaves).threads():
        thread.join()
    dist.barrier()


def two_steps(out: str, environment: dict[str, str], repo: str, **more: Any) -> list[dict[str, Any]]:
    """Save step 2, and see later what became of it: at step 3, or with `fail_training` at step 4, the next save. The
    metrics of both calls."""
    pipe = made(out, environment, repo, save_steps=2, max_steps=9, **more)
    told = [pipe.do_checkpoint(2)]
    settle()
    try:
        told.append(pipe.do_checkpoint(4 if more.get("fail_training") else 3))
    except RuntimeError as problem:
        told.append({"raised": str(problem)})
    dist.barrier()
    return told


def last_step(out: str, environment: dict[str, str], repo: str, **more: Any) -> dict[str, Any]:
    """Save two steps, the second of which is the last; the metrics of that call."""
    pipe = made(out, environment, repo, max_steps=3, **more)
    pipe.do_checkpoint(1)
    told: dict[str, Any] = {}
    told["raised"] = raised(lambda: told.update(pipe.do_checkpoint(2)))
    dist.barrier()
    return told
