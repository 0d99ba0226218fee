"""The settings of a DeepSpeed engine: its own section of the config, what ROLL_CKPT says, and both together."""

from __future__ import annotations

import json
import sys
import weakref
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from roll_ckpt.backends import start
from roll_ckpt.backends.deepspeed.facts import user_config
from roll_ckpt.config import DeepSpeedConfig, Section
from roll_ckpt.disk import witness
from roll_ckpt.errors import ConfigError

SECTION = "checkpoint.roll_ckpt in the DeepSpeed config"
VARIABLE = "ROLL_CKPT"

_variable: DeepSpeedConfig | None = None
_left_to_stock: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()
_told_of_stock = False


def use_variable(settings: DeepSpeedConfig | None) -> None:
    """Give these settings, which the variable ROLL_CKPT holds, to every engine that is made from now on."""
    global _variable
    _variable = settings


def section_of(engine: DeepSpeedEngine) -> DeepSpeedConfig | None:
    """The settings by which `engine` saves through us: of its own section and of ROLL_CKPT; None if it does not.

    Raises:
        ConfigError: the section has an unknown key or a bad value, or the variable gives a key another value.
    """
    if engine in _left_to_stock:
        return None
    own = _own(engine)
    if own is None or _variable is None:
        return own if own is not None else _variable
    return DeepSpeedConfig.parse(_merged(own, _variable), f"{SECTION} and {VARIABLE} together")


def source_of(engine: DeepSpeedEngine, key: str | None = None) -> str:
    """Where the settings of `engine`, or the one named `key`, come from, in words."""
    own = _own(engine)
    if own is None:
        return VARIABLE
    if key is not None:
        return SECTION if key in own.model_fields_set else VARIABLE
    return SECTION if _variable is None else f"{SECTION}, and {VARIABLE}"


def leave_to_stock(engine: DeepSpeedEngine, problem: Exception) -> None:
    """Raise `problem`; with ROLL_CKPT_OPTIONAL=1 warn instead, and let stock DeepSpeed save `engine`."""
    start.leave_to_stock(problem, "DeepSpeed", "this engine")
    why = f"{start.OPTIONAL}=1 lets training go on without roll_ckpt: {problem}"
    _witness_stock(engine, why, "mend what is wrong")
    _left_to_stock.add(engine)


def is_left_to_stock(engine: DeepSpeedEngine) -> bool:
    """Whether `leave_to_stock` has let `engine` go on without us."""
    return engine in _left_to_stock


def tell_of_stock(engine: DeepSpeedEngine) -> None:
    """Say once that an engine saves as stock DeepSpeed, where we are installed and nothing gives it settings."""
    global _told_of_stock
    if engine not in _left_to_stock:
        advice = "set ROLL_CKPT=1, or give its config the section checkpoint.roll_ckpt"
        _witness_stock(engine, "nothing gives it settings", advice)
    if _told_of_stock or engine in _left_to_stock or "roll_ckpt.pipeline.base" in sys.modules:
        return
    _told_of_stock = True
    start.warn(
        f"this engine saves as stock DeepSpeed: roll_ckpt is installed, but {VARIABLE} is not set, and there is no "
        f'{SECTION}. Set {VARIABLE}=1, or add "checkpoint": {{"roll_ckpt": {{}}}} to the config; an engine that you '
        "give to roll_ckpt.deepspeed.attach needs neither"
    )


def _witness_stock(engine: DeepSpeedEngine, why: str, advice: str) -> None:
    witness.tell("engine", framework="deepspeed", id=id(engine), ours=False, why=why, advice=advice)


def _own(engine: DeepSpeedEngine) -> DeepSpeedConfig | None:
    values = (user_config(engine).get("checkpoint") or {}).get("roll_ckpt")
    return None if values is None else DeepSpeedConfig.parse(values, SECTION)


def _merged(own: Section, variable: Section, prefix: str = "") -> dict[str, Any]:
    """What either of two sections sets. ConfigError if they set a key to different values."""
    values = {key: getattr(own, key) for key in own.model_fields_set}
    for key in sorted(variable.model_fields_set):
        given, value = values.get(key), getattr(variable, key)
        if key not in values:
            values[key] = value
        elif isinstance(given, Section) and isinstance(value, Section):
            values[key] = _merged(given, value, f"{prefix}{key}.")
        elif given != value:
            raise ConfigError(
                f"{SECTION} sets {prefix}{key} to {_json(given)}, the environment variable {VARIABLE} to "
                f"{_json(value)}; remove one of them, or give both the same value"
            )
    return values


def _json(value: Any) -> str:
    """A setting as its user writes it."""
    return json.dumps(value, default=str)
