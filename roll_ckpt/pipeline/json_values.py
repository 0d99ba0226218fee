"""How values of any kind become JSON in a pipeline's state, and come back; no code runs when they are read.

`kv` is restored, so it is kept exactly. None, bools, numbers (NaN and Infinity as Python's `json` spells them), text,
lists, and dictionaries with text as keys are JSON as they are, and NumPy and torch scalars are numbers. Other values
that load back equal are kept as `{"__roll_ckpt__": kind, "value": ...}`: tuples, sets, frozensets, deques, dictionaries
with other keys, bytes, complex numbers, paths, dates and times, and NumPy arrays and tensors of numbers (their dtype,
shape, and elements in one list; up to a million of them). Subclasses come back as these. Anything else, and what is
nested too deeply for JSON (100 levels), becomes text: its `repr`, at most 1000 characters of it.

`log_history` is for reading, so it has no kinds: tuples and sets become lists, arrays and tensors lists of lists (above
10,000 elements text), keys text, paths, dates and complex numbers their `str`, anything else the same `repr`.
"""

from __future__ import annotations

import base64
import datetime
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from roll_ckpt.errors import Damaged, presentable
from roll_ckpt.formats.torch_zip.sources import span_of

_KIND = "__roll_ckpt__"
_DEPTH, _TEXT, _ELEMENTS, _READABLE_ELEMENTS, _LONG_BITS = 100, 1000, 1_000_000, 10_000, 10_000
_SAME_HASH = 100
_ARRAYS = {kind: np.dtype(kind) for kind in ("?", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)))}
_ARRAYS |= {kind: np.dtype(kind) for kind in ("f2", "f4", "f8", "c8", "c16")}
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)
_FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
_TENSORS = {str(dtype).removeprefix("torch."): dtype for dtype in (*_FLOATS, *_INTEGERS)}


def exact(value: object, lost: list[str]) -> Any:
    """`value` as JSON that `restored` takes back. `lost` gets the type of each part that only its text stands for."""
    return _Writer(lost, is_exact=True).plain(value, 0)


def are_plain(keys: Iterable[object]) -> bool:
    """Whether a dictionary of these keys is JSON as it is."""
    return all(isinstance(key, str) and key != _KIND for key in keys)


def spelled_row(row: object, lost: list[str]) -> str:
    """A row of the log as JSON text; what is no dictionary becomes one with the key "value". `lost` as for `exact`."""
    entries = row if isinstance(row, Mapping) else {"value": row}
    writer = _Writer(lost, is_exact=False)
    try:
        text = json.dumps(entries, default=lambda value: writer.plain(value, 0))
        if text.count("[") + text.count("{") <= _DEPTH:  # so it is not nested more deeply
            return text
    except (TypeError, ValueError, RecursionError):
        pass  # a key that is no text, a number too long, a list that holds itself
    lost.clear()
    return json.dumps(writer.plain(dict(entries), 0))


def restored(value: Any, where: object) -> Any:
    """What `exact` was given. Damaged, naming `where`, for what it never writes."""
    try:
        return _restored(value)
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError, AttributeError) as problem:
        raise Damaged(f"{where}: a value in kv is not as it was written: {problem}") from problem


class _Writer:
    """Turns values into JSON; see the module for the rules."""

    def __init__(self, lost: list[str], *, is_exact: bool) -> None:
        self._lost = lost
        self._is_exact = is_exact
        self._open: set[int] = set()

    def plain(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str or kind is float or value is None or kind is bool:
            return value
        if depth > _DEPTH or id(value) in self._open:  # the second: it holds itself
            return self._text(value)
        self._open.add(id(value))
        try:
            return self._plain(value, depth + 1)
        except Exception:  # a subclass may raise anything, and must not cost the checkpoint
            return self._text(value)
        finally:
            self._open.discard(id(value))

    def _plain(self, value: Any, depth: int) -> Any:
        if isinstance(value, int):
            return value if value.bit_length() <= _LONG_BITS else self._kept("int", hex(value))
        if isinstance(value, str | float):
            return value
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list):
            return [self.plain(item, depth) for item in value]
        if isinstance(value, np.generic) and value.dtype.kind in "biufc" and value.dtype.itemsize <= 16:
            number = value.item()
            return self._text(value) if isinstance(number, np.generic) else self.plain(number, depth)
        if isinstance(value, np.ndarray | torch.Tensor):
            return self._array(value, depth)
        return self._kind(value, depth) if self._is_exact else self._readable(value, depth)

    def _kind(self, value: Any, depth: int) -> Any:
        for kinds, kind, parts in _KINDS:
            if isinstance(value, kinds) and (kinds not in _DATES or type(value) is kinds):
                found = parts(value)
                items = [self.plain(item, depth + 1) for item in found] if isinstance(found, list) else found
                return self._kept(kind, items)
        return self._text(value)

    def _readable(self, value: Any, depth: int) -> Any:
        if isinstance(value, tuple | set | frozenset | deque):
            return [self.plain(item, depth) for item in value]
        return str(value) if isinstance(value, _READABLE) else self._text(value)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        items = list(value.items())
        if not self._is_exact or are_plain(key for key, _ in items):
            return {str(key): self.plain(item, depth) for key, item in items}
        return self._kept("dict", [[self.plain(key, depth + 2), self.plain(item, depth + 2)] for key, item in items])

    def _array(self, value: Any, depth: int) -> Any:
        is_tensor = isinstance(value, torch.Tensor)
        if is_tensor and _is_freed(value):  # its repr would read memory that is not there
            self._lost.append("a tensor whose memory was freed")
            return "<a tensor whose memory was freed>"
        limit = _ELEMENTS if self._is_exact else _READABLE_ELEMENTS
        kept = (_of_tensor if is_tensor else _of_array)(value) if math.prod(value.shape) <= limit else None
        if kept is None:
            return self._text(value)
        if is_tensor and not kept["shape"]:
            number = kept["value"][0] if len(kept["value"]) == 1 else complex(*kept["value"])
            return self.plain(number, depth)
        if self._is_exact:
            return {_KIND: "tensor" if is_tensor else "ndarray", "value": kept}
        pairs = [2] if len(kept["value"]) > math.prod(kept["shape"]) else []  # a complex number is two
        return np.array(kept["value"], object).reshape([*kept["shape"], *pairs]).tolist()

    def _kept(self, kind: str, value: Any) -> Any:
        return {_KIND: kind, "value": value} if self._is_exact else value

    def _text(self, value: object) -> str:
        self._lost.append(type(value).__qualname__)
        try:
            shown = repr(value)
        except Exception:
            shown = f"<{type(value).__qualname__}>"
        return presentable(shown[:_TEXT])


