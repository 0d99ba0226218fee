"""The random states of this rank: Python, NumPy, torch, and CUDA where there is one. The one place that takes and sets them.

`capture` and `restore` use the states as each library has them. The portable form holds nothing but numbers, strings
and tensors, so that a `weights_only` load takes it under every version of NumPy.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from roll_ckpt.errors import Damaged


def capture() -> dict[str, Any]:
    """The states under the keys `python`, `numpy`, `torch` and, where CUDA is available, `cuda`."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(legacy=True), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, Any]) -> None:
    """Set the states to what `capture` returned; `cuda` only where CUDA is available.

    Raises:
        LookupError, TypeError, ValueError, RuntimeError, …: as the libraries do for what is no state of theirs.
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].clone())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].clone())


def capture_portable() -> dict[str, Any]:
    """What `capture` returns in the portable form, as a pipeline's file holds it."""
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
    """Set the states to what `capture_portable` returned. Damaged, naming `where`, if it is anything else."""
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
        raise Damaged(f"{where}: holds no state of random numbers: {problem}") from problem
