"""The Megatron-core backend: what `dist_checkpointing` saves goes through us, and stays what stock reads.

`SaveStrategy` is given to `dist_checkpointing.save(sharded_strategy=...)`, alone or inside Megatron's
`FullyParallelSaveStrategyWrapper`: stock code still plans who writes which shard, we move the bytes. `save` and
`load` are the same under the commit: the directory appears under its name when every rank has voted.
`attach` returns both for a model with its distributed optimizer, scheduler and random states.

Written against Megatron-core 0.16.1 (`dist_checkpointing/serialization.py`, `strategies/torch.py`). A version that
lacks what this module takes hold of is refused when the module is imported, with `UnsupportedError`.
"""

from __future__ import annotations

from roll_ckpt import errors

TESTED_WITH = "0.16.1"

try:
    from roll_ckpt.backends.megatron import version
    from roll_ckpt.backends.megatron.attached import Attached, Model, attach
    from roll_ckpt.backends.megatron.facts import (
        RESHARDABLE,
        check_form,
        content_metadata_of,
        describe,
        parallel_layout,
    )
    from roll_ckpt.backends.megatron.fence import Fence, stable_storages
    from roll_ckpt.backends.megatron.loading import load
    from roll_ckpt.backends.megatron.saving import Prepared, prepare, save, stage
    from roll_ckpt.backends.megatron.strategy import SaveStrategy
except ImportError as problem:
    raise errors.UnsupportedError(
        f"this Megatron-core is not one that roll_ckpt knows, or there is none: {problem}; "
        f"pip install megatron-core=={TESTED_WITH}"
    ) from problem

version.check(TESTED_WITH)

__all__ = [
    "RESHARDABLE",
    "Attached",
    "Fence",
    "Model",
    "Prepared",
    "SaveStrategy",
    "attach",
    "check_form",
    "content_metadata_of",
    "describe",
    "load",
    "parallel_layout",
    "prepare",
    "save",
    "stable_storages",
    "stage",
]
