"""`engine.load_checkpoint`: which tag, whether this engine can load it, and its bytes verified before stock code runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.backends.deepspeed.checkpoint_engine import ALLOWED_GLOBALS, RollCheckpointEngine
from roll_ckpt.backends.deepspeed.facts import parameters_of
from roll_ckpt.disk import reads, tree
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import ConfigError, Damaged, RanksDisagree, Unreadable, UnsupportedError
from roll_ckpt.load.checkpoint import OpenedCheckpoint, as_unreadable
from roll_ckpt.load.compare import compare_models
from roll_ckpt.load.newest import newest_sound
from roll_ckpt.load.reader import Reader
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.save import claims, pending
from roll_ckpt.transaction import listing

log = logging.getLogger("roll_ckpt")


def load_checkpoint(
    ours: RollCheckpointEngine, stock: Callable[..., Any], load_dir: str, tag: object = None, *args: Any, **kwargs: Any
) -> Any:
    """`engine.load_checkpoint`: every rank calls; waits for pending saves, checks the model and every byte. Blocks.

    Without a tag it takes the one that `latest` names, or else the newest, and falls back past damaged ones to
    the newest sound one, saying so. Returns what stock returns.

    Raises:
        Damaged: the tag that was asked for is damaged, or all are. Unreadable: the disk does not tell whether one
            is; nothing older is taken in its place. RanksDisagree: the ranks do not see one and the same
            checkpoint. ModelMismatch, UnsupportedError: another model, or another number of ranks. On every rank,
            before anything is loaded.
    """
    ours.fence()
    pending.wait_pending()
    engine = ours.engine
    if engine.load_universal_checkpoint():
        return stock(engine, load_dir, tag, *args, **kwargs)

    def open_verified(stack: ExitStack, directory: Path) -> Reader:
        call = inspect.signature(stock).bind(engine, load_dir, directory.name, *args, **kwargs)
        call.apply_defaults()
        reader = stack.enter_context(open_together(ours.ranks, directory, ours.settings, ALLOWED_GLOBALS))
        if reader.checkpoint is not None:
            _check_together(ours, reader.checkpoint, directory, call.arguments)
            reader.cached = True
        return reader

    tags = _agree_on_tags(ours, Path(load_dir), None if tag is None else str(tag))
    with ExitStack() as stack:
        if tag is not None and tags:
            found: tuple[str, Reader] | None = tags[0], open_verified(stack, Path(load_dir) / tags[0])
        else:
            found = stack.enter_context(newest_sound(Path(load_dir), tags, open_verified))
        if found is None:
            return stock(engine, load_dir, tag, *args, **kwargs)
        name, reader = found
        with ours.reading(reader):
            return stock(engine, load_dir, name, *args, **kwargs)


def _agree_on_tags(ours: RollCheckpointEngine, load_dir: Path, tag: str | None) -> list[str]:
    """The tags to load, the one to try first first, the same on every rank; none where there is no such directory.
    What a killed run left there is finished or discarded first."""

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        asked = {post["tag"] for post in posts}
        if len(asked) > 1:
            raise RanksDisagree(f"{load_dir}: ranks ask to load different tags: {sorted(map(str, asked))}")
        claims.recover(load_dir, ours.settings, {ours.cluster: ours.ranks.size})
        with as_unreadable(load_dir):
            tags = tags_to_load(load_dir) if tag is None else [tag]
            retries = ReadRetries()
            return {"tags": [name for name in tags if retries.run(partial(tree.is_dir, load_dir / name))]}

    tags: list[str] = ours.ranks.decide_on_rank0({"tag": tag}, decide, ours.settings.commit_timeout_s)["tags"]
    return tags


def _check_together(
    ours: RollCheckpointEngine, opened: OpenedCheckpoint, directory: Path, call: Mapping[str, Any]
) -> None:
    """Refuse on every rank another model, another job's optimizer partitions, and damaged files."""
    clusters, load_dir = opened.manifest.clusters, directory.parent
    cluster = load_dir.resolve().name if load_dir.resolve().name in clusters else next(iter(clusters))

    def check() -> None:
        resuming = call["load_optimizer_states"] and not call["load_module_only"]
        if resuming and ours.engine.zero_optimization():
            check_world(clusters[cluster], ours.ranks.size, str(directory))
        if call["custom_load_fn"] is None:
            saved = opened.parameters(cluster, ours.ranks.rank)
            compare_models(saved, parameters_of(ours.engine), str(directory), strict=call["load_module_strict"])

    ours.ranks.run_on_all_ranks(check, ours.settings.commit_timeout_s)
    if ours.verified != opened.directory:
        check_bytes(ours.ranks, opened.directory)


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
        named = (ReadRetries().run(partial(reads.read_text_or_none, latest)) or "").strip()
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
