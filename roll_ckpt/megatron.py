"""The public module for Megatron-core. Its checkpoints stay readable by stock `dist_checkpointing.load`.

- `attach` wires a model with its distributed optimizer and scheduler; the `MegatronHandle` it returns saves and loads
  them together with the random states.
- `save` and `load` take a sharded state dict, as `megatron.core.dist_checkpointing` does. The checkpoint directory
  appears under its final name once every rank has voted.
- `SaveStrategy` is for stock Megatron's own `dist_checkpointing.save(sharded_strategy=...)`.

Importing this module also makes every stock `TorchDistSaveShardedStrategy` of the process move its bytes through us,
with the settings of the variable ROLL_CKPT if there are any. It raises UnsupportedError if Megatron-core is missing, or
lacks a name that roll_ckpt uses.
"""

from __future__ import annotations

from roll_ckpt.activation import switch
from roll_ckpt.backends.megatron import requirement

requirement.check()

from roll_ckpt.backends.megatron.handle import MegatronHandle, attach  # noqa: E402
from roll_ckpt.backends.megatron.load import load  # noqa: E402
from roll_ckpt.backends.megatron.save import save  # noqa: E402
from roll_ckpt.backends.megatron.strategy import SaveStrategy  # noqa: E402

switch.install(switch.MEGATRON)

__all__ = ["MegatronHandle", "SaveStrategy", "attach", "load", "save"]
