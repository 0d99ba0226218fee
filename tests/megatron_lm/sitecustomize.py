"""What Megatron-LM's unchanged `pretrain_gpt.py` needs on a machine without GPUs. Python imports this at its start.

This folder is put on PYTHONPATH, so that the command stays the usual one and so do the processes that it starts. What
Megatron-core needs is patched by `examples/megatron_cpu.py`; here is what `megatron.training` asks of CUDA besides.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import traceback
import typing
from contextlib import nullcontext
from types import ModuleType
from typing import Any

SCRIPT = "pretrain_gpt.py"


NEED_TRITON = (
    "megatron.core.transformer.custom_layers.batch_invariant_kernels",  # 0.16
    "megatron.core.transformer.moe.paged_stash",  # 0.18
    "megatron.core.transformer.moe.ops.paged_stash",  # 0.19
)


class Nothing:
    """Takes every call, has every attribute and is false: a CUDA stream, an event, the functions of a module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        return self

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class WithoutTriton(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of Megatron-core that need triton and that are imported where no GPU uses them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name in NEED_TRITON else None

    def create_module(self, spec: Any) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = Nothing().__getattr__  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None: ...


def patch_torch() -> None:
    import torch

    cuda: Any = torch.cuda
    cuda.device_count = lambda: 1  # none, and Megatron skips the set-up of its process groups
    cuda.set_device = cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *args, **kwargs: None
    cuda.memory_stats = lambda *args, **kwargs: {}
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    cuda.Stream = cuda.Event = Nothing
    cuda.current_stream = Nothing
    cuda.stream = lambda stream: nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    for name in ("IntTensor", "LongTensor", "FloatTensor", "DoubleTensor", "ByteTensor"):
        setattr(cuda, name, getattr(torch, name))
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def patch_training() -> None:
    from megatron.training import initialize, training

    stock = training.initialize_megatron
    training.initialize_megatron = lambda *args, **kwargs: stock(*args, **{**kwargs, "allow_no_cuda": True})
    if hasattr(initialize, "fused_kernels"):
        initialize.fused_kernels.load = lambda args: None  # asks nvcc for its version


def main() -> None:
    """Patch a rank of the job, and what it spawns; and import in a rank what MEGATRON_LM_IMPORTS names."""
    is_rank = any(argument.endswith(SCRIPT) for argument in sys.orig_argv)
    is_child = any("multiprocessing" in argument for argument in sys.orig_argv)
    if "RANK" not in os.environ or not is_rank | is_child:
        return
    if importlib.util.find_spec("triton") is None:
        sys.meta_path.insert(0, WithoutTriton())
    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined]  # Megatron-LM 0.19 needs Python 3.12
    from examples import megatron_cpu

    megatron_cpu.install()
    patch_torch()
    if is_rank:
        patch_training()
        for name in os.environ.get("MEGATRON_LM_IMPORTS", "").split():
            importlib.import_module(name)


try:
    main()
except BaseException:  # Python would go on
    traceback.print_exc()
    os._exit(1)
