"""Which tensors a save may copy during training, and the fence that what changes them waits at."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from roll_ckpt.backends.forward_changes import changes_in_forward
from roll_ckpt.save import pending
from roll_ckpt.save.save import Save


class Fence:
    """The saves that still read the tensors of one optimizer.

    The optimizer's step, and what else changes the tensors, first waits for their copies; for loads into the model,
    `save.hooks` waits. There is one fence for each optimizer, however often it is attached.
    """

    def __init__(self) -> None:
        self._saves: list[Save] = []

    @classmethod
    def of(cls, optimizer: Any, model: Sequence[Any]) -> Fence:
        """The fence of `optimizer`. The first call wraps its methods and those of `model`. This rank alone."""
        existing: Fence | None = getattr(optimizer, "_roll_ckpt_fence", None)
        if existing is not None:
            return existing
        fence = optimizer._roll_ckpt_fence = cls()
        for part in [optimizer, *getattr(optimizer, "chained_optimizers", ())]:
            loads = (name for name in dir(part) if name.startswith("load_parameter_state"))
            for name in (*_CHANGES, *loads):
                fence._before(part, name)
        for chunk in model:
            fence._before(chunk, "broadcast_params")
            for buffer in _buffers(chunk):
                fence._before(buffer, "offload_to_cpu")
        return fence

    def add(self, save: Save) -> None:
        """Let `wait` also wait for `save`, which reads the tensors from now on."""
        self._saves.append(save)

    def wait(self) -> None:
        """Block until no save reads the tensors any more; does not wait for the disk. This rank alone.

        Raises:
            SaveFailed: an earlier save failed in the background and `fail_training` is set.
        """
        pending.wait_copied(self._saves)

    def _before(self, owner: Any, name: str) -> None:
        """Let the method `name` of `owner`, if it has one, wait first."""
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
"""Methods of an optimizer that change or move its tensors and the parameters that it trains."""


def overlappable_storages(model: Sequence[Any], optimizer: Any) -> frozenset[int]:
    """Storages that only the step of a distributed optimizer changes, each as its `_cdata`.

    They are its main parameters, its moments, and the parameters that it trains. Where the gather of parameters
    overlaps the forward pass, parameters are excluded: hooks write them there. If an optimizer keeps a copy on the
    host, the result is empty: it may still be moving that copy after the step. So it is if the model changes parameters
    in its forward pass.
    """
    if changes_in_forward(model):
        return frozenset()
    tensors: list[Any] = []
    for part in distributed_parts(optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            return frozenset()
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        tensors += part.model_param_gbuf_map
    gathered_late = {
        buffer.param_data.untyped_storage()._cdata
        for chunk in model
        for buffer in _buffers(chunk)
        if buffer.param_data is not None and gathers_late(chunk)
    }
    plain = (torch.Tensor, torch.nn.Parameter)
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors if type(tensor) in plain) - gathered_late


def live_tensors(model: Sequence[Any], optimizer: Any) -> list[Any]:
    """The tensors through which code may change what a save copies late. Each has a version counter of its own.

    Parameters are views of flat buffers made through `.data`, so that a change of the buffer does not count as one of
    the view.
    """
    tensors = [parameter for chunk in model for parameter in chunk.parameters()]
    tensors += [buffer.param_data for chunk in model for buffer in _buffers(chunk) if buffer.param_data is not None]
    for part in distributed_parts(optimizer):
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    return tensors


def distributed_parts(optimizer: Any) -> list[Any]:
    """The distributed optimizers that `optimizer` is, or chains, and that have parameters on this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer]


def _buffers(chunk: Any) -> list[Any]:
    """The buffers in which DistributedDataParallel keeps parameters and gradients."""
    return [*getattr(chunk, "buffers", ()), *getattr(chunk, "expert_parallel_buffers", ())] if _is_ddp(chunk) else []


def _is_ddp(chunk: Any) -> bool:
    return isinstance(chunk, DistributedDataParallel)


def gathers_late(chunk: Any) -> bool:
    """Whether parameters keep their old values after the step, until hooks of the next forward pass gather them."""
    return _is_ddp(chunk) and bool(chunk.ddp_config.overlap_param_gather)
