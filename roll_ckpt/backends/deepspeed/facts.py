"""What is read off a DeepSpeed engine: its config as the user gave it, and the manifest's facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from roll_ckpt.backends.deepspeed.tensors import OFFLOAD_BUFFER, base_optimizer

FRAMEWORK = "deepspeed"


def describe(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Facts for the manifest: framework, stage, precision, parallel sizes, and what tells optimizers apart."""
    base = base_optimizer(engine)
    return {
        "framework": FRAMEWORK,
        "framework_version": deepspeed.__version__,
        "zero_stage": int(engine.zero_optimization_stage()),
        "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
        "dp_world_size": engine.seq_dp_world_size,
        "mp_world_size": engine.mp_world_size,
        "global_steps": engine.global_steps,
        "optimizer": type(base).__name__,
        "optimizer_state": sorted(state_keys_of(base.state.values())),
        "optimizer_settings": sorted(settings_of(base.param_groups)),
    }


_SETTINGS = frozenset({"betas", "momentum", "alpha", "rho", "lr_decay", "etas", "lambd"})


def state_keys_of(states: Iterable[Any]) -> frozenset[str]:
    """The keys of what an optimizer keeps for each parameter. Empty before the first step of most optimizers.

    Left out: the step, which some keep among their settings, and host buffers of DeepSpeed's for offloading.
    """
    kinds = {tuple(state) for state in states if isinstance(state, dict)}
    keys = {str(key) for kind in kinds for key in kind}
    return frozenset(key for key in keys if key != "step" and not key.endswith(OFFLOAD_BUFFER))


def settings_of(groups: Iterable[Any]) -> frozenset[str]:
    """Which of the settings that only some kinds of optimizers have are in its groups of parameters."""
    return frozenset(key for group in groups if isinstance(group, dict) for key in _SETTINGS & group.keys())


def user_config(engine: DeepSpeedEngine) -> Mapping[str, Any]:
    """The DeepSpeed config as the user gave it, unknown keys included."""
    config: Mapping[str, Any] = engine._config._param_dict
    return config
