"""Two processes that meet over a real store: what the fixture `pair` gives."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from runs import ended, forked

from roll_ckpt.errors import RollCkptError
from roll_ckpt.ranks.group import RankGroup

Pair = Callable[[Callable[[RankGroup], Any]], list[Any]]


def pair_in(folder: Path) -> Pair:
    """Runs a function on rank 0, this process, and on rank 1, a forked one; returns both results."""

    def run(work: Callable[[RankGroup], Any]) -> list[Any]:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        told = folder / "rank1.json"

        def other() -> None:
            gc.freeze()  # a store of the parent that the collector frees here would wait for a thread that is not here
            own = dist.TCPStore("127.0.0.1", store.port, is_master=False)
            told.write_text(json.dumps(outcome(work, RankGroup(1, 2, own))))

        pid = forked(other)
        mine = outcome(work, RankGroup(0, 2, store))
        assert ended(pid) == 0
        return [mine, json.loads(told.read_text())]

    return run


def outcome(work: Callable[[RankGroup], Any], ranks: RankGroup) -> Any:
    """What `work` returns, or the class and text of our error."""
    try:
        return work(ranks)
    except RollCkptError as problem:
        return [type(problem).__name__, str(problem)]
