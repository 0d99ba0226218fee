"""Pickles that forge the values which load without a setting: opcodes, to be put between PROTO and a full stop."""

from __future__ import annotations

import pickle
import struct

import saved_values  # noqa: F401 (a load finds its classes because this process has imported them)

PROTO = b"\x80\x02"


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def called(name: str, *arguments: bytes) -> bytes:
    """The opcodes of a call."""
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def made(name: str, state: bytes) -> bytes:
    """The opcodes of an object made by `__new__`, with this state."""
    return named(name) + b")\x81" + state + b"b"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def raw(value: bytes) -> bytes:
    return called("_codecs.encode", text(value.decode("latin-1")), text("latin1"))


def dtype(code: str, order: bytes, nbytes: bytes, alignment: bytes, flags: bytes, more: bytes = b"") -> bytes:
    state = b"(K\3" + order + b"NNN" + nbytes + alignment + flags + more + b"t"
    return called("numpy.dtype", text(code), b"\x89\x88") + state + b"b"


def date(unit: bytes, count: bytes) -> bytes:
    return dtype("M8", text("<"), *_SIZES[1:], more=b"N(" + raw(unit) + count + b"K\1K\1t\x86")


_SIZES = text("<"), number(-1), number(-1), b"K\0"
I4 = dtype("i4", *_SIZES)
F8 = dtype("f8", *_SIZES)
OBJECT = dtype("O8", text("|"), number(-1), number(-1), b"K?")
CORE = "numpy.core.multiarray."
EMPTY = called(CORE + "_reconstruct", named("numpy.ndarray"), b"K\0\x85", raw(b"b"))
HUGE = number(1 << 40)
RANGE = called("builtins.range", number(0), HUGE, b"K\1")
MB = raw(b"x" * (1 << 20)) + b"q\x09"
MB_TEXT = dtype(f"S{1 << 20}", text("|"), number(1 << 20), b"K\1", b"K\0")


def array(shape: bytes, data: bytes, kind: bytes = I4) -> bytes:
    return EMPTY + b"(K\1" + shape + kind + b"\x89" + data + b"tb"


def times(count: int, first: bytes, again: bytes) -> bytes:
    """A list of what `first` makes, and of what `again` makes so often."""
    return b"](" + first + again * count + b"e"


def nested(level: bytes, close: bytes = b"a", depth: int = 5_000) -> bytes:
    return level * depth + b"N" + close * depth


def chain(count: int) -> bytes:
    """Deques that are nested one by one from the outside, when they all exist."""
    deques = b"".join(called("collections.deque") + b"r" + struct.pack("<I", n) + b"0" for n in range(count))
    links = (struct.pack("<I", n) + b"j" + struct.pack("<I", n + 1) for n in range(count - 1))
    return deques + b"".join(b"j" + link + b"a0" for link in links) + b"j\0\0\0\0"


