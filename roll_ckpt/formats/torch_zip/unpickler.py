"""An unpickler that runs no code of the file: it makes what is on its lists, and refuses every other name.

`known` and `known_numpy` hold what it makes by itself, `found` the enumerations and dataclasses of this process. What
the user names in `load.allow` is trusted as pickle trusts it: it is called, and so is its `__setstate__`.

Source: pickle.py; torch/_weights_only_unpickler.py.
"""

from __future__ import annotations

import _compat_pickle
import enum
import pickle
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import _weights_only_unpickler as torch_rules

from roll_ckpt.formats.torch_zip import found, known, known_numpy
from roll_ckpt.formats.torch_zip.making import Named, Pending, Unsupported
from roll_ckpt.formats.torch_zip.opcodes import Opcodes

_MISSING = object()
_stock_build: Callable[[Any], None] = pickle._Unpickler.dispatch[pickle.BUILD[0]]


def named(allow: Iterable[Any]) -> dict[str, Any]:
    """Objects by the names that pickles have for them. An entry of `allow` is an object, or an object and its name."""
    listed = dict(torch_rules._get_user_allowed_globals())  # what a script has told torch itself
    for entry in allow:
        made, name = entry if isinstance(entry, tuple) else (entry, f"{entry.__module__}.{entry.__qualname__}")
        listed[name] = made
    return listed


class Unpickler(Opcodes):
    """Reads one pickle. `storage_of` is called for each persistent id, `allowed` are the objects of the user by name.

    `file_bytes` is the size of the file: what the pickle makes takes memory in proportion to it. `load` raises
    Unsupported for what only `load.allow` could allow, or nothing can.
    """

    def __init__(
        self, data: bytes, storage_of: Callable[[Any], Any], allowed: Mapping[str, Any], file_bytes: int
    ) -> None:
        super().__init__(data, storage_of, file_bytes)
        self.allowed = allowed
        self._trusted = {id(made) for made in allowed.values()}
        self._made: dict[int, Any] = {}  # what trusted callables have made
        self._found: dict[int, type] = {}

    # names

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[(module, name)]
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        if self.stack and self.stack[-1] is getattr:
            return Named(module, name)  # protocols below 4 pickle Outer.Inner as getattr(Outer, "Inner")
        return self.resolve(module, name)

    def resolve(self, module: str, name: str) -> Any:
        """The object called `module.name`, if it is on a list."""
        full = f"{module}.{name}"
        for listed in (known.names(), self.allowed):
            if (value := listed.get(full, _MISSING)) is not _MISSING:
                return value
        if (kind := found.class_called(module, name)) is not None:
            self._found[id(kind)] = kind
            return kind
        outer, _, attribute = name.rpartition(".")
        kind = self.allowed.get(f"{module}.{outer}") or (found.class_called(module, outer) if outer else None)
        if type(kind) is enum.EnumMeta and attribute in kind._member_map_:
            return kind._member_map_[attribute]
        return self.unknown(module, name)

    def unknown(self, module: str, name: str) -> Any:
        """What stands for an object that is on no list."""
        raise Unsupported(f"{module}.{name}", is_name=True)

    # calls

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        """What `function(*args)` makes, if `function` is known, found or trusted."""
        make = known.calls().get(id(function))
        if make is not None:
            return make(self, args)
        if self.is_trusted(function):
            return self.run(function, args, trusted=True)
        if id(function) in self._found and issubclass(function, enum.Enum) and len(args) == 1:
            member = found.member(function, args[0])
            if member is not None:
                return member
        if isinstance(function, type):
            return self.unknown(function.__module__, function.__qualname__)
        raise pickle.UnpicklingError(f"it calls {type(function).__name__}, which it may not")

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        options: Mapping[str, Any] = MappingProxyType({}),
        *,
        trusted: bool = False,
    ) -> Any:
        """Call a function of torch, or of the user; what a `trusted` one makes is changed by its own methods."""
        made = function(*args, **options)
        if trusted:
            self._made[id(made)] = made
        return made

    def is_trusted(self, function: Any) -> bool:
        """Whether the user allows `function`, or the class of an object that is called."""
        return id(function) in self._trusted or id(type(function)) in self._trusted

    def is_made(self, value: Any) -> bool:
        """Whether `value` was made by something that is trusted, and may be changed by its own methods."""
        return id(value) in self._made

    def pend(self, base: Any) -> Pending:
        """What stands for an object until its state comes."""
        self.unbuilt += 1
        return Pending(base)

    def new(self, kind: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What `kind.__new__(kind, *args, **options)` makes."""
        if id(kind) in self._found and not issubclass(kind, enum.Enum):
            if args or options:
                return self.unknown(kind.__module__, kind.__qualname__)
            return object.__new__(kind)
        if isinstance(kind, type) and id(kind) in self._trusted and id(kind) not in known.calls():
            return self.run(kind.__new__, (kind, *args), options, trusted=True)
        if options:
            raise pickle.UnpicklingError("it makes an object with named arguments")
        return self.call(kind, args)

    def build(self, made: Any, state: Any) -> Any:
        """`made` with this state; usually the same object."""
        kind = type(made)
        if kind is Pending:
            made.value = known_numpy.build(self, made.base, state)
            self.unbuilt -= 1
            return made.value
        builder = known.builds().get(id(kind))
        if builder is not None:
            builder(made, state)
        elif id(kind) in self._found and not issubclass(kind, enum.Enum):
            found.set_fields(made, state)
        elif self.is_made(made):
            self.stack.append(state)
            _stock_build(self)
        else:
            raise pickle.UnpicklingError(f"it sets the state of a {kind.__name__}, which has none")
        return made
