"""Wraps methods of `DeepSpeedEngine`, so that `engine.save_checkpoint()` and its relatives go through roll_ckpt.

An engine whose config has a section `checkpoint.roll_ckpt`, or that a `Cluster` attached, gets our checkpoint engine;
where the variable ROLL_CKPT is set, every engine does. Other engines behave as before.

Written against DeepSpeed 0.19 (`runtime/engine.py`); `version` tells what others have instead. docs/deepspeed.md tells
what we found in it; look there first if an update breaks something.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import deepspeed
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from roll_ckpt.backends import start
from roll_ckpt.backends.deepspeed import version
from roll_ckpt.backends.deepspeed.checkpoint_engine import RollCheckpointEngine, no_changes
from roll_ckpt.backends.deepspeed.load import load_checkpoint
from roll_ckpt.backends.deepspeed.refusals import (
    refusals_of_config,
    refuse,
    refuse_rivals,
    refuse_unsupported,
    will_have_optimizer,
    without_optimizer,
)
from roll_ckpt.backends.deepspeed.save import save_16bit_model, save_checkpoint
from roll_ckpt.backends.deepspeed.section import (
    is_left_to_stock,
    leave_to_stock,
    section_of,
    source_of,
    tell_of_stock,
)
from roll_ckpt.backends.deepspeed.tensors import stepped_tensors, storages_of
from roll_ckpt.backends.deepspeed.weights import state_dict_of_zero_checkpoint
from roll_ckpt.config import Settings
from roll_ckpt.disk import witness
from roll_ckpt.errors import ConfigError, RanksDisagree, RollCkptError, UnsupportedError
from roll_ckpt.save import gate, pending

Method = Callable[..., Any]
WHAT = "this DeepSpeed engine"


def attach(
    engine: DeepSpeedEngine,
    settings: Settings,
    cluster: str,
    switched_on_by: str = "roll_ckpt.deepspeed.attach",
    *,
    async_save: bool | None = None,
    together: bool = False,
) -> RollCheckpointEngine:
    """Put our checkpoint engine into `engine`, which saves as `cluster`; every rank calls. No collective.

    Rank 0 says so, with what `switched_on_by` calls the caller. `async_save` is what an unset one means to the caller.
    With `together` the ranks make sure first that all do so: see `start.agree`, also for the errors.

    Raises:
        UnsupportedError: the engine has no optimizer, or uses a feature that this version refuses.
        ConfigError: its config also asks for another checkpoint engine.
        Either way the engine is left as it was.
    """
    install()
    if without_optimizer(engine) or engine.checkpoint_engine is None:
        raise UnsupportedError(
            f"cluster {cluster}: DeepSpeed cannot save an engine without an optimizer at any ZeRO stage; "
            "keep frozen models out of the checkpoint clusters"
        )
    refuse_rivals(engine)
    refuse_unsupported(engine)
    if together:
        start.agree(settings, WHAT)
    start.announce(
        f"DeepSpeed {deepspeed.__version__}, ZeRO-{int(engine.zero_optimization_stage())}",
        f"cluster {cluster}",
        settings,
        switched_on_by,
        async_save=bool(settings.async_save if async_save is None else async_save),
    )
    version.clean_up(engine.checkpoint_engine)
    checkpoint_engine = RollCheckpointEngine(engine, settings, cluster)
    engine.checkpoint_engine = checkpoint_engine
    _by_optimizer[engine.optimizer] = checkpoint_engine
    witness.tell("engine", framework="deepspeed", id=id(engine), ours=True)
    return checkpoint_engine


_by_optimizer: weakref.WeakKeyDictionary[Any, RollCheckpointEngine] = weakref.WeakKeyDictionary()


def attached(engine: DeepSpeedEngine) -> RollCheckpointEngine | None:
    """Our checkpoint engine in `engine`; None if it has another one."""
    checkpoint_engine = getattr(engine, "checkpoint_engine", None)
    return checkpoint_engine if isinstance(checkpoint_engine, RollCheckpointEngine) else None


# --- wrappers, which can be told from those of others --------------------------------------------------------

_BEHIND = "_roll_ckpt_behind"
"""The attribute that marks our wrappers; its value is the function that the wrapper replaced."""


def _wrapped(function: Method, replacement: Method) -> Method:
    """A marked wrapper of `function`: calls `replacement(function, *args, **kwargs)`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(function, *args, **kwargs)

    setattr(wrapper, _BEHIND, function)
    return wrapper


