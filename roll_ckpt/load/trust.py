"""What pickles in a checkpoint may refer to: torch's own list, and the names in `load.allow`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roll_ckpt.config import Settings
from roll_ckpt.errors import ConfigError
from roll_ckpt.formats.torch_zip import safe_pickle

log = logging.getLogger("roll_ckpt")


def allowed(settings: Settings) -> list[Any]:
    """What pickles may refer to beyond torch's list: the objects that `load.allow` names, and members of allowed enums.

    Imports the modules of these names.

    Raises:
        ConfigError: a name cannot be imported.
    """
    objects: list[Any] = [safe_pickle.ENUM_MEMBERS]
    for name in settings.load.allow:
        module, _, attribute = name.rpartition(".")
        try:
            objects.append(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError, ValueError) as problem:
            raise ConfigError(f"load.allow: cannot import {name!r}: {problem}") from problem
    return objects


def warn_unloadable(path: Path, unsafe: Mapping[str, list[str]], warned: set[str]) -> None:
    """Warn which entries of the state saved at `path` a safe load will refuse; each key is added to `warned` and warned
    about once.

    `unsafe` maps these keys to the names that their pickles refer to; see `formats.torch_zip.safe_pickle.unsafe_parts`.
    """
    for key, refused_names in unsafe.items():
        if key not in warned:
            warned.add(key)
            log.warning(
                "%s: the entry %r holds %s, which a safe load refuses; keep plain values and tensors there, or add "
                "these names to load.allow",
                path,
                key,
                ", ".join(refused_names),
            )
