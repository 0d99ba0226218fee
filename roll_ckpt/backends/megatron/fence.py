"""Copies under training: what may be copied late, and what waits for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from roll_ckpt.save import pending
from roll_ckpt.save.save import Save


class Fence:
    """The saves that read tensors of one optimizer: its step, and all else that changes them, waits for the copies.

    One for each optimizer, however often it is attached.
    """

    def __init__(self) -> None:
        self._saves: list[Save] = []

    @classmethod
    def of(cls, optimizer: Any, model: Sequence[Any]) -> Fence:
        """The fence of `optimizer`, wired into it and into `model` at the first call."""
        found: Fence | None = getattr(optimizer, "_roll_ckpt_fence", None)
        if found is not None:
            return found
        fence = optimizer._roll_ckpt_fence = cls()
        for part in [optimizer, *getattr(optimizer, "chained_optimizers", ())]:
            loads = (name for name in dir(part) if name.startswith("load_parameter_state"))
            for name in (*_CHANGES, *loads):
                fence._before(part, name)
        for chunk in model:
            fence._before(chunk, "broadcast_params")
            for buffer in _buffers(chunk):
                fence._before(buffer, "offload_to_cpu")
            for module in chunk.modules():  # a hook, no wrapper: a copy of the model must load into itself
                module.register_load_state_dict_pre_hook(lambda *args: fence.wait())
        return fence

    def add(self, save: Save) -> None:
        """`save` reads the tensors from now on."""
        self._saves.append(save)

    def wait(self) -> None:
        """See `Attached.fence`."""
        pending.wait_copied(self._saves)

    def _before(self, owner: Any, name: str) -> None:
        stock = getattr(owner, name, None)
        if stock is None:
            return

        @functools.wraps(stock)
        def fenced(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            return stock(*args, **kwargs)

        setattr(owner, name, fenced)


_CHANGES = (
    "step",
    "step_with_ready_grads",
    "load_state_dict",
    "reload_model_params",
    "offload_to_cpu",
    "restore_from_cpu",
)
"""What changes, or moves, an optimizer's tensors and the parameters that it trains."""


def overlappable_storages(model: Sequence[Any], optimizer: Any) -> frozenset[int]:
    """Storages that change in the step of a distributed optimizer alone: its main parameters and moments, and the
    parameters that it trains.

    Where the gather of parameters overlaps the forward pass, parameters are none of them: hooks write them there.
    Nor is anything whose optimizer keeps a copy on the host, which it may still be moving after the step.
    """
    tensors: list[Any] = []
    for part in distributed_parts(optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            return frozenset()
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        tensors += part.model_param_gbuf_map
    unstable = {
        buffer.param_data.untyped_storage()._cdata
        for chunk in model
        for buffer in _buffers(chunk)
        if buffer.param_data is not None and gathers_late(chunk)
    }
    plain = (torch.Tensor, torch.nn.Parameter)
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors if type(tensor) in plain) - unstable


def distributed_parts(optimizer: Any) -> list[Any]:
    """The distributed optimizers with parameters on this rank that `optimizer` is or is made of."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer]


def _buffers(chunk: Any) -> list[Any]:
    """The buffers in which DistributedDataParallel keeps parameters and gradients."""
    return [*getattr(chunk, "buffers", ()), *getattr(chunk, "expert_parallel_buffers", ())] if _is_ddp(chunk) else []


def _is_ddp(chunk: Any) -> bool:
    return isinstance(chunk, DistributedDataParallel)


def gathers_late(chunk: Any) -> bool:
    """Whether parameters are old after the step, until hooks of the next forward pass have gathered them."""
    return _is_ddp(chunk) and bool(chunk.ddp_config.overlap_param_gather)
