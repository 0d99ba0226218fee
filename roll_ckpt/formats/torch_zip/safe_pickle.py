"""Which names a pickle may refer to: torch's `weights_only` list, extended by what the user allows.

`unsafe_parts` tells at save time what a load would refuse; `safe_loads` applies the list to loads.
Source: torch/_weights_only_unpickler.py.
"""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import _weights_only_unpickler as safe_pickle

from roll_ckpt.formats.torch_zip.skeleton import skeleton_of


def enum_member(kind: object, name: object) -> enum.Enum:
    """`getattr` for members of enumerations only: Python 3.11.0 to 3.11.3 pickle them as such a call."""
    if not (
        isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(name, str) and name in kind.__members__
    ):
        raise pickle.UnpicklingError("it looks up an attribute that is no member of an enumeration")
    return kind[name]


ENUM_MEMBERS = (enum_member, "builtins.getattr")
"""An entry for torch's list of safe globals; the class of the enumeration must be listed, too."""


def unsafe_parts(state: object, allow: Iterable[Any] = ()) -> dict[str, list[str]]:
    """What a load with `weights_only=True` would refuse: for each top-level key of `state`, the qualified names in its
    pickle that neither torch's list nor `allow` has. Empty if the whole state can be loaded."""
    with torch.serialization.safe_globals(list(allow)):
        allowed = {*safe_pickle._get_allowed_globals(), *safe_pickle._get_user_allowed_globals()}
    if _globals_of(state) <= allowed:
        return {}
    parts = state.items() if isinstance(state, dict) else [("", state)]
    unsafe = {str(key): sorted(_globals_of(value) - allowed) for key, value in parts}
    return {key: refused for key, refused in unsafe.items() if refused}


def _globals_of(state: object) -> set[str]:
    try:
        return {str(name) for name in safe_pickle.get_globals_in_pkl(io.BytesIO(skeleton_of(state).data))}
    except pickle.UnpicklingError as problem:
        return {str(problem)}


@contextmanager
def safe_loads(allow: Iterable[Any]) -> Iterator[None]:
    """Inside the block, torch's `weights_only` loads also accept the objects in `allow`, and check sparse tensors.

    Without that check torch accepts indices that point outside of the tensor's memory.
    """
    with torch.serialization.safe_globals(list(allow)), torch.sparse.check_sparse_tensor_invariants():
        yield
