"""Finds and opens the checkpoint that a pipeline resumes from, the same one on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from roll_ckpt import errors, names
from roll_ckpt.config import PipelineConfig
from roll_ckpt.disk import tree
from roll_ckpt.errors import Damaged, NotFound, Unreadable
from roll_ckpt.load.checkpoint import as_unreadable
from roll_ckpt.load.newest import newest_sound
from roll_ckpt.load.reader import Reader
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import claims
from roll_ckpt.transaction import listing
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.progress import ProgressBar
from roll_ckpt.upload.hub.pull import pull

log = logging.getLogger("roll_ckpt")


@dataclass(frozen=True)
class Candidates:
    """The entries of an output directory that are named like checkpoints.

    `committed` are the committed ones, oldest first; `others` are all others (damaged, say). `unread` maps those that
    the disk did not return to the reason.
    """

    committed: list[str]
    others: list[str]
    unread: dict[str, str]

    def newest_first(self) -> Iterator[str]:
        """The names of the committed checkpoints, newest first.

        Raises:
            Unreadable: before yielding a checkpoint that is older than one that could not be read, which may be sound.
        """
        for name in reversed(self.committed):
            _refuse_to_pass(self.unread, names.step_of(name) or 0)
            yield name
        _refuse_to_pass(self.unread, 0)


def claim_and_list(ranks: RankGroup, config: PipelineConfig, clusters: Mapping[str, int]) -> Candidates:
    """Claim the output directory, finish or discard what a killed run left there, and list its checkpoints.

    Every rank calls; blocks.

    Raises, on every rank:
        RunIsLive: another live run owns the directory.
        Unreadable: the disk does not list the directory.
    """

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        claims.claim(config.output_dir, config, clusters, config.expected_clusters)
        unread = {}

        def report(problem: Damaged | Unreadable) -> None:
            log.warning("%s; this checkpoint is not used", problem)
            if isinstance(problem, Unreadable) and problem.checkpoint_dir is not None:
                unread[problem.checkpoint_dir.name] = str(problem)

        with as_unreadable(config.output_dir):
            committed = [manifest.name for manifest in listing.committed(config.output_dir, report)]
            others = [entry for entry in tree.list_dir(config.output_dir) if entry not in committed]
        return {"committed": committed, "others": others, "unread": unread}

    listed = ranks.decide_on_rank0({}, decide, config.commit_timeout_s)
    committed, others = (
        [name for name in listed[kind] if names.step_of(name) is not None] for kind in ("committed", "others")
    )
    return Candidates(committed, others, listed["unread"])


@contextmanager
def open_chosen(ranks: RankGroup, config: PipelineConfig, listed: Candidates) -> Iterator[tuple[Path, Reader] | None]:
    """Open and verify the checkpoint that `resume_from_checkpoint` chooses; yield its path and reader.

    Yields None if there is nothing to resume from. Every rank calls; blocks while every byte is read.

    Raises, on every rank: see `BasePipeline.resume`.
    """
    source, open_verified = config.resume_from_checkpoint, partial(_open_verified, ranks, config)
    if source is False:
        yield None
        return
    if source is True:
        advice = ". To start anew set resume_from_checkpoint: false"
        newest_first = listed.newest_first()
        with newest_sound(
            config.output_dir, newest_first, open_verified, refused=listed.others, advice=advice
        ) as newest:
            yield None if newest is None else (config.output_dir / newest[0], newest[1])
        return
    with ExitStack() as stack:
        path = pulled(ranks, config, Remote.parse(source)) if isinstance(source, str) else at_path(ranks, config)
        yield path, open_verified(stack, path)


def _open_verified(ranks: RankGroup, config: PipelineConfig, stack: ExitStack, checkpoint_dir: Path) -> Reader:
    reader = stack.enter_context(open_together(ranks, checkpoint_dir, config))
    if reader.checkpoint is None:
        raise NotFound(f"{checkpoint_dir}: no checkpoint of roll_ckpt is there")
    check_bytes(ranks, checkpoint_dir, config.commit_timeout_s)
    return reader


def pulled(ranks: RankGroup, config: PipelineConfig, remote: Remote) -> Path:
    """Rank 0 pulls the checkpoint `remote` to `<output_dir>-pulled`; every rank gets its path there.

    Every rank calls; blocks until it is downloaded, verified and durable.

    Raises, on every rank:
        NotFound, Damaged, NoRoom, HubRefused, HubUnavailable, ConfigError, RunIsLive: see `upload.hub.pull.pull`.
    """
    directory = Path(f"{os.path.abspath(config.output_dir)}{names.PULLED}")

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        bar = ProgressBar()

        def show(done: int, total: int) -> None:
            bar({"name": remote.uri, "doing": "pulled", "done": done, "total": total})

        try:
            return {"path": str(pull(remote, directory, show))}
        finally:
            bar.end()

    return Path(ranks.decide_on_rank0({}, decide, config.commit_timeout_s, working=True)["path"])


def at_path(ranks: RankGroup, config: PipelineConfig) -> Path:
    """The path of the checkpoint that rank 0 finds where `resume_from_checkpoint` says, or in the output directory.

    Every rank calls; blocks for one rendezvous.

    Raises, on every rank:
        NotFound: there is no committed checkpoint. Unreadable: the disk does not tell.
    """

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        with as_unreadable(config.resume_paths[0]):
            return {"path": os.path.abspath(_checked_path(config.resume_paths, config.output_dir))}

    return Path(ranks.decide_on_rank0({}, decide, config.commit_timeout_s)["path"])


def _refuse_to_pass(unread: Mapping[str, str], step: int) -> None:
    """Raise Unreadable if a checkpoint of `step`, or of a later step, could not be read."""
    reasons = [reason for name, reason in unread.items() if (of := names.step_of(name)) is not None and of >= step]
    if reasons:
        raise Unreadable(f"{'; '.join(reasons)}. {errors.BY_HAND}")


def _checked_path(paths: list[Path], output_dir: Path) -> Path:
    for path in paths:
        if tree.exists(path / names.MANIFEST):
            return path
    raise NotFound(
        f"resume_from_checkpoint: {paths[0]} holds no complete checkpoint (no {names.MANIFEST} in it); give a "
        f"committed checkpoint-N directory; `roll-ckpt ls {output_dir}` lists them"
    )
