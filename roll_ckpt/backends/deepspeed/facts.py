"""What is read off a DeepSpeed engine: its section of the config, the manifest's facts, and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
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


def user_config(engine: DeepSpeedEngine) -> Mapping[str, Any]:
    """The DeepSpeed config as the user gave it, unknown keys included."""
    config: Mapping[str, Any] = engine._config._param_dict
    return config


def section_of(engine: DeepSpeedEngine) -> DeepSpeedConfig | None:
    """The `checkpoint.roll_ckpt` section of the engine's config, validated; None if there is none.

    Raises:
        ConfigError: the section has an unknown key or a bad value.
    """
    values = (user_config(engine).get("checkpoint") or {}).get("roll_ckpt")
    return None if values is None else DeepSpeedConfig.parse(values, SECTION)
