"""What the ranks of a Megatron world do in tests/test_unusual_state.py."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import unusual
from megatron.core.dist_checkpointing.dict_utils import diff
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron_save_cases import build, error_of, save_, state_of, strategy_for

from roll_ckpt.config import Settings


def common_of_all_kinds(directory: str) -> list[str]:
    """A common state of every kind is saved twice, the second time by the first plan; which values differ.

    Left out is what Megatron itself cannot send to other ranks and compare.
    """
    build()
    strategy = strategy_for(True)
    common = {name: value for name, value in unusual.ordered(unusual.STATE).items() if _can_be_compared(value)}
    assert len(common) > len(unusual.STATE) / 2
    file, differing = io.BytesIO(), []
    torch.save(common, file)
    file.seek(0)
    told = torch.load(file, weights_only=False)
    for turn in range(2):
        path = Path(directory) / f"turn_{turn}"
        save_({**state_of(turn), "common": common}, path, step=turn, settings=Settings(), strategy=strategy)
        found = torch.load(path / "common.pt", weights_only=False)["common"]
        differing += [f"{turn}: {key}" for key in told if not unusual.same(found[key], told[key])]
    return differing


def _can_be_compared(value: Any) -> bool:
    try:
        diff(pickle.loads(pickle.dumps({"a": value})), {"a": value})
    except Exception:
        return False
    return True


def impossible_parts(directory: str) -> dict[str, Any]:
    """What each rank is told of a common state of rank 0, and objects of rank 1, that cannot be saved."""
    build()
    strategy, rank, size = strategy_for(True), dist.get_rank(), dist.get_world_size()
    lock = unusual.IMPOSSIBLE["lock"]()
    impossible: dict[str, dict[str, Any]] = {
        "common": {"common": {"foo": lock if rank == 0 else 1}},
        "object": {"mine": ShardedObject("mine", {"foo": lock if rank == 1 else 1}, (size,), (rank,))},
    }
    of_rank_1 = {"common": {"foo": lock if rank == 1 else 1}}
    found = {}

    def save(turn: int, more: dict[str, Any]) -> None:
        made = save_(
            {**state_of(turn), **more},
            Path(directory) / f"turn_{turn}",
            step=turn,
            settings=Settings(async_save=True),
            strategy=strategy,
        )
        made.wait(60)

    for what, more in {**impossible, "common of rank 1": of_rank_1}.items():
        found[what] = error_of(lambda more=more: save(1, more)), Path(directory).exists()
    dist.barrier()
    save(1, {})
    for what, more in impossible.items():
        found[f"{what} later"] = (
            error_of(lambda more=more: save(2, more)),
            (Path(directory) / "turn_2").exists(),
        )
    return found
