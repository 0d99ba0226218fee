"""Replacing a function of roll_ckpt wherever it has been imported by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def replace(function: Callable[..., Any], by: Callable[..., Any]) -> list[ModuleType]:
    """Put `by` in the place of `function` in every module of roll_ckpt that has it under its name; those modules."""
    name = function.__name__
    places = [
        module
        for key, module in list(sys.modules.items())
        if key.startswith("roll_ckpt.") and getattr(module, name, None) is function
    ]
    assert places, f"no module of roll_ckpt has {function}"
    for module in places:
        setattr(module, name, by)
    return places


@contextmanager
def replaced(function: Callable[..., Any], by: Callable[..., Any]) -> Iterator[None]:
    """`replace` inside the block."""
    places = replace(function, by)
    try:
        yield
    finally:
        for module in places:
            setattr(module, function.__name__, function)
