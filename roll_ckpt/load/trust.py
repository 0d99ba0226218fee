"""The load corridor of one rank: find, read with every digest checked, parse."""

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
    """What pickles may hold beyond torch's list: members of allowed enumerations, and the objects that `load.allow`
    names.

    Raises:
        ConfigError: a name that cannot be imported.
    """
    found: list[Any] = [safe_pickle.ENUM_MEMBERS]
    for name in settings.load.allow:
        module, _, attribute = name.rpartition(".")
        try:
            found.append(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError, ValueError) as problem:
            raise ConfigError(f"load.allow: cannot import {name!r}: {problem}") from problem
    return found


def warn_unloadable(path: Path, unsafe: Mapping[str, list[str]], warned: set[str]) -> None:
    """Say which entries of the state saved at `path` a safe load would refuse, those in `warned` not again.

    `unsafe` is what `torch_zip.unsafe_parts` found.
    """
    for key, found in unsafe.items():
        if key not in warned:
            warned.add(key)
            log.warning(
                "%s: the entry %r holds %s, which a safe load refuses; keep plain values and tensors there, or add "
                "these names to load.allow",
                path,
                key,
                ", ".join(found),
            )
