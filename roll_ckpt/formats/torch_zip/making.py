"""What the unpickler shares with the builders of known objects: the refusal, and what stands for an object."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any, Protocol


class Unsupported(pickle.UnpicklingError):
    """A sound pickle holds what is not loaded: `what` is a qualified name, which `load.allow` may list, or a reason."""

    def __init__(self, what: str, *, is_name: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.is_name = is_name


class Pending:
    """Stands for an object until its state comes; `value` is the object then. The memo keeps referring to this."""

    __slots__ = ("base", "value")

    def __init__(self, base: Any) -> None:
        self.base = base
        self.value: Any = None


class Named:
    """A class or module attribute that only names something inside of it."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name


class Maker(Protocol):
    """What builders use of the unpickler."""

    allowed: Any
    stack: list[Any]

    def charge(self, nbytes: int) -> None: ...

    def nest(self, outer: Any, values: Iterable[Any]) -> None: ...

    def resolve(self, module: str, name: str) -> Any: ...

    def unknown(self, module: str, name: str) -> Any: ...

    def run(self, function: Any, args: tuple[Any, ...], *, trusted: bool = False) -> Any: ...

    def is_trusted(self, function: Any) -> bool: ...

    def is_made(self, value: Any) -> bool: ...

    def pend(self, base: Any) -> Pending: ...
