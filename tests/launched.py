"""What each launcher of test_launchers.py starts: it builds a tiny engine, or saves by Megatron's stock strategy, and
writes whose code moves the bytes. Nothing here knows of roll_ckpt but the question.

    python launched.py FOLDER engine|accelerate|megatron     one rank
    python launched.py FOLDER ray                            a driver with two actors
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}


def alone(rank: int = 0, size: int = 1, port: str = "") -> None:
    """Set what a launcher sets for a rank, where none did."""
    if not port:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        os.environ.setdefault(name, value)


def engine(folder: str) -> None:
    """Build an engine as any script does, and ask it."""
    import deepspeed
    import torch

    deepspeed.init_distributed("gloo")
    model = torch.nn.Linear(4, 4)
    built, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    _tell(folder, type(built.checkpoint_engine).__module__)


def accelerate(folder: str) -> None:
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim

    plugin = DeepSpeedPlugin(hf_ds_config={**CONFIG, "gradient_accumulation_steps": 1})
    model = torch.nn.Linear(4, 4)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    data = torch.utils.data.DataLoader(torch.zeros(4, 4), batch_size=1)
    built, *_ = accelerator.prepare(model, DummyOptim(model.parameters()), data)
    _tell(folder, type(built.checkpoint_engine).__module__)


def megatron(folder: str) -> None:
    """Begin as a training does, then ask the class that Megatron's own `save` uses."""
    import megatron_cpu

    megatron_cpu.install()
    import torch
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    code = TorchDistSaveShardedStrategy.async_save
    _tell(folder, code.__globals__["__name__"] if hasattr(code, "_roll_ckpt_behind") else code.__module__)


def ray(folder: str) -> None:
    import ray as cluster

    cluster.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=True)

    @cluster.remote
    class Trainer:
        def train(self, rank: int, port: str) -> None:
            import launched

            launched.alone(rank, 2, port)
            launched.engine(folder)

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    actors = [Trainer.remote() for _ in range(2)]  # type: ignore[attr-defined]
    cluster.get([actor.train.remote(rank, port) for rank, actor in enumerate(actors)], timeout=400)
    cluster.shutdown()


def _tell(folder: str, whose: str) -> None:
    Path(folder, os.environ.get("RANK", "0")).write_text(whose)


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if arguments[1] != "ray":
        alone()
    {"engine": engine, "accelerate": accelerate, "megatron": megatron, "ray": ray}[arguments[1]](arguments[0])
