"""Values that users keep in a state, for tests of saves and loads; imported by name on every rank."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import random
import types
import typing
import uuid
from typing import Any

import numpy as np
import torch


class Colour(enum.Enum):
    RED = "red"
    BLUE = (1, 2)


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Plain:
    name: str
    values: Any = None

    class Inner(enum.Enum):
        ONE = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    name: str
    at: Colour = Colour.RED


@dataclasses.dataclass(slots=True)
class Slots:
    name: str


def plain_values() -> dict[str, Any]:
    """What loads without any setting; `same` compares it with what was loaded."""
    history: Any = collections.defaultdict(list, a=[1], b=[np.float32(2)])
    recent: Any = collections.deque([1, (2, "x")], maxlen=5)
    zone = datetime.timezone(datetime.timedelta(hours=2), "here")
    return {
        "scalars": [np.float64(1.5), np.float32(0.1), np.int64(-3), np.bool_(True), np.str_("ü"), np.uint8(7)],
        "more scalars": [np.float16(2), np.complex64(1j), np.datetime64("2020-01-01"), np.timedelta64(3, "ms")],
        "empty text": np.str_(""),
        "arrays": [np.arange(6).reshape(2, 3), np.array(5.0), np.zeros((0, 3)), np.asfortranarray(np.eye(3)[:2])],
        "more arrays": [np.array(["ab", "c"]), np.array([b"x"]), np.zeros(1, "M8[3D]")],
        "objects": np.array([{"a": 1}, [1, 2], None, "x"], dtype=object),
        "dtypes": [np.dtype("f4"), np.dtype(">i8"), np.dtype("U7"), np.float32, np.ndarray],
        "numpy rng": np.random.RandomState(3).get_state(),
        "generator": np.random.default_rng(5).bit_generator.state,
        "python rng": random.Random(3).getstate(),
        "deque": recent,
        "endless": collections.deque("abc"),
        "defaultdict": history,
        "nested": collections.defaultdict(dict, x={1: collections.deque()}),
        "ordered": collections.OrderedDict(b=1, a=2),
        "counter": collections.Counter("aab"),
        "paths": [pathlib.Path("/a/b"), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("d\\e")],
        "enums": [Colour.RED, Colour.BLUE, Level.LOW, Plain.Inner.ONE, Colour],
        "dataclasses": [Plain("x", [1, Plain("y")]), Frozen("z"), Slots("s")],
        "keys": {Frozen("k"): 1, Colour.RED: 2, pathlib.Path("p"): 3, (1, decimal.Decimal("2.5")): 4},
        "times": [datetime.datetime(2024, 5, 6, 7, 8, 9, 10, zone), datetime.date(2024, 1, 2), datetime.time(3, 4)],
        "more times": [datetime.timedelta(3, 4, 5), datetime.timezone.utc, datetime.datetime(1, 1, 1)],
        "numbers": [decimal.Decimal("1.50"), fractions.Fraction(1, 3), 1 + 2j, 10**50, float("inf")],
        "uuid": uuid.UUID(int=5),
        "namespaces": [argparse.Namespace(lr=0.1, name="n"), types.SimpleNamespace(a=[1])],
        "builtins": [range(1, 9, 2), slice(1, None, 3), frozenset([1, (2, 3)]), {4}],
        "bytes": [bytearray(b"abc"), bytearray(), b"\xff", b""],
        "singletons": [..., NotImplemented, type(None), list, int],
        "tensor": torch.arange(3.0),
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in type and in content, to every bit of arrays and tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        sound = a.dtype == b.dtype and a.shape == b.shape and a.flags.writeable == b.flags.writeable
        return sound and a.flags.f_contiguous == b.flags.f_contiguous and all(map(same, a.flat, b.flat))
    if isinstance(a, dict):
        factory = getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        return factory and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | collections.deque):
        limit = getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
        return limit and len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    return bool(a == b)


# What needs a setting


class WithState:
    """Calls made by a load are counted."""

    calls: typing.ClassVar[list[str]] = []

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> Any:
        return [self.value]

    def __setstate__(self, state: Any) -> None:
        self.calls.append("setstate")
        (self.value,) = state

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Loose(WithState):
    """Pickled in the usual way, with the attributes that it has."""

    def __getstate__(self) -> Any:
        return vars(self)

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)

    class Inner:
        def __init__(self, value: Any) -> None:
            self.value = value

        def __eq__(self, other: object) -> bool:
            return type(self) is type(other) and vars(self) == vars(other)

        __hash__ = None  # type: ignore[assignment]


class Pair(typing.NamedTuple):
    a: int
    b: Any


class Reduced(WithState):
    def __reduce__(self) -> Any:
        return Reduced, (self.value,)


class ByFunction(WithState):
    def __reduce__(self) -> Any:
        return made_by_function, (self.value,)


def made_by_function(value: Any) -> ByFunction:
    return ByFunction(value)


class Listed(list):  # type: ignore[type-arg]
    pass


class Mapped(dict):  # type: ignore[type-arg]
    pass


class WithOptions(WithState):
    def __new__(cls, *, value: Any = None) -> WithOptions:
        made = object.__new__(cls)
        made.value = value
        return made

    def __init__(self, **options: Any) -> None:
        pass

    def __getnewargs_ex__(self) -> Any:
        return (), {"value": self.value}

    def __getstate__(self) -> Any:
        return None


@dataclasses.dataclass
class Guarded:
    """A dataclass whose state runs code of its own."""

    value: int

    def __setstate__(self, state: Any) -> None:
        self.value = state["value"]


class Flags(enum.Flag):
    A = 1
    B = 2


@dataclasses.dataclass
class Odd:
    value: Any

    def __hash__(self) -> int:
        raise AssertionError("a load runs a __hash__ of a user")


def values_for_allow() -> dict[str, Any]:
    return {
        "__setstate__": WithState(3),
        "attributes": Loose([1]),
        "nested class": Loose.Inner(2),
        "NamedTuple": Pair(1, Pair(2, np.float64(3))),
        "__reduce__": Reduced(4),
        "a function makes it": ByFunction(5),
        "function": made_by_function,
        "method": Loose.__getstate__,
        "class": Loose,
        "list": Listed([1, 2]),
        "dict": Mapped(a=1),
        "named arguments": WithOptions(value=6),
        "dataclass with code": Guarded(7),
        "flags": Flags.A | Flags.B,
        "its own hash": [Odd(8)],
        "builtin": len,
        "error": ValueError("x"),
        "random generator": np.random.default_rng(3).bit_generator,
        "masked": np.ma.masked_array([1, 2], [True, False]),
        "matrix": np.matrix([[1, 2]]),
        "subclass in a deque": collections.deque([Loose(1), Loose(2)]),
        "factory": collections.defaultdict(Listed, a=Listed([1])),
        "torch": torch.nn.Linear(2, 2),
        "aware": datetime.datetime(2024, 1, 1, tzinfo=Zone()),
    }


class Zone(datetime.tzinfo):
    def utcoffset(self, when: object) -> datetime.timedelta:
        return datetime.timedelta(hours=1)

    def __eq__(self, other: object) -> bool:
        return type(other) is Zone

    __hash__ = None  # type: ignore[assignment]
