"""WorkerState, the state of a pipeline itself, and Stateful, what a registered component must offer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from roll_ckpt.errors import ConfigError
from roll_ckpt.formats import sealed_json
from roll_ckpt.formats.sealed_json import Fields


class Stateful(Protocol):
    """Anything with a state of its own: a data loader, a curriculum, a replay buffer.

    Every rank has its own object and its own state. What `state_dict` returns is copied before the save returns; it
    must be loadable without running code: values of Python, NumPy and torch, enumerations and plain dataclasses that
    are imported before `resume()`, and names in `load.allow`.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class WorkerState:
    """A pipeline's own state: the last finished `step`, a `log_history` of metrics, and `kv` for the user's values.

    Rank 0's is saved, and restored on every rank. All of it must be JSON; NumPy and torch scalars are stored as Python
    numbers.
    """

    step: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    kv: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The state as a JSON file.

        Raises:
            ConfigError: JSON cannot hold a value, or would change a value in `kv` (a tuple, say).
        """
        try:
            for key, value in self.kv.items():
                if json.loads(json.dumps({key: value}, default=_plain_number)) != {key: value}:
                    raise ValueError(f"kv[{key!r}] would be changed by JSON: {value!r}")
            return json.dumps(asdict(self), default=_plain_number, indent=1).encode()
        except (TypeError, ValueError) as problem:
            raise ConfigError(
                f"pipeline state: {problem}; keep numbers, strings, lists and dicts in log_history and kv"
            ) from problem

    @classmethod
    def from_json(cls, data: bytes, where: object) -> WorkerState:
        """The state that `to_json` wrote.

        Raises:
            Damaged: `data` is anything else; the message begins with `where`.
        """
        fields = Fields(sealed_json.parse_json(data, where), where)
        return cls(
            step=fields.take("step", int),
            log_history=fields.take("log_history", list, lambda rows: all(isinstance(row, dict) for row in rows)),
            kv=fields.take("kv", dict),
        )


def _plain_number(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.generic) and np.ndim(value) == 0:
        return value.item()
    raise TypeError(f"an object of type {type(value).__name__} is not JSON")
