"""The environment variable ROLL_CKPT: whether it switches roll_ckpt on, and the settings that it gives.

    unset, empty, 0     off
    1                   on, with the defaults
    {"async_save": …}   on, with these settings: JSON
    /path/to/file       on, with the settings in this file: JSON if it ends in .json, else YAML

Its keys are those of the section `checkpoint.roll_ckpt` of a DeepSpeed config.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from roll_ckpt import names
from roll_ckpt.errors import ConfigError

if TYPE_CHECKING:
    from roll_ckpt.config import DeepSpeedConfig, Settings

NAME = "ROLL_CKPT"

_FORMS = (
    "give 1, 0 for off, settings as JSON such as '{\"async_save\": true}', or the path of a JSON or YAML file with "
    "settings"
)


def value() -> str:
    """What the variable holds; "" where it switches nothing on."""
    text = os.environ.get(NAME, "").strip()
    return "" if text == "0" else text


def is_on() -> bool:
    """Whether the variable switches roll_ckpt on. Reads nothing else and never fails."""
    return value() != ""


def settings() -> DeepSpeedConfig | None:
    """The settings for DeepSpeed engines; None if the variable is off. Reads the file that the variable may name.

    Raises:
        ConfigError: not JSON, a file that cannot be read, an unknown key or a bad value. The message names it.
    """
    from roll_ckpt.config import DeepSpeedConfig

    return DeepSpeedConfig.parse(_values(), _where()) if is_on() else None


def shared_settings() -> Settings | None:
    """The settings without those that only DeepSpeed engines have: for Megatron-core. As `settings`."""
    from roll_ckpt.config import Settings

    if settings() is None:
        return None
    own = Settings.model_fields.keys() | {"save_total_limit"}
    return Settings.parse({key: given for key, given in _values().items() if key in own}, _where())


def _where() -> str:
    text = value()
    return NAME if text == "1" or text.startswith("{") else f"{NAME}, the file {text}"


def _values() -> Any:
    text = value()
    if text == "1":
        return {}
    if text.startswith("{"):
        return _json(text, NAME)
    if text.lower() in ("true", "on", "yes", "false", "off", "no"):
        raise ConfigError(f"{NAME} is {text!r}; {_FORMS}")
    path = names.absolute(text)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "not UTF-8"
        raise ConfigError(f"{NAME} is {text!r}, and the file {path} cannot be read: {reason}; {_FORMS}") from problem
    return _json(content, str(path)) if path.suffix == ".json" else _yaml(content, str(path))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{where} is not JSON: {problem}; {_FORMS}") from problem


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} stands there {keys.count(key)} times")
    return dict(pairs)


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise ConfigError(f"{where} is not YAML: {problem}") from problem
    return {} if found is None else found
