"""`import roll_ckpt.deepspeed` installs the backend for DeepSpeed engines created afterwards."""

from __future__ import annotations

from roll_ckpt.backends.deepspeed.install import attach, install

__all__ = ["attach", "install"]

install()
