"""What the unpickler makes by itself: the values of Python, of its standard library, of NumPy and of torch.

`names` are the objects that a pickle may refer to. A call to one of them goes to its entry in `calls`, which checks the
arguments first: none takes memory or time for what a number claims. `builds` set the state of an object.
"""

from __future__ import annotations

import _codecs
import argparse
import collections
import datetime
import decimal
import fractions
import pathlib
import pickle
import types
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import _weights_only_unpickler as torch_rules

from roll_ckpt.formats.torch_zip import known_numpy
from roll_ckpt.formats.torch_zip.making import Maker, Named, Unsupported

Make = Callable[[Maker, tuple[Any, ...]], Any]

_BUILTINS = (list, dict, set, frozenset, tuple, int, float, str, bool, bytes, bytearray, complex, range, slice, type)
_COLLECTIONS = (collections.deque, collections.defaultdict, collections.OrderedDict, collections.Counter)
_PATHS = (pathlib.Path, pathlib.PosixPath, pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
_TIMES = (datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone)
_OTHERS = (decimal.Decimal, fractions.Fraction, uuid.UUID, argparse.Namespace, types.SimpleNamespace)
_SINGLETONS: tuple[Any, ...] = (None, ..., NotImplemented)
_FRACTION_BITS = 1 << 16  # making a fraction takes time that grows with the square of them
_REBUILDS = torch_rules._tensor_rebuild_functions()
_CONVERSIONS = (
    torch._utils._rebuild_device_tensor_from_numpy,
    torch._utils._rebuild_device_tensor_from_cpu_tensor,
)


@cache
def names() -> dict[str, Any]:
    """What a pickle may refer to without any setting, by qualified name."""
    listed = {
        **torch_rules._get_allowed_globals(),
        **{f"builtins.{kind.__name__}": kind for kind in _BUILTINS},
        **{f"{kind.__module__}.{kind.__name__}": kind for kind in (*_COLLECTIONS, *_TIMES, *_OTHERS)},
        **{f"{module}.{kind.__name__}": kind for module in ("pathlib", "pathlib._local") for kind in _PATHS},
        "builtins.getattr": getattr,
        "builtins.Ellipsis": ...,
        "builtins.NotImplemented": NotImplemented,
    }
    listed.update(known_numpy.names())
    return listed


@cache
def calls() -> dict[int, Make]:
    """What makes the result of a call, by the identity of the object that is called."""
    return {id(function): make for function, make in _calls()}


@cache
def builds() -> dict[int, Callable[[Any, Any], None]]:
    """What sets the state of an object, by the identity of its class."""
    kinds = (collections.OrderedDict, argparse.Namespace, types.SimpleNamespace)
    return {
        **{id(kind): _set_attributes for kind in kinds},
        id(uuid.UUID): _set_uuid,
        id(torch.Tensor): lambda made, state: made.set_(*state),
        id(torch.nn.Parameter): lambda made, state: made.__setstate__(state),
    }


def _calls() -> Iterator[tuple[Any, Make]]:
    kind: Any
    for kind in (int, float, str, bool, bytes, dict):
        yield kind, _typed(kind, at_most=0)
    for kind in (list, tuple, set, frozenset):
        yield kind, _typed(kind, list, tuple, at_most=1)
    yield complex, _typed(complex, float, int, at_most=2)
    yield range, _typed(range, int, at_most=3)
    yield slice, _typed(slice, int, float, str, bool, type(None), at_most=3)
    yield bytearray, _bytearray
    yield type, _type_of
    yield getattr, _attribute
    yield _codecs.encode, _encode
    yield collections.deque, _deque
    yield collections.defaultdict, _defaultdict
    yield collections.OrderedDict, _typed(collections.OrderedDict, list, at_most=1)
    yield collections.Counter, _typed(collections.Counter, dict, at_most=1)
    for kind in _PATHS:
        yield kind, _typed(kind, str, at_most=1 << 16)
    for kind in (datetime.date, datetime.time, datetime.datetime):
        yield kind, _time(kind)
    yield datetime.timedelta, _typed(datetime.timedelta, int, float, at_most=7)
    yield datetime.timezone, _typed(datetime.timezone, datetime.timedelta, str, at_most=2)
    yield decimal.Decimal, _typed(decimal.Decimal, str, at_most=1)
    yield fractions.Fraction, _fraction
    for kind in (argparse.Namespace, types.SimpleNamespace):
        yield kind, _typed(kind, at_most=0)
    yield uuid.UUID, lambda maker, args: object.__new__(uuid.UUID)
    yield from known_numpy.calls()
    yield from _torch_calls()


def _typed(function: Any, *kinds: type, at_most: int) -> Make:
    """Calls `function` with arguments of exactly these types."""

    def make(maker: Maker, args: tuple[Any, ...]) -> Any:
        _check(function, len(args) <= at_most and all(type(arg) in kinds for arg in args))
        maker.charge(sum(map(_cost, args)))
        return function(*args)

    return make


def _cost(arg: Any) -> int:
    """About the bytes that a copy of `arg` takes; many paths share the names of their folders."""
    if isinstance(arg, str):
        return 8 + max(0, len(arg) - 256)
    if isinstance(arg, list | tuple | dict):
        return (32 if isinstance(arg, dict) else 16) * len(arg)
    return 0


def _check(function: Any, sound: object) -> None:
    if not sound:
        raise pickle.UnpicklingError(f"it makes a {function.__name__} in a way that nobody pickles one")


def _bytearray(maker: Maker, args: tuple[Any, ...]) -> bytearray:
    _check(bytearray, [type(arg) for arg in args] in ([], [bytes], [bytearray], [str, str]))
    return bytearray(_encode(maker, args) if len(args) == 2 else _copied(maker, *args))


def _copied(maker: Maker, data: bytes = b"") -> bytes:
    maker.charge(len(data))
    return data


def _encode(maker: Maker, args: tuple[Any, ...]) -> bytes:
    text, encoding = args
    _check(bytes, type(text) is str and encoding in ("latin1", "latin-1", "utf-8", "utf8", "ascii"))
    maker.charge(len(text))
    return _codecs.encode(text, encoding)  # type: ignore[no-any-return]


def _type_of(maker: Maker, args: tuple[Any, ...]) -> type:
    _check(type, len(args) == 1 and any(args[0] is value for value in _SINGLETONS))
    return type(args[0])


def _attribute(maker: Maker, args: tuple[Any, ...]) -> Any:
    """Protocols below 4 name what is inside of a class so; also members of enumerations, up to Python 3.11.3."""
    owner, attribute = args
    if isinstance(owner, type):
        owner = Named(owner.__module__, owner.__qualname__)
    if type(attribute) is str and type(owner) is Named:
        name = f"{owner.name}.{attribute}"
        if len(maker.stack) > 1 and maker.stack[-2] is getattr:
            return Named(owner.module, name)
        return maker.resolve(owner.module, name)
    if "builtins.getattr" in maker.allowed:
        return maker.run(getattr, args, trusted=True)
    return maker.unknown("builtins", "getattr")


def _deque(maker: Maker, args: tuple[Any, ...]) -> Any:
    items, *more = args or ((),)
    _check(collections.deque, type(items) in (list, tuple) and len(more) < 2)
    _check(collections.deque, all(type(limit) in (int, type(None)) for limit in more))
    maker.charge(8 * len(items))
    made = collections.deque(items, *more)
    maker.nest(made, items)
    return made


def _defaultdict(maker: Maker, args: tuple[Any, ...]) -> Any:
    factory = args[0] if args else None
    known = factory is None or id(factory) in calls() or maker.is_trusted(factory) or maker.is_made(factory)
    _check(collections.defaultdict, len(args) < 2)
    if not known and not (isinstance(factory, type) and issubclass(factory, known_numpy.SCALAR)):
        return maker.unknown(getattr(factory, "__module__", "?"), getattr(factory, "__qualname__", "?"))
    return collections.defaultdict(factory)


def _time(kind: Any) -> Make:
    def make(maker: Maker, args: tuple[Any, ...]) -> Any:
        sound = all(type(arg) in (bytes, str, int, datetime.timezone, type(None)) or maker.is_made(arg) for arg in args)
        _check(kind, sound and len(args) <= 8)
        return kind(*args)

    return make


def _fraction(maker: Maker, args: tuple[Any, ...]) -> fractions.Fraction:
    _check(fractions.Fraction, len(args) == 2 and all(type(arg) is int for arg in args))
    nbytes = sum(arg.bit_length() // 8 for arg in args)
    if nbytes > _FRACTION_BITS // 8:
        raise Unsupported(f"a fraction of {8 * nbytes} bits")
    maker.charge(nbytes)
    return fractions.Fraction(*args)


def _set_attributes(made: Any, state: Any) -> None:
    _check(type(made), type(state) is dict and all(type(key) is str for key in state))
    made.__dict__.update(state)


def _set_uuid(made: Any, state: Any) -> None:
    _check(uuid.UUID, type(state) is dict and type(state.get("int")) is int and 0 <= state["int"] < 1 << 128)
    object.__setattr__(made, "int", state["int"])
    safe = {kind.value: kind for kind in uuid.SafeUUID}.get(state.get("is_safe"), uuid.SafeUUID.unknown)
    object.__setattr__(made, "is_safe", safe)


# torch


def _torch_calls() -> Iterator[tuple[Any, Make]]:
    for function in (*_REBUILDS, torch.serialization._get_layout):
        yield function, _torch(function)
    for function in _CONVERSIONS:
        yield function, _conversion(function)
    yield torch._tensor._rebuild_from_type_v2, _from_type
    yield torch.Size, _typed(torch.Size, tuple, list, at_most=1)
    yield torch.device, _typed(torch.device, str, int, at_most=2)
    yield torch.nn.Parameter, _parameter
    for kind in (torch.Tensor, *torch._tensor_classes):
        yield kind, _sparse(kind) if "sparse" in kind.__module__ else _typed(kind, at_most=0)


def _torch(function: Any) -> Make:
    return lambda maker, args: maker.run(function, args)


def _parameter(maker: Maker, args: tuple[Any, ...]) -> Any:
    _check(torch.nn.Parameter, not args or isinstance(args[0], torch.Tensor))
    return maker.run(torch.nn.Parameter, args)


def _conversion(function: Any) -> Make:
    def make(maker: Maker, args: tuple[Any, ...]) -> Any:
        _charge_conversion(maker, args)
        return maker.run(function, args)

    return make


def _charge_conversion(maker: Maker, args: tuple[Any, ...]) -> None:
    """A tensor may show one value as often as it likes, but a copy of it takes memory for each."""
    data = args[0]
    _check(torch.Tensor, isinstance(data, torch.Tensor | known_numpy.ARRAY))
    maker.charge(8 * (data.numel() if isinstance(data, torch.Tensor) else data.size))


def _from_type(maker: Maker, args: tuple[Any, ...]) -> Any:
    function, kind, inner, state = args
    _check(torch.Tensor, any(function is rebuild for rebuild in _REBUILDS) or maker.is_trusted(function))
    _check(torch.Tensor, isinstance(kind, type) and issubclass(kind, torch.Tensor))
    if function in _CONVERSIONS:
        _charge_conversion(maker, inner)
    return maker.run(torch._tensor._rebuild_from_type_v2, (function, kind, inner, state))


def _sparse(kind: Any) -> Make:
    def make(maker: Maker, args: tuple[Any, ...]) -> Any:
        made = maker.run(kind, args)
        if isinstance(made, torch.Tensor):
            torch._utils._sparse_tensors_to_validate.append(made)
        return made

    return make
