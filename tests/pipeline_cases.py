"""What the ranks of a test world do in tests/test_pipeline.py."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed_cases import OURS, raised
from tiny import engine, train

from roll_ckpt import BasePipeline, Cluster, PipelineConfig, process
from roll_ckpt.disk import tree
from roll_ckpt.save import pending
from roll_ckpt.upload.hub import version

_held: list[BasePipeline] = []


def pipeline(out: str, *clusters: Cluster, **more: Any) -> BasePipeline:
    values = {"output_dir": out, "save_steps": 1, "max_steps": 4, "staging": OURS["staging"], "io": OURS["io"]}
    made = BasePipeline(PipelineConfig.parse({**values, **more}, "test"))
    if clusters:
        made.set_checkpoint_clusters(*clusters)
    return made


def bad_input(out: str) -> dict[str, str]:
    made = engine(2, "bf16", None)
    told = {"twice": raised(lambda: pipeline(out, Cluster("actor", made), Cluster("actor", made)))}
    asked = pipeline(out, Cluster("actor", made))
    told["step"] = raised(lambda: asked.do_checkpoint(1 + dist.get_rank()))
    real = tree.free_bytes
    tree.free_bytes = lambda path: 10  # type: ignore[assignment]
    told["room"] = raised(lambda: asked.do_checkpoint(1))
    tree.free_bytes = real
    nowhere = pipeline(out + ".none", Cluster("actor", made), resume_from_checkpoint=out + "/checkpoint-7")
    told["path"] = raised(nowhere.resume)
    file = Path(out).with_name("file")
    if dist.get_rank() == 0:
        file.write_text("not a directory")
    dist.barrier()
    told["unwritable"] = raised(lambda: pipeline(str(file / "run"), Cluster("actor", made)).resume())
    return told


def hold(out: str) -> int:
    """Claim the directory and stay alive."""
    made = pipeline(out, Cluster("actor", engine(2, "bf16", None)))
    made.resume()
    _held.append(made)
    return os.getpid()


def hub_out_of_reach(out: str) -> str:
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    made = pipeline(out, Cluster("actor", engine(2, "bf16", None)), resume_from_checkpoint="hf://dev/run")
    return raised(made.resume)


def hub_too_old(out: str) -> str:
    """Resume where the huggingface_hub of rank 0 is too old, and the other ranks, which push nothing, have none."""
    hub, number = sys.modules.get("huggingface_hub"), "0.33.5"
    if dist.get_rank() == 0:
        hub = importlib.import_module("huggingface_hub")
        number, hub.__version__ = hub.__version__, number  # type: ignore[attr-defined]
    else:
        sys.modules["huggingface_hub"] = None  # type: ignore[assignment]
    version.installed.cache_clear()
    version.check_push.cache_clear()
    try:
        upload = {"type": "hub", "repo_id": "dev/run"}
        return raised(pipeline(out, Cluster("actor", engine(2, "bf16", None)), checkpoint_config=upload).resume)
    finally:
        if dist.get_rank() == 0:
            hub.__version__ = number  # type: ignore[union-attr]
        elif hub is None:
            del sys.modules["huggingface_hub"]
        else:
            sys.modules["huggingface_hub"] = hub


def another_model(out: str, checkpoint: str) -> str:
    clusters = [Cluster("actor", engine(2, "bf16", None, width=32)), Cluster("critic", engine(3, "bf16", None))]
    return raised(pipeline(out, *clusters, resume_from_checkpoint=checkpoint).resume)


class Interrupted:
    def state_dict(self) -> dict[str, Any]:
        raise SystemExit("preempted")

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Located:
    def state_dict(self) -> dict[str, Any]:
        return {"step": 1, "where": self}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def unloadable_stateful(out: str) -> None:
    made = pipeline(out, Cluster("actor", engine(2, "bf16", None)))
    made.register_stateful("reader", Located())
    made.resume()
    for step in (1, 2):
        made.do_checkpoint(step, is_last_step=step == 2)


def interrupted(out: str) -> list[str]:
    """A preemption arrives while the pipeline's own state is staged."""
    made = pipeline(out, Cluster("actor", engine(2, "bf16", None)))
    made.register_stateful("loader", Interrupted())
    made.resume()
    try:
        made.do_checkpoint(1)
    except SystemExit:
        pending.wait_pending()
    return sorted(p.name for p in Path(out).iterdir())


def failing_client_state(out: str) -> str:
    """Rank 1 cannot say its client state: nobody begins."""

    def state() -> dict[str, Any]:
        if dist.get_rank() == 1 and saves:
            raise ValueError("no state today")
        return {}

    saves: list[int] = []
    made = pipeline(out, Cluster("actor", engine(2, "bf16", None), client_state=state))
    saves.append(1)
    return raised(lambda: made.do_checkpoint(1))


def resumed_by_path(out: str) -> list[str]:
    """Resume from an old step by path: that step stays until this run has one of its own."""
    cluster = Cluster("actor", engine(2, "bf16", None))
    first = pipeline(out, cluster, max_steps=9)
    first.resume()
    for step in range(1, 4):
        first.do_checkpoint(step)
    pending.wait_pending()
    dist.barrier()
    again = pipeline(out, cluster, resume_from_checkpoint=out + "/checkpoint-1", max_ckpt_to_keep=1)
    assert again.resume() == 1
    for thread, _ in process.part(pending.PendingSaves).threads():
        thread.join()
    dist.barrier()
    return sorted(p.name for p in Path(out).glob("checkpoint-*"))


class Config:
    def save_pretrained(self, directory: str) -> None:
        Path(directory, "config.json").write_text("{}")


def pretrained_files(out: str) -> dict[str, Any]:
    made = engine(2, "bf16", None)
    train(made, 1, seed=1)
    saved = pipeline(out, Cluster("actor", made, config=Config(), client_state=lambda: {"epochs": 3}))
    saved.resume()
    saved.do_checkpoint(1, is_last_step=True)
    dist.barrier()
    cluster = Cluster("actor", engine(2, "bf16", None, seed=5))
    again = pipeline(out, cluster)
    assert again.resume() == 1
    same = [
        torch.equal(a, b) for a, b in zip(made.module.parameters(), cluster.trained.module.parameters(), strict=True)
    ]
    assert all(same)
    return {"client": {key: cluster.loaded_client_state[key] for key in ("epochs",)}}


def only_model(out: str) -> str:
    made = engine(2, "bf16", None)
    saved = pipeline(out, Cluster("actor", made, save_only_model=True))
    saved.resume()
    saved.do_checkpoint(1, is_last_step=True)
    dist.barrier()
    return raised(pipeline(out, Cluster("actor", made)).resume)
