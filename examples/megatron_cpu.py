"""Real Megatron-core on CPU and gloo: patches of what assumes CUDA.

Import this before `megatron`. Tried with megatron-core 0.14 to 0.19 and torch 2.13. Patched is what stops without
it: names of CUDA devices become the CPU, its random state is torch's, its stream does nothing, tensors say that they
are CUDA tensors (the distributed optimizer asks), and the fused Adam is one with the same state, written in torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """`device="cuda"` of a factory function is the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _type_as_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_of(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(tensor, *args, **kwargs)
        if isinstance(found, str) and not found.startswith("torch.cuda."):
            return found.replace("torch.", "torch.cuda.", 1)
        return found

    return type_of


def _made_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """One process group for the same ranks: Megatron makes dozens for each model and never ends their threads."""
    made: dict[Any, Any] = {}

    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        key = None if ranks is None else tuple(ranks)
        if key not in made:
            made[key] = original(ranks, *args, **kwargs)
        return made[key]

    return new_group


class _Stream:
    """Stands for a CUDA stream, which Megatron-core 0.19 lets wait for events."""

    def wait_event(self, event: Any) -> None:
        pass


class Adam(torch.optim.Optimizer):
    """Stands for the fused Adam of apex and TransformerEngine: moments as state, `step` in the group."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        **_: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + bool(group["params"])
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, grad = self.state[parameter], parameter.grad.float()
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["exp_avg"].lerp_(grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                mean = state["exp_avg"] / (1 - first ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt_().add_(group["eps"])
                parameter.addcdiv_(mean, scale, value=-group["lr"])


def install() -> None:
    """Patch this process, for good. Twice is fine."""
    if getattr(torch.cuda, "_stands_for_cpu", False):
        return
    torch.cuda._stands_for_cpu = True  # type: ignore[attr-defined]
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment, misc]
    torch.Tensor.type = _type_as_on_cuda(torch.Tensor.type)  # type: ignore[method-assign, assignment]
    _CudaMeansCpu().__enter__()
    dist.new_group = _made_once(dist.new_group)

    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = cuda.get_rng_state
    random._set_cuda_rng_state = cuda.set_rng_state
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = Adam, False
    distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = Adam, True, True