def _behind_our_wrapper(function: Method) -> Method | None:
    """The function that our wrapper replaced; None if `function` does not lead to a wrapper of ours.

    Others may have wrapped the method before us and after us. Their wrappers are seen through if they set
    `__wrapped__`, as `functools.wraps` does.
    """
    link = inspect.unwrap(function, stop=lambda link: hasattr(link, _BEHIND))
    return getattr(link, _BEHIND, None)


def stock(name: str) -> Method:
    """The method of `DeepSpeedEngine` that our wrapper replaced: DeepSpeed's own, or a patch made before ours."""
    method = getattr(DeepSpeedEngine, name)
    return _behind_our_wrapper(method) or method


def install() -> None:
    """Wrap DeepSpeed's methods. Does nothing if our wrappers are there already, also beneath wrappers of others."""
    if any(_behind_our_wrapper(getattr(DeepSpeedEngine, name)) is not None for name in _ENGINE_METHODS):
        return
    for name, replacement in _ENGINE_METHODS.items():
        setattr(DeepSpeedEngine, name, _wrapped(getattr(DeepSpeedEngine, name), replacement))
    # Some trainers call it there.
    for optimizer in version.with_offload_states([DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3]):
        optimizer.offload_states = _wrapped(optimizer.offload_states, _offload_optimizer)
    function = engine_module.get_fp32_state_dict_from_zero_checkpoint
    engine_module.get_fp32_state_dict_from_zero_checkpoint = _wrapped(function, state_dict_of_zero_checkpoint)
    # `from deepspeed.utils import tensor_fragment` would give the class of that name.
    where_they_are = importlib.import_module("deepspeed.utils.tensor_fragment")
    for name in _SETTERS:
        for module in (deepspeed.utils, where_they_are):
            if hasattr(module, name):
                setattr(module, name, _wrapped(getattr(module, name), _set_after_fence))


# --- what the wrapped methods do -----------------------------------------------------------------------------


def _do_sanity_check(original: Method, engine: DeepSpeedEngine) -> None:
    """Refuse features by the config, before DeepSpeed acts on it: swap folders, processes, minutes of work."""
    try:
        if section_of(engine) is not None and will_have_optimizer(engine):
            refuse_rivals(engine)
            refuse(refusals_of_config(engine))
    except (ConfigError, UnsupportedError) as problem:
        leave_to_stock(engine, problem)
    original(engine)


