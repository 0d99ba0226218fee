"""What a load of a pickle would refuse, told before it is loaded: at the save, and in the message of a load.

The same unpickler goes through the pickle, and nothing is made: calls to torch and to what the user trusts give an
object that takes whatever is done to it, and so do names that are on no list.
"""

from __future__ import annotations

import pickle
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from roll_ckpt.formats.torch_zip import known
from roll_ckpt.formats.torch_zip.making import Named, Pending, Unsupported
from roll_ckpt.formats.torch_zip.skeleton import skeleton_of
from roll_ckpt.formats.torch_zip.unpickler import Unpickler, named

_TOLD = 10  # how many names or reasons a message tells


@dataclass
class Unloadable:
    """What a load refuses of a state, or of one entry: `names` that `load.allow` may list, and `reasons` that none of
    its names can remove."""

    names: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, what: str, is_name: bool) -> None:
        """Add a name or a reason, once."""
        listed = self.names if is_name else self.reasons
        if what not in listed:
            listed.append(what)

    def __str__(self) -> str:
        told = [*self.names, *self.reasons]
        return ", ".join(told[:_TOLD]) + (f" and {len(told) - _TOLD} more" if len(told) > _TOLD else "")


def setting(found: Iterable[Unloadable]) -> str:
    """The setting that allows all names in `found`; "" if there are none."""
    names = dict.fromkeys(name for unloadable in found for name in unloadable.names)
    return f"load.allow: [{', '.join(names)}]" if names else ""


def unsafe_parts(state: object, allow: Iterable[Any] = ()) -> dict[str, Unloadable]:
    """What a load would refuse of `state`, by its top-level key; empty if all of it can be loaded.

    With the names of an entry in `load.allow`, and without reasons, that entry can be loaded.
    """
    try:
        return unloadable(skeleton_of(state).data, named(allow))
    except Exception as problem:  # a save goes on, whatever an object has made of its pickle
        return {"": Unloadable(reasons=[f"what cannot be made again: {problem}"])}


def unloadable(data: bytes, allowed: Mapping[str, Any]) -> dict[str, Unloadable]:
    """What a load would refuse of a pickle, by the key of its top-level dictionary, or "" for anything else.

    Raises:
        Exception: of any class; no pickler has written these bytes.
    """
    checker = _Checker(data, lambda storage: _Inert(), allowed, len(data))
    checker.load()
    return checker.by_key()


class _Inert:
    """Stands for an object that is not made. Nothing changes it.

    `named` says which, if it is on no list; `told` is the name of it, or of what has made it.
    """

    def __init__(self, named: Named | None = None, told: str = "") -> None:
        self.named = named
        self.told = told

    def __setstate__(self, state: object) -> None:
        pass

    append = add = __setstate__

    def __setitem__(self, key: object, value: object) -> None:
        pass


class _Checker(Unpickler):
    """Notes what a load would refuse, with its place in the pickle, and goes on."""

    def __init__(
        self, data: bytes, storage_of: Callable[[Any], Any], allowed: Mapping[str, Any], file_bytes: int
    ) -> None:
        super().__init__(data, storage_of, allowed, file_bytes)
        self._noted: list[tuple[int, str, bool]] = []
        self._keys: list[tuple[int, int, str]] = []  # where the value of a top-level key begins and ends

    def load(self) -> None:
        """Go through the pickle."""
        self.begin()
        read, tell, dispatch = self.read, self.file.tell, self.dispatch
        ends: dict[tuple[int, int], int] = {}  # by depth and height of the stack: where it last had that height
        try:
            while True:
                opcode = read(1)
                depth = len(self.metastack)
                if depth < 2:
                    self._note_keys(opcode, depth, ends)
                dispatch[opcode[0]](self)
                if len(self.metastack) < 2:
                    ends[len(self.metastack), len(self.stack)] = tell()
        except pickle._Stop:  # type: ignore[attr-defined]
            return

    def _note_keys(self, opcode: bytes, depth: int, ends: Mapping[tuple[int, int], int]) -> None:
        """Remember where the values lie that the top-level dictionary is about to get."""
        if opcode == pickle.SETITEMS and depth == 1 and len(self.metastack[0]) == 1:
            first, items = 0, self.stack
        elif opcode == pickle.SETITEM and depth == 0 and len(self.stack) == 3:
            first, items = 1, self.stack[1:]
        else:
            return
        for place in range(0, len(items) - 1, 2):
            key, value = first + place + 1, first + place + 2
            self._keys.append((ends[depth, key], ends[depth, value], str(items[place])))

    def note(self, what: str, is_name: bool) -> None:
        """Remember what a load would refuse here."""
        self._noted.append((self.file.tell(), what, is_name))

    def by_key(self) -> dict[str, Unloadable]:
        """What was noted, by top-level key."""
        found: dict[str, Unloadable] = {}
        starts = [start for start, _, _ in self._keys]
        for at, what, is_name in self._noted:
            place = bisect_right(starts, at) - 1
            key = self._keys[place][2] if place >= 0 and at <= self._keys[place][1] else ""
            found.setdefault(key, Unloadable()).add(what, is_name)
        return found

    def get(self, number: int) -> None:
        super().get(number)
        value = self.stack[-1]
        if type(value) is _Inert and value.told:
            self.note(value.told, True)  # for the entry that refers to it again

    def unknown(self, module: str, name: str) -> Any:
        self.note(f"{module}.{name}", True)
        return _Inert(Named(module, name), f"{module}.{name}")

    def run(self, function: Any, args: Any, options: Any = None, *, trusted: bool = False) -> Any:
        return _Inert()

    def is_made(self, value: Any) -> bool:
        return type(value) is _Inert

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        if function is getattr and args and type(args[0]) is _Inert and args[0].named is not None:
            args = (args[0].named, *args[1:])
        return self._made_by(super().call, function, args)

    def new(self, kind: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return self._made_by(super().new, kind, args, options)

    def build(self, made: Any, state: Any) -> Any:
        if type(made) is _Inert:
            return made
        return self._made_by(super().build, made, state)

    def _made_by(self, make: Callable[..., Any], function: Any, given: Any, *more: Any) -> Any:
        """What `make` makes, or an inert object if it cannot know, or refuses."""
        parts = given if type(given) is tuple else ()
        by_itself = type(function) is Pending or (id(function) in known.calls() and function is not getattr)
        if type(function) is _Inert:
            return _Inert(told=function.told)
        if by_itself and any(type(part) is _Inert for part in parts):
            return _Inert()
        try:
            return make(function, given, *more)
        except Unsupported as problem:
            self.note(problem.what, problem.is_name)
        except Exception as problem:
            self.note(f"what cannot be made again: {problem}", False)
        return _Inert()


@contextmanager
def safe_loads(allow: Iterable[Any]) -> Iterator[None]:
    """Inside the block, torch's `weights_only` loads also accept the objects in `allow`, and check sparse tensors.

    Without that check torch accepts indices that point outside of the tensor's memory.
    """
    with torch.serialization.safe_globals(list(allow)), torch.sparse.check_sparse_tensor_invariants():
        yield
