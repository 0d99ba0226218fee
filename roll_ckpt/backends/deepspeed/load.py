"""The DeepSpeed backend: `engine.save_checkpoint()` and its kin go through us.

`install()` wraps methods of `DeepSpeedEngine`. An engine whose config has `checkpoint.roll_ckpt`, or that a
`Cluster` attached, gets our `CheckpointEngine`; every other engine behaves as before. Stock code still decides
what a checkpoint holds and how its files are called; we decide where they go (an attempt directory that is
renamed into place when all ranks have voted), how their bytes get there, and when `latest` is written.

Written against DeepSpeed 0.19 (`runtime/engine.py`, `runtime/checkpoint_engine/checkpoint_engine.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.disk import reads, tree
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import ConfigError, Damaged, Unreadable, UnsupportedError
from roll_ckpt.transaction import listing

log = logging.getLogger("roll_ckpt")


def check_world(saved: Mapping[str, Any], world_size: int, where: str) -> None:
    """Refuse to resume on another number of ranks than saved; `saved` are the cluster's facts in the manifest.

    Raises:
        UnsupportedError: names both sizes. Nothing was loaded.
    """
    if saved["world_size"] != world_size:
        raise UnsupportedError(
            f"{where} was saved by {saved['world_size']} ranks and this job has {world_size}; this version resumes on "
            "the same number of ranks only. Start that many, or convert it with DeepSpeed's ds_to_universal"
        )


def tags_to_load(load_dir: Path) -> list[str]:
    """The tags of a plain DeepSpeed directory in the order in which a load tries them when none is given.

    A directory that `latest` names wins, because users edit it; then our committed ones, the newest first.

    Raises:
        Damaged: there are checkpoints of ours, and none has a manifest that can be trusted.
        Unreadable: `latest` names none, and the disk does not tell which is the newest.
    """
    latest = load_dir / names.LATEST
    try:
        named = (ReadRetries().again(partial(reads.read_text_or_none, latest)) or "").strip()
    except Damaged as problem:
        log.warning("%s; the newest checkpoint is loaded", problem)
        named = ""
    chosen = [named] if named and _is_tag(named) and tree.is_dir(load_dir / named) else []
    try:
        tags = [found.name for found in listing.newest_first(load_dir) if found.name not in chosen]
    except (Damaged, Unreadable) as problem:
        if not chosen:
            raise
        log.warning("%s", problem)
        tags = []
    if tags and named and not chosen:
        log.warning("%s names %s, which is not there; loading %s", latest, named, tags[0])
    return chosen + tags


def _is_tag(name: str) -> bool:
    try:
        return bool(names.check_name("tag", name))
    except ConfigError:
        return False
