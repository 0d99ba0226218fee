"""The DeepSpeed backend: `engine.save_checkpoint()` and its kin go through us.

`install()` wraps methods of `DeepSpeedEngine`. An engine whose config has `checkpoint.roll_ckpt`, or that a
`Cluster` attached, gets our `CheckpointEngine`; every other engine behaves as before. Stock code still decides
what a checkpoint holds and how its files are called; we decide where they go (an attempt directory that is
renamed into place when all ranks have voted), how their bytes get there, and when `latest` is written.

Written against DeepSpeed 0.19 (`runtime/engine.py`, `runtime/checkpoint_engine/checkpoint_engine.py`).
"""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import DummyOptim
from deepspeed.runtime.zero.config import ZeroStageEnum

from roll_ckpt.backends.deepspeed.tensors import base_optimizer
from roll_ckpt.errors import ConfigError, UnsupportedError


def refuse_unsupported(engine: DeepSpeedEngine) -> None:
    """Raise for what this version does not support, by name and with the reason.

    Raises:
        UnsupportedError
    """
    refuse({**refusals_of_config(engine), **_refusals_of_engine(engine)})


def refuse(refusals: dict[str, tuple[bool, str]]) -> None:
    for name, (found, reason) in refusals.items():
        if found:
            raise UnsupportedError(f"roll_ckpt does not support {name} in this version: {reason}")


def refuse_parts(engine: DeepSpeedEngine) -> None:
    """Raise if `save_16bit_model` would write a part of the model as if it were the model.

    Raises:
        UnsupportedError
    """
    experts = engine.expert_parallel_group.values() if engine.has_moe_layers else ()
    for name, parted in {
        "a PipelineModule": isinstance(engine, PipelineEngine),
        "experts on several ranks": any(dist.get_world_size(group) > 1 for group in experts),
        "AutoTP below ZeRO-3": engine.autotp_size() > 1 and engine.zero_optimization_stage() < ZeroStageEnum.weights,
    }.items():
        if parted:
            raise UnsupportedError(
                f"save_16bit_model and save_only_model do not support {name}: DeepSpeed gathers nothing there and "
                "would write what rank 0 holds alone. Save a whole checkpoint"
            )


def refuse_rivals(engine: DeepSpeedEngine) -> None:
    """Raise if the config also asks for another checkpoint engine.

    Raises:
        ConfigError: names both keys.
    """
    values = engine._config._param_dict
    for key, present in {
        "checkpoint.writer": bool((values.get("checkpoint") or {}).get("writer")),
        "datastates_ckpt": "datastates_ckpt" in values,
    }.items():
        if present:
            raise ConfigError(
                f"the DeepSpeed config sets both {key} and checkpoint.roll_ckpt; each replaces the checkpoint "
                "engine, remove one"
            )


def refusals_of_config(engine: DeepSpeedEngine) -> dict[str, tuple[bool, str]]:
    """What can be told before the engine has an optimizer, groups or swap files."""
    zero = engine._config.zero_config
    offloads = [zero.offload_optimizer, zero.offload_param]
    return {
        "NVMe offload": (
            any(offload is not None and offload.device == "nvme" for offload in offloads),
            "the state lies in swap files, which DeepSpeed copies past the checkpoint engine: no digest and no vote "
            "would cover them. Offload to the CPU instead",
        ),
        "offload_optimizer.ratio below 1 (Twin-Flow)": (
            zero.stage == ZeroStageEnum.weights
            and zero.offload_optimizer is not None
            and zero.offload_optimizer.device != "none"
            and zero.offload_optimizer.ratio < 1,
            "the moments of the part that stays on the GPU are not in DeepSpeed's checkpoint",
        ),
        "zero_quantized_nontrainable_weights": (
            zero.zero_quantized_nontrainable_weights,
            "DeepSpeed's checkpoint holds the frozen weights as 8-bit integers without their scales",
        ),
        "ZeRO++ quantization (zero_quantized_weights, zero_quantized_gradients)": (
            zero.zero_quantized_weights or zero.zero_quantized_gradients,
            "its kernels do not exist on CPUs, so that it could not be tried. hpZ alone works",
        ),
        "ZenFlow": (
            zero.zenflow is not None,
            "its second optimizer changes weights after the step, and neither that one's state nor the moments in "
            "its overlapping process are in DeepSpeed's checkpoint",
        ),
        "SuperOffload": (
            zero.offload_optimizer is not None and zero.offload_optimizer.super_offload,
            "its weights change during backward, and the moments in its worker process are not in DeepSpeed's "
            "checkpoint",
        ),
        "a PipelineModule in bf16 below ZeRO-1": (
            engine.pipeline_parallelism and engine.bfloat16_enabled() and zero.stage == ZeroStageEnum.disabled,
            "DeepSpeed cannot load its own checkpoints of it. Set zero_optimization.stage to 1",
        ),
        "use_node_local_storage": (
            bool(engine.use_node_local_storage()),
            "the commit needs one directory that all ranks see",
        ),
    }


def _refusals_of_engine(engine: DeepSpeedEngine) -> dict[str, tuple[bool, str]]:
    subset = engine.seq_dp_world_size * engine.mp_world_size
    if isinstance(engine, PipelineEngine):
        grid = engine.module.mpu()
        subset = grid.data_parallel_size * grid.pipe_parallel_size * grid.model_parallel_size
    return {
        "sequence parallelism over a device mesh": (
            engine.mesh_device is not None and engine.sequence_parallel_size > 1,
            "every rank of a sequence would write the same files. Give DeepSpeed an mpu instead: "
            "deepspeed.runtime.sequence_parallel.parallel_state_sp",
        ),
        "an engine on a subset of its world": (
            subset != dist.get_world_size(),
            f"DeepSpeed's own save waits for all {dist.get_world_size()} ranks and would hang; give the engine's "
            "ranks a torchrun job of their own",
        ),
    }


def without_optimizer(engine: DeepSpeedEngine) -> bool:
    base = base_optimizer(engine)
    return isinstance(base, DummyOptim) or not hasattr(base, "param_groups")
