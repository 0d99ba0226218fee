"""Which of an engine's tensors a save may copy during training, which lie on the host, and how many bytes there are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from deepspeed.runtime.zero.config import ZeroStageEnum

from roll_ckpt.backends.forward_changes import changes_in_forward
from roll_ckpt.formats.torch_zip.sources import bytes_of
from roll_ckpt.save import hooks

OFFLOAD_BUFFER = "_offload_buffer"
hooks.not_stepped.add(OFFLOAD_BUFFER)


def base_optimizer(engine: DeepSpeedEngine) -> Any:
    """The torch optimizer under DeepSpeed's wrapper; without one a `DummyOptim`, None or an offload hook."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _optimizer_tensors(engine: DeepSpeedEngine, *, offload_buffers: bool = True) -> Iterator[torch.Tensor]:
    """The flat partitions (or plain parameters) that the optimizer owns, and its state for them.

    `offload_buffers`: also ZeRO-3's host buffers that wait for the next offload.
    """
    base = base_optimizer(engine)
    for group in base.param_groups:
        yield from (parameter.data for parameter in group["params"])
    for state in base.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and (offload_buffers or not key.endswith(OFFLOAD_BUFFER)):
                yield value
    # ZeRO-3 keeps its flat partitions in the base optimizer only during a step.
    yield from getattr(engine.optimizer, "fp32_partitioned_groups_flat", ())


def _optimized_parameters(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """The module's parameters that this engine's optimizer writes: no frozen ones, none of another optimizer."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        for group in getattr(engine.optimizer, name, ()):
            yield from (parameter for parameter in group if parameter.requires_grad)


def changes_in_step_alone(engine: DeepSpeedEngine) -> bool:
    """Whether only the optimizer step changes the engine's state, so that copies may run until then.

    Not so with LoRA: between two steps a hybrid engine fuses LoRA weights to generate, PEFT merges them, and AdaLoRA
    masks them. Nor where the forward pass itself changes parameters.
    """
    adapted = any(hasattr(module, "peft_config") for module in engine.module.modules())
    return not (isinstance(engine, DeepSpeedHybridEngine) or adapted or changes_in_forward([engine.module]))


def overlappable_storages(engine: DeepSpeedEngine) -> frozenset[int]:
    """Storages that only the optimizer step changes: flat partitions, their state, plain parameters.

    A storage is identified by its `_cdata`, the address of its `StorageImpl`.
    """
    if not changes_in_step_alone(engine):
        return frozenset()
    tensors = list(_optimizer_tensors(engine))
    if engine.zero_optimization_stage() < ZeroStageEnum.weights:
        tensors += [parameter.data for parameter in _optimized_parameters(engine)]
    return storages_of(tensors)


def offloaded_storages(engine: DeepSpeedEngine) -> frozenset[int]:
    """Storages of the optimizer's tensors that `offload_states` has moved to the host.

    They stay unchanged until `offload_states` is called again; the result is empty where that cannot be known. Where
    the host is the device, `reload_states` moves nothing and the next step writes to them. Step counters, which are
    always on the host, are left out.
    """
    if not getattr(engine.optimizer, "offloaded_states", None):
        return frozenset()
    if any("offload_states" in vars(owner) for owner in (engine, engine.optimizer)):
        return frozenset()  # replaced on the instance: that one would overwrite the buffers without waiting for us
    if os.environ.get("DS_PIN_MEMORY_BACKEND", "").strip().lower() == "native":
        return frozenset()  # DeepSpeed frees such memory when it drops the tensor, even while we hold the storage
    return storages_of(tensor for tensor in stepped_tensors(engine) if tensor.device.type == "cpu" and tensor.dim() > 0)


def live_tensors(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The tensors through which code may change what a save copies late. Each has a version counter of its own.

    Parameters and fp32 partitions are views of flat buffers made through `.data`, so that a change of the buffer does
    not count as one of the view.
    """
    flat = ("bit16_groups_flat", "bf16_groups_flat", "fp16_groups_flat", "fp32_partitioned_groups_flat")
    tensors = [tensor for name in flat for tensor in getattr(engine.optimizer, name, ())]
    tensors += [parameter for group in base_optimizer(engine).param_groups for parameter in group["params"]]
    return [*tensors, *engine.module.parameters()]


def stepped_tensors(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """The tensors that the optimizer step writes; ZeRO-3's host buffers for the next offload are left out."""
    yield from _optimizer_tensors(engine, offload_buffers=False)
    yield from (parameter.data for parameter in _optimized_parameters(engine))


def storages_of(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    """The storages of `tensors`, each as its `_cdata`; sparse tensors and their like have none."""
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors if tensor.layout is torch.strided)


def estimate_bytes(engine: DeepSpeedEngine) -> int:
    """About how many bytes this rank will write in one save. No collective."""
    tensors = []
    if engine.save_zero_checkpoint or engine.save_non_zero_checkpoint:
        tensors += list(_optimizer_tensors(engine))
    if engine.save_non_zero_checkpoint and engine.zero_optimization_stage() < ZeroStageEnum.weights:
        tensors += [*engine.module.parameters(), *engine.module.buffers()]
    return bytes_of(tensors)
