"""`engine.load_checkpoint`: picks the tag, checks that this engine can load it, and verifies every byte first."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.backends.deepspeed.checkpoint_engine import ALLOWED_GLOBALS, RollCheckpointEngine
from roll_ckpt.backends.deepspeed.index import parameters_of
from roll_ckpt.disk import reads, tree
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import ConfigError, Damaged, RanksDisagree, Unreadable, UnsupportedError
from roll_ckpt.load.checkpoint import OpenedCheckpoint, as_unreadable
from roll_ckpt.load.compare import compare_models
from roll_ckpt.load.newest import newest_sound
from roll_ckpt.load.reader import Reader
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.save import claims, gate, pending
from roll_ckpt.transaction import listing

log = logging.getLogger("roll_ckpt")


def load_checkpoint(
    checkpoint_engine: RollCheckpointEngine,
    stock: Callable[..., Any],
    load_dir: str,
    tag: object = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`engine.load_checkpoint`: every rank calls; blocks. Returns what `stock`, DeepSpeed's own method, returns.

    Waits for pending saves, and checks the model and every byte before anything is loaded. Without a tag it takes the
    tag that `latest` names, or else the newest. Damaged ones are logged and passed over, down to the newest sound one.

    Raises, on every rank and with nothing loaded:
        Damaged: the given tag is damaged, or without a tag all are.
        Unreadable: the disk does not tell whether a checkpoint is sound; no older one is taken in its place.
        RanksDisagree: the ranks ask for different tags, or see different checkpoints.
        ModelMismatch: the checkpoint holds another model.
        UnsupportedError: another number of ranks saved the optimizer.
    """
    if checkpoint_engine.verified is not None:  # a pipeline resumes, and has passed the gate
        return load_inside(checkpoint_engine, stock, load_dir, tag, *args, **kwargs)
    timeout_s = checkpoint_engine.settings.commit_timeout_s
    with gate.entered(checkpoint_engine.ranks, f"load from {os.path.abspath(load_dir)}", timeout_s):
        return load_inside(checkpoint_engine, stock, load_dir, tag, *args, **kwargs)


