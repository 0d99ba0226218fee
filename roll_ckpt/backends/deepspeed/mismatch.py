"""Refuses checkpoints that an engine cannot load, before anything is loaded, with what differs and what to do.

Stock DeepSpeed finds most of this out after it has replaced the weights, some of it at the next step. No collective
here: the callers run these on all ranks together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from roll_ckpt.backends.deepspeed.facts import FRAMEWORK, describe
from roll_ckpt.backends.deepspeed.saved import SavedEngine, of_facts
from roll_ckpt.disk import tree
from roll_ckpt.errors import ModelMismatch, NotFound, UnsupportedError
from roll_ckpt.load.checkpoint import as_unreadable
from roll_ckpt.transaction import listing

_NAMED = 10  # how many tags a message names
_WEIGHTS_ONLY = "load the weights alone, with load_optimizer_states=False"


def check_framework(facts: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint that DeepSpeed did not make. `facts` are the cluster's, from the manifest.

    Raises:
        ModelMismatch: names the framework. Nothing was loaded.
    """
    framework = facts.get("framework")
    if framework != FRAMEWORK:
        made = "by a StateSaver" if framework == "none" else f"under {framework}"
        raise ModelMismatch(
            f"{where} was saved {made}, not by a DeepSpeed engine; nothing was loaded. Load it with what saved it, or "
            "give load_checkpoint a checkpoint of a DeepSpeed engine"
        )


def check_world_size(saved: int, world_size: int, where: str) -> None:
    """Refuse to resume the optimizer on another number of ranks than saved it.

    Raises:
        UnsupportedError: names both numbers. Nothing was loaded.
    """
    if saved != world_size:
        raise UnsupportedError(
            f"{where} was saved by {saved} rank{'s' * (saved > 1)} and this job has {world_size}; this version resumes "
            "on the same number of ranks only. Start that many, convert it with DeepSpeed's ds_to_universal, or "
            f"{_WEIGHTS_ONLY}"
        )


def check_resuming(saved: SavedEngine, engine: DeepSpeedEngine, where: str) -> None:
    """Refuse to load the optimizer of a checkpoint into an engine with another one, or with another ZeRO stage.

    ZeRO-1 and 2 can load each other's. Not compared: what either side does not know.

    Raises:
        ModelMismatch: names what differs. Nothing was loaded.
    """
    live = of_facts({**describe(engine), "world_size": engine.seq_dp_world_size})
    problem = _stage(saved, live) or _dtype(saved, live) or _optimizer(saved, live)
    if problem:
        raise ModelMismatch(f"{where}: {problem}; nothing was loaded. Configure this engine alike, or {_WEIGHTS_ONLY}")


def check_model_parallel(saved: SavedEngine, engine: DeepSpeedEngine, where: str) -> None:
    """Refuse a checkpoint of a model that was cut into another number of parts; stages of a pipeline may differ.

    Raises:
        ModelMismatch: names both numbers. Nothing was loaded.
    """
    if isinstance(engine, PipelineEngine) or saved.mp_world_size in (None, engine.mp_world_size):
        return
    raise ModelMismatch(
        f"{where} was saved with model parallelism over {saved.mp_world_size} ranks and this engine has "
        f"{engine.mp_world_size}; nothing was loaded. Start it with as many"
    )


def _stage(saved: SavedEngine, live: SavedEngine) -> str:
    if saved.zero_stage == live.zero_stage or {saved.zero_stage, live.zero_stage} == {1, 2}:
        return ""
    return f"its optimizer was saved at ZeRO stage {saved.zero_stage} and this engine has stage {live.zero_stage}"


def _dtype(saved: SavedEngine, live: SavedEngine) -> str:
    """The names of ZeRO's files tell bf16 from all others; without ZeRO fp16, bf16 and fp32 have optimizers apart."""
    without_zero = live.zero_stage == 0
    if saved.dtype is None:
        if not without_zero and live.dtype == "bfloat16":
            return "its optimizer was saved in another precision than bfloat16, which this engine has"
        if without_zero and live.dtype == "float32":
            return "its optimizer was saved in 16-bit precision and this engine has float32"
        return ""
    if saved.dtype == live.dtype or (not without_zero and "bfloat16" not in (saved.dtype, live.dtype)):
        return ""
    return f"its optimizer was saved in {saved.dtype} and this engine has {live.dtype}"


def _optimizer(saved: SavedEngine, live: SavedEngine) -> str:
    """Optimizers that keep the same state, such as the kinds of Adam, load each other's."""
    unknown = saved.optimizer is None and not saved.state_keys and not saved.settings
    if unknown or saved.optimizer == live.optimizer:
        return ""
    kept_by_both = bool(saved.state_keys and live.state_keys)
    alike = saved.state_keys == live.state_keys if kept_by_both else saved.settings == live.settings
    if alike:
        return ""
    name = saved.optimizer or "another one"
    return f"its optimizer was {name}, which {_spell(saved)}; this engine's is {live.optimizer}, which {_spell(live)}"


def _spell(engine: SavedEngine) -> str:
    if engine.state_keys:
        return f"keeps {', '.join(sorted(engine.state_keys))}"
    return f"keeps nothing yet (its settings: {', '.join(sorted(engine.settings)) or 'none that is known'})"


def check_tag_exists(load_dir: Path, tag: str) -> None:
    """Refuse a tag without a directory.

    Raises:
        NotFound: lists the tags that are there, the newest first. Unreadable: the disk does not list them.
    """
    with as_unreadable(load_dir):
        if tree.is_dir(load_dir / tag):
            return
        tags = tags_of(load_dir)
    more = f", and {len(tags) - _NAMED} more" if len(tags) > _NAMED else ""
    if not tree.is_dir(load_dir):
        raise NotFound(f"{load_dir} does not exist, so there is no tag {tag} to load; nothing was loaded")
    there = f"it holds {', '.join(tags[:_NAMED])}{more} (the newest first)" if tags else "it holds no tag at all"
    raise NotFound(
        f"{load_dir}: there is no tag {tag}: {there}; nothing was loaded. Give one of those, or the directory in which "
        "save_checkpoint was called"
    )


def tags_of(load_dir: Path) -> list[str]:
    """The tags in `load_dir`: ours, the newest first, then those of stock DeepSpeed."""
    if not tree.is_dir(load_dir):
        return []
    ours = [manifest.name for manifest in reversed(listing.committed(load_dir))]
    others = [
        (path.stat().st_mtime, path.name)
        for path in load_dir.iterdir()
        if path.name not in ours and not path.name.startswith(".") and any(path.glob("*model_states.pt"))
    ]
    return ours + [name for _, name in sorted(others, reverse=True)]
