"""The public module for DeepSpeed. Importing it installs roll_ckpt in every DeepSpeed engine created afterwards.

An installed engine's `save_checkpoint` and `load_checkpoint` go through roll_ckpt; its settings stand under
`checkpoint.roll_ckpt` in the DeepSpeed config. `install` does what the import does; `attach` wires one engine that
exists already.
"""

from __future__ import annotations

from roll_ckpt.backends.deepspeed.install import attach, install

__all__ = ["attach", "install"]

install()
