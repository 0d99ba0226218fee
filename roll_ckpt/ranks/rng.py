"""Captures and restores the random states of this rank: Python, NumPy, torch, and the current CUDA device.

`capture` and `restore` use each library's own objects. The portable form holds only numbers, strings and tensors, so
that `torch.load(weights_only=True)` accepts it under every version of NumPy. Nothing here is collective.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from roll_ckpt.errors import Damaged


def capture() -> dict[str, Any]:
    """The states of this rank under the keys `python`, `numpy`, `torch` and, if CUDA is available, `cuda`."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(legacy=True), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, Any]) -> None:
    """Set the states to what `capture` returned; `cuda` only if CUDA is available here.

    Raises:
        LookupError, TypeError, ValueError, RuntimeError, ...: the libraries' own errors for an invalid state.
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].clone())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].clone())


def capture_portable() -> dict[str, Any]:
    """The states of this rank in the portable form, which a pipeline saves. Keys: `python`, `numpy`, `cpu`, `cuda`."""
    states = capture()
    kind, keys, position, has_gauss, cached = states["numpy"]
    numpy = {
        "bit_generator": str(kind),
        "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "position": int(position),
        "has_gauss": int(has_gauss),
        "cached_gaussian": float(cached),
    }
    cuda = {"cuda": states["cuda"]} if "cuda" in states else {}
    return {"python": states["python"], "numpy": numpy, "cpu": states["torch"], **cuda}


def restore_portable(state: dict[str, Any], where: object) -> None:
    """Set the states to what `capture_portable` returned.

    Raises:
        Damaged: `state` is anything else; the message begins with `where`.
    """
    try:
        version, internal, gauss = state["python"]
        numpy = state["numpy"]
        keys = numpy["keys"].numpy().astype(np.uint32)
        position, has_gauss, cached = numpy["position"], numpy["has_gauss"], numpy["cached_gaussian"]
        cuda = {"cuda": state["cuda"]} if "cuda" in state else {}
        restore(
            {
                "python": (version, tuple(internal), gauss),
                "numpy": (numpy["bit_generator"], keys, position, has_gauss, cached),
                "torch": state["cpu"],
                **cuda,
            }
        )
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as problem:
        raise Damaged(f"{where}: it does not hold random states: {problem}") from problem
