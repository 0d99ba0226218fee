"""Tells `switch` when a framework has been imported. `startup.RollCkptFinder` hands those imports to `find_spec`."""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from roll_ckpt.activation import switch

_looking = threading.local()


def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """The spec that the other finders have for the framework `name`, with a loader that calls `switch.imported`."""
    if getattr(_looking, "now", False):  # another finder asks all finders in its turn, and so us
        return None
    _looking.now = True
    try:
        spec = _found_by_others(name, path, target)
    finally:
        _looking.now = False
    if spec is not None and spec.loader is not None:
        spec.loader = _Announcing(spec.loader, lambda: switch.imported(name))
    return spec


def _found_by_others(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


class _Announcing(importlib.abc.Loader):
    """The loader `inner`, which calls `then` when the module's own code has run. The module keeps `inner` itself."""

    def __init__(self, inner: Any, then: Callable[[], None]) -> None:
        self._inner = inner
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        parent, _, own = module.__name__.rpartition(".")
        if parent:  # importlib does so after us only, and `import megatron.core` in our backend needs it now
            setattr(sys.modules[parent], own, module)
        self._then()

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._inner, name)
