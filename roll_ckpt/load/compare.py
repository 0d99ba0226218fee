"""Compares the model in a checkpoint with the live model, before anything is loaded."""

from __future__ import annotations

from typing import Any

from roll_ckpt.errors import ModelMismatch


def compare_models(saved: dict[str, Any], live: dict[str, Any], where: str, strict: bool = True) -> None:
    """Refuse a checkpoint of another model. This rank alone; does not block.

    `saved` and `live` map parameter names to dicts with a `shape`. Dtypes may differ: frameworks convert them. Unless
    `strict`, names may be missing on either side. An empty `saved` means that no parameters were recorded: no refusal.

    Raises:
        ModelMismatch: lists the first ten differences.
    """
    if not saved:
        return
    differences = []
    for name in [*live, *(name for name in saved if name not in live)]:
        if not strict and (name not in saved or name not in live):
            continue
        if name not in saved:
            differences.append(f"{name}: not in the checkpoint")
        elif name not in live:
            differences.append(f"{name}: not in this model")
        elif list(saved[name]["shape"]) != list(live[name]["shape"]):
            differences.append(
                f"{name}: shape {list(saved[name]['shape'])} in the checkpoint, {list(live[name]['shape'])} here"
            )
    if differences:
        more = f"\n  ... and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise ModelMismatch(
            f"{where} holds another model; nothing was loaded. Differences:\n  " + "\n  ".join(differences[:10]) + more
        )
