"""What differs between the versions of DeepSpeed, found by looking for it, and what every version must have.

The rest of this folder asks here; docs/deepspeed.md#versions has the same as a table. Importing the folder calls
`check` first, so the names in `_NEEDED` may be imported anywhere in it.
"""

from __future__ import annotations

import dis
import importlib
import importlib.util
import inspect
import logging
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import deepspeed
import torch.distributed as dist

from roll_ckpt.errors import UnsupportedError

log = logging.getLogger("roll_ckpt")

OLDEST, NEWEST = "0.16.0", "0.19.8"
"""The versions that were tried. Others run, with a warning, if they have all that is needed."""

_ENGINE = "deepspeed.runtime.engine"
_NEEDED: dict[str, str] = {
    "deepspeed.accelerator": "get_accelerator",
    "deepspeed.moe.layer": "MoE",
    "deepspeed.runtime.checkpoint_engine.checkpoint_engine": "CheckpointEngine",
    "deepspeed.runtime.fp16.loss_scaler": "DynamicLossScaler LossScaler",
    "deepspeed.runtime.hybrid_engine": "DeepSpeedHybridEngine",
    "deepspeed.runtime.pipe.engine": "PipelineEngine",
    "deepspeed.runtime.pipe.module": "PipelineModule PipelineModule.ckpt_layer_path",
    "deepspeed.runtime.utils": "DummyOptim",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.zero.stage3": "DeepSpeedZeroOptimizer_Stage3",
    "deepspeed.runtime.zero.stage_1_and_2": "DeepSpeedZeroOptimizer",
    "deepspeed.utils.groups": "_get_expert_parallel_rank _get_max_expert_size_name",
    "deepspeed.utils.tensor_fragment": "fragment_address",
    _ENGINE: "DeepSpeedEngine get_fp32_state_dict_from_zero_checkpoint",
}
"""By module, what must be in it."""
_METHODS: dict[str, str] = {
    "_checkpoint_tag_validation": "tag",
    "_configure_checkpointing": "",
    "_do_sanity_check": "",
    "_get_all_ckpt_names": "",
    "_optimizer_has_ckpt_event_epilogue": "",
    "_optimizer_has_ckpt_event_prologue": "",
    "_take_model_step": "",
    "bfloat16_enabled": "",
    "destroy": "",
    "get_data_types": "",
    "load_checkpoint": "load_dir tag load_module_strict load_optimizer_states load_module_only custom_load_fn",
    "load_module_state_dict": "checkpoint strict custom_load_fn fetch_z3_params",
    "load_universal_checkpoint": "",
    "save_16bit_model": "save_dir save_filename exclude_frozen_parameters",
    "save_checkpoint": "save_dir tag client_state save_latest exclude_frozen_parameters",
    "use_node_local_storage": "",
    "zero_optimization": "",
    "zero_optimization_partition_weights": "",
    "zero_optimization_stage": "",
}
"""The methods that `DeepSpeedEngine` must have, and the arguments that they must take by these names."""
_ATTRIBUTES = (
    "_config checkpoint_engine expert_parallel_group global_rank global_steps has_moe_layers mesh_device "
    "mp_world_size mpu optimizer save_non_zero_checkpoint save_zero_checkpoint seq_data_parallel_group "
    "seq_dp_world_size sequence_parallel_size"
)
"""What engines must have; it is there only once there is an engine, so it is looked for in DeepSpeed's code."""


def check() -> None:
    """Refuse a DeepSpeed without what this backend relies on. No collective.

    A version outside of `OLDEST` to `NEWEST` that has it all is accepted, with a warning on rank 0.

    Raises:
        UnsupportedError: names what is missing. Nothing of DeepSpeed was changed.
    """
    missing = [*_missing_names(), *_missing_methods(), *_missing_attributes()]
    if missing:
        raise UnsupportedError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}, which roll_ckpt relies on; roll_ckpt was "
            f"not installed in it. Use DeepSpeed {OLDEST} to {NEWEST}"
        )
    if not _numbers(OLDEST) <= _numbers(deepspeed.__version__) <= _numbers(NEWEST) and _on_rank0():
        log.warning(
            "DeepSpeed %s has all that roll_ckpt relies on, but roll_ckpt was tested with %s to %s only; resume once "
            "from a checkpoint before you rely on it",
            *(deepspeed.__version__, OLDEST, NEWEST),
        )


def _missing_names() -> Iterator[str]:
    for module, names in _NEEDED.items():
        for name in names.split():
            if _found(module, name) is None:
                yield f"{module}.{name}"


def _missing_methods() -> Iterator[str]:
    engine = _found(_ENGINE, "DeepSpeedEngine")
    for name, arguments in _METHODS.items() if engine is not None else ():
        method = getattr(engine, name, None)
        if method is None:
            yield f"DeepSpeedEngine.{name}"
        elif absent := [argument for argument in arguments.split() if not _takes(method, argument)]:
            yield f"argument {', '.join(absent)} of DeepSpeedEngine.{name}"


def _missing_attributes() -> Iterator[str]:
    engine = _found(_ENGINE, "DeepSpeedEngine")
    if engine is not None:
        stored = _stored(_ENGINE)
        for name in _ATTRIBUTES.split():
            if name not in stored and not hasattr(engine, name):
                yield f"DeepSpeedEngine.{name}"


