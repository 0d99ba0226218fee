"""The parallel layouts of the Megatron tests, and the torchrun worlds that hold them.

A layout is its name: "TP2xDP2" has two tensor parallel and two data parallel ranks, "PP2xVPP2xDP2" two pipeline
stages in two virtual ones each. No framework is imported here: the patches of tests/megatron_cpu.py are for good.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from worlds import World

TWO_RANKS = ("TP2", "PP2", "DP2")
FOUR_RANKS = ("TP2xDP2", "TP2xPP2", "PP2xVPP2xDP2")
LAYOUTS = TWO_RANKS + FOUR_RANKS

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
"""How far the next losses and gradient norms may be, relatively, from those of another layout. What was loaded is
equal bit for bit, but sums over ranks and over parts of matrices are made in another order: seen were 1e-7 in
fp32 (one bit of the loss) and 8e-4 in bf16 (the norm, of gradients with 8 bits)."""

MISSING = ""
if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    MISSING = "megatron-core is not installed: pip install 'megatron-core>=0.14'"


def _has(path: str, name: str) -> bool:
    """Whether a module of the installed Megatron-core mentions a name; it is not imported here."""
    found = None if MISSING else importlib.util.find_spec("megatron.core")
    folders = (found.submodule_search_locations if found else None) or ()
    return any(name in (Path(folder) / path).read_text() for folder in folders)


OPTIMIZER, MAPPING = "optimizer/distrib_optimizer.py", "dist_checkpointing/mapping.py"
SERIALIZATION, STRATEGIES = "dist_checkpointing/serialization.py", "dist_checkpointing/strategies/common.py"
HAS_RESHARDABLE = bool(MISSING) or _has(OPTIMIZER, "sharded_param_state_dp_reshardable")
FORMS = ("dp_reshardable", "fully_reshardable") if HAS_RESHARDABLE else ("fully_sharded_model_space",)
"""The sharding types of the distributed optimizer that are tried in every layout."""
MAKES = {*FORMS, *(["fully_sharded_model_space"] if _has(MAPPING, "def from_rank_offsets_flat(") else [])}
"""All of them that we can save with it."""
UNGATHERED, ANY_LAYOUT = FORMS[0], FORMS[-1]
NO_RESHARDABLE = "" if HAS_RESHARDABLE else "before 0.15 Megatron-core has neither dp_reshardable nor fully_reshardable"
COMMON_READER = (
    ("strategies.common", "TorchCommonLoadStrategy")
    if bool(MISSING) or _has(STRATEGIES, "class TorchCommonLoadStrategy")
    else ("serialization", "load_common" if _has(SERIALIZATION, " = load_common(") else "load_common_state_dict")
)
"""Where `dist_checkpointing.load` has what reads the common state, and its name."""
WRITES_COMMON = bool(MISSING) or not _has(SERIALIZATION, 'key="common_state"')
"""Whether stock code writes `common.pt`; from 0.19 on it only reads it."""


def sizes(layout: str) -> dict[str, int]:
    """Sizes of the parallel dimensions: tp, pp, vpp, dp."""
    named = {name.lower(): int(size) for name, size in re.findall(r"([A-Z]+)(\d+)", layout)}
    return {"tp": 1, "pp": 1, "vpp": 1, "dp": 1, **named}


def ranks(layout: str) -> int:
    size = sizes(layout)
    return size["tp"] * size["pp"] * size["dp"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the losses and norms of the steps after it."""

    directory: Path
    layout: str
    precision: str
    sharding_type: str
    following: list[tuple[float, float]]


def world(layout: str, *, torchrun: bool = True) -> World:
    with mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
        return World(ranks(layout), torchrun=torchrun)


class Worlds:
    """A world for each number of ranks, started when it is first called."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def at(self, layout: str) -> World:
        size = ranks(layout)
        if size not in self._worlds:
            self._worlds[size] = world(layout)
        return self._worlds[size]

    def call(self, layout: str, case: str, *args: Any, **kwargs: Any) -> list[Any]:
        """`case` of tests/megatron_cases.py, told the layout, on each rank of it."""
        return self.at(layout).call(f"megatron_cases:{case}", layout, *args, **kwargs)

    def save(
        self,
        directory: Path,
        layout: str,
        precision: str = "fp32",
        who: str = "ours",
        sharding_type: str = ANY_LAYOUT,
    ) -> Saved:
        """A model trained in `layout` and saved by `who`, see `SAVE` in tests/megatron_cases.py."""
        told = self.call(layout, "save", str(directory), who, sharding_type, bf16=precision == "bf16")
        return Saved(directory, layout, precision, sharding_type, told[0])

    def check_load(self, saved: Saved, layout: str, who: str) -> None:
        """Loaded by `who` in `layout`: the same bits, and it goes on as it did where it was saved."""
        tolerance = 0.0 if layout == saved.layout else TOLERANCE[saved.precision]
        told = self.call(layout, "load", str(saved.directory), who, saved.sharding_type, bf16=saved.precision == "bf16")
        for rank, (different, following) in enumerate(told):
            place = f"saved in {saved.layout}, loaded by {who} in {layout}, rank {rank}"
            assert not different, f"{place}: other bits in {different}"
            assert len(following) == len(saved.following)
            for step, (found, wanted) in enumerate(zip(following, saved.following, strict=True)):
                for what, is_now, was in zip(("loss", "gradient norm"), found, wanted, strict=True):
                    assert abs(is_now - was) <= tolerance * was, f"{place}: {what} {step} is {is_now}, was {was}"

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()
