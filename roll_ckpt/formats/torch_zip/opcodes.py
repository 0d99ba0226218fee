"""The opcodes of pickles, each checked before it changes anything. What calls make, a subclass decides.

Memory and time stay in proportion to the file, and nothing recurses, whatever the bytes are. Source: pickle.py.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from roll_ckpt.formats.torch_zip.hash_guard import PLAIN, HashGuard
from roll_ckpt.formats.torch_zip.known_numpy import ARRAY
from roll_ckpt.formats.torch_zip.making import Named, Pending, Unsupported

_ROOM = 1 << 20  # bytes that any pickle may take beyond those of its file
_TIMES = 8  # how often a pickle may repeat the bytes of its file
_DEEPEST = 100  # levels of containers that the interpreter frees by recursion
_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_DEEP = (collections.deque, collections.defaultdict, ARRAY)
"""Containers that the interpreter frees by recursion: one in the other 100,000 times overflows its stack."""
_STOCK: dict[int, Any] = pickle._Unpickler.dispatch
_REFUSED = (
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.PERSID, pickle.DUP),
    *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)
"""Opcodes that no pickle of a state needs; some call what `find_class` never sees."""


class Opcodes(pickle._Unpickler):
    """Reads one pickle. `storage_of` is called for each persistent id; `file_bytes` is the size of the file."""

    stack: list[Any]
    metastack: list[list[Any]]
    memo: dict[int, Any]
    proto: int

    def __init__(self, data: bytes, storage_of: Callable[[Any], Any], file_bytes: int) -> None:
        self.file = io.BytesIO(data)
        super().__init__(self.file, encoding="utf-8")
        self.read, self.readline = self.file.read, self.file.readline
        self.guard = HashGuard(len(data))
        self.unbuilt = 0
        self._storage_of = storage_of
        self._room = _ROOM + _TIMES * file_bytes
        self._heights: dict[int, tuple[int, Any]] = {}
        self._inner: dict[int, Any] = {}

    def resolve(self, module: str, name: str) -> Any:
        """The object called `module.name`."""
        raise NotImplementedError

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        """What `function(*args)` makes."""
        raise NotImplementedError

    def new(self, kind: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What `kind.__new__(kind, *args, **options)` makes."""
        raise NotImplementedError

    def build(self, made: Any, state: Any) -> Any:
        """`made` with this state; usually the same object."""
        raise NotImplementedError

    def is_made(self, value: Any) -> bool:
        """Whether `value` was made by something that is trusted, and may be changed by its own methods."""
        raise NotImplementedError

    def load(self) -> Any:
        """The object in the pickle.

        Raises:
            Unsupported: it holds what only `load.allow` could allow, or nothing can. Any other exception: nobody has
                pickled these bytes, or they are a bomb.
        """
        self.begin()
        read, dispatch = self.read, self.dispatch
        try:
            while True:
                dispatch[read(1)[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            if self.unbuilt:
                raise pickle.UnpicklingError("it ends before an array is complete") from None
            return stop.value
        except IndexError:
            raise pickle.UnpicklingError("it is truncated or damaged") from None

    def begin(self) -> None:
        """Empty the stack before the first opcode."""
        self.metastack, self.stack = [], []
        self.append = self.stack.append
        self.proto = 0

    def pop_mark(self) -> list[Any]:
        """The values since the last mark."""
        items, self.stack = self.stack, self.metastack.pop()
        self.append = self.stack.append
        return items

    def charge(self, nbytes: int) -> None:
        """Take `nbytes` of memory. UnpicklingError if the pickle takes more than its file can need."""
        self._room -= nbytes
        if self._room < 0:
            raise pickle.UnpicklingError("it makes far more bytes than the file holds")

    def nest(self, outer: Any, values: Iterable[Any]) -> None:
        """Refuse `values` in `outer`, a container of `_DEEP`, if such containers are nested too deeply."""
        for value in values:
            if type(value) in _DEEP:
                height = self._heights.get(id(value), (1, None))[0] + 1
                if height > _DEEPEST or id(outer) in self._inner:
                    raise Unsupported("deques, defaultdicts or arrays nested in one another too deeply")
                self._inner[id(value)] = value
                self._heights[id(outer)] = max(height, self._heights.get(id(outer), (1, None))[0]), outer

    # opcodes

    def load_reduce(self) -> None:
        args = self.stack.pop()
        if type(args) is not tuple:
            raise pickle.UnpicklingError("it makes a call without a tuple of arguments")
        if args:
            self.guard.check((args,))
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj(self) -> None:
        self._load_new({})

    def load_newobj_ex(self) -> None:
        options = self.stack.pop()
        if type(options) is not dict:
            raise pickle.UnpicklingError("it makes an object with options that are no dict")
        self._load_new(options)

    def _load_new(self, options: dict[str, Any]) -> None:
        args = self.stack.pop()
        if type(args) is not tuple:
            raise pickle.UnpicklingError("it makes an object without a tuple of arguments")
        self.guard.check((args,))
        self.stack[-1] = self.new(self.stack[-1], args, options)

    def load_build(self) -> None:
        state = self.stack.pop()
        self.stack[-1] = self.build(self.stack[-1], state)

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(self.stack[-1], items)

    def _extend(self, target: Any, items: list[Any]) -> None:
        kind = type(target)
        if kind is list:
            target.extend(items)
        elif kind is collections.deque:
            self.nest(target, items)
            target.extend(items)
        elif self.is_made(target):
            for item in items:
                target.append(item)
        else:
            raise pickle.UnpicklingError(f"it appends to a {kind.__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        kind = type(target)
        if kind is not dict:
            if kind not in _DICTS and not self.is_made(target):
                raise pickle.UnpicklingError(f"it sets items of a {kind.__name__}")
            if kind is collections.defaultdict:
                self.nest(target, items[1::2])
        check = self.guard.check
        for place in range(0, len(items), 2):
            key = items[place]
            if type(key) not in PLAIN:
                check((key,))
            target[key] = items[place + 1]

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set and not self.is_made(target):
            raise pickle.UnpicklingError(f"it adds items to a {type(target).__name__}")
        self.guard.check(items)
        for item in items:
            target.add(item)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.guard.check(items)
        self.append(frozenset(items))

    def load_binget(self) -> None:
        self.get(self.read(1)[0])

    def load_long_binget(self) -> None:
        self.get(int.from_bytes(self.read(4), "little"))

    def load_get(self) -> None:
        self.get(int(self.readline()[:-1]))

    def get(self, number: int) -> None:
        """Push the object that was stored under this number."""
        try:
            value = self.memo[number]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to object {number}, which it has not made") from None
        kind = type(value)
        if kind is Pending:
            if value.value is None:
                raise Unsupported("a NumPy array that holds itself")
            value = value.value
        elif kind is Named and not (self.stack and self.stack[-1] is getattr):
            value = self.memo[number] = self.resolve(value.module, value.name)
        self.append(value)

    def load_global(self) -> None:
        module, name = self.readline(), self.readline()
        if not module.endswith(b"\n") or not name.endswith(b"\n"):
            raise pickle.UnpicklingError("it is truncated in a name")
        self.append(self.find_class(module[:-1].decode(), name[:-1].decode()))

    def load_binpersid(self) -> None:
        self.stack[-1] = self._storage_of(self.stack[-1])

    def load_frame(self) -> None:
        self.read(8)  # a frame only says how much to read ahead

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_refused(self) -> None:
        raise pickle.UnpicklingError("it holds an instruction that no pickle of a state needs")

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), load_refused),
        **{code: load for code, load in _STOCK.items() if bytes([code]) not in _REFUSED},
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BINGET[0]: load_binget,
        pickle.LONG_BINGET[0]: load_long_binget,
        pickle.GET[0]: load_get,
        pickle.GLOBAL[0]: load_global,
        pickle.BINPERSID[0]: load_binpersid,
        pickle.FRAME[0]: load_frame,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }
