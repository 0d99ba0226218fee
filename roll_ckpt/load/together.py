"""Opens and verifies one checkpoint on all ranks together: all see the same one, and share the reading."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from roll_ckpt import errors, names
from roll_ckpt.config import Settings
from roll_ckpt.disk import reads, tree
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import Damaged, NotFound, RanksDisagree, Unreadable
from roll_ckpt.formats import sealed_json
from roll_ckpt.load.checkpoint import as_unreadable
from roll_ckpt.load.reader import Reader, enter_reader, warn_unverified
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.transaction import verification

log = logging.getLogger("roll_ckpt")

_LOOK_AGAIN_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # pauses before ranks that do not see the checkpoint look again
_NAMED = 10  # how many damaged files a message names


@contextmanager
def open_together(ranks: RankGroup, directory: Path, settings: Settings, allow: Iterable[Any] = ()) -> Iterator[Reader]:
    """Open the same checkpoint on every rank, as `open_reader` does on one. Every rank calls; blocks.

    If some ranks see the checkpoint and others do not, all look again for about 15 s: an NFS client can believe for
    some seconds that a name is missing, unless it lists the directory.

    Raises, on every rank and before a file is read:
        NotFound, Damaged, Unreadable: what one of the ranks met.
        RanksDisagree: ranks see different manifests, or some still see none.
    """
    opened: list[Reader] = []
    view = {"manifest": "", "error": "", "text": ""}

    def look(stack: ExitStack, again: bool) -> None:
        if view["manifest"]:
            return
        opened.clear()
        try:
            with as_unreadable(directory):
                for folder in (directory.parent, directory) if again else ():
                    _refresh(folder)
                reader = enter_reader(stack, directory, settings, allow)
                if reader.checkpoint is not None:
                    record = ReadRetries().run(partial(reads.read_bytes, reader.checkpoint.directory / names.MANIFEST))
                    view["manifest"] = sealed_json.sha256(record)
            opened.append(reader)
            view["error"] = ""
        except (NotFound, Damaged) as problem:
            if not isinstance(problem, NotFound) and not isinstance(problem.__cause__, NotFound):
                raise
            view.update(error=type(problem).__name__, text=str(problem))

    with ExitStack() as stack:
        for round, pause in enumerate([*_LOOK_AGAIN_S, 0]):
            ranks.run_on_all_ranks(partial(look, stack, round > 0), settings.commit_timeout_s)
            compare = partial(_compare_views, directory, not pause)
            if not ranks.decide_on_rank0(view, compare, settings.commit_timeout_s)["again"]:
                break
            time.sleep(pause)
        warn_unverified(directory, opened[0])
        yield opened[0]


def _refresh(folder: Path) -> None:
    """List `folder`: an NFS client then asks the server again for names that it believed missing."""
    try:
        tree.list_dir(folder)
    except OSError as problem:
        log.debug("%s: it could not be listed before looking again: %s", folder, problem)


def _compare_views(directory: Path, last: bool, posts: list[dict[str, str]]) -> dict[str, bool]:
    """On rank 0: whether all ranks should look again, because some see the checkpoint and some do not."""
    views = [post["manifest"] for post in posts]
    if len({*views}) == 1:
        for post in posts:
            if post["error"]:
                raise getattr(errors, post["error"])(post["text"])
        return {"again": False}
    if "" in views and not last:
        return {"again": True}
    others = [str(rank) for rank, view in enumerate(views) if view != views[0]]
    shown = "; ".join(f"rank {rank}: {(view and f'SHA-256 {view}') or 'none'}" for rank, view in enumerate(views[:8]))
    raise RanksDisagree(
        f"{directory}: rank {', '.join(others)} and rank 0 see different manifests, or none ({shown}); nothing was "
        "loaded. Give every rank the same directory, on a file system that shows all of them the same"
    )


def check_bytes(ranks: RankGroup, checkpoint_dir: Path, timeout_s: float) -> None:
    """Read and verify every file of a checkpoint, each rank its share. Every rank calls; blocks.

    A rank that gives no sign of life for `timeout_s` seconds is given up.

    Reads go through the page cache, so a load that follows reads from memory as much of it as memory holds.

    Raises, on every rank:
        Damaged: names the first ten damaged files that any rank has read.
        Unreadable: no damage was found, and some files could not be read.
    """
    problems: dict[str, list[str]] = {"damaged": [], "unreadable": []}

    def check() -> None:
        for problem in verification.verify(checkpoint_dir, part=ranks.rank, parts=ranks.size, cache=True):
            kind = "unreadable" if problem.kind == "unreadable" else "damaged"
            problems[kind].append(f"{problem.path}: {problem.detail}")

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        damaged, unreadable = (
            sorted({text for post in posts for text in post[kind]}) for kind in ("damaged", "unreadable")
        )
        listed = damaged + unreadable
        shown = "; ".join(listed[:_NAMED]) + ("; and more, see `roll-ckpt verify`" if listed[_NAMED:] else "")
        if damaged:
            raise Damaged(f"{checkpoint_dir}: damaged: {shown}")
        if unreadable:
            raise Unreadable(f"{checkpoint_dir}: it cannot be read: {shown}. {errors.BY_HAND}")
        return {}

    ranks.run_on_all_ranks(check, timeout_s, working=True)
    ranks.decide_on_rank0({kind: texts[: _NAMED + 1] for kind, texts in problems.items()}, decide, timeout_s)