def _found(module: str, name: str) -> Any:
    """What `name`, with dots, is in `module`; None if either is not there."""
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _takes(method: Callable[..., Any], argument: str) -> bool:
    """Whether it takes an argument of this name; somebody's wrapper with `**kwargs` does."""
    parameters = inspect.signature(method).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _stored(module: str) -> frozenset[str]:
    """The attributes that the code of `module` assigns, as it is on disk: others may have replaced its functions."""
    spec = importlib.util.find_spec(module)
    code = spec.loader.get_code(module) if spec is not None and hasattr(spec.loader, "get_code") else None  # type: ignore[union-attr]
    left, found = [code], set()
    while left:
        part = left.pop()
        if isinstance(part, types.CodeType):
            found |= {step.argval for step in dis.get_instructions(part) if step.opname == "STORE_ATTR"}
            left += part.co_consts
    return frozenset(found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _on_rank0() -> bool:
    if dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"


# --- what differs ------------------------------------------------------------------------------------------------


def _uses(function: Any, name: str) -> bool:
    """Whether the code of `function`, beneath wrappers, uses a global or an attribute of this name."""
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    return code is not None and name in code.co_names


_engine = _found(_ENGINE, "DeepSpeedEngine")

CREATES_FILES_IN_TURN = _uses(getattr(_engine, "_create_zero_checkpoint_files", None), "barrier")
"""Up to 0.17.0: under ZeRO the ranks make the directory of the tag one after the other, with a barrier for each."""
_BF16_SAVED_IN_PARTITIONS = _uses(getattr(_engine, "_save_checkpoint", None), "bfloat16_enabled")
BF16_IN_PARTITIONS = _uses(getattr(_engine, "load_checkpoint", None), "bfloat16_enabled")
"""Up to 0.17.6: without ZeRO, bf16 engines save and load the optimizer in files of partitions, as under ZeRO-1."""

_constants = importlib.import_module("deepspeed.checkpoint.constants")
AFFINE_MAP, AUTOEP_PARAM_EP_RANK, DS_AUTOEP_UC_META, DS_AUTOTP_UC_META = (
    str(getattr(_constants, name, name.lower()))
    for name in ("AFFINE_MAP", "AUTOEP_PARAM_EP_RANK", "DS_AUTOEP_UC_META", "DS_AUTOTP_UC_META")
)
"""The marks that AutoTP and AutoEP put on parameters; where DeepSpeed has none, no parameter bears one."""


def partitions_without_zero(engine: Any) -> bool:
    """Whether an engine without ZeRO has the optimizer in partitions, one for each rank."""
    return BF16_IN_PARTITIONS and bool(engine.bfloat16_enabled())


def loses_bf16(engine: Any) -> bool:
    """Whether DeepSpeed itself does not save or load the optimizer of this engine, which is in bf16 without ZeRO.

    So in 0.17.6, whose save raises, and in 0.18.0 to 0.18.4, which say nothing: they take the optimizer to be in
    partitions, where it no longer is.
    """
    in_use = bool(engine.bfloat16_enabled()) and int(engine.zero_optimization_stage()) == 0
    in_partitions = BF16_IN_PARTITIONS and hasattr(engine.optimizer, "bf16_groups")
    return in_use and _BF16_SAVED_IN_PARTITIONS and not in_partitions


def take_turns_left(engine: Any, dirs_made: int) -> None:
    """After an error in `save_checkpoint` on this rank: the turns of `CREATES_FILES_IN_TURN` that are left of it.

    `dirs_made`: how often `makedirs` was called since `create`, first for the model states, then in this rank's turn.
    """
    if CREATES_FILES_IN_TURN and engine.save_zero_checkpoint and dirs_made < 2:
        for _ in range(dist.get_world_size(engine.optimizer.dp_process_group)):
            dist.barrier(group=engine.optimizer.dp_process_group)


def clean_up(checkpoint_engine: Any) -> None:
    """End a checkpoint engine of DeepSpeed's that is replaced. Before 0.17.1 there was nothing to end."""
    if hasattr(checkpoint_engine, "cleanup"):
        checkpoint_engine.cleanup()


def with_offload_states(classes: Iterable[Any]) -> list[Any]:
    """Those of the optimizers that can offload their states: before 0.17.6 only that of ZeRO-3."""
    return [optimizer for optimizer in classes if hasattr(optimizer, "offload_states")]


def checkpoint_mp_rank(engine: Any) -> int:
    """The model parallel rank in the names of this rank's files; after 0.19.5 an attribute of its own."""
    if hasattr(engine, "checkpoint_mp_rank"):
        return int(engine.checkpoint_mp_rank)
    return 0 if engine.mpu is None else int(engine.mpu.get_model_parallel_rank())


def autotp_size(engine: Any) -> int:
    """Over how many ranks AutoTP cuts the model; 1 before it could be trained (0.16.4)."""
    return int(engine.autotp_size()) if hasattr(engine, "autotp_size") else 1


def zero_setting(engine: Any, *names: str) -> Any:
    """A setting of `zero_optimization`, such as `("offload_optimizer", "ratio")`; None where this version has none."""
    value = engine._config.zero_config
    for name in names:
        value = getattr(value, name, None)
    return value


def flat_offsets(optimizer: Any, group: int) -> list[int]:
    """Where each parameter begins in a flat buffer of ZeRO-1 and 2: up to 0.19.5 one follows the other."""
    if hasattr(optimizer, "round_robin_bit16_offsets"):
        return list(optimizer.round_robin_bit16_offsets[group])
    numels = [like.numel() for like in optimizer.round_robin_bit16_meta[group]]
    return [0, *accumulate(numels)][: len(numels)]


def sub_group_process_group(optimizer: Any, sub_group: int) -> Any:
    """The ranks over which ZeRO-3 cuts a sub-group: before 0.19.3 those of data parallelism."""
    groups = getattr(optimizer, "sub_group_process_groups", None)
    return optimizer.dp_process_group if groups is None else groups[sub_group]
