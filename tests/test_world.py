"""The rendezvous of two processes over a real store."""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from pairs import Pair, outcome

from roll_ckpt.errors import (
    ConfigError,
    Damaged,
    NoRoom,
    RanksDisagree,
    RollCkptError,
    RunIsLive,
    SaveFailed,
    SourceChanged,
)
from roll_ckpt.ranks import rendezvous
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.ranks.rendezvous import Patience, Place, Rendezvous, verdict_of


def collect(posts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"posts": posts, "pid": os.getpid()}


def test_every_rank_gets_what_rank_0_made_of_all_posts(pair: Pair) -> None:
    answers = pair(lambda ranks: ranks.decide_on_rank0({"rank": ranks.rank}, collect, 10))
    assert answers[0] == answers[1] == {"posts": [{"rank": 0}, {"rank": 1}], "pid": os.getpid()}


def test_rendezvous_do_not_mix_and_leave_little_behind(pair: Pair) -> None:
    def many(ranks: RankGroup) -> list[Any]:
        return [ranks.decide_on_rank0({"n": n, "rank": ranks.rank}, collect, 10)["posts"] for n in range(20)]

    expected = [[{"n": n, "rank": 0}, {"n": n, "rank": 1}] for n in range(20)]
    assert pair(many) == [expected, expected]


def test_a_rank_that_comes_late_is_waited_for(pair: Pair) -> None:
    def late(ranks: RankGroup) -> Any:
        time.sleep(0.3 * ranks.rank)
        return ranks.decide_on_rank0({"rank": ranks.rank}, collect, 10)["posts"]

    assert pair(late) == [[{"rank": 0}, {"rank": 1}]] * 2


@pytest.mark.parametrize("kind", [RanksDisagree, NoRoom, RunIsLive, ConfigError, SaveFailed])
def test_our_error_on_rank_0_is_raised_alike_on_all(pair: Pair, kind: type[RollCkptError]) -> None:
    def refuse(posts: list[dict[str, Any]]) -> dict[str, Any]:
        raise kind("the reason, with figures: 1,234")

    answers = pair(lambda ranks: ranks.decide_on_rank0({}, refuse, 10))
    assert answers == [[kind.__name__, "the reason, with figures: 1,234"]] * 2


def test_the_world_goes_on_after_an_error(pair: Pair) -> None:
    def refuse(posts: list[dict[str, Any]]) -> dict[str, Any]:
        raise NoRoom("full")

    def work(ranks: RankGroup) -> Any:
        first = outcome(lambda same: same.decide_on_rank0({}, refuse, 10), ranks)
        return [first, ranks.decide_on_rank0({"rank": ranks.rank}, collect, 10)["posts"]]

    assert pair(work) == [[["NoRoom", "full"], [{"rank": 0}, {"rank": 1}]]] * 2


def test_an_error_that_is_not_ours_reaches_every_rank_too(pair: Pair) -> None:
    def break_(posts: list[dict[str, Any]]) -> dict[str, Any]:
        raise PermissionError(13, "Permission denied", "/the/run")

    began = time.monotonic()
    for answer in pair(lambda ranks: ranks.decide_on_rank0({}, break_, 10)):
        assert answer[0] == "SaveFailed" and "/the/run" in answer[1]
    assert time.monotonic() - began < 8, "a rank waited for a verdict that nobody would give"


def test_a_rank_that_does_not_come_is_named(pair: Pair) -> None:
    def work(ranks: RankGroup) -> Any:
        return ranks.decide_on_rank0({}, collect, 0.3) if ranks.rank == 0 else "stayed away"

    answers = pair(work)
    assert answers[1] == "stayed away" and answers[0][0] == "RanksDisagree"
    assert "rank 1 of 2 did not come within 0.3 s" in answers[0][1]


def test_a_rank_without_an_answer_says_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "SLACK_S", 0.1)

    def work(ranks: RankGroup) -> Any:
        return ranks.decide_on_rank0({}, collect, 0.3) if ranks.rank == 1 else "stayed away"

    answers = pair(work)
    assert answers[0] == "stayed away"
    assert answers[1][0] == "RanksDisagree" and "rank 1: no answer from rank 0 within 0.3 s" in answers[1][1]


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_rank_is_raised_on_all(pair: Pair, failing: int) -> None:
    def work(ranks: RankGroup) -> Any:
        def action() -> None:
            if ranks.rank == failing:
                raise Damaged("file x")

        ranks.run_on_all_ranks(action, 10)

    assert pair(work) == [["Damaged", "file x"]] * 2


