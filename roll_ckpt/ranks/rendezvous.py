"""One meeting of all ranks over the store: each brings a post, and all leave with the same verdict.

The verdict is one key of the store, and the first who sets it wins: rank 0 with the outcome, or any rank that gives up,
is interrupted or has failed elsewhere. So either all ranks get the outcome, or none does.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from roll_ckpt import errors
from roll_ckpt.errors import RanksDisagree, RollCkptError

log = logging.getLogger("roll_ckpt")

Decide = Callable[[list[dict[str, Any]]], dict[str, Any]]

SLACK_S = 30.0
"""How much longer than rank 0 the other ranks wait, in seconds: rank 0 decides in this time, and claims a directory."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _RANKS_PER_PAUSE = 0.0005, 0.02, 64


@dataclass(frozen=True)
class Place:
    """Where in which call a rank is. Two ranks meet only at the same place."""

    call: str = ""
    """Such as "save checkpoint-10 to /runs/a"; empty for a rendezvous outside of any call."""
    first: int = 0
    """The number of the call's first rendezvous."""
    number: int = 0

    def __str__(self) -> str:
        nth = self.number - self.first + 1
        if not self.call:
            return "outside of any call"
        return f"in {self.call}" + (f" (its rendezvous {nth})" if self.number and nth > 1 else "")

    def key(self) -> list[Any]:
        return [self.call, self.first]


@dataclass
class Patience:
    """How long a rank waits for others: `timeout_s` seconds; with `working`, since their last sign of life."""

    timeout_s: float
    working: bool = False
    began: float = field(default_factory=time.monotonic)


