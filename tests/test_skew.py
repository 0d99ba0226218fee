"""One rank fails and the others do not: all are told, no older checkpoint is lost, and the next save works."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import World

CASES = "skew_cases"

ONE_FAILS = [
    ("prepare", "broken", 1),
    ("begin", "full", 0),
    ("stage", "broken", 1),
    ("stage", "full", 0),
    ("stage", "hung", 1),
    ("vote", "full", 1),
    ("vote", "broken", 0),
    ("settle", "full", 1),
    ("upload", "full", 0),
    ("load", "broken", 1),
]


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("phase, how, failing", ONE_FAILS)
def test_what_fails_on_one_rank_is_told_to_all_and_the_next_save_works(
    two_ranks: World, tmp_path: Path, phase: str, how: str, failing: int, asynchronous: bool
) -> None:
    answers = two_ranks.call(f"{CASES}:one_fails", str(tmp_path), phase, how, failing, asynchronous)
    at_once = phase in ("prepare", "stage") or (phase in ("begin", "vote", "upload") and not asynchronous)
    for rank, (second, outcome, loaded, third, *steps) in enumerate(answers):
        assert third == "" and steps == [1, 3], (rank, second, outcome, loaded, third)
        if phase == "load":
            reason = "ValueError: it is broken"
            assert loaded == (reason if rank == failing else f"SaveFailed: rank {failing}: {reason}")
        elif at_once and how != "hung":
            assert second, f"rank {rank} went on"
        elif how == "hung":
            assert "rank 1" in second or "it hung" in second


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "stage, method, failing",
    [
        (2, "state_dict", 1),
        (3, "state_dict", 0),
        (0, "_common_checkpoint_state", 1),
    ],
)
def test_an_error_of_deepspeeds_own_code_on_one_rank_holds_nobody_up(
    two_ranks: World, tmp_path: Path, stage: int, method: str, failing: int, asynchronous: bool
) -> None:
    answers = two_ranks.call(f"{CASES}:deepspeed_raises", str(tmp_path), stage, method, failing, asynchronous)
    assert answers[failing] == ["ValueError: it is broken", "", "good", "next"]
    assert answers[1 - failing] == [f"SaveFailed: rank {failing}: ValueError: it is broken", "", "good", "next"]


def test_what_only_one_rank_knows_before_a_save_begins_is_raised_on_all(two_ranks: World, tmp_path: Path) -> None:
    for first, second in two_ranks.call(f"{CASES}:engine_fails_at_the_fence", str(tmp_path)):
        assert first.startswith("SaveFailed: the save was not begun: rank 1: ") and "cannot be saved" in first
        assert second == ""


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("where", ["component", "client_state", "upload"])
def test_what_fails_on_one_rank_of_a_pipeline_is_raised_on_all(
    two_ranks: World, tmp_path: Path, where: str, background: bool
) -> None:
    answers = two_ranks.call(f"{CASES}:pipeline_fails", str(tmp_path / "run"), where, background)
    reason = "the hub said no" if where == "upload" else "it is broken"
    assert all(reason in first and second == "" for first, second in answers)


def test_a_save_on_one_rank_and_a_load_on_another_are_told_at_once(two_ranks: World, tmp_path: Path) -> None:
    for first, second in two_ranks.call(f"{CASES}:save_while_another_loads", str(tmp_path)):
        assert first.startswith("RanksDisagree") and f"rank 0 is in save step_2 to {tmp_path}" in first
        assert f"rank 1 is in load {tmp_path}/step_1" in first
        assert second == ""
