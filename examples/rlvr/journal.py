"""What a rank writes down of every step, exactly: two runs are compared by it, the table is made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def work_dir_of(output_dir: Path) -> Path:
    """Logs, figures and uploads lie beside the output directory, which holds checkpoints only."""
    return output_dir.with_name(output_dir.name + "-work")


@dataclass(frozen=True)
class Place:
    """Where a rank of a torchrun world keeps by-products; `world` is `rlvr` or the only cluster's name."""

    work_dir: Path
    world: str
    rank: int

    @property
    def log(self) -> Path:
        return self.work_dir / "logs" / f"{self.world}.rank{self.rank}.log"

    @property
    def journal(self) -> Path:
        return self.work_dir / "steps" / f"{self.world}.rank{self.rank}.jsonl"

    @property
    def stopped(self) -> Path:
        """Is there once the rank stands at the point of `--stop-at`."""
        return self.work_dir / "stopped" / f"{self.world}.rank{self.rank}"


@dataclass
class Step:
    """`figures` are losses and the like as hexadecimal floats, `metrics` what `do_checkpoint` returned."""

    step: int
    figures: dict[str, str]
    metrics: dict[str, Any]


@dataclass
class Launch:
    """One start of the job."""

    resumed_from: int | None
    steps: dict[int, Step] = field(default_factory=dict)


class Journal:
    """Appends to a rank's file; the kernel has a line when the call returns, so a kill loses none."""

    def __init__(self, path: Path, resumed_from: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._write({"resumed_from": resumed_from})

    def step(self, step: int, figures: dict[str, float], metrics: dict[str, Any]) -> None:
        exact = {name: value.hex() for name, value in figures.items()}
        self._write({"step": step, "figures": exact, "metrics": metrics})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")


def read_journal(path: Path) -> list[Launch]:
    """All launches in the file, oldest first."""
    launches: list[Launch] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "resumed_from" in record:
            launches.append(Launch(record["resumed_from"]))
        else:
            launches[-1].steps[record["step"]] = Step(**record)
    return launches
