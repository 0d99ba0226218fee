"""The save corridor of one process: begin, stage, write, vote, commit.

A `Save` is this process's part of one checkpoint, a `Ticket` one cluster's part of it. Bytes are copied and
written by native threads; a short-lived Python thread for each save only waits for them, votes and settles.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roll_ckpt.config import Settings
from roll_ckpt.errors import NoRoom, RanksDisagree, SaveFailed
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save.claims import _epochs, claim, clear
from roll_ckpt.save.pending import remember, wait_pending
from roll_ckpt.save.save import CommitHook, Save
from roll_ckpt.transaction import attempts
from roll_ckpt.transaction.attempts import Attempt


@dataclass(frozen=True)
class Request:
    """What every rank of a world must agree on before the first byte."""

    output_dir: Path
    name: str
    step: int | None
    clusters: Mapping[str, int]
    expected_clusters: Mapping[str, int] | None = None
    save_latest: bool = True


@dataclass(frozen=True)
class SaveEstimate:
    """What this rank is about to write for one cluster: about how many bytes, and the name of an earlier save's plan
    that fits, if one does."""

    nbytes: int
    plan: str | None = None


def begin(
    world: RankGroup,
    request: Request,
    settings: Settings,
    *,
    nbytes: int,
    problem: str | None = None,
    plans: Mapping[str, str | None] | None = None,
    on_commit: CommitHook | None = None,
) -> Save:
    """Agree on a new attempt and make its directory. Every rank of `world` calls; one rendezvous.

    `nbytes` is what this rank is about to write; `problem` an error that this rank already has, which then is
    raised on all. `plans` names, for each cluster that has one, the plan of an earlier save that fits what this
    rank saves now: `Save.replays` has those clusters for which every rank named the same. Waits for a pending save
    of the same name.

    A disk that is full or refuses does not end a training run that has saved there: the save that is returned is then
    not `begun`, on every rank, and to be staged by nobody.

    Raises:
        RanksDisagree, RunIsLive, EpochLost, ConfigError: on every rank, with nothing on disk touched.
        NoRoom, SaveFailed: the same, if this run has not claimed the directory yet.
    """
    request = replace(request, output_dir=request.output_dir.absolute())
    wait_pending(request.output_dir, request.name)
    wish = {
        "output_dir": str(request.output_dir),
        "name": request.name,
        "step": request.step,
        "clusters": dict(request.clusters),
        "save_latest": request.save_latest,
    }

    def begin_here(needed_bytes: int) -> Attempt:
        try:
            attempts.check_room(request.output_dir, request.name, needed_bytes)
            attempts.check_replaced(request.output_dir, request.name)
        except Exception:
            if (claimed := _epochs.get(request.output_dir.resolve())) is not None:
                attempts.pass_over(claimed, request.name)
            raise
        return attempts.begin(
            claim(request.output_dir, settings, request.clusters, request.expected_clusters),
            request.name,
            step=request.step,
            expected=request.expected_clusters or request.clusters,
            save_latest=request.save_latest,
            needed_bytes=needed_bytes,
        )

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        _check_agreement(posts)
        claimed = clear(request.output_dir)
        try:
            made = begin_here(sum(post["nbytes"] for post in posts))
        except OSError as problem:
            if not claimed:
                raise
            return {"failure": _told(problem, request.output_dir / request.name), "room": _lacks_room(problem)}
        replays = [
            cluster
            for cluster, plan in posts[0]["plans"].items()
            if plan and all(post["plans"].get(cluster) == plan for post in posts)
        ]
        return {"epoch": made.epoch, "attempt": made.attempt, "run_id": made.run_id, "replays": replays}

    mine = {"wish": wish, "nbytes": nbytes, "problem": problem, "plans": dict(plans or {})}
    verdict = world.agree(mine, decide, settings.commit_timeout_s)
    attempt = Attempt(
        output_dir=request.output_dir,
        name=request.name,
        step=request.step,
        run_id=verdict.get("run_id", ""),
        epoch=verdict.get("epoch", 0),
        attempt=verdict.get("attempt", 0),
        expected=dict(request.expected_clusters or request.clusters),
        save_latest=request.save_latest,
    )
    replays = frozenset(verdict.get("replays", ()))
    save = Save(attempt, settings, world.rank, tuple(request.clusters), replays, on_commit=on_commit)
    if save.begun:
        remember(save)
    else:
        save._fail((NoRoom if verdict["room"] else SaveFailed)(verdict["failure"]))
        save._settled.set()
        save._finished.set()
    return save


def _told(problem: OSError, final: Path) -> str:
    if isinstance(problem, NoRoom):
        return str(problem)
    return (
        f"{final}: the save could not begin: rank 0: {problem.strerror} ({problem.filename}). Older checkpoints are "
        "untouched; the next save tries again"
    )


def _lacks_room(problem: OSError) -> bool:
    return isinstance(problem, NoRoom) or problem.errno in (errno.ENOSPC, errno.EDQUOT)


def _check_agreement(posts: list[dict[str, Any]]) -> None:
    problems = [f"rank {rank}: {post['problem']}" for rank, post in enumerate(posts) if post["problem"]]
    if problems:
        raise SaveFailed("the save was not begun: " + "; ".join(problems))
    first = posts[0]["wish"]
    for rank, post in enumerate(posts):
        differing = [key for key in first if post["wish"][key] != first[key]]
        if differing:
            raise RanksDisagree(
                f"rank {rank} and rank 0 ask for different saves: "
                + ", ".join(f"{key} {post['wish'][key]!r} and {first[key]!r}" for key in differing)
                + "; nothing was written. Call the save with the same arguments on every rank"
            )
