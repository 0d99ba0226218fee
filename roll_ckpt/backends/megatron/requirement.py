"""Whether the installed Megatron-core is one that this backend can work with. Importing this module needs none."""

from __future__ import annotations

import functools
import importlib

from roll_ckpt.errors import UnsupportedError

TESTED = "0.14", "0.19"
"""The oldest and the newest minor version with which the backend was tested."""
INSTALL = "pip install 'megatron-core>=0.14'"

_MODULES = (
    *("version", "planning", "facts", "fence", "checked_files", "plan", "strategy", "install", "load", "save"),
    *("handle", "cluster"),
)


@functools.cache
def check() -> None:
    """Import every module of this backend, and so every name of Megatron-core that they use.

    Raises:
        UnsupportedError: Megatron-core is not installed, or it lacks a name that the backend needs; names it.
    """
    try:
        modules = [importlib.import_module(f"roll_ckpt.backends.megatron.{name}") for name in _MODULES]
    except ImportError as problem:
        raise UnsupportedError(
            f"roll_ckpt cannot work with this Megatron-core, or it is not installed: {problem}; {INSTALL}"
        ) from problem
    modules[0].check()