def _configure_checkpointing(original: Method, engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> None:
    original(engine, *args, **kwargs)
    settings = section_of(engine)
    if without_optimizer(engine):
        return
    if settings is None:
        if is_left_to_stock(engine):
            with suppress(RollCkptError):  # the other ranks get it, and this one has told its reason
                start.agree(None, WHAT)
        tell_of_stock(engine)
        return
    try:
        attach(engine, settings, settings.cluster, source_of(engine), together=True)
    except (ConfigError, UnsupportedError, RanksDisagree) as problem:
        leave_to_stock(engine, problem)


def _save_checkpoint(original: Method, engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    checkpoint_engine = attached(engine)
    if checkpoint_engine is not None:
        return save_checkpoint(checkpoint_engine, original, *args, **kwargs)
    if without_optimizer(engine) and section_of(engine) is not None:
        raise UnsupportedError(
            "this engine has no optimizer, and DeepSpeed cannot save such an engine at any ZeRO stage; do not call "
            "save_checkpoint on it, or remove checkpoint.roll_ckpt from its config (or the variable ROLL_CKPT)"
        )
    return original(engine, *args, **kwargs)


def _load_checkpoint(original: Method, engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    checkpoint_engine = attached(engine)
    if checkpoint_engine is None:
        return original(engine, *args, **kwargs)
    loaded = load_checkpoint(checkpoint_engine, original, *args, **kwargs)
    _forget_secondary_partitions(engine)
    return loaded


def _forget_secondary_partitions(engine: DeepSpeedEngine) -> None:
    """Drop the secondary partitions from which hpZ gathers weights, so that it makes them anew.

    After a load DeepSpeed drops those of trained parameters only; those of frozen ones would keep their old values.
    """
    for parameter in engine.module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


def _get_all_ckpt_names(original: Method, engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    checkpoint_engine = attached(engine)
    if checkpoint_engine is None or checkpoint_engine.weights is None:
        return original(engine, *args, **kwargs)
    return checkpoint_engine.weights.model_files()


def _load_module_state_dict(original: Method, engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    checkpoint_engine = attached(engine)
    if checkpoint_engine is not None:
        checkpoint_engine.fence()
        if checkpoint_engine.weights is not None:
            call = inspect.signature(original).bind(engine, *args, **kwargs)
            call.apply_defaults()
            return checkpoint_engine.load_weights(original, call.arguments["strict"], call.arguments["custom_load_fn"])
    return original(engine, *args, **kwargs)


def _save_16bit_model(original: Method, engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    checkpoint_engine = attached(engine)
    if checkpoint_engine is None:
        return original(engine, *args, **kwargs)
    return save_16bit_model(checkpoint_engine, original, *args, **kwargs)


def _fence_first(original: Method, engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    checkpoint_engine = attached(engine)
    if checkpoint_engine is not None:
        checkpoint_engine.fence()
    return original(engine, *args, **kwargs)


def _offload_optimizer(original: Method, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    checkpoint_engine = _by_optimizer.get(optimizer)
    if checkpoint_engine is not None:
        checkpoint_engine.fence()
    return original(optimizer, *args, **kwargs)


def _take_model_step(original: Method, engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    checkpoint_engine = attached(engine)
    if checkpoint_engine is not None:
        stepped = functools.cache(lambda: storages_of(stepped_tensors(engine)))
        checkpoint_engine.fence(lambda storage: storage._cdata in stepped())
        with gate.signals_put_off():
            return original(engine, *args, **kwargs)
    return original(engine, *args, **kwargs)


def _reload_states(original: Method, engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    checkpoint_engine = attached(engine)
    if checkpoint_engine is not None:
        # It only reads the host's buffers, and a save keeps alive those that it drops.
        checkpoint_engine.fence(no_changes)
    return original(engine, *args, **kwargs)


def _set_after_fence(original: Method, *args: Any, **kwargs: Any) -> Any:
    pending.fence()
    return original(*args, **kwargs)


_ENGINE_METHODS: dict[str, Method] = {
    "_do_sanity_check": _do_sanity_check,
    "_configure_checkpointing": _configure_checkpointing,
    "save_checkpoint": _save_checkpoint,
    "load_checkpoint": _load_checkpoint,
    "save_16bit_model": _save_16bit_model,
    "_take_model_step": _take_model_step,
    "reload_states": _reload_states,
    # ZeRO-3 offloads into the same host buffers each time. At lower stages, waiting keeps the host at one copy.
    "offload_states": _fence_first,
    "load_module_state_dict": _load_module_state_dict,
    "_get_all_ckpt_names": _get_all_ckpt_names,
    "destroy": _fence_first,
}
_SETTERS = (
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_optimizer_state",
)
"""Functions of `deepspeed.utils` that change parameters and moments."""
