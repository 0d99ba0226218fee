"""What DeepSpeed engines are refused: features by name and with the reason, before the disk is touched."""

from __future__ import annotations

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import DummyOptim
from deepspeed.runtime.zero.config import ZeroStageEnum

from roll_ckpt.backends.deepspeed import version
from roll_ckpt.backends.deepspeed.facts import user_config
from roll_ckpt.backends.deepspeed.tensors import base_optimizer
from roll_ckpt.errors import ConfigError, UnsupportedError


def refuse_unsupported(engine: DeepSpeedEngine) -> None:
    """Refuse an engine that uses a feature which this version does not support. No collective.

    Raises:
        UnsupportedError: names the first such feature and the reason.
    """
    refuse({**refusals_of_config(engine), **_refusals_of_engine(engine)})


def refuse(refusals: dict[str, tuple[bool, str]]) -> None:
    """Refuse the first feature that is in use; `refusals` maps its name to whether it is in use, and the reason.

    Raises:
        UnsupportedError: names the feature and the reason.
    """
    for name, (in_use, reason) in refusals.items():
        if in_use:
            raise UnsupportedError(f"roll_ckpt does not support {name} in this version: {reason}")


def refuse_parts(engine: DeepSpeedEngine) -> None:
    """Refuse an engine of which `save_16bit_model` would write a part as if it were the whole model.

    Raises:
        UnsupportedError: names what cuts the model into parts.
    """
    in_slices = version.autotp_size(engine) > 1 and engine.zero_optimization_stage() < ZeroStageEnum.weights
    experts = engine.expert_parallel_group.values() if engine.has_moe_layers else ()
    for name, in_use in {
        "a PipelineModule": isinstance(engine, PipelineEngine),
        "experts on several ranks": any(dist.get_world_size(group) > 1 for group in experts),
        "AutoTP below ZeRO-3": in_slices,
    }.items():
        if in_use:
            raise UnsupportedError(
                f"save_16bit_model and save_only_model do not support {name}: DeepSpeed gathers nothing there and "
                "would write only the part that rank 0 holds. Save a whole checkpoint instead"
            )


def refuse_rivals(engine: DeepSpeedEngine) -> None:
    """Refuse a config that also asks for another checkpoint engine.

    Raises:
        ConfigError: names both keys.
    """
    values = user_config(engine)
    for key, present in {
        "checkpoint.writer": bool((values.get("checkpoint") or {}).get("writer")),
        "datastates_ckpt": "datastates_ckpt" in values,
        "nebula.enabled": bool((values.get("nebula") or {}).get("enabled")),  # later versions have no Nebula
    }.items():
        if present:
            raise ConfigError(
                f"the DeepSpeed config sets both {key} and checkpoint.roll_ckpt; each replaces the checkpoint "
                "engine, remove one"
            )


def refusals_of_config(engine: DeepSpeedEngine) -> dict[str, tuple[bool, str]]:
    """For `refuse`: what the config shows before the engine has an optimizer, process groups or swap files."""
    zero = engine._config.zero_config
    offloads = [zero.offload_optimizer, zero.offload_param]
    return {
        "NVMe offload": (
            any(offload is not None and offload.device == "nvme" for offload in offloads),
            "the state is in swap files, which DeepSpeed copies without its checkpoint engine, so no digest and no "
            "vote would cover them. Offload to the CPU instead",
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
            "its kernels do not exist on CPUs, so it could not be tested. hpZ alone works",
        ),
        "MiCS": (
            (version.zero_setting(engine, "mics_shard_size") or 0) > 0,
            "only the first of its groups of ranks saves, and later versions of DeepSpeed have no MiCS, so it was not "
            "tested. Use hpZ (zero_hpz_partition_size) instead",
        ),
        "ZenFlow": (
            version.zero_setting(engine, "zenflow") is not None,
            "its second optimizer changes weights after the step, and DeepSpeed's checkpoint holds neither the state "
            "of that optimizer nor the moments in its overlapping process",
        ),
        "SuperOffload": (
            bool(version.zero_setting(engine, "offload_optimizer", "super_offload")),
            "its weights change during the backward pass, and DeepSpeed's checkpoint does not hold the moments in its "
            "worker process",
        ),
        "a PipelineModule in bf16 below ZeRO-1": (
            isinstance(engine, PipelineEngine)
            and engine.bfloat16_enabled()
            and zero.stage == ZeroStageEnum.disabled
            and not version.BF16_IN_PARTITIONS,
            "DeepSpeed cannot load its own checkpoints of it. Set zero_optimization.stage to 1",
        ),
        "use_node_local_storage": (
            bool(engine.use_node_local_storage()),
            "the commit needs one directory that all ranks see. Turn it off, and save to a shared file system",
        ),
    }


def _refusals_of_engine(engine: DeepSpeedEngine) -> dict[str, tuple[bool, str]]:
    """For `refuse`: what only the finished engine shows."""
    engine_size = engine.seq_dp_world_size * engine.mp_world_size
    if isinstance(engine, PipelineEngine):
        grid = engine.module.mpu()
        engine_size = grid.data_parallel_size * grid.pipe_parallel_size * grid.model_parallel_size
    return {
        "sequence parallelism over a device mesh": (
            engine.mesh_device is not None and engine.sequence_parallel_size > 1,
            "all ranks that share a sequence would write the same files. Give DeepSpeed an mpu instead: "
            "deepspeed.runtime.sequence_parallel.parallel_state_sp",
        ),
        "bf16 without ZeRO": (
            version.loses_bf16(engine),
            f"DeepSpeed {deepspeed.__version__} does not save or load the optimizer of such an engine. Set "
            "zero_optimization.stage to 1, or use another version: up to 0.17.5, or from 0.18.5",
        ),
        "an engine on a subset of the job's ranks": (
            engine_size != dist.get_world_size(),
            f"DeepSpeed's own save waits for all {dist.get_world_size()} ranks and would hang; give the engine's "
            f"{engine_size} ranks a torchrun job of their own",
        ),
    }


def will_have_optimizer(engine: DeepSpeedEngine) -> bool:
    """Whether an engine that is being made gets an optimizer. Without one it is never saved, so nothing is refused."""
    return engine.client_optimizer is not None or bool(engine.optimizer_name())


def without_optimizer(engine: DeepSpeedEngine) -> bool:
    """Whether the engine has no optimizer that steps; DeepSpeed cannot save such an engine."""
    base = base_optimizer(engine)
    return isinstance(base, DummyOptim) or not hasattr(base, "param_groups")