def test_any_error_of_an_action_is_told_with_its_rank(pair: Pair) -> None:
    def work(ranks: RankGroup) -> Any:
        ranks.run_on_all_ranks(lambda: 1 // (1 - ranks.rank), 10)

    for answer in pair(work):
        assert answer[0] == "SaveFailed" and "rank 1: ZeroDivisionError" in answer[1]


def test_a_world_of_one_agrees_with_itself() -> None:
    alone = RankGroup.current()
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.decide_on_rank0({"a": 1}, lambda posts: {"n": len(posts), **posts[0]}, 1) == {"n": 1, "a": 1}
    with pytest.raises(NoRoom, match="full"):
        alone.decide_on_rank0({}, lambda posts: (_ for _ in ()).throw(NoRoom("full")), 1)


# --- ranks that fail differently -----------------------------------------------------------------------------


def ended_quickly(began: float) -> bool:
    """Whether far less than the 60 s that these tests allow a rendezvous have passed."""
    return time.monotonic() - began < 20


def test_ranks_in_different_calls_are_told_at_once_and_meet_again(pair: Pair) -> None:
    def work(ranks: RankGroup) -> Any:
        def first() -> Any:
            with ranks.call(["save step_1 to /runs", "load /runs/step_1"][ranks.rank], 60):
                return ranks.decide_on_rank0({}, collect, 60)

        told = outcome(lambda _: first(), ranks)
        with ranks.call("save step_2 to /runs", 60):
            return [told, ranks.decide_on_rank0({"rank": ranks.rank}, collect, 60)["posts"]]

    began = time.monotonic()
    for (kind, text), posts in pair(work):
        assert kind == "RanksDisagree"
        assert "rank 0 is in save step_1 to /runs; rank 1 is in load /runs/step_1" in text
        assert posts == [{"rank": 0}, {"rank": 1}]
    assert ended_quickly(began)


@pytest.mark.parametrize("leaving", [0, 1])
@pytest.mark.parametrize("met", [0, 1])
def test_a_rank_that_leaves_a_call_with_an_error_tells_the_others_at_once(pair: Pair, leaving: int, met: int) -> None:
    def work(ranks: RankGroup) -> Any:
        def first() -> None:
            with ranks.call("save step_1", 60):
                for _ in range(met):
                    ranks.decide_on_rank0({}, collect, 60)
                if ranks.rank == leaving:
                    raise NoRoom("no room here")
                ranks.decide_on_rank0({}, collect, 60)

        told = outcome(lambda _: first(), ranks)
        with ranks.call("save step_2", 60):
            return [told, ranks.decide_on_rank0({"rank": ranks.rank}, collect, 60)["posts"]]

    began = time.monotonic()
    answers = pair(work)
    assert answers[leaving][0] == ["NoRoom", "no room here"]
    assert answers[1 - leaving][0] == ["NoRoom", f"rank {leaving} has left: no room here"]
    assert [posts for _, posts in answers] == [[{"rank": 0}, {"rank": 1}]] * 2
    assert ended_quickly(began)


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_rank_that_leaves_two_calls_one_after_the_other_tells_the_others_of_both(pair: Pair, leaving: int) -> None:
    def work(ranks: RankGroup) -> Any:
        def call(name: str) -> Any:
            with ranks.call(name, 60):
                if ranks.rank == leaving:
                    raise NoRoom(f"no room for {name}")
                return ranks.decide_on_rank0({}, collect, 60)

        told = [outcome(lambda _, name=name: call(name), ranks) for name in ("step_1", "step_2", "step_3")]
        with ranks.call("step_4", 60):
            return [told, ranks.decide_on_rank0({"rank": ranks.rank}, collect, 60)["posts"]]

    began = time.monotonic()
    answers = pair(work)
    steps = ("step_1", "step_2", "step_3")
    assert answers[1 - leaving][0] == [["NoRoom", f"rank {leaving} has left: no room for {step}"] for step in steps]
    assert [posts for _, posts in answers] == [[{"rank": 0}, {"rank": 1}]] * 2
    assert ended_quickly(began)


def test_a_rank_that_has_its_verdict_takes_no_post_away_from_under_rank_0() -> None:
    class Slow(dist.HashStore):
        """Lets rank 1 take its verdict after rank 0 has seen that there is a post, and before it reads the post."""

        def check(self, keys: list[str]) -> bool:
            there = super().check(keys)
            if there and keys == ["1/1"] and not took:
                Rendezvous(store, 2, 3, "1", place, Patience(0)).end(verdict_of(NoRoom("no room"), 2, [place]))
                took.append(threading.Thread(target=lambda: follower.meet({}, collect)))
                took[0].start()
                took[0].join()
            return there

    took: list[threading.Thread] = []
    place = Place("save", 1, 1)
    store = Slow()
    store.set_timeout(timedelta(seconds=1))
    follower = Rendezvous(store, 1, 3, "1", place, Patience(60))
    lead = Rendezvous(store, 0, 3, "1", place, Patience(0.01))
    store.set("1/1", json.dumps({"place": place.__dict__, "rank": 1, "post": {}}))
    assert lead.meet({}, collect)["text"] == "no room"
    assert not store.check(["1/1"])


@pytest.mark.parametrize("leaving", [0, 1])
def test_an_error_after_the_last_rendezvous_of_a_call_is_none_of_the_next(pair: Pair, leaving: int) -> None:
    def work(ranks: RankGroup) -> Any:
        def first() -> None:
            with ranks.call("save", 60):
                ranks.decide_on_rank0({}, collect, 60)
                if ranks.rank == leaving:
                    time.sleep(0.3)  # the other one waits in the next call by then
                    raise NoRoom("no room here")

        outcome(lambda _: first(), ranks)
        with ranks.call("save", 60):  # by the same name
            return ranks.decide_on_rank0({"rank": ranks.rank}, collect, 60)["posts"]

    began = time.monotonic()
    assert pair(work) == [[{"rank": 0}, {"rank": 1}]] * 2
    assert ended_quickly(began)


def test_rank_0_does_not_go_on_alone_when_it_decides_too_late(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "SLACK_S", 0.2)

    def slow(posts: list[dict[str, Any]]) -> dict[str, Any]:
        time.sleep(2)
        return {}

    def work(ranks: RankGroup) -> Any:
        told = outcome(lambda same: same.decide_on_rank0({}, slow, 0.3), ranks)
        return [told, ranks.decide_on_rank0({"rank": ranks.rank}, collect, 10)["posts"]]

    for (kind, text), posts in pair(work):
        assert kind == "RanksDisagree" and "rank 1: no answer from rank 0 within 0.3 s" in text
        assert posts == [{"rank": 0}, {"rank": 1}]


def test_a_rank_that_comes_too_late_learns_that_its_call_is_over(pair: Pair) -> None:
    def work(ranks: RankGroup) -> Any:
        with ranks.call("save step_1", 0.5):
            if ranks.rank == 1:
                time.sleep(2)
            return ranks.decide_on_rank0({}, collect, 0.5)

    began = time.monotonic()
    for kind, text in pair(work):
        assert kind == "RanksDisagree" and "rank 1 of 2 did not come within 0.5 s" in text and "save step_1" in text
    assert ended_quickly(began)


def test_a_rank_that_works_is_waited_for_and_a_silent_one_is_not(pair: Pair) -> None:
    def work(ranks: RankGroup) -> Any:
        with ranks.call("load", 1):
            ranks.run_on_all_ranks(lambda: time.sleep(3 * ranks.rank), 1, working=True)
        if ranks.rank == 1:
            time.sleep(3)  # outside of any call it gives no sign of life
        with ranks.call("load", 1):
            ranks.run_on_all_ranks(lambda: None, 1, working=True)

    for kind, text in pair(work):
        assert kind == "RanksDisagree" and "rank 1 of 2 gave no sign of life for 1 s" in text


def test_the_wait_for_an_outcome_overlaps_with_another_call(pair: Pair) -> None:
    def work(ranks: RankGroup) -> Any:
        may_end = threading.Event()
        waited = threading.Thread(target=lambda: ranks.run_on_all_ranks(may_end.wait, 10, key="step_1"))
        waited.start()
        time.sleep(0.3 * ranks.rank)
        with ranks.call("save step_2", 10):
            posts = ranks.decide_on_rank0({"rank": ranks.rank}, collect, 10)["posts"]
        may_end.set()
        waited.join(20)
        return [posts, waited.is_alive()]

    assert pair(work) == [[[{"rank": 0}, {"rank": 1}], False]] * 2


def test_an_error_that_its_text_alone_does_not_make_reaches_the_others_all_the_same(pair: Pair) -> None:
    def work(ranks: RankGroup) -> Any:
        def action() -> None:
            if ranks.rank == 1:
                raise SourceChanged("the weight was changed", 0, 8)

        ranks.run_on_all_ranks(action, 10)

    assert pair(work) == [["SaveFailed", "the weight was changed"]] * 2
