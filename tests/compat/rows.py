"""The rows of rows.yaml: which versions go together, and who has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

PACKAGES = ("torch", "deepspeed", "megatron-core", "huggingface_hub", "transformers")
PARTS = ("python", *PACKAGES)
"""What a test marked `core(part)` is about, and the columns of the table."""


@dataclass(frozen=True)
class Row:
    """One environment."""

    name: str
    why: str
    python: str
    versions: dict[str, str]
    pins: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    short: bool = False

    def __post_init__(self) -> None:
        if tuple(self.versions) != PACKAGES:
            raise ValueError(f"rows.yaml: {self.name}: versions must name {', '.join(PACKAGES)}, in this order")
        if set(self.reasons) - set(PARTS):
            raise ValueError(f"rows.yaml: {self.name}: reasons may name {', '.join(PARTS)} only")

    @property
    def pins_file(self) -> Path:
        """The exact version of everything in the environment."""
        return HERE / "pins" / f"{self.name}.txt"


def read() -> dict[str, Row]:
    told = yaml.safe_load((HERE / "rows.yaml").read_text(encoding="utf-8"))
    return {name: Row(name, **values) for name, values in told.items()}


def chosen(names: list[str]) -> list[Row]:
    """The rows of these names; `short` stands for those that are, and no name for all.

    Raises:
        SystemExit: a name that is no row.
    """
    rows = read()
    groups = {"short": [row.name for row in rows.values() if row.short], "all": list(rows)}
    wanted = [row for name in names or ["all"] for row in groups.get(name, [name])]
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        raise SystemExit(f"no such row: {', '.join(unknown)}. There are {', '.join([*rows, *groups])}")
    return [rows[name] for name in dict.fromkeys(wanted)]
