"""RankGroup: the ranks of one torchrun job, and how they agree on a value.

They meet over their own connection to torch's key-value store, never over the training process group: a failure there
cannot block a collective of the training, and a collective cannot block a save.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from roll_ckpt import process
from roll_ckpt.ranks.rendezvous import Decide, Patience, Place, Rendezvous, error_of, outcome, signs_of_life, verdict_of

log = logging.getLogger("roll_ckpt")

_generations = itertools.count(1)
_SIGN_OF_LIFE_S = 5.0


class RankGroup:
    """`size` ranks of one job that can agree on small JSON values; this process is `rank`.

    Every rank makes the same calls on one group in the same order. A rendezvous has a number, and belongs to a `call`,
    a save or a load. Ranks that are in different calls at one number, or of which one has left the call with an error,
    learn so at once: each raises, and goes on at the next number. A number that has ended for another call is passed
    over. So after any error the ranks meet again in the next call that all of them make.
    """

    def __init__(self, rank: int, size: int, store: Store | None) -> None:
        self.rank = rank
        self.size = size
        self._store = store if size > 1 else None
        self._sequence = 0
        self._call = ""
        self._first = 0
        self._told: BaseException | None = None

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

    @contextmanager
    def call(self, name: str, timeout_s: float) -> Iterator[None]:
        """Inside the block, every rendezvous belongs to the call `name`, such as "save checkpoint-10 to /runs/a".

        One thread at a time. An exception that leaves the block on this rank alone is told to the other ranks: they
        raise it where they would wait for this rank, instead of waiting for `timeout_s` seconds. Does not block.
        """
        self._call, self._first = name, self._sequence + 1
        try:
            with signs_of_life(self._store, self.rank, min(_SIGN_OF_LIFE_S, timeout_s / 8)):
                yield
        except BaseException as problem:
            if problem is not self._told:
                self._leave(problem)
            raise
        finally:
            self._call, self._told = "", None

    def decide_on_rank0(
        self, post: dict[str, Any], decide: Decide, timeout_s: float, *, working: bool = False
    ) -> dict[str, Any]:
        """Run `decide` on rank 0 with the `post` of every rank, and return its result on every rank.

        Every rank calls; blocks until rank 0 has decided. `post` and the result are JSON; the posts come in order of
        rank. With `working`, ranks may take long before they come, and rank 0 to decide: the time limit then counts
        from the last sign of life of those that are waited for.

        Raises, on every rank:
            RanksDisagree: a rank did not come within `timeout_s` seconds, or is in another call; or rank 0 did not
                decide within `timeout_s` plus `rendezvous.SLACK_S` seconds. The message names the ranks.
            RollCkptError: what `decide` raises, with the same class and text on every rank; any other exception
                becomes SaveFailed. Also what a rank has raised that left this call before the rendezvous.
        """
        if self._store is None:
            self._sequence += 1
            return self._unwrap(outcome(decide, [post], Place()))
        patience = Patience(timeout_s, working)
        while True:
            self._sequence += 1
            place = self._place(self._sequence)
            verdict = self._meet(str(self._sequence), place, patience, post, decide)
            if place.key() in verdict["places"]:
                return self._unwrap(verdict)
            if self._first == self._sequence:  # the others have ended this number for a call before this one
                self._first += 1

    def run_on_all_ranks(
        self, action: Callable[[], object], timeout_s: float, *, working: bool = False, key: str | None = None
    ) -> None:
        """Run `action` on every rank, and then one rendezvous: no rank returns before all are done.

        Every rank calls; blocks. `timeout_s` is how long rank 0 waits for the others; see `decide_on_rank0`. A `key`
        that is used once names the rendezvous instead of a number, so that it may overlap with calls in other threads.

        Raises:
            RollCkptError: if `action` failed on any rank, the error of the first such rank, on every rank; an exception
                of another kind becomes SaveFailed.
            RanksDisagree: see `decide_on_rank0`.
        """
        if key is None or self._store is None:
            self.decide_on_rank0(self._post_of(action), _first_failure, timeout_s, working=working)
            return
        place = Place(f"waiting for the outcome of {key}")
        with signs_of_life(self._store, self.rank, min(_SIGN_OF_LIFE_S, timeout_s / 8)):
            try:
                post = self._post_of(action)
            except BaseException as problem:
                self._end(key, problem, place)
                raise
            verdict = self._meet(key, place, Patience(timeout_s, working), post, _first_failure)
        if "error" in verdict:
            raise error_of(verdict)

    def raise_together(self, problem: Exception | None, timeout_s: float) -> None:
        """Raise on every rank if any rank has a `problem`: its own on that rank, on the others what the first one has.

        Every rank calls; blocks for one rendezvous.
        """
        try:
            post = {} if problem is None else verdict_of(problem, self.rank, [])
            self.decide_on_rank0(post, _first_failure, timeout_s, working=True)
        except Exception:
            if problem is None:
                raise
            self._told = problem
        if problem is not None:
            raise problem

    @contextmanager
    def raising_together(self, timeout_s: float) -> Iterator[None]:
        """After the block, `raise_together` what it has raised on any rank. Every rank calls; no rendezvous in it."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        self.raise_together(problem, timeout_s)

    def _post_of(self, action: Callable[[], object]) -> dict[str, Any]:
        try:
            action()
        except Exception as problem:
            return verdict_of(problem, self.rank, [])
        return {}

    def _place(self, number: int) -> Place:
        return Place(self._call, self._first, number) if self._call else Place(number=number)

    def _meet(self, key: str, place: Place, patience: Patience, post: dict[str, Any], decide: Decide) -> dict[str, Any]:
        assert self._store is not None
        return Rendezvous(self._store, self.rank, self.size, key, place, patience).meet(post, decide)

    def _leave(self, problem: BaseException) -> None:
        """Tell the ranks that wait in this call at the next number, or will, why this rank does not come.

        A number that this rank has ended already, when it left an earlier call, is passed over as the others do.
        """
        number = self._sequence + 1
        while self._store is not None:
            place = self._place(number)
            verdict = self._end(str(number), problem, place)
            if verdict is None or place.key() in verdict["places"]:
                return
            if self._first == number:
                self._first += 1
            number += 1

    def _end(self, key: str, problem: BaseException, place: Place) -> dict[str, Any] | None:
        """End the meeting `key` with `problem`; return the verdict that holds, None if the store is unreachable."""
        assert self._store is not None
        try:
            rendezvous = Rendezvous(self._store, self.rank, self.size, key, place, Patience(0))
            verdict = verdict_of(problem, self.rank, [place])
            reason = verdict["text"].removeprefix(f"rank {self.rank}: ")
            return rendezvous.end({**verdict, "text": f"rank {self.rank} has left: {reason}"})
        except dist.DistError as unreachable:
            log.debug("rank %d cannot tell the other ranks of %r: %s", self.rank, problem, unreachable)
            return None

    def _unwrap(self, verdict: dict[str, Any]) -> dict[str, Any]:
        if "error" in verdict:
            self._told = error_of(verdict)
            raise self._told
        value: dict[str, Any] = verdict["value"]
        return value


def _first_failure(posts: list[dict[str, Any]]) -> dict[str, Any]:
    for post in posts:
        if post:
            raise error_of(post)
    return {}


class _Groups:
    """The part of the `process` registry that holds the rank group, with the store of its process group."""

    def __init__(self) -> None:
        self.current: tuple[Store, RankGroup] | None = None
