"""Which checkpoint a pipeline resumes from, the same on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_ckpt import errors, names
from roll_ckpt.config import PipelineConfig
from roll_ckpt.disk import tree
from roll_ckpt.errors import Damaged, NotFound, Unreadable
from roll_ckpt.load.checkpoint import as_unreadable
from roll_ckpt.ranks.group import LONGEST_S, RankGroup
from roll_ckpt.save import claims
from roll_ckpt.transaction import listing
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.progress import ProgressBar
from roll_ckpt.upload.hub.pull import pull

log = logging.getLogger("roll_ckpt")


@dataclass(frozen=True)
class Candidates:
    """What bears the name of a checkpoint in an output directory.

    `committed` are the names of committed ones, the oldest first; `others` what else is called like one; `unread`
    what could not be looked at, with the reason.
    """

    committed: list[str]
    others: list[str]
    unread: dict[str, str]

    def newest_first(self) -> Iterator[str]:
        """The committed ones, the newest first.

        Raises:
            Unreadable: one that could not be looked at may be newer than the next; nothing older is taken instead.
        """
        for name in reversed(self.committed):
            _refuse_to_pass(self.unread, names.step_of(name) or 0)
            yield name
        _refuse_to_pass(self.unread, 0)


def claim_and_list(ranks: RankGroup, config: PipelineConfig, clusters: Mapping[str, int]) -> Candidates:
    """Claim the output directory, recover what a killed run left there, and list its checkpoints. Every rank calls.

    Raises:
        RunIsLive: another live run owns the directory. On every rank.
    """

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        claims.claim(config.output_dir, config, clusters, config.expected_clusters)
        unread = {}

        def report(problem: Damaged | Unreadable) -> None:
            log.warning("%s; this checkpoint is left out", problem)
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


def pulled(ranks: RankGroup, config: PipelineConfig, remote: Remote) -> Path:
    """Let rank 0 pull a checkpoint beside the output directory; its path on every rank. Every rank calls; blocks."""
    directory = Path(f"{os.path.abspath(config.output_dir)}{names.PULLED}")

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        bar = ProgressBar()

        def show(here: int, of: int) -> None:
            bar({"name": remote.uri, "doing": "pulled", "done": here, "total": of})

        try:
            return {"path": str(pull(remote, directory, show))}
        finally:
            bar.end()

    return Path(ranks.decide_on_rank0({}, decide, LONGEST_S)["path"])


def asked_for(ranks: RankGroup, config: PipelineConfig, wanted: Path) -> Path:
    """The checkpoint that a path means to rank 0; its path on every rank. Every rank calls.

    Raises:
        NotFound: there is no committed checkpoint.
    """

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        with as_unreadable(wanted):
            return {"path": os.path.abspath(_checked_path(wanted, config.output_dir))}

    return Path(ranks.decide_on_rank0({}, decide, config.commit_timeout_s)["path"])


def _refuse_to_pass(unread: Mapping[str, str], step: int) -> None:
    """Raise if a checkpoint that could not be read is as new as `step`, or newer."""
    newer = [why for name, why in unread.items() if (at := names.step_of(name)) is not None and at >= step]
    if newer:
        raise Unreadable(f"{'; '.join(newer)}. {errors.BY_HAND}")


def _checked_path(path: Path, output_dir: Path) -> Path:
    for candidate in (path, output_dir / path):
        if tree.exists(candidate / names.MANIFEST):
            return candidate
    raise NotFound(
        f"resume_from_checkpoint: {path} holds no complete checkpoint (no {names.MANIFEST} in it); give a committed "
        f"checkpoint-N directory; `roll-ckpt ls {output_dir}` lists them"
    )
