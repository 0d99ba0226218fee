"""What every Python process of the environment runs at its start: `roll_ckpt.pth` in site-packages holds this text.

It imports nothing, not even roll_ckpt, and reads no variable: it waits for the import of a framework. Stay short.
"""

import sys


class RollCkptFinder:
    """Finds no module itself. Hands the import of a framework to `roll_ckpt.activation.hook`."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        """The module's spec with a loader that tells us when it has run; None for every other module."""
        if name != "deepspeed" and name != "megatron.core":
            return None
        try:
            from roll_ckpt.activation import hook
        except Exception:  # a checkout that was removed or is broken, or an older one in front of it
            import os

            if os.environ.get("ROLL_CKPT", "").strip() not in ("", "0"):
                raise
            return None
        return hook.find_spec(name, path, target)


if not any(getattr(finder, "__name__", "") == "RollCkptFinder" for finder in sys.meta_path):
    sys.meta_path.insert(0, RollCkptFinder)
