"""The rendezvous of two processes over a real store."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from pairs import Pair, outcome

from roll_ckpt.errors import ConfigError, Damaged, NoRoom, RanksDisagree, RollCkptError, RunIsLive, SaveFailed
from roll_ckpt.ranks import rendezvous
from roll_ckpt.ranks.group import RankGroup


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
