"""WorkerState and what else a pipeline saves of itself: RNG and registered components."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from roll_ckpt.errors import Damaged


def capture() -> dict[str, Any]:
    """RNG of this rank: `python`, `numpy`, `cpu` and, where there is one, `cuda`; loads with `weights_only`."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": {
            "bit_generator": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any], where: object) -> None:
    """Set this rank's RNG to what `capture_rng` returned. Damaged, naming `where`, if it is anything else."""
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        legacy = state["numpy"]
        keys = legacy["keys"].numpy().astype(np.uint32)
        np.random.set_state(
            (legacy["bit_generator"], keys, legacy["position"], legacy["has_gauss"], legacy["cached_gaussian"])
        )
        torch.set_rng_state(state["cpu"].clone())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].clone())
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as problem:
        raise Damaged(f"{where}: holds no state of random numbers: {problem}") from problem
