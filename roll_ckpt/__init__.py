"""roll_ckpt: a checkpoint backend for post-training language models. Start with README.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from roll_ckpt.backends.megatron.model import MegatronModel as MegatronModel
    from roll_ckpt.config import PipelineConfig as PipelineConfig
    from roll_ckpt.pipeline.base import BasePipeline as BasePipeline
    from roll_ckpt.pipeline.cluster import Cluster as Cluster
    from roll_ckpt.pipeline.worker_state import WorkerState as WorkerState
    from roll_ckpt.save.pending import fence as fence
    from roll_ckpt.save.pending import wait_pending as wait_pending

_HOME = {
    "BasePipeline": "roll_ckpt.pipeline.base",
    "Cluster": "roll_ckpt.pipeline.cluster",
    "MegatronModel": "roll_ckpt.backends.megatron.model",
    "PipelineConfig": "roll_ckpt.config",
    "WorkerState": "roll_ckpt.pipeline.worker_state",
    "fence": "roll_ckpt.save.pending",
    "wait_pending": "roll_ckpt.save.pending",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line starts without torch."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "errors":
        return importlib.import_module("roll_ckpt.errors")
    raise AttributeError(f"module 'roll_ckpt' has no attribute {name!r}")
