"""NumPy's arrays, scalars and dtypes in a pickle: checked, and made without NumPy's own `__setstate__`.

That would take memory for what a shape claims, and flags and sizes as a stranger writes them. Taken are dtypes of plain
kinds; arrays of objects are made of a list of objects that were loaded before.

Source: numpy/_core/src/multiarray/{descriptor,methods}.c.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

try:
    from numpy._core import multiarray, numeric
except ImportError:  # NumPy 1
    from numpy.core import multiarray, numeric  # type: ignore[no-redef]

from roll_ckpt.formats.torch_zip.making import Maker, Pending, Unsupported

_from_bytes = getattr(numeric, "_frombuffer")  # noqa: B009 (NumPy's annotations leave it out)
ARRAY = np.ndarray
SCALAR = np.generic
_KINDS = "biufcSUMmO"
_CODE = re.compile(r"[biufcSUMmO?][0-9]{0,9}")
_UNITS = frozenset(["Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as", "generic"])
_DIMENSIONS = 64


def names() -> Iterator[tuple[str, Any]]:
    """The objects that pickles of NumPy refer to, by name."""
    for package in ("numpy._core", "numpy.core"):
        yield f"{package}.multiarray._reconstruct", multiarray._reconstruct
        yield f"{package}.multiarray.scalar", multiarray.scalar
        yield f"{package}.numeric._frombuffer", _from_bytes
    yield "numpy.ndarray", np.ndarray
    yield "numpy.dtype", np.dtype
    for kind in {np.bool_, *np.sctypeDict.values()}:
        if np.dtype(kind).kind in _KINDS:
            yield f"numpy.{kind.__name__}", kind
            yield f"numpy.dtypes.{type(np.dtype(kind)).__name__}", type(np.dtype(kind))
    yield "numpy.bool_", np.bool_
    yield "numpy.bool", np.bool_


def calls() -> Iterator[tuple[Any, Any]]:
    """What makes the result of a call to each of these objects."""
    yield multiarray._reconstruct, _reconstruct
    yield multiarray.scalar, _scalar
    yield _from_bytes, _from_buffer
    yield np.dtype, _dtype


def build(maker: Maker, base: Any, state: Any) -> Any:
    """The dtype or array that has this state; `base` is the native dtype, None for an array."""
    if type(state) is not tuple:
        raise pickle.UnpicklingError("it gives NumPy a state that is no tuple")
    return _array(maker, *state) if base is None else _with_state(base, *state)


def _dtype(maker: Maker, args: tuple[Any, ...]) -> Pending:
    code = args[0] if args else None
    if type(code) is str and code.startswith("V"):
        raise Unsupported("NumPy values of several fields (a structured dtype)")
    if type(code) is not str or not _CODE.fullmatch(code) or not all(type(arg) is bool for arg in args[1:]):
        raise pickle.UnpicklingError("it makes a NumPy dtype that there is not")
    return maker.pend(np.dtype(code))


def _with_state(base: Any, version: Any, order: Any, *rest: Any) -> Any:
    parts, (nbytes, alignment, flags), more = rest[:3], rest[3:6], rest[6:]
    if base.kind not in _KINDS or any(part is not None for part in parts):
        raise Unsupported("NumPy values of several fields (a structured dtype)")
    sound = (
        version in (3, 4)
        and type(order) is str
        and order in tuple("<>|=")
        and type(nbytes) is type(alignment) is type(flags) is int
        and nbytes in (-1, base.itemsize)
        and alignment in (-1, base.alignment)
        and flags in (0, base.flags)
    )
    if not sound:
        raise pickle.UnpicklingError("it gives a NumPy dtype a state that none has")
    if base.kind in "Mm":
        base = _with_unit(base, more)
    elif more not in ((), (None,)):
        raise Unsupported("a NumPy dtype with metadata")
    return base if order in "|=" else _ordered(base, order)


def _ordered(base: Any, order: str) -> Any:
    turned = base.newbyteorder(order)
    return base if turned == base else turned


def _with_unit(base: Any, more: tuple[Any, ...]) -> Any:
    if len(more) != 1 or type(more[0]) is not tuple or len(more[0]) != 2:
        raise pickle.UnpicklingError("it gives a NumPy date no unit")
    metadata, unit = more[0]
    if metadata not in (None, {}) or type(unit) is not tuple or len(unit) != 4:
        raise pickle.UnpicklingError("it gives a NumPy date no unit")
    name, count, *rest = unit
    name = name.decode("ascii") if type(name) is bytes else name
    if type(name) is not str or name not in _UNITS or type(count) is not int or rest != [1, 1]:
        raise pickle.UnpicklingError("it gives a NumPy date a unit that there is not")
    if not 0 < count < 1 << 31:
        raise pickle.UnpicklingError("it gives a NumPy date a unit that there is not")
    return np.dtype(f"{base.kind}8" if name == "generic" else f"{base.kind}8[{count}{name}]")


def _scalar(maker: Maker, args: tuple[Any, ...]) -> Any:
    dtype, data = args
    return _of_bytes(maker, dtype, (), data, "C")[()]


def _reconstruct(maker: Maker, args: tuple[Any, ...]) -> Any:
    kind, shape, code = args
    if kind is np.ndarray and shape == (0,) and code in (b"b", "b"):
        return maker.pend(None)
    if maker.is_trusted(kind):
        return maker.run(multiarray._reconstruct, args, trusted=True)
    raise pickle.UnpicklingError("it makes an array of a class that is none of arrays")


def _from_buffer(maker: Maker, args: tuple[Any, ...]) -> Any:
    data, dtype, shape, order, *axes = args
    if order == "K" and len(axes) == 1 and type(axes[0]) is tuple and all(type(axis) is int for axis in axes[0]):
        return _of_bytes(maker, dtype, shape, data, "C").transpose(axes[0])
    return _of_bytes(maker, dtype, shape, data, "F" if order == "F" else "C")


def _array(maker: Maker, version: Any, shape: Any, dtype: Any, fortran: Any, data: Any) -> Any:
    order = "F" if fortran is True else "C"
    if not isinstance(dtype, np.dtype) or dtype.kind != "O":
        return _of_bytes(maker, dtype, shape, data, order)
    count = _count(shape)
    if type(data) is not list or len(data) != count:
        raise pickle.UnpicklingError("it makes an array of another number of objects than its shape says")
    maker.charge(8 * count)
    flat: Any = np.empty(count, dtype=object)
    for place, value in enumerate(data):
        flat[place] = value
    made = flat.reshape(shape, order=order)
    maker.nest(made, data)
    return made


def _of_bytes(maker: Maker, dtype: Any, shape: Any, data: Any, order: Any) -> Any:
    """An array that owns its bytes, which must be as many as its shape and dtype say."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in _KINDS or dtype.kind == "O":
        raise pickle.UnpicklingError("it makes an array of a dtype that has no bytes")
    if type(data) not in (bytes, bytearray) or _count(shape) * dtype.itemsize != len(data):
        raise pickle.UnpicklingError("it makes an array of another size than its shape says")
    maker.charge(len(data) or _count(shape) * 4)  # NumPy makes room for one character where a text has none
    if not data:
        return np.empty(shape, dtype=dtype, order=order)
    return np.ndarray(shape, dtype=dtype, buffer=data, order=order).copy(order="A")


def _count(shape: Any) -> int:
    """How many values an array of this shape has; a shape whose other dimensions overflow is refused, as by NumPy."""
    if type(shape) is not tuple or len(shape) > _DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("it makes an array of a shape that none has")
    return math.prod(shape)
