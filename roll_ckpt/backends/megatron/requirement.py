"""Whether there is a Megatron-core that this backend can work with; importable without one."""

from __future__ import annotations

import importlib

from roll_ckpt.errors import UnsupportedError

TESTED_WITH = "0.16.1"

_MODULES = ("version", "facts", "fence", "checked_files", "plan", "strategy", "load", "save", "handle", "cluster")


def check() -> None:
    """Import every module of this backend, which needs Megatron-core's names.

    Raises:
        UnsupportedError: there is no Megatron-core, or it lacks a name that the backend takes hold of; names it.
    """
    try:
        loaded = [importlib.import_module(f"roll_ckpt.backends.megatron.{name}") for name in _MODULES]
    except ImportError as problem:
        raise UnsupportedError(
            f"this Megatron-core is not one that roll_ckpt knows, or there is none: {problem}; "
            f"pip install megatron-core=={TESTED_WITH}"
        ) from problem
    loaded[0].check(TESTED_WITH)
