"""Megatron-core: models whose checkpoints go through us, and stay what stock reads.

`attach` binds a model with its distributed optimizer, scheduler and random states. `save` and `load` take a sharded
state, as `dist_checkpointing` does, under the commit: the directory appears under its name when every rank has voted.
`SaveStrategy` is given to stock's own `dist_checkpointing.save(sharded_strategy=...)`.

Importing this module raises `UnsupportedError` where Megatron-core is missing or lacks what we take hold of.
"""

from __future__ import annotations

from roll_ckpt.backends.megatron import requirement

requirement.check()

from roll_ckpt.backends.megatron.handle import MegatronHandle, attach  # noqa: E402
from roll_ckpt.backends.megatron.load import load  # noqa: E402
from roll_ckpt.backends.megatron.save import save  # noqa: E402
from roll_ckpt.backends.megatron.strategy import SaveStrategy  # noqa: E402

__all__ = ["MegatronHandle", "SaveStrategy", "attach", "load", "save"]
