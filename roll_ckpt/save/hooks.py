"""The fence before any optimizer's step and before any load into a module or an optimizer, whoever makes it.

Frameworks change parameters in many places, but most changes end in three functions of torch. While a save still
reads what they are about to change, they wait for its copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from roll_ckpt.save import pending
from roll_ckpt.save.source_versions import storage_of

not_stepped: set[str] = set()
"""Endings of keys in an optimizer's state under which a framework keeps what no step changes."""


@functools.cache
def install() -> None:
    """Let `Optimizer.step`, `Optimizer.load_state_dict` and `Module.load_state_dict` of torch wait; once in a process.

    They wait for saves that read the parameters, the buffers or the optimizer's state at hand, and for all saves where
    these cannot be told. They raise nothing that they would not raise otherwise. A step that was compiled or captured
    into a graph does not come by here.
    """
    register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: _fence(lambda: _tensors_of(optimizer)))
    _fence_before(torch.optim.Optimizer, _tensors_of)
    _fence_before(torch.nn.Module, lambda module: (*module.parameters(), *module.buffers()))


def _fence_before(kind: Any, tensors_of: Callable[[Any], Iterable[Any]]) -> None:
    stock = kind.load_state_dict

    @functools.wraps(stock)
    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        _fence(lambda: tensors_of(self))
        return stock(self, *args, **kwargs)

    kind.load_state_dict = load_state_dict


def _tensors_of(optimizer: Any) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and not str(key).endswith(tuple(not_stepped)):
                yield value


def _fence(tensors_of: Callable[[], Iterable[Any]]) -> None:
    if torch.compiler.is_compiling():
        return
    reading = [save for save in pending.pending() if save.reads(None)]
    if not reading:
        return
    storages: set[int] | None
    try:
        storages = {storage_of(tensor) for tensor in tensors_of()}
    except (AttributeError, KeyError, RuntimeError, TypeError):
        storages = None  # tensors without a storage: nobody knows what changes
    for save in reading:
        if save.reads(storages):
            save.fence(lambda owner: storages is None or owner._cdata in storages)
