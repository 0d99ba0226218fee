"""The `torch_zip` layout: the bytes that `torch.save` would write, and views of the bytes it wrote.

The format is that of `torch.serialization` (zip, stored records, `data.pkl` by pickle protocol 2 with storages
as persistent ids). Four things differ from a stock file, none visible to a reader: large records start at
multiples of 4096, so that direct I/O and views are aligned; a storage holds only the bytes that the saved
tensors show, never the rest of a flat buffer; zeros may follow the pickle in its record, so that it may grow; and
`.format_version` is left out, because it promises offsets that follow from a constant alignment.
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
    """`getattr` for members of enumerations and nothing else: Python 3.11.0 to 3.11.3 pickle them by it."""
    if not (
        isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(name, str) and name in kind.__members__
    ):
        raise pickle.UnpicklingError("it looks up what is no member of an enumeration")
    return kind[name]


ENUM_MEMBERS = (enum_member, "builtins.getattr")
"""For torch's list of safe globals; the enumeration itself must be there, too."""


def unsafe_parts(state: object, allow: Iterable[Any] = ()) -> dict[str, list[str]]:
    """What `weights_only=True` would refuse to load back: for each top-level key of `state`, the qualified
    names that its pickle holds beyond torch's list and `allow`."""
    with torch.serialization.safe_globals(list(allow)):
        allowed = {*safe_pickle._get_allowed_globals(), *safe_pickle._get_user_allowed_globals()}
    if _globals_of(state) <= allowed:
        return {}
    parts = state.items() if isinstance(state, dict) else [("", state)]
    unsafe = {str(key): sorted(_globals_of(value) - allowed) for key, value in parts}
    return {key: found for key, found in unsafe.items() if found}


def _globals_of(state: object) -> set[str]:
    try:
        return {str(name) for name in safe_pickle.get_globals_in_pkl(io.BytesIO(skeleton_of(state).data))}
    except pickle.UnpicklingError as problem:
        return {str(problem)}


@contextmanager
def safe_loads(allow: Iterable[Any]) -> Iterator[None]:
    """Inside the block, torch's `weights_only` loads take the objects in `allow`, too, and look into sparse tensors:
    unless asked to, torch believes indices that lead out of memory."""
    with torch.serialization.safe_globals(list(allow)), torch.sparse.check_sparse_tensor_invariants():
        yield
