"""WorkerState, the state of a pipeline itself, and Stateful, what a registered component must offer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from roll_ckpt.errors import Damaged
from roll_ckpt.formats import sealed_json
from roll_ckpt.formats.sealed_json import Fields
from roll_ckpt.pipeline import json_values

log = logging.getLogger("roll_ckpt")


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

    Rank 0's is saved, and restored on every rank. Any value can be saved: `json_values` tells how. In `kv`, what JSON,
    tuples, sets, bytes, paths, dates, arrays and tensors can hold comes back equal, and other objects as the text of
    their `repr`. `log_history` is for reading: it comes back as numbers, text, lists and dictionaries.
    """

    step: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    kv: dict[str, Any] = field(default_factory=dict)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add `metrics` to the newest row of `log_history`, if there is one and it is a dictionary."""
        if self.log_history and isinstance(self.log_history[-1], dict):
            self.log_history[-1].update(metrics)

    def to_json(self, warned: set[str] | None = None) -> bytes:
        """The state as a file that `json.load` reads. Copies nothing that is plain; raises for no value.

        A key of `kv` or `log_history` whose value becomes text is logged once, and added to `warned`.
        """
        warned = set() if warned is None else warned
        rows = ",\n  ".join(self._rows(warned))
        kv = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self._kv(warned).items())
        return (
            f'{{\n "step": {int(self.step)},\n "log_history": [\n  {rows}\n ],\n "kv": {{\n  {kv}\n }}\n}}\n'
        ).encode()

    def _rows(self, warned: set[str]) -> Iterator[str]:
        for row in self.log_history or ():
            lost: list[str] = []
            yield json_values.spelled_row(row, lost)
            if lost:
                for key, value in row.items() if isinstance(row, Mapping) else [("value", row)]:
                    lost = []
                    json_values.spelled_row({"value": value}, lost)
                    _warn(f"log_history: {key!r}", lost, warned)

    def _kv(self, warned: set[str]) -> dict[str, Any]:
        known: Mapping[Any, Any] = self.kv if isinstance(self.kv, Mapping) else {"value": self.kv}
        kept = {}
        for key, value in list(known.items()):
            lost: list[str] = []
            kept[key] = json_values.exact(value, lost)
            _warn(f"kv[{key!r}]", lost, warned)
        return kept if json_values.are_plain(kept) else json_values.exact(known, [])

    @classmethod
    def from_json(cls, data: bytes, where: object) -> WorkerState:
        """The state that `to_json` wrote, also by an older version. Runs no code.

        Raises:
            Damaged: `data` is anything else; the message begins with `where`.
        """
        fields = Fields(sealed_json.parse_json(data, where), where)
        step = fields.take("step", int)
        log_history = fields.take("log_history", list, lambda rows: all(isinstance(row, dict) for row in rows))
        kv = json_values.restored(fields.take("kv", dict), where)
        if not isinstance(kv, dict):
            raise Damaged(f"{where}: kv is no dictionary")
        return cls(step, log_history, kv)


def _warn(where: str, lost: list[str], warned: set[str]) -> None:
    if lost and where not in warned:
        warned.add(where)
        log.warning(
            "pipeline state: %s holds %s, of which only the text of its repr is saved; keep numbers, text, lists, "
            "dictionaries, arrays or tensors there, or register a component with state_dict and load_state_dict",
            where,
            ", ".join(sorted(set(lost))),
        )
