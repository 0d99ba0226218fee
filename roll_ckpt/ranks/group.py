"""RankGroup: the ranks of one torchrun job, and how they agree on a value.

They meet over their own connection to torch's key-value store, never over the training process group: a failure there
cannot block a collective of the training, and a collective cannot block a save.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from roll_ckpt import errors, process
from roll_ckpt.errors import RanksDisagree, RollCkptError

_SLACK_S = 30.0
LONGEST_S = 24 * 3600.0
"""The longest that ranks wait for each other while one of them verifies or uploads, in seconds."""


_generations = itertools.count(1)


class RankGroup:
    """`size` ranks of one job that can agree on small JSON values; this process is `rank`.

    A rendezvous is matched by its number on each rank. So every rank must make the same calls on one group in the same
    order, from one thread.
    """

    def __init__(self, rank: int, size: int, store: Store | None) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._sequence = 0

    @classmethod
    def current(cls) -> RankGroup:
        """The ranks of the default process group of `torch.distributed`; a single rank if none is initialised.

        Returns the same object for as long as that process group lives, because all engines of a process must share
        its count of rendezvous. No collective; does not block.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, None)
        shared, groups = dist.distributed_c10d._get_default_store(), process.part(_Groups)
        if groups.current is None or groups.current[0] is not shared:
            own = shared.clone() if hasattr(shared, "clone") else shared
            # A later process group may use the same store, where old verdicts lie under the same numbers.
            ranks = cls(dist.get_rank(), dist.get_world_size(), PrefixStore(f"roll_ckpt/{next(_generations)}", own))
            groups.current = shared, ranks
        return groups.current[1]

    @property
    def rendezvous_count(self) -> int:
        """How many rendezvous this group has had so far."""
        return self._sequence

    def decide_on_rank0(
        self, post: dict[str, Any], decide: Callable[[list[dict[str, Any]]], dict[str, Any]], timeout_s: float
    ) -> dict[str, Any]:
        """Run `decide` on rank 0 with the `post` of every rank, and return its result on every rank.

        Every rank calls; blocks until rank 0 has decided. `post` and the result are JSON; the posts come in order of
        rank.

        Raises:
            RanksDisagree: a rank did not call within `timeout_s` seconds, or rank 0 did not answer. Rank 0's message
                names the missing ranks.
            RollCkptError: what `decide` raises, with the same class and text on every rank; any other exception
                becomes SaveFailed.
        """
        self._sequence += 1
        prefix = str(self._sequence)
        if self.rank == 0:
            return self._unwrap(self._decide(prefix, post, decide, timeout_s))
        assert self._store is not None
        try:
            self._store.set(f"{prefix}/{self.rank}", json.dumps(post))
            self._store.wait([f"{prefix}/verdict"], timedelta(seconds=timeout_s + _SLACK_S))
            verdict = json.loads(self._store.get(f"{prefix}/verdict"))
        except dist.DistError as problem:
            raise RanksDisagree(
                f"rank {self.rank}: no answer from rank 0 within {timeout_s:g} s, or it died; see its log: {problem}"
            ) from problem
        return self._unwrap(verdict)

    def run_on_all_ranks(self, action: Callable[[], object], timeout_s: float) -> None:
        """Run `action` on every rank, and then one rendezvous: no rank returns before all are done.

        Every rank calls; blocks. `timeout_s` is how long rank 0 waits for the others.

        Raises:
            RollCkptError: if `action` failed on any rank, the error of the first such rank, on every rank; an exception
                of another kind becomes SaveFailed.
            RanksDisagree: see `decide_on_rank0`.
        """
        failure: dict[str, Any] = {}
        try:
            action()
        except RollCkptError as problem:
            failure = {"error": type(problem).__name__, "text": str(problem)}
        except Exception as problem:
            failure = {"error": "SaveFailed", "text": f"rank {self.rank}: {type(problem).__name__}: {problem}"}

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            for post in posts:
                if post:
                    raise getattr(errors, post["error"])(post["text"])
            return {}

        self.decide_on_rank0(failure, decide, timeout_s)

    def _decide(
        self,
        prefix: str,
        post: dict[str, Any],
        decide: Callable[[list[dict[str, Any]]], dict[str, Any]],
        timeout_s: float,
    ) -> dict[str, Any]:
        try:
            verdict: dict[str, Any] = {"value": decide([post, *self._gather(prefix, timeout_s)])}
        except RollCkptError as problem:
            verdict = {"error": type(problem).__name__, "text": str(problem)}
        except Exception as problem:  # without a verdict the other ranks would wait until their timeout
            verdict = {"error": "SaveFailed", "text": f"rank 0: {type(problem).__name__}: {problem}"}
        if self._store is not None:
            self._store.set(f"{prefix}/verdict", json.dumps(verdict))
            self._store.delete_key(f"{self._sequence - 1}/verdict")
        return verdict

    def _gather(self, prefix: str, timeout_s: float) -> list[dict[str, Any]]:
        if self._store is None:
            return []
        keys = [f"{prefix}/{rank}" for rank in range(1, self.size)]
        try:
            if keys:
                self._store.wait(keys, timedelta(seconds=timeout_s))
        except dist.DistError as problem:
            missing = [str(r) for r in range(1, self.size) if not self._store.check([f"{prefix}/{r}"])]
            raise RanksDisagree(
                f"rank {', '.join(missing)} of {self.size} did not come within {timeout_s:g} s; every rank must make "
                "the same save or load call: see the logs of these ranks"
            ) from problem
        posts = [json.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return posts

    @staticmethod
    def _unwrap(verdict: dict[str, Any]) -> dict[str, Any]:
        if "error" in verdict:
            raise getattr(errors, verdict["error"])(verdict["text"])
        value: dict[str, Any] = verdict["value"]
        return value


class _Groups:
    """The part of the `process` registry that holds the rank group, with the store of its process group."""

    def __init__(self) -> None:
        self.current: tuple[Store, RankGroup] | None = None
