"""Says which entry of a state cannot be saved, by its key: a lambda, an open file, a lock, a tensor without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from roll_ckpt.errors import SaveFailed
from roll_ckpt.formats.torch_zip.skeleton import check_dtype, walk
from roll_ckpt.formats.torch_zip.sources import freed, span_of, untyped

_ADVICE = "take it out of what is saved, or keep plain values and tensors there"


def check(value: object, root: str) -> None:
    """Pickle `value` for nothing, on the calling thread, to learn whether `torch.save` could; reads no tensor.

    Raises:
        SaveFailed: it cannot be saved; the message begins with `root` and the key of the entry.
    """
    try:
        _attempt(value)
    except Exception as problem:
        raise named(value, problem, root, _attempt) from problem


def _attempt(value: object) -> None:
    for obj in walk(value, skipped=_is_plain_array).marked:
        storage = untyped(obj)
        storage.data_ptr()  # raises for a tensor that only describes one
        if isinstance(obj, torch.Tensor):
            check_dtype(obj.dtype)
            needed = span_of(obj)[1]
            if needed > storage.nbytes():
                raise freed(obj, needed, storage)


def _is_plain_array(obj: object) -> bool:
    """Whether NumPy pickles `obj` without asking anything that could fail."""
    return type(obj) is np.ndarray and not obj.dtype.hasobject


def named(state: object, problem: Exception, root: str, attempt: Callable[[Any], object]) -> SaveFailed:
    """The error for a `state` that cannot be saved because of `problem`, with the path of keys to the guilty entry.

    `attempt` raises for each part of the state that cannot be saved by itself. If no single part is guilty, the state
    as a whole is.
    """
    where, cause = _guilty(state, root, attempt, set()) or (root, problem)
    if isinstance(cause, SaveFailed):
        return SaveFailed(f"{where}: {cause}" if where else str(cause))
    told = f"cannot be saved: {type(cause).__name__}: {str(cause)[:500]}; {_ADVICE}"
    return SaveFailed(f"{where}: {told}" if where else f"the state {told}")


def _guilty(
    state: object, where: str, attempt: Callable[[Any], object], open_containers: set[int]
) -> tuple[str, Exception] | None:
    if id(state) in open_containers:
        return None
    for shown, part in _parts(state):
        path = f"{where}{shown}"
        try:
            attempt(part)
        except Exception as problem:
            return _guilty(part, path, attempt, open_containers | {id(state)}) or (path, problem)
    return None


def _parts(state: object) -> Iterable[tuple[str, object]]:
    """What a dict, list or tuple holds, keys of dicts included, each with how its place is written."""
    if isinstance(state, dict):
        for key, value in state.items():
            shown = f"[{key!r}]"[:200]
            yield shown, value
            if type(key) not in (str, int):
                yield f" key {key!r}"[:200], key
    elif isinstance(state, list | tuple):
        for place, value in enumerate(state):
            yield f"[{place}]", value
