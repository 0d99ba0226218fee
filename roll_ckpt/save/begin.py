"""How all ranks of a job agree to begin a save: one rendezvous, in which rank 0 makes the attempt directory."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.errors import NoRoom, RanksDisagree, RollCkptError, SaveFailed
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import hooks
from roll_ckpt.save.claims import claim, clear, find_claim
from roll_ckpt.save.course import Course
from roll_ckpt.save.pending import PendingSaves, wait_pending
from roll_ckpt.save.save import Hook, Save
from roll_ckpt.transaction import attempts, listing
from roll_ckpt.transaction.attempts import Attempt


@dataclass(frozen=True)
class Request:
    """What is to be saved: every rank of a job passes the same values.

    `step` is the training step, None if it has none. `clusters` maps each cluster of this job to its number of ranks;
    `expected_clusters` does so for all jobs that commit this checkpoint together, None if this job is the only one.
    `course` is that of the engine or pipeline. `host`: the directory belongs to a program around us, so our bookkeeping
    lies beside it.
    """

    output_dir: Path
    name: str
    step: int | None
    clusters: Mapping[str, int]
    expected_clusters: Mapping[str, int] | None = None
    save_latest: bool = True
    course: Course = field(default_factory=Course)
    host: bool = False

    def compared(self) -> dict[str, Any]:
        """The values that `begin` compares between ranks, ready for JSON."""
        return {
            "output_dir": str(self.output_dir),
            "name": self.name,
            "step": self.step,
            "clusters": dict(self.clusters),
            "save_latest": self.save_latest,
        }

    def attempt(self, verdict: Mapping[str, Any]) -> Attempt:
        """The attempt that rank 0 made, from the verdict that every rank got; its number is 0 if rank 0 made none."""
        return Attempt(
            output_dir=self.output_dir,
            name=self.name,
            step=self.step,
            run_id=verdict.get("run_id", ""),
            epoch=verdict.get("epoch", 0),
            attempt=verdict.get("attempt", 0),
            expected=dict(self.expected_clusters or self.clusters),
            save_latest=self.save_latest,
            home=Path(verdict.get("home", self.output_dir)),
        )


@dataclass(frozen=True)
class SaveEstimate:
    """What this rank is about to write for one cluster.

    `nbytes` is the approximate size; `plan` names the save plan of an earlier save that fits again, None if none does.
    """

    nbytes: int
    plan: str | None = None


def begin(
    ranks: RankGroup,
    request: Request,
    settings: Settings,
    *,
    nbytes: int,
    problem: str | None = None,
    plans: Mapping[str, str | None] | None = None,
    on_commit: Hook | None = None,
) -> Save:
    """Agree on a new attempt and make its directory. Every rank of `ranks` calls.

    Blocks for one rendezvous, and before it until a pending save of the same name has settled.

    Args:
        nbytes: about how many bytes this rank will write.
        problem: an error that this rank has met already; then SaveFailed is raised on every rank.
        plans: for each cluster, the name of an earlier save plan that fits what this rank saves now, or None.
            `Save.reused_plans` has the clusters for which every rank gave the same name.
        on_commit: see `Save.on_commit`.

    If this run has saved in the directory before, a full or failing disk does not end training: the save that is
    returned has `begun` false on every rank and must not be staged, and `failure` says why.

    Raises, on every rank:
        RanksDisagree, RunIsLive, EpochLost, ConfigError: nothing on disk was changed.
        SaveFailed: a rank gave a `problem`, or rank 0 could not make the attempt; older checkpoints are untouched.
        NoRoom: the file system has too little room, and this run has not claimed the directory yet.
    """
    request = replace(request, output_dir=request.output_dir.absolute())
    wait_pending(request.output_dir, request.name)
    post = {"request": request.compared(), "nbytes": nbytes, "problem": problem, "plans": dict(plans or {})}
    decided: list[bool] = []

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        decided.append(True)
        return _decide(request, settings, posts)

    try:
        verdict = ranks.decide_on_rank0(post, decide, settings.commit_timeout_s)
    except RollCkptError:
        claimed = None if decided or ranks.rank else find_claim(request.output_dir)
        if claimed is not None:  # a rank did not come, or is in another call: the save counts all the same
            attempts.pass_over(claimed, request.name)
        raise
    reused_plans = frozenset(verdict.get("reused_plans", ()))
    save = Save(
        request.attempt(verdict), settings, ranks.rank, tuple(request.clusters), reused_plans, on_commit=on_commit
    )
    if save.begun:
        hooks.install()
        process.part(PendingSaves).add(save)
    else:
        save.fail_to_begin((NoRoom if verdict["lacks_room"] else SaveFailed)(verdict["failure"]))
    return save


def _decide(request: Request, settings: Settings, posts: list[dict[str, Any]]) -> dict[str, Any]:
    """On rank 0: make the attempt that all ranks ask for. Every rank gets the returned verdict."""
    claimed = find_claim(request.output_dir)
    try:
        _check_agreement(posts)
        if claimed is not None:
            clear(claimed)
        needed_bytes = sum(post["nbytes"] for post in posts)
        attempts.check_room(request.output_dir, request.name, needed_bytes)
        attempts.check_replaced(request.output_dir, request.name)
    except Exception as problem:
        if claimed is not None:
            attempts.pass_over(claimed, request.name)
        return _not_begun(problem, request, claimed is not None)
    try:
        owner = claim(request.output_dir, settings, request.clusters, request.expected_clusters, host=request.host)
        if request.expected_clusters is not None:
            request.course.share(owner.run_id, owner.number)
        elif not request.course.settled:
            request.course.settle(listing.committed(request.output_dir), request.clusters, request.name)
        attempt = attempts.begin(
            owner,
            request.name,
            step=request.step,
            expected=request.expected_clusters or request.clusters,
            save_latest=request.save_latest,
            needed_bytes=needed_bytes,
            lineage=request.course.lineage,
        )
    except OSError as problem:
        return _not_begun(problem, request, claimed is not None)
    reused = [
        cluster
        for cluster, plan in posts[0]["plans"].items()
        if plan and all(post["plans"].get(cluster) == plan for post in posts)
    ]
    return {
        "epoch": attempt.epoch,
        "attempt": attempt.attempt,
        "run_id": attempt.run_id,
        "home": str(attempt.home),
        "reused_plans": reused,
    }


def _not_begun(problem: Exception, request: Request, claimed: bool) -> dict[str, Any]:
    """The verdict if the disk refused and this run has claimed the directory; else `problem` is raised."""
    if not claimed or not isinstance(problem, OSError):
        raise problem
    lacks_room = isinstance(problem, NoRoom) or problem.errno in (errno.ENOSPC, errno.EDQUOT)
    return {"failure": _failure(problem, request.output_dir / request.name), "lacks_room": lacks_room}


def _failure(problem: OSError, final: Path) -> str:
    if isinstance(problem, NoRoom):
        return str(problem)
    return (
        f"{final}: the save could not begin: rank 0: {problem.strerror} ({problem.filename}). Older checkpoints are "
        "untouched; the next save tries again"
    )


def _check_agreement(posts: list[dict[str, Any]]) -> None:
    problems = [f"rank {rank}: {post['problem']}" for rank, post in enumerate(posts) if post["problem"]]
    if problems:
        raise SaveFailed("the save was not begun: " + "; ".join(problems))
    first = posts[0]["request"]
    for rank, post in enumerate(posts):
        differing = [key for key in first if post["request"][key] != first[key]]
        if differing:
            raise RanksDisagree(
                f"rank {rank} and rank 0 ask for different saves: "
                + ", ".join(f"{key} {post['request'][key]!r} and {first[key]!r}" for key in differing)
                + "; nothing was written. Call the save with the same arguments on every rank"
            )