SHOWN_OFTEN = called(
    "torch._utils._rebuild_tensor_v2",
    b"(" + text("storage") + named("torch.FloatStorage") + text("0") + text("cpu") + b"K\x18tQ",
    b"K\0" + number(1 << 30) + b"\x85K\0\x85\x89" + called("collections.OrderedDict"),
)
VALUES: dict[str, bytes] = {
    # NumPy
    "an array that claims a huge shape": array(HUGE + b"\x85", raw(b"abcd")),
    "an array of more than its bytes": array(b"K\2\x85", raw(b"abcd")),
    "an array of less than its bytes": array(b"K\1\x85", raw(b"abcdefgh")),
    "a negative shape of an array": array(number(-1) + b"\x85", raw(b"abcd")),
    "an empty array that claims a huge shape": array(b"K\0" + number(1 << 62) + b"\x86", raw(b"")),
    "a shape of floats": array(b"G" + bytes(8) + b"\x85", raw(b"")),
    "a thousand dimensions": array(b"(" + b"K\1" * 1000 + b"t", raw(b"abcd")),
    "many texts of no size": array(HUGE + b"\x85", raw(b""), dtype("U0", text("<"), b"K\0", b"K\4", b"K\x08")),
    "an array of bytes taken for objects": array(b"K\1\x85", raw(b"x" * 8), OBJECT),
    "objects of another number": array(HUGE + b"\x85", b"](NNe", OBJECT),
    "objects in an array of numbers": array(b"K\1\x85", b"](Ne"),
    "a dtype with a size of its own": dtype("U2", text("<"), HUGE, b"K\4", b"K\x08"),
    "a dtype with flags of its own": dtype("i4", text("<"), b"K\4", b"K\4", b"K?"),
    "a dtype with more than a state": dtype("i4", *_SIZES, more=b"}K\1"),
    "a dtype with fields": called("numpy.dtype", text("i4")) + b"(K\3" + text("|") + b"N)}K\4K\4K\0tb",
    "a dtype of several": called("numpy.dtype", text("i4,O")),
    "a dtype that is none": called("numpy.dtype", text("x9")),
    "a dtype of another version": called("numpy.dtype", text("i4")) + b"(K\x09" + text("<") + b"NNNK\4K\4K\0tb",
    "a dtype without an order": dtype("i4", b"N", b"K\4", b"K\4", b"K\0"),
    "a date of no unit": date(b"zz", b"K\1"),
    "a date of zero days": date(b"D", b"K\0"),
    "an array without its state": EMPTY,
    "an array of a shape at once": called(CORE + "_reconstruct", named("numpy.ndarray"), HUGE + b"\x85", raw(b"b")),
    "an array of a class of no arrays": called(CORE + "_reconstruct", named("builtins.list"), b"K\0\x85", raw(b"b")),
    "a call of the class of arrays": called("numpy.ndarray", HUGE + b"\x85"),
    "a scalar of too few bytes": called(CORE + "scalar", F8, raw(b"abc")),
    "a scalar of an object": called(CORE + "scalar", OBJECT, raw(b"x" * 8)),
    "a buffer of another size": called("numpy.core.numeric._frombuffer", raw(b"abcd"), I4, HUGE + b"\x85", text("C")),
    "a state for a finished array": array(b"K\1\x85", raw(b"abcd")) + b"(K\1" + HUGE + b"\x85" + I4 + b"\x89Ntb",
    "an array that holds itself": EMPTY + b"q\x63(K\1K\1\x85" + OBJECT + b"\x89](h\x63etb",
    # what takes memory for a number, or for a few bytes
    "a deque of a negative length": called("collections.deque", b")", number(-1)),
    "a deque of a length beyond": called("collections.deque", b")", number(1 << 80)),
    **{
        f"a {name} of a range": called(name, RANGE)
        for name in ("collections.deque", "builtins.list", "builtins.set", "builtins.tuple", "builtins.bytes")
    },
    "a shape of a range": called("torch.Size", RANGE),
    "a shape by a rebuild": called(
        "torch._tensor._rebuild_from_type_v2", named("torch.Size"), named("torch.Tensor"), RANGE + b"\x85", b"}"
    ),
    "bytes of a size": called("builtins.bytes", HUGE),
    "bytes of a size, by their class": named("builtins.bytearray") + HUGE + b"\x85\x81",
    "text of a number": called("builtins.str", number(1 << 2000)),
    "a number of a text": called("builtins.int", text("9" * 4000)),
    "a number of a decimal": called("builtins.int", called("decimal.Decimal", text("1e999999999"))),
    "a tensor of a size": called("torch.Tensor", HUGE),
    "a tensor of a size, by its class": named("torch.Tensor") + HUGE + b"\x85\x81",
    "a fraction of a text": called("fractions.Fraction", text("1e999999999")),
    "a fraction of a number and a text": called("fractions.Fraction", b"K\1", text("1")),
    "bytes again and again": times(2000, MB, b"cbuiltins\nbytearray\nh\x09\x85R"),
    "texts again and again": times(2000, MB, called(CORE + "scalar", MB_TEXT, b"h\x09")),
    "paths again and again": times(500, text("a/" * (1 << 17)) + b"q\x09", b"cpathlib\nPosixPath\nh\x09\x85R"),
    "lists again and again": times(2000, b"](" + b"N" * (1 << 18) + b"eq\x09", b"cbuiltins\ntuple\nh\x09\x85R"),
    "copies of a value that is shown often": called(
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        SHOWN_OFTEN,
        named("torch.float64") + text("cpu") + b"\x89",
    ),
    # what the interpreter frees, or compares, by recursion
    "slices in slices": nested(b"cbuiltins\nslice\n", b"\x85R"),
    "deques in deques": nested(called("collections.deque")),
    "defaults in defaults": nested(called("collections.defaultdict") + b"N", b"s"),
    "deques in open deques": chain(2000),
    # what would run, or change, something
    "a default that is made by a stranger": called("collections.defaultdict", named("os.abort")),
    "a default that is no call": called("collections.defaultdict", b"K\1"),
    "a text coded by a stranger": called("_codecs.encode", text("x"), text("idna")),
    "a zone by a stranger": called("datetime.datetime", raw(b"\x07\xe8\1\1\0\0\0\0\0\0"), called("argparse.Namespace")),
    "attributes of a list": b"]}" + text("x") + b"Nsb",
    "attributes of a class": named("collections.OrderedDict") + b"}" + text("x") + b"Nsb",
    "attributes of a member": called("saved_values.Colour", text("red")) + b"}" + text("x") + b"Nsb",
    "a member that there is not": called("saved_values.Colour", text("green")),
    "a dataclass by its constructor": called("saved_values.Plain", text("x")),
    "a dataclass with code": made("saved_values.Guarded", b"}" + text("value") + b"Ns"),
    "a dataclass that hashes by itself": b"}" + made("saved_values.Odd", b"}" + text("value") + b"Ns") + b"Ns",
    "a class that is no dataclass": made("saved_values.WithState", b"](Ne"),
    "a slot that is none": made("saved_values.Slots", b"N}" + text("__class__") + named("builtins.list") + b"s\x86"),
    "an attribute of an object": called("builtins.getattr", called("argparse.Namespace"), text("__class__")),
    "an attribute of a class": called("builtins.getattr", named("collections.OrderedDict"), text("__init__")),
    "what is inside of a module": called("builtins.getattr", named("os.path"), text("join")),
    "what it has named": b"cbuiltins\ngetattr\ncos\nsystem\nq\x090" + b"h\x09" + text("true") + b"\x85R",
    "an old class": b"(ios\nsystem\n",
    "an extension": b"\x82\1",
    # what cannot be meant
    "a fraction by zero": called("fractions.Fraction", b"K\1K\0"),
    "a date beyond all": called("datetime.datetime", raw(b"\xff" * 10)),
    "a path of numbers": called("pathlib.PosixPath", b"K\1"),
    "a namespace of no names": called("argparse.Namespace") + b"}K\1K\2sb",
    "an identifier beyond 128 bits": made("uuid.UUID", b"}" + text("int") + number(1 << 128) + b"s"),
    "a dataclass with a state without names": made("saved_values.Plain", b"}K\1Ns"),
    "items of text": text("x") + b"Na",
}
SOUND: dict[str, bytes] = {
    "array": array(b"K\1\x85", raw(b"abcd")),
    "objects": array(b"K\2\x85", b"](NNe", OBJECT),
    "text": dtype("U2", text("<"), b"K\x08", b"K\4", b"K\x08"),
    "date": date(b"D", b"K\1"),
    "scalar": called(CORE + "scalar", F8, raw(b"abcdefgh")),
    "buffer": called("numpy.core.numeric._frombuffer", raw(b"abcd"), I4, b"K\1\x85", text("C")),
    "deque": called("collections.deque", b")", HUGE),
    "deques": nested(called("collections.deque"), depth=50),
    "default": called("collections.defaultdict", named("builtins.list")),
    "member": called("saved_values.Colour", text("red")),
    "dataclass": made("saved_values.Plain", b"}" + text("name") + b"Ns"),
    "slot": made("saved_values.Slots", b"N}" + text("name") + b"Ns\x86"),
    "fraction": called("fractions.Fraction", number(1 << 2000), b"K\3"),
    "inner": called("builtins.getattr", named("saved_values.Plain"), text("Inner")),
    "often": times(5, MB, b"cbuiltins\nbytearray\nh\x09\x85R"),
    "shown often": SHOWN_OFTEN,
}
"""The same, sound."""
