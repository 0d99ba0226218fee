"""The DeepSpeed backend: `engine.save_checkpoint()` and its kin go through us.

`install()` wraps methods of `DeepSpeedEngine`. An engine whose config has `checkpoint.roll_ckpt`, or that a
`Cluster` attached, gets our `CheckpointEngine`; every other engine behaves as before. Stock code still decides
what a checkpoint holds and how its files are called; we decide where they go (an attempt directory that is
renamed into place when all ranks have voted), how their bytes get there, and when `latest` is written.

Written against DeepSpeed 0.19 (`runtime/engine.py`, `runtime/checkpoint_engine/checkpoint_engine.py`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import tensor_fragment

from roll_ckpt.backends.deepspeed.checkpoint_engine import RollCheckpointEngine, nothing
from roll_ckpt.backends.deepspeed.facts import section_of
from roll_ckpt.backends.deepspeed.load import load_checkpoint
from roll_ckpt.backends.deepspeed.refusals import (
    refusals_of_config,
    refuse,
    refuse_rivals,
    refuse_unsupported,
    without_optimizer,
)
from roll_ckpt.backends.deepspeed.save import save_16bit_model, save_checkpoint
from roll_ckpt.backends.deepspeed.tensors import stepped_tensors, storages_of
from roll_ckpt.config import Settings
from roll_ckpt.errors import UnsupportedError
from roll_ckpt.save import pending


def attach(engine: DeepSpeedEngine, settings: Settings, cluster: str) -> RollCheckpointEngine:
    """Put our checkpoint engine into `engine`; every rank calls. No collective.

    Raises:
        UnsupportedError, ConfigError: see `refuse_unsupported` and `refuse_rivals`; the engine is left as it was.
    """
    install()
    if without_optimizer(engine) or engine.checkpoint_engine is None:
        raise UnsupportedError(
            f"cluster {cluster}: DeepSpeed cannot save an engine without an optimizer at any ZeRO stage; "
            "keep frozen models out of the checkpoint clusters"
        )
    refuse_rivals(engine)
    refuse_unsupported(engine)
    engine.checkpoint_engine.cleanup()
    ours = RollCheckpointEngine(engine, settings, cluster)
    engine.checkpoint_engine = ours
    _of_optimizer[engine.optimizer] = ours
    return ours


_of_optimizer: weakref.WeakKeyDictionary[Any, RollCheckpointEngine] = weakref.WeakKeyDictionary()


def attached(engine: DeepSpeedEngine) -> RollCheckpointEngine | None:
    """Our checkpoint engine in `engine`, if it is there."""
    ours = getattr(engine, "checkpoint_engine", None)
    return ours if isinstance(ours, RollCheckpointEngine) else None


def stock(name: str) -> Callable[..., Any]:
    """DeepSpeed's own method behind our wrapper."""
    method = getattr(DeepSpeedEngine, name)
    return getattr(method, "__wrapped__", method)  # type: ignore[no-any-return]


def install() -> None:
    """Wrap DeepSpeed's methods once in this process. Engines without our section behave as before."""
    if hasattr(DeepSpeedEngine._configure_checkpointing, "__wrapped__"):
        return

    def wrap(name: str, replacement: Callable[..., Any], home: type = DeepSpeedEngine) -> None:
        original = getattr(home, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return replacement(original, self, *args, **kwargs)

        setattr(home, name, method)

    wrap("_do_sanity_check", _do_sanity_check)
    wrap("_configure_checkpointing", _configure_checkpointing)
    wrap("save_checkpoint", _save_checkpoint)
    wrap("load_checkpoint", _load_checkpoint)
    wrap("save_16bit_model", _save_16bit_model)
    wrap("_take_model_step", _take_model_step)
    wrap("reload_states", _reload_states)
    # ZeRO-3 offloads into the buffers of the last time; below it waiting keeps the host at one copy.
    for name in ("offload_states", "load_module_state_dict", "destroy"):
        wrap(name, _fence_first)
    for home in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):  # some trainers call it there
        wrap("offload_states", _offload_optimizer, home)
    for name in _SETTERS:
        for home in (deepspeed.utils, tensor_fragment):
            if hasattr(home, name):
                setattr(home, name, _fencing(getattr(home, name)))


_SETTERS = (
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_optimizer_state",
)


def _fencing(setter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(setter)
    def fenced(*args: Any, **kwargs: Any) -> Any:
        pending.fence()
        return setter(*args, **kwargs)

    return fenced


def _do_sanity_check(original: Callable[..., Any], engine: DeepSpeedEngine) -> None:
    """Refuse what the config asks for before DeepSpeed starts on it: swap folders, processes, minutes of work."""
    if section_of(engine) is not None:
        refuse_rivals(engine)
        refuse(refusals_of_config(engine))
    original(engine)


def _configure_checkpointing(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kw: Any) -> None:
    original(engine, *args, **kw)
    settings = section_of(engine)
    if settings is not None and not without_optimizer(engine):
        attach(engine, settings, settings.cluster)


def _save_checkpoint(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is not None:
        return save_checkpoint(ours, original, *args, **kwargs)
    if section_of(engine) is not None:
        raise UnsupportedError(
            "this engine has no optimizer, and DeepSpeed cannot save such an engine at any ZeRO stage; keep it "
            "out of the saves, or remove checkpoint.roll_ckpt from its config"
        )
    return original(engine, *args, **kwargs)


def _load_checkpoint(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is None:
        return original(engine, *args, **kwargs)
    loaded = load_checkpoint(ours, original, *args, **kwargs)
    _forget_secondary_partitions(engine)
    return loaded


def _forget_secondary_partitions(engine: DeepSpeedEngine) -> None:
    """hpZ gathers weights from second partitions. After a load DeepSpeed drops those of trained parameters only, and
    frozen ones would keep the values of before."""
    for parameter in engine.module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


def _save_16bit_model(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is None:
        return original(engine, *args, **kwargs)
    return save_16bit_model(ours, original, *args, **kwargs)


def _fence_first(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is not None:
        ours.fence()
    return original(engine, *args, **kwargs)


def _offload_optimizer(original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    ours = _of_optimizer.get(optimizer)
    if ours is not None:
        ours.fence()
    return original(optimizer, *args, **kwargs)


def _take_model_step(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is not None:
        stepped = functools.cache(lambda: storages_of(stepped_tensors(engine)))
        ours.fence(lambda storage: storage._cdata in stepped())
    return original(engine, *args, **kwargs)


def _reload_states(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is not None:
        ours.fence(nothing)  # it copies out of the host's buffers, and those it drops a save holds
    return original(engine, *args, **kwargs)