class Rendezvous:
    """This rank's side of one meeting under the name `key` of the store."""

    def __init__(self, store: Store, rank: int, size: int, key: str, place: Place, patience: Patience) -> None:
        self._store, self._rank, self._size, self._key = store, rank, size, key
        self._place, self._patience = place, patience
        self._looked_s = time.monotonic()
        self._signs: dict[int, tuple[int, float]] = {}
        """By rank, its count of signs of life and when this rank saw it change."""

    def meet(self, post: dict[str, Any], decide: Decide) -> dict[str, Any]:
        """Bring `post`, and wait for the verdict. It may be one of another call that the ranks have ended meanwhile.

        Raises:
            RanksDisagree: the store cannot be reached any more.
            BaseException: what interrupts this rank; the others are told.
        """
        try:
            return self._lead(post, decide) if self._rank == 0 else self._follow(post)
        except dist.DistError as problem:
            raise RanksDisagree(
                f"rank {self._rank} of {self._size}, {self._place}: the store over which the ranks meet cannot be "
                f"reached; the rank or launcher that holds it has died, see its log: {problem}"
            ) from problem
        except BaseException as problem:
            self.end(verdict_of(problem, self._rank, [self._place]))
            raise

    def end(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """Make `verdict` that of this meeting, unless there is one; return the one that holds."""
        return dict(json.loads(self._store.compare_set(self._name("verdict"), "", json.dumps(verdict))))

    def _lead(self, post: dict[str, Any], decide: Decide) -> dict[str, Any]:
        others = [self._name(str(rank)) for rank in range(1, self._size)]
        verdict: dict[str, Any] | None = None
        if self._wait(others):
            brought = [json.loads(value) for value in self._store.multi_get(others)]
            posts = [post, *(other["post"] for other in brought)]
            verdict = self._strayed(brought) or outcome(decide, posts, self._place)
        elif not self._store.check([self._name("verdict")]):
            verdict = self._strayed(self._brought()) or self._missing()
        return self._taken(self.end(verdict or {}))

    def _follow(self, post: dict[str, Any]) -> dict[str, Any]:
        own = self._name(str(self._rank))
        self._store.set(own, json.dumps({"place": self._place.__dict__, "rank": self._rank, "post": post}))
        if not self._wait([self._name("verdict")]):
            waited = f"{self._patience.timeout_s:g} s" + ("" if self._patience.working else f" and {SLACK_S:g} s more")
            text = f"rank {self._rank}: no answer from rank 0 within {waited}, {self._place}; see the log of rank 0"
            self.end(verdict_of(RanksDisagree(text), self._rank, [self._place]))
        return self._taken(json.loads(self._store.get(self._name("verdict"))))

    def _taken(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """`verdict`, which this rank has got; the last rank to get it removes it from the store.

        Rank 0 may be about to read the posts of the others until it has the verdict too. It counts as `size` ranks, so
        that the others know whether it has: then each removes its own post, otherwise rank 0 removes it.
        """
        got = self._store.add(self._name("got"), self._size if self._rank == 0 else 1)
        if self._rank and got > self._size:
            self._store.delete_key(self._name(str(self._rank)))
        elif self._rank == 0 and got > self._size:
            for rank in range(1, self._size):
                self._store.delete_key(self._name(str(rank)))
        if got == 2 * self._size - 1:
            self._store.delete_key(self._name("got"))
            self._store.delete_key(self._name("verdict"))
        return verdict

    def _wait(self, keys: list[str]) -> bool:
        """Wait until all `keys` are there. False: not in time; or, on rank 0, a rank is elsewhere or has ended this."""
        pause, longest = _FIRST_PAUSE_S, _LONGEST_PAUSE_S * max(1, self._size // _RANKS_PER_PAUSE)
        while True:
            if self._rank == 0 and self._store.check([self._name("verdict")]):
                return False
            if self._store.check(keys):
                return True
            now = time.monotonic()
            if now - self._looked_s > min(1, self._patience.timeout_s / 8):
                self._looked_s = now
                if self._late(now) or (self._rank == 0 and self._strayed(self._brought()) is not None):
                    return False
            time.sleep(pause)
            pause = min(1.5 * pause, longest)

    def _late(self, now: float) -> bool:
        """Whether a rank that this one waits for has let the time limit pass."""
        began, limit_s = self._patience.began, self._patience.timeout_s
        if not self._patience.working:
            return now - began > limit_s + (SLACK_S if self._rank else 0)
        for rank in self._awaited():
            sign = self._store.add(f"alive/{rank}", 0)
            if sign != self._signs.get(rank, (0, began))[0]:
                self._signs[rank] = sign, now
        return any(now - self._signs.get(rank, (0, began))[1] > limit_s for rank in self._awaited())

    def _awaited(self) -> list[int]:
        if self._rank:
            return [0]
        return [rank for rank in range(1, self._size) if not self._store.check([self._name(str(rank))])]

    def _brought(self) -> list[dict[str, Any]]:
        """On rank 0: what has come so far from the others."""
        keys = (self._name(str(rank)) for rank in range(1, self._size))
        return [json.loads(self._store.get(key)) for key in keys if self._store.check([key])]

    def _missing(self) -> dict[str, Any]:
        how = "gave no sign of life for" if self._patience.working else "did not come within"
        text = (
            f"rank {', '.join(map(str, self._awaited()))} of {self._size} {how} {self._patience.timeout_s:g} s, while "
            f"rank 0 was {self._place}; every rank must make the same save or load call: see the logs of these ranks"
        )
        return verdict_of(RanksDisagree(text), 0, [self._place])

    def _strayed(self, brought: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The verdict if a rank is in another call than rank 0; None if all are in this one."""
        places = {other["rank"]: Place(**other["place"]) for other in brought}
        strayed = {rank: place for rank, place in places.items() if place != self._place}
        if not strayed:
            return None
        told = "; ".join(f"rank {rank} is {place}" for rank, place in list(strayed.items())[:8])
        text = (
            f"ranks are in different calls: rank 0 is {self._place}; {told}; none of them took place. Every rank must "
            "make the same save and load calls in the same order"
        )
        return verdict_of(RanksDisagree(text), 0, [self._place, *strayed.values()])

    def _name(self, part: str) -> str:
        return f"{self._key}/{part}"


def outcome(decide: Decide, posts: list[dict[str, Any]], place: Place) -> dict[str, Any]:
    """The verdict on rank 0: what `decide` makes of all posts, or the error that it raises."""
    try:
        return {"places": [place.key()], "value": decide(posts)}
    except Exception as problem:  # without a verdict the other ranks would wait until their timeout
        return verdict_of(problem, 0, [place])


def verdict_of(problem: BaseException, rank: int, places: list[Place]) -> dict[str, Any]:
    """The verdict by which every rank at one of `places` raises `problem`, which `rank` has met.

    An error that is not ours, or that cannot be made from its text alone (SourceChanged), becomes SaveFailed.
    """
    kind, text = type(problem).__name__, str(problem)
    if not isinstance(problem, RollCkptError):
        kind, text = "SaveFailed", f"rank {rank}: {kind}: {text}"
    if kind not in _REBUILT:
        kind = "SaveFailed"
    return {"places": [place.key() for place in places], "error": kind, "text": text}


def error_of(verdict: dict[str, Any]) -> RollCkptError:
    """The error that a verdict tells."""
    problem: RollCkptError = getattr(errors, verdict["error"])(verdict["text"])
    return problem


_REBUILT = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, RollCkptError) and "__init__" not in vars(kind)
}


@contextmanager
def signs_of_life(store: Store | None, rank: int, every_s: float) -> Iterator[None]:
    """Inside the block, tell the other ranks every `every_s` seconds that this process lives."""
    if store is None:
        yield
        return
    done = threading.Event()

    def beat() -> None:
        own = None
        try:
            while not done.wait(every_s):
                own = own or (store.clone() if hasattr(store, "clone") else store)
                own.add(f"alive/{rank}", 1)
        except (dist.DistError, RuntimeError) as problem:
            log.debug("rank %d cannot tell the other ranks that it lives: %s", rank, problem)

    thread = threading.Thread(target=beat, name="roll_ckpt sign of life", daemon=True)
    try:
        thread.start()
    except RuntimeError as problem:
        log.debug("no thread can be started to tell the other ranks that this one lives: %s", problem)
    try:
        yield
    finally:
        done.set()