def load_inside(
    checkpoint_engine: RollCheckpointEngine,
    stock: Callable[..., Any],
    load_dir: str,
    tag: object = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`load_checkpoint`, for a caller that has passed the gate."""
    checkpoint_engine.fence()
    pending.wait_pending()
    engine, ranks = checkpoint_engine.engine, checkpoint_engine.ranks
    if engine.load_universal_checkpoint():
        return stock(engine, load_dir, tag, *args, **kwargs)

    def open_verified(stack: ExitStack, directory: Path) -> Reader:
        call = inspect.signature(stock).bind(engine, load_dir, directory.name, *args, **kwargs)
        call.apply_defaults()
        reader = stack.enter_context(open_together(ranks, directory, checkpoint_engine.settings, ALLOWED_GLOBALS))
        if reader.checkpoint is not None:
            _check_together(checkpoint_engine, reader.checkpoint, directory, call.arguments)
            reader.cached = True
        return reader

    tags = _agree_on_tags(checkpoint_engine, Path(load_dir), None if tag is None else str(tag))
    with ExitStack() as stack:
        if tag is not None and tags:
            opened: tuple[str, Reader] | None = tags[0], open_verified(stack, Path(load_dir) / tags[0])
        else:
            opened = stack.enter_context(newest_sound(Path(load_dir), tags, open_verified))
        if opened is None:
            return stock(engine, load_dir, tag, *args, **kwargs)
        name, reader = opened
        timeout_s = checkpoint_engine.settings.commit_timeout_s
        with ranks.raising_together(timeout_s), checkpoint_engine.reading(reader):
            loaded = stock(engine, load_dir, name, *args, **kwargs)
        return loaded


def _agree_on_tags(checkpoint_engine: RollCheckpointEngine, load_dir: Path, tag: str | None) -> list[str]:
    """The tags to try, in this order, the same on every rank; those without a directory are left out.

    Rank 0 first finishes or discards what a killed run has left in `load_dir`.
    """
    ranks, settings = checkpoint_engine.ranks, checkpoint_engine.settings

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        posted = {post["tag"] for post in posts}
        if len(posted) > 1:
            raise RanksDisagree(
                f"{load_dir}: ranks ask to load different tags: {sorted(map(str, posted))}; nothing was loaded. Call "
                "load_checkpoint with the same tag on every rank"
            )
        claims.recover(load_dir, settings, {checkpoint_engine.cluster: ranks.size})
        with as_unreadable(load_dir):
            tags = tags_to_load(load_dir) if tag is None else [tag]
            retries = ReadRetries()
            return {"tags": [name for name in tags if retries.run(partial(tree.is_dir, load_dir / name))]}

    tags: list[str] = ranks.decide_on_rank0({"tag": tag}, decide, settings.commit_timeout_s)["tags"]
    return tags


def _check_together(
    checkpoint_engine: RollCheckpointEngine, opened: OpenedCheckpoint, directory: Path, call: Mapping[str, Any]
) -> None:
    """Refuse, on every rank, another model, optimizer partitions of another number of ranks, and damaged files.

    `call` holds the arguments of DeepSpeed's `load_checkpoint` by name.
    """
    engine, ranks = checkpoint_engine.engine, checkpoint_engine.ranks
    clusters, load_dir = opened.manifest.clusters, directory.parent
    cluster = load_dir.resolve().name if load_dir.resolve().name in clusters else next(iter(clusters))

    def check() -> None:
        resuming = call["load_optimizer_states"] and not call["load_module_only"]
        if resuming and engine.zero_optimization():
            check_world_size(clusters[cluster], ranks.size, str(directory))
        if call["custom_load_fn"] is None:
            saved = opened.parameters(cluster, ranks.rank)
            compare_models(saved, parameters_of(engine), str(directory), strict=call["load_module_strict"])

    ranks.run_on_all_ranks(check, checkpoint_engine.settings.commit_timeout_s)
    if checkpoint_engine.verified != opened.directory:
        check_bytes(ranks, opened.directory, checkpoint_engine.settings.commit_timeout_s)


def check_world_size(facts: Mapping[str, Any], world_size: int, where: str) -> None:
    """Refuse to resume on another number of ranks than saved. `facts` are the cluster's, from the manifest.

    Raises:
        UnsupportedError: names both numbers. Nothing was loaded.
    """
    if facts["world_size"] != world_size:
        raise UnsupportedError(
            f"{where} was saved by {facts['world_size']} ranks and this job has {world_size}; this version resumes on "
            "the same number of ranks only. Start that many, or convert it with DeepSpeed's ds_to_universal"
        )


def tags_to_load(load_dir: Path) -> list[str]:
    """The tags in a `save_dir` of `engine.save_checkpoint`, in the order in which a load without a tag tries them.

    The tag that `latest` names comes first, because users edit that file; then our committed ones, the newest first.

    Raises:
        Damaged: the directory has checkpoints of ours, and the manifest of none can be trusted.
        Unreadable: `latest` names no tag, and the disk does not tell which is the newest.
    """
    latest = load_dir / names.LATEST
    try:
        named = (ReadRetries().run(partial(reads.read_text_or_none, latest)) or "").strip()
    except Damaged as problem:
        log.warning("%s; the newest checkpoint is loaded instead of the one it names", problem)
        named = ""
    chosen = [named] if named and _is_tag(named) and tree.is_dir(load_dir / named) else []
    try:
        tags = [manifest.name for manifest in listing.newest_first(load_dir) if manifest.name not in chosen]
    except (Damaged, Unreadable) as problem:
        if not chosen:
            raise
        log.warning("%s; only %s, which latest names, is tried", problem, named)
        tags = []
    if tags and named and not chosen:
        log.warning("%s names %s, which does not exist; loading %s instead", latest, named, tags[0])
    return chosen + tags


def _is_tag(name: str) -> bool:
    try:
        return bool(names.check_name("tag", name))
    except ConfigError as problem:
        log.debug("%s names no tag: %s", names.LATEST, problem)
        return False
