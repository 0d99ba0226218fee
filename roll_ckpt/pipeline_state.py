"""WorkerState and what else a pipeline saves of itself: RNG and registered components."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from roll_ckpt import errors, seal

WORKER_STATE_FILE = "worker_state_pipeline.json"


class Stateful(Protocol):
    """Anything with a state of its own: a data loader, a curriculum, a replay buffer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class WorkerState:
    """The pipeline's own state: `step` last finished, `log_history` of metrics, `kv` for the user's values.

    All of it must be JSON; numbers of NumPy and torch are stored as Python numbers.
    """

    step: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    kv: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The file's bytes.

        Raises:
            ConfigError: a value that JSON cannot hold, or a key of `kv` whose value it would change.
        """
        try:
            for key, value in self.kv.items():
                if json.loads(json.dumps({key: value}, default=_plain_number)) != {key: value}:
                    raise ValueError(f"kv[{key!r}] would come back changed: {value!r}")
            return json.dumps(asdict(self), default=_plain_number, indent=1).encode()
        except (TypeError, ValueError) as problem:
            raise errors.ConfigError(
                f"pipeline state: {problem}; keep numbers, strings, lists and dicts in log_history and kv"
            ) from problem

    @classmethod
    def from_json(cls, data: bytes, where: object) -> WorkerState:
        """What `to_json` made. Damaged, naming `where`, if it is anything else."""
        fields = seal.Fields(seal.parse_json(data, where), where)
        return cls(
            step=fields.take("step", int),
            log_history=fields.take("log_history", list, lambda rows: all(isinstance(row, dict) for row in rows)),
            kv=fields.take("kv", dict),
        )


def _plain_number(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.generic) and np.ndim(value) == 0:
        return value.item()
    raise TypeError(f"an object of type {type(value).__name__} is not JSON")


def rng_file(rank: int) -> str:
    """File name of a rank's RNG state; rank 0's stands for the pipeline, as in ROLL."""
    return "rng_state_pipeline.pth" if rank == 0 else f"rng_state_rank_{rank}.pth"


def stateful_file(name: str, rank: int) -> str:
    return f"stateful_{name}_rank_{rank}.pth"


def capture_rng() -> dict[str, Any]:
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


def restore_rng(state: dict[str, Any], where: object) -> None:
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
        raise errors.Damaged(f"{where}: holds no state of random numbers: {problem}") from problem
