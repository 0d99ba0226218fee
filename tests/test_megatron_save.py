"""Megatron saves that replay a plan and copy under training, with real Megatron-core, CPU and gloo."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from megatron_worlds import FORMS, MISSING, NO_RESHARDABLE, UNGATHERED, Worlds

from roll_ckpt.transaction import verification

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def call(megatron: Worlds, case: str, *args: Any, **kwargs: Any) -> list[Any]:
    return megatron.at("DP2").call(f"megatron_save_cases:{case}", *args, **kwargs)


# --- copies under training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [True, False])
def test_a_save_under_training_holds_the_step_that_it_was_asked_at(
    megatron: Worlds, tmp_path: Path, bf16: bool
) -> None:
    for told in call(megatron, "step_while_copying", str(tmp_path / "run"), bf16):
        assert told == {"stepped": True, "differ": []}


def test_what_changes_the_model_waits_for_the_copies(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "change_while_copying", str(tmp_path / "run")):
        assert len(told) == 9
        assert all(late and fenced for late, fenced in told.values())


def test_a_step_that_does_not_wait_fails_the_save_by_name(megatron: Worlds, tmp_path: Path) -> None:
    for torn, after in call(megatron, "step_without_the_fence", str(tmp_path / "run")):
        assert "torn" in torn and re.search(r"distcp: '(embedding|decoder|optimizer)\.", torn) and "fence()" in torn
        assert after == "None"
    assert not (tmp_path / "run" / "torn").exists() and verification.verify(tmp_path / "run" / "next") == []


def test_a_change_by_other_means_is_never_saved_torn(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "change_by_other_means", str(tmp_path / "run")):
        assert told.pop("base step") == ("None", [])
        assert len(told) == 4
        assert all("SourceChanged" in failure for failure, _ in told.values()), told


def test_a_load_waits_for_the_copies_of_a_save(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "load_while_copying", str(tmp_path / "run")):
        assert told == {"step": 2, "old": [], "new": []}


def test_only_what_the_step_alone_changes_is_copied_late(megatron: Worlds, tmp_path: Path) -> None:
    late = {"main": [True], "moments": [True], "model": [True], "other": [False]}
    for told in call(megatron, "who_is_late", str(tmp_path / "bf16"), UNGATHERED, True):
        assert told == {"first": late, "replayed": late}


@pytest.mark.skipif(bool(NO_RESHARDABLE), reason=NO_RESHARDABLE)
def test_a_gathered_optimizer_is_copied_before_the_save_returns(megatron: Worlds, tmp_path: Path) -> None:
    late = {"model": [True], "other": [False]}
    for told in call(megatron, "who_is_late", str(tmp_path / "run"), "fully_reshardable", True):
        assert told == {"first": late, "replayed": late}


def test_without_overlap_nothing_is_copied_late(megatron: Worlds, tmp_path: Path) -> None:
    settings = {"staging": {"overlap": False}}
    for told in call(megatron, "who_is_late", str(tmp_path / "run"), UNGATHERED, True, **settings):
        assert all(late == [False] for turn in told.values() for late in turn.values())


@pytest.mark.parametrize("fail_training", [True, False])
def test_fail_training_raises_a_background_failure_at_the_next_step(
    megatron: Worlds, tmp_path: Path, fail_training: bool
) -> None:
    found = call(megatron, "fail_in_the_background", str(tmp_path / "run"), fail_training)
    for first, second, begun, third in found:
        assert first.startswith("SaveFailed") == fail_training and ("the disk is gone" in first) == fail_training
        assert second == "no error" and begun == "False"
        assert third.startswith("NoRoom" if fail_training else "no error")


# --- plans ---------------------------------------------------------------------------------------------------


def test_a_save_that_replays_a_plan_needs_no_collective_and_holds_its_own_step(
    megatron: Worlds, tmp_path: Path
) -> None:
    for told in call(megatron, "save_every_step", str(tmp_path / "run")):
        assert told["met"][0]["gather_object"] > 0
        assert told["met"][1:] == [{"decide_on_rank0": 2}] * 2
        assert told["found"] == [[]] * 3 and told["ours"] == []
        assert told["resumed"] == told["unbroken"]
    for step in range(3):
        assert verification.verify(tmp_path / "run" / f"iter_{step}") == []


REPLAYED = {"values", "common grows", "object grows a little", "large object again", "dtype again", "again"}


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_change_of_structure_on_any_rank_makes_all_plan_again(
    megatron: Worlds, tmp_path: Path, wrapped: bool
) -> None:
    for told in call(megatron, "change_structure", str(tmp_path / "run"), wrapped):
        assert {what: read for what, (_, read) in told.items() if not read} == {}
        # What grew keeps its larger slot when it shrinks again.
        assert {what for what, (replayed, _) in told.items() if replayed} == REPLAYED | {"object shrinks"}


def test_a_caller_that_begins_itself_replays_by_one_rendezvous_of_its_own(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "stage_without_prepare", str(tmp_path / "run")):
        assert all(read for _, read in told.values())
        assert {what for what, (collectives, _) in told.items() if not collectives} == {
            *("values", "common grows", "object grows a little", "large object again", "object shrinks")
        }


def test_a_rank_that_cannot_lay_out_votes_no_and_the_next_save_is_sound(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "fail_to_lay_out", str(tmp_path / "run")):
        sound, replayed, problems = zip(*told["told"], strict=True)
        assert sound == (False, True, False, True)
        assert replayed == (False, False, True, True)
        assert all("no such tensor" in problem for problem in (problems[0], problems[2]))


def test_a_state_that_stock_code_finds_invalid_fails_on_every_rank(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "invalid_sharding", str(tmp_path / "run")):
        assert told.startswith("SaveFailed") and "CheckpointingException" in told


def test_planning_does_not_bring_back_what_was_thrown_away(megatron: Worlds, tmp_path: Path) -> None:
    for found in call(megatron, "thrown_away_while_planning", str(tmp_path / "run")):
        assert found == []


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding_type", FORMS)
def test_a_save_before_the_first_step_is_refused_in_our_words(
    megatron: Worlds, tmp_path: Path, sharding_type: str
) -> None:
    for told, untouched in call(megatron, "save_before_the_first_step", str(tmp_path / "run"), sharding_type):
        assert told.startswith("SaveFailed") and "no step yet" in told and sharding_type in told
        assert untouched


def test_ranks_that_see_different_manifests_are_told_so(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "load_what_one_rank_does_not_see", str(tmp_path / "run")):
        assert told.startswith("RanksDisagree") and "rank 1" in told


# --- overlap_param_gather ------------------------------------------------------------------------------------


def test_parameters_that_are_gathered_late_are_gathered_for_the_save(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "gather_late", str(tmp_path / "run")):
        assert told["differ"] == [[], []]
        assert told["losses True"] == told["losses False"]
        assert told["late True"] == {"parameters": [False], "others": [False, True]}
        assert True in told["late False"]["parameters"]
        assert told["resumed"] == told["losses True"][-1:]
