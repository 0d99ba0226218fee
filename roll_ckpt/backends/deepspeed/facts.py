"""The DeepSpeed backend: `engine.save_checkpoint()` and its kin go through us.

`install()` wraps methods of `DeepSpeedEngine`. An engine whose config has `checkpoint.roll_ckpt`, or that a
`Cluster` attached, gets our `CheckpointEngine`; every other engine behaves as before. Stock code still decides
what a checkpoint holds and how its files are called; we decide where they go (an attempt directory that is
renamed into place when all ranks have voted), how their bytes get there, and when `latest` is written.

Written against DeepSpeed 0.19 (`runtime/engine.py`, `runtime/checkpoint_engine/checkpoint_engine.py`).
"""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from roll_ckpt.config import DeepSpeedConfig

SECTION = "checkpoint.roll_ckpt in the DeepSpeed config"
FRAMEWORK = "deepspeed"


def describe(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Facts for the manifest: framework, stage, precision and parallel sizes."""
    return {
        "framework": FRAMEWORK,
        "framework_version": deepspeed.__version__,
        "zero_stage": int(engine.zero_optimization_stage()),
        "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
        "dp_world_size": engine.seq_dp_world_size,
        "mp_world_size": engine.mp_world_size,
        "global_steps": engine.global_steps,
    }


def parameters_of(engine: DeepSpeedEngine) -> dict[str, dict[str, Any]]:
    """Name, dtype and global shape of every parameter of the engine's module on this rank."""
    return {
        name: {
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "shape": list(getattr(parameter, "ds_shape", parameter.shape)),
        }
        for name, parameter in engine.module.named_parameters()
    }


def section_of(engine: DeepSpeedEngine) -> DeepSpeedConfig | None:
    """The engine's `checkpoint.roll_ckpt`, checked, or None if its config has none."""
    values = (engine._config._param_dict.get("checkpoint") or {}).get("roll_ckpt")
    return None if values is None else DeepSpeedConfig.parse(values, SECTION)
