"""`engine.load_checkpoint`: picks the tag, checks that this engine can load it, and verifies every byte first."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from roll_ckpt import names
from roll_ckpt.backends.deepspeed.checkpoint_engine import ALLOWED_GLOBALS, RollCheckpointEngine
from roll_ckpt.backends.deepspeed.mismatch import check_tag_exists
from roll_ckpt.backends.deepspeed.preparing import is_resuming, prepare
from roll_ckpt.backends.deepspeed.weights import Weights
from roll_ckpt.disk import reads, tree
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import ConfigError, Damaged, NotFound, RanksDisagree, Unreadable
from roll_ckpt.load.checkpoint import as_unreadable
from roll_ckpt.load.newest import newest_sound
from roll_ckpt.load.reader import Reader
from roll_ckpt.load.together import open_together
from roll_ckpt.save import gate, pending
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
        NotFound: the given tag is not there, or holds no DeepSpeed checkpoint.
        Damaged: the given tag is damaged, or without a tag all are.
        Unreadable: the disk does not tell whether a checkpoint is sound; no older one is taken in its place.
        RanksDisagree: the ranks ask for different tags, or see different checkpoints.
        ModelMismatch: the checkpoint holds another model or optimizer, or is none of DeepSpeed's.
        UnsupportedError: another number of ranks saved the optimizer.

    Without the optimizer (`load_optimizer_states=False` or `load_module_only=True`) it loads the weights at any ZeRO
    stage and number of ranks, from the files that were verified; the next step trains from them.
    """
    load_dir = checkpoint_engine.expanded(load_dir)
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
        checkpoint_engine.warn_universal(load_dir)
        return stock(engine, load_dir, tag, *args, **kwargs)
    call = inspect.signature(stock).bind(engine, load_dir, tag, *args, **kwargs)
    call.apply_defaults()
    weights: dict[str, Weights | None] = {}
    directory = Path(load_dir).absolute()

    def open_verified(stack: ExitStack, checkpoint_dir: Path) -> Reader:
        reader = stack.enter_context(open_together(ranks, checkpoint_dir, checkpoint_engine.settings, ALLOWED_GLOBALS))
        name = str(checkpoint_dir.relative_to(directory))
        weights[name] = prepare(checkpoint_engine, reader, checkpoint_dir, call.arguments)
        reader.cached = reader.checkpoint is not None
        return reader

    tags = _agree_on_tags(checkpoint_engine, directory, None if tag is None else str(tag))
    if not tags:
        _refuse_missing(checkpoint_engine, directory, None if tag is None else str(tag))
    with ExitStack() as stack:
        if tag is not None and tags:
            opened: tuple[str, Reader] | None = tags[0], open_verified(stack, directory / tags[0])
        else:
            opened = stack.enter_context(newest_sound(directory, tags, open_verified))
        if opened is None:
            return stock(engine, load_dir, tag, *args, **kwargs)
        name, reader = opened
        timeout_s = checkpoint_engine.settings.commit_timeout_s
        with ranks.raising_together(timeout_s), checkpoint_engine.reading(reader, weights[name]):
            loaded = stock(engine, load_dir, name, *args, **kwargs)
        if is_resuming(call.arguments):
            checkpoint_engine.course.resumed(None if reader.checkpoint is None else reader.checkpoint.manifest)
        elif not engine.zero_optimization():
            _refresh_masters(engine)
        return loaded


def _refresh_masters(engine: DeepSpeedEngine) -> None:
    """Copy 16-bit weights into the optimizer's fp32 copies, as DeepSpeed does after a weights-only load under ZeRO.

    Without ZeRO it forgets that for `load_optimizer_states=False`: the next step would bring the old weights back.
    """
    if hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()


def _refuse_missing(checkpoint_engine: RollCheckpointEngine, load_dir: Path, tag: str | None) -> None:
    """Refuse, on every rank, a tag that is not there, whether it was asked for or `latest` names it.

    Does nothing if no tag was asked for and there is no `latest`: then there is nothing to load yet.
    """

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        named = tag
        if named is None:
            with as_unreadable(load_dir):
                latest = ReadRetries().run(partial(reads.read_text_or_none, load_dir / names.LATEST))
            named = None if latest is None else latest.strip()
        if named is not None:
            check_tag_exists(load_dir, named)
        elif tree.exists(load_dir / names.MANIFEST):
            raise NotFound(
                f"{load_dir} is a checkpoint itself, not a directory of checkpoints; nothing was loaded. Give "
                f"{load_dir.parent} and tag={load_dir.name!r}"
            )
        return {}

    checkpoint_engine.ranks.decide_on_rank0({}, decide, checkpoint_engine.settings.commit_timeout_s)


def _agree_on_tags(checkpoint_engine: RollCheckpointEngine, load_dir: Path, tag: str | None) -> list[str]:
    """The tags to try, in this order, the same on every rank; those without a directory are left out."""
    ranks, settings = checkpoint_engine.ranks, checkpoint_engine.settings

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        posted = {post["tag"] for post in posts}
        if len(posted) > 1:
            raise RanksDisagree(
                f"{load_dir}: ranks ask to load different tags: {sorted(map(str, posted))}; nothing was loaded. Call "
                "load_checkpoint with the same tag on every rank"
            )
        with as_unreadable(load_dir):
            tags = tags_to_load(load_dir, checkpoint_engine.cluster) if tag is None else [tag]
            retries = ReadRetries()
            return {"tags": [name for name in tags if retries.run(partial(tree.is_dir, load_dir / name))]}

    tags: list[str] = ranks.decide_on_rank0({"tag": tag}, decide, settings.commit_timeout_s)["tags"]
    return tags


def tags_to_load(load_dir: Path, cluster: str) -> list[str]:
    """The tags in a `save_dir` of `engine.save_checkpoint`, in the order in which a load without a tag tries them.

    The tag that `latest` names comes first, because users edit that file; then our committed ones, the newest first.
    Where several engines save into one directory under names of their own, those of `cluster` are tried, if it has any.

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
        manifests = listing.newest_first(load_dir)
        own = [manifest for manifest in manifests if cluster in manifest.clusters]
        if own and chosen and chosen[0] in {manifest.name for manifest in manifests if manifest not in own}:
            log.warning("%s names %s, which another cluster than %s has saved; loading %s instead",
                        latest, named, cluster, own[0].name)  # fmt: skip
            chosen = []
        tags = [manifest.name for manifest in own or manifests if manifest.name not in chosen]
    except (Damaged, Unreadable) as problem:
        if not chosen:
            raise
        log.warning("%s; only %s, which latest names, is tried", problem, named)
        tags = []
    if tags and named and not chosen and not tree.is_dir(load_dir / named):
        log.warning("%s names %s, which does not exist; loading %s instead", latest, named, tags[0])
    return chosen + tags


def _is_tag(name: str) -> bool:
    try:
        return bool(names.check_name("tag", name))
    except ConfigError as problem:
        log.debug("%s names no tag: %s", names.LATEST, problem)
        return False
