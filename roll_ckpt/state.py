"""State dictionaries of a script without DeepSpeed or Megatron-core, saved under the same commit.

from roll_ckpt.state import StateSaver

saver = StateSaver()
saver.save({"model": model.state_dict(), "step": step}, f"runs/plain/step_{step}", step=step)
state = saver.load("runs/plain/step_100")
"""

from __future__ import annotations

from roll_ckpt.backends.plain.saver import StateSaver
from roll_ckpt.native.extension import cuda_status
from roll_ckpt.native.image import Lifetime

__all__ = ["Lifetime", "StateSaver", "cuda_status"]
