"""What pickles in a checkpoint may refer to beyond the built-in list: the names in `load.allow`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roll_ckpt.config import Settings
from roll_ckpt.errors import ConfigError
from roll_ckpt.formats.torch_zip.safe_pickle import Unloadable, setting

log = logging.getLogger("roll_ckpt")


def allowed(settings: Settings) -> list[Any]:
    """The objects that `load.allow` names, which pickles may refer to: each as it is, or with the name given there if
    that is not its own. Imports the modules of these names.

    Raises:
        ConfigError: a name cannot be imported.
    """
    objects: list[Any] = []
    for name in settings.load.allow:
        try:
            found = _imported(name)
        except (ImportError, AttributeError, ValueError) as problem:
            raise ConfigError(f"load.allow: cannot import {name!r}: {problem}") from problem
        own = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
        if hasattr(found, "__qualname__"):
            objects.append(found)
        if own != name:
            objects.append((found, name))
    return objects


def _imported(name: str) -> Any:
    """The object called `name`: an attribute of a module, or of a class in it."""
    module, _, attribute = name.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as problem:
        outer, _, _ = module.rpartition(".")
        if not outer or problem.name is None or not f"{module}.".startswith(f"{problem.name}."):
            raise
        found = _imported(module)
    return getattr(found, attribute)


def warn_unloadable(path: Path, unsafe: Mapping[str, Unloadable], warned: set[str]) -> None:
    """Warn which entries of the state saved at `path` a load will refuse, once for each entry and what it holds.

    `unsafe` tells what of these entries; see `formats.torch_zip.safe_pickle.unsafe_parts`.
    """
    for key, refused in unsafe.items():
        if f"{key} {refused}" not in warned:
            warned.add(f"{key} {refused}")
            allow = setting([refused]) if not refused.reasons else ""
            log.warning(
                "%s: the entry %r holds %s, which a safe load refuses; keep plain values and tensors there%s",
                path,
                key,
                refused,
                f", or set {allow}" if allow else ": no setting allows it",
            )
