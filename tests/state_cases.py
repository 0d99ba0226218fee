"""What the ranks of a world do in tests/test_state.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from roll_ckpt import process
from roll_ckpt.state import StateSaver


def one_rank_cannot_stage(out: str) -> list[str]:
    """The errors of a save of what rank 1 cannot save, and of the save after it."""
    with process.installed(process.Process()):  # other tests of this world have an arena of another size
        ours = StateSaver()
        raised = []
        for step, bad in ((1, True), (2, False)):
            state = {"weight": torch.ones(3), "hook": (lambda: None) if bad and dist.get_rank() == 1 else None}
            try:
                ours.save(state, Path(out) / f"step_{step}", step=step)
                raised.append("")
            except Exception as error:
                raised.append(f"{type(error).__name__}: {error}")
    return raised
