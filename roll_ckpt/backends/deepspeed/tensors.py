"""The DeepSpeed backend: `engine.save_checkpoint()` and its kin go through us.

`install()` wraps methods of `DeepSpeedEngine`. An engine whose config has `checkpoint.roll_ckpt`, or that a
`Cluster` attached, gets our `CheckpointEngine`; every other engine behaves as before. Stock code still decides
what a checkpoint holds and how its files are called; we decide where they go (an attempt directory that is
renamed into place when all ranks have voted), how their bytes get there, and when `latest` is written.

Written against DeepSpeed 0.19 (`runtime/engine.py`, `runtime/checkpoint_engine/checkpoint_engine.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from deepspeed.runtime.zero.config import ZeroStageEnum

_OFFLOAD_BUFFER = "_offload_buffer"


def base_optimizer(engine: DeepSpeedEngine) -> Any:
    """The torch optimizer under DeepSpeed's wrapper; without one a `DummyOptim`, None or an offload hook."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _optimizer_tensors(engine: DeepSpeedEngine, *, offload_buffers: bool = True) -> Iterator[torch.Tensor]:
    """The flat partitions (or plain parameters) that the optimizer owns, and its state for them."""
    base = base_optimizer(engine)
    for group in base.param_groups:
        yield from (parameter.data for parameter in group["params"])
    for state in base.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and (offload_buffers or not key.endswith(_OFFLOAD_BUFFER)):
                yield value
    # ZeRO-3 leaves its flat partitions in the base optimizer only while that steps.
    yield from getattr(engine.optimizer, "fp32_partitioned_groups_flat", ())


def _optimized_parameters(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """The module's parameters that this engine's optimizer writes; frozen ones and others' are not among them."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        for group in getattr(engine.optimizer, name, ()):
            yield from (parameter for parameter in group if parameter.requires_grad)


def changes_in_step_alone(engine: DeepSpeedEngine) -> bool:
    """Whether the engine's state changes in the optimizer step alone, so that copies may run until then.

    A hybrid engine fuses LoRA weights to generate; PEFT merges them, and AdaLoRA masks them: between two steps.
    """
    adapted = any(hasattr(module, "peft_config") for module in engine.module.modules())
    return not (isinstance(engine, DeepSpeedHybridEngine) or adapted)


def overlappable_storages(engine: DeepSpeedEngine) -> frozenset[int]:
    """Storages that only the optimizer step changes: flat partitions, their state, plain parameters."""
    if not changes_in_step_alone(engine):
        return frozenset()
    tensors = list(_optimizer_tensors(engine))
    if engine.zero_optimization_stage() < ZeroStageEnum.weights:
        tensors += [parameter.data for parameter in _optimized_parameters(engine)]
    return storages_of(tensors)


def offloaded_storages(engine: DeepSpeedEngine) -> frozenset[int]:
    """Storages of the optimizer that `offload_states` has left on the host.

    They stay as they are until it is called again; none where that cannot be known. Where the host is the device
    `reload_states` moves nothing, and the next step writes to them. Counters are on the host at all times, and are
    not among them.
    """
    if not getattr(engine.optimizer, "offloaded_states", None):
        return frozenset()
    if any("offload_states" in vars(owner) for owner in (engine, engine.optimizer)):
        return frozenset()  # somebody's own, which would not wait before it overwrites them
    if os.environ.get("DS_PIN_MEMORY_BACKEND", "").strip().lower() == "native":
        return frozenset()  # such memory is freed when DeepSpeed drops the tensor, whoever holds its storage
    return storages_of(t for t in stepped_tensors(engine) if t.device.type == "cpu" and t.dim() > 0)


def stepped_tensors(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """What the optimizer step writes; ZeRO-3's host buffers that wait for the next offload are not among it."""
    yield from _optimizer_tensors(engine, offload_buffers=False)
    yield from (parameter.data for parameter in _optimized_parameters(engine))


def storages_of(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors)


def estimate_bytes(engine: DeepSpeedEngine) -> int:
    """About what this rank will write, in bytes."""
    tensors = []
    if engine.save_zero_checkpoint or engine.save_non_zero_checkpoint:
        tensors += list(_optimizer_tensors(engine))
    if engine.save_non_zero_checkpoint and engine.zero_optimization_stage() < ZeroStageEnum.weights:
        tensors += [*engine.module.parameters(), *engine.module.buffers()]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
