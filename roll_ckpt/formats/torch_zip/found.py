"""Enumerations and dataclasses that this process has imported: made without running any code of theirs.

Nothing is imported here. A class is taken only if making an object and setting its fields runs none of its methods.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import pickle
import sys
import types
from typing import Any

_COMPARED = (int, str, float, bool, bytes, type(None), tuple)
_ITS_OWN = ("__new__", "__setattr__", "__getattribute__", "__reduce__", "__reduce_ex__", "__hash__", "__eq__")
_MADE = ("__setattr__", "__hash__", "__eq__")
"""Those that the module dataclasses may have made; the `__setattr__` of a frozen one only refuses."""


def class_called(module: str, name: str) -> type | None:
    """The enumeration or plain dataclass `module.name` of this process; None if there is none."""
    holder: Any = sys.modules.get(module)
    if not isinstance(holder, types.ModuleType):
        return None
    found: Any = None
    attributes = object.__getattribute__(holder, "__dict__")
    for part in name.split("."):
        found = attributes.get(part)
        if type(found) not in (type, abc.ABCMeta, enum.EnumMeta):
            return None
        attributes = type.__getattribute__(found, "__dict__")
    if issubclass(found, enum.Enum):
        return found if type(found) is enum.EnumMeta else None
    return found if _is_plain_dataclass(found) else None


def member(kind: Any, value: Any) -> enum.Enum | None:
    """The member of an enumeration that has this value; None if there is none. `_missing_` is not asked."""
    if type(value) in _COMPARED:
        for found in kind._member_map_.values():
            if type(found._value_) is type(value) and found._value_ == value:
                return found  # type: ignore[no-any-return]
    return None


def set_fields(made: Any, state: Any) -> None:
    """Give an object of a plain dataclass its state, without its `__setattr__`.

    Raises:
        UnpicklingError: no dataclass has such a state.
    """
    kind = type(made)
    if type(state) is list:  # dataclasses with slots that are frozen
        names = [field.name for field in dataclasses.fields(made)]
        if len(state) != len(names):
            raise pickle.UnpicklingError(f"it gives a {kind.__name__} another number of fields")
        state = (None, dict(zip(names, state, strict=True)))
    attributes, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
    for part in (attributes, slots):
        if part is not None and (type(part) is not dict or not all(type(key) is str for key in part)):
            raise pickle.UnpicklingError(f"it gives a {kind.__name__} a state without names")
    if attributes:
        object.__getattribute__(made, "__dict__").update(attributes)
    for key, value in (slots or {}).items():
        if not isinstance(_attribute(kind, key), types.MemberDescriptorType):
            raise pickle.UnpicklingError(f"it sets {key} of a {kind.__name__}, which has no such field")
        object.__setattr__(made, key, value)


def _is_plain_dataclass(kind: Any) -> bool:
    if "__dataclass_fields__" not in type.__getattribute__(kind, "__dict__"):
        return False
    for name in _ITS_OWN:
        method, default = _attribute(kind, name), object.__dict__[name]
        if method is not default and not (name in _MADE and _is_generated(method)):
            return False  # the class makes, sets, compares or pickles its objects in a way of its own
    own_state = getattr(dataclasses, "_dataclass_setstate", None)  # of frozen dataclasses with slots
    return _attribute(kind, "__setstate__") in (None, own_state) and not any(
        _attribute(kind, name) is not None for name in ("__del__", "__getattr__")
    )


def _attribute(kind: Any, name: str) -> Any:
    """What `name` is in the first class of the MRO that has it; no descriptor runs."""
    for base in type.__getattribute__(kind, "__mro__"):
        attributes = type.__getattribute__(base, "__dict__")
        if name in attributes:
            return attributes[name]
    return None


def _is_generated(method: Any) -> bool:
    """Whether the module dataclasses has made a method, or the class has none."""
    code = getattr(method, "__code__", None)
    return method is None or (code is not None and code.co_filename == "<string>")
