"""The load corridor of one rank: find, read with every digest checked, parse."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
from roll_ckpt.ranks.group import LONGEST_S, RankGroup
from roll_ckpt.transaction import verification

_LOOK_AGAIN_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_NAMED = 10  # damaged files in one message


@contextmanager
def open_together(ranks: RankGroup, directory: Path, settings: Settings, allow: Iterable[Any] = ()) -> Iterator[Reader]:
    """`reading` of one and the same checkpoint on every rank. Every rank calls; blocks.

    A rank that does not see what another one sees looks again for a while: an NFS client believes for some seconds
    that a name is missing, unless its directory is listed.

    Raises, on every rank and with nothing read:
        NotFound, Damaged, Unreadable: as a rank met it.
        RanksDisagree: ranks see different manifests, or some see none.
    """
    opened: list[Reader] = []
    mine = {"manifest": "", "error": "", "text": ""}

    def look(stack: ExitStack, again: bool) -> None:
        if mine["manifest"]:
            return
        opened.clear()
        try:
            with as_unreadable(directory):
                for folder in (directory.parent, directory) if again else ():
                    with suppress(OSError):
                        tree.list_dir(folder)
                reader = enter_reader(stack, directory, settings, allow)
                if reader.checkpoint is not None:
                    record = ReadRetries().run(partial(reads.read_bytes, reader.checkpoint.directory / names.MANIFEST))
                    mine["manifest"] = sealed_json.sha256(record)
            opened.append(reader)
            mine["error"] = ""
        except (NotFound, Damaged) as problem:
            if not isinstance(problem, NotFound) and not isinstance(problem.__cause__, NotFound):
                raise
            mine.update(error=type(problem).__name__, text=str(problem))

    with ExitStack() as stack:
        for round, pause in enumerate([*_LOOK_AGAIN_S, 0]):
            ranks.run_on_all_ranks(partial(look, stack, round > 0), settings.commit_timeout_s)
            compare = partial(_compare_views, directory, not pause)
            if not ranks.decide_on_rank0(mine, compare, settings.commit_timeout_s)["again"]:
                break
            time.sleep(pause)
        warn_unverified(directory, opened[0])
        yield opened[0]


def _compare_views(directory: Path, last: bool, posts: list[dict[str, str]]) -> dict[str, bool]:
    """Whether to look again at a checkpoint that some ranks see and some do not."""
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


def check_bytes(ranks: RankGroup, checkpoint_dir: Path) -> None:
    """Re-read every file of a checkpoint, each rank its share, through the page cache: who loads it then reads memory
    and not the disk, as far as memory goes. Every rank calls; blocks.

    Raises:
        Damaged: on every rank; names the first ten damaged files, whoever read them.
        Unreadable: on every rank; no file is damaged as far as is known, and some could not be read.
    """
    mine: dict[str, list[str]] = {"damaged": [], "unreadable": []}

    def check() -> None:
        problems = verification.verify(checkpoint_dir, part=ranks.rank, parts=ranks.size, cache=True)
        for problem in problems:
            kind = "unreadable" if problem.kind == "unreadable" else "damaged"
            mine[kind].append(f"{problem.path}: {problem.detail}")

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        told = {kind: sorted({problem for post in posts for problem in post[kind]}) for kind in mine}
        every = told["damaged"] + told["unreadable"]
        shown = "; ".join(every[:_NAMED]) + ("; and more, see `roll-ckpt verify`" if every[_NAMED:] else "")
        if told["damaged"]:
            raise Damaged(f"{checkpoint_dir}: damaged: {shown}")
        if told["unreadable"]:
            raise Unreadable(f"{checkpoint_dir}: it cannot be read: {shown}. {errors.BY_HAND}")
        return {}

    ranks.run_on_all_ranks(check, LONGEST_S)
    ranks.decide_on_rank0({kind: problems[: _NAMED + 1] for kind, problems in mine.items()}, decide, LONGEST_S)
