"""The public module for DeepSpeed. Importing it installs roll_ckpt in every DeepSpeed engine created afterwards.

An installed engine's `save_checkpoint` and `load_checkpoint` go through roll_ckpt; its settings stand under
`checkpoint.roll_ckpt` in the DeepSpeed config, and in the environment variable ROLL_CKPT. `install` does what the
import does; `attach` wires one engine that exists already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from roll_ckpt.activation import switch

if TYPE_CHECKING:
    from roll_ckpt.backends.deepspeed.install import attach as attach

__all__ = ["attach", "install"]


def install() -> None:
    """Install roll_ckpt in DeepSpeed; for the errors see `activation.switch.install`. May be called again."""
    switch.install(switch.DEEPSPEED)


def __getattr__(name: str) -> Any:
    """`attach`, imported on first use: with ROLL_CKPT_OPTIONAL=1 this module also loads where the backend does not."""
    if name == "attach":
        from roll_ckpt.backends.deepspeed.install import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