_KINDS: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (tuple, "tuple", list),
    (set, "set", list),
    (frozenset, "frozenset", list),
    (deque, "deque", lambda value: [list(value), value.maxlen]),
    (bytes, "bytes", lambda value: base64.b64encode(value).decode()),
    (bytearray, "bytearray", lambda value: base64.b64encode(value).decode()),
    (complex, "complex", lambda value: [value.real, value.imag]),
    (Path, "path", str),
    (datetime.datetime, "datetime", lambda value: value.isoformat()),
    (datetime.date, "date", lambda value: value.isoformat()),
    (datetime.time, "time", lambda value: value.isoformat()),
    (datetime.timedelta, "timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
)
"""Class, name of the kind, and what is kept of a value; the parts of a list are values themselves."""
_DATES = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
"""Of these, subclasses may hold more than is kept, as a timestamp with nanoseconds does."""
_READABLE = (Path, complex, datetime.date, datetime.time, datetime.timedelta)


def _of_array(array: np.ndarray[Any, Any]) -> dict[str, Any] | None:
    name = array.dtype.str[1:] if array.dtype.kind != "b" else "?"
    if type(array) is not np.ndarray or name not in _ARRAYS:
        return None
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1)
    if array.dtype.kind == "c":
        flat = flat.view(f"f{array.dtype.itemsize // 2}")
    return {"dtype": name, "shape": list(array.shape), "value": flat.tolist()}


def _of_tensor(tensor: torch.Tensor) -> dict[str, Any] | None:
    name = str(tensor.dtype).removeprefix("torch.")
    is_usual = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not is_usual or name not in _TENSORS or tensor.is_meta or tensor.is_nested:
        return None
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    if flat.is_floating_point():
        flat = flat.double()
    return {"dtype": name, "shape": list(tensor.shape), "value": flat.tolist()}


def _is_freed(tensor: torch.Tensor) -> bool:
    is_strided = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not is_strided or tensor.is_nested or tensor.is_meta:
        return False
    return span_of(tensor)[1] > tensor.untyped_storage().nbytes()


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {_KIND, "value"}:
        return {key: _restored(item) for key, item in value.items()}
    return _RESTORE[value[_KIND]](value["value"])


def _hashable(keys: Iterable[Any]) -> list[Any]:
    """The restored `keys` of a set or dictionary. ValueError if they were made to be slow in one."""
    found = [_restored(key) for key in keys]
    for _, same in itertools.groupby(sorted(map(hash, found))):
        if len(list(same)) > _SAME_HASH:
            raise ValueError("too many of its keys have the same hash")
    return found


def _dict(pairs: list[list[Any]]) -> dict[Any, Any]:
    keys = _hashable(key for key, _ in pairs)
    return {key: _restored(item) for key, (_, item) in zip(keys, pairs, strict=True)}


def _array(kept: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype = _ARRAYS[kept["dtype"]]
    stored = f"f{dtype.itemsize // 2}" if dtype.kind == "c" else dtype
    array: np.ndarray[Any, Any] = np.array(_numbers(kept["value"]), stored).view(dtype).reshape(kept["shape"])
    return array


def _tensor(kept: dict[str, Any]) -> torch.Tensor:
    dtype, numbers = _TENSORS[kept["dtype"]], _numbers(kept["value"])
    if dtype in _INTEGERS:
        return torch.tensor(numbers, dtype=dtype).reshape(kept["shape"])
    made = torch.tensor(numbers, dtype=torch.float64)
    if dtype.is_complex:
        made = torch.view_as_complex(made.reshape(-1, 2))
    return made.to(dtype).reshape(kept["shape"])


def _numbers(values: Any) -> list[Any]:
    if type(values) is not list or not all(type(value) in (int, float, bool) for value in values):
        raise TypeError("its elements are not a list of numbers")
    return values


_RESTORE: dict[str, Callable[[Any], Any]] = {
    "int": lambda value: int(value, 16),
    "dict": _dict,
    "tuple": lambda items: tuple(_restored(items)),
    "set": lambda items: set(_hashable(items)),
    "frozenset": lambda items: frozenset(_hashable(items)),
    "deque": lambda value: deque(_restored(value[0]), value[1]),
    "bytes": lambda value: base64.b64decode(value, validate=True),
    "bytearray": lambda value: bytearray(base64.b64decode(value, validate=True)),
    "complex": lambda value: complex(*value),
    "path": Path,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda value: datetime.timedelta(*value),
    "ndarray": _array,
    "tensor": _tensor,
}
"""By the name of a kind, what makes a value of it again."""
