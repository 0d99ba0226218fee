"""A pipeline with one cluster under DeepSpeed and one under Megatron-core, on two torchrun ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron_worlds import MISSING, Worlds
from worlds import World

from roll_ckpt.formats import manifests
from roll_ckpt.transaction import verification

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

CASES = "mixed_cases"


@pytest.fixture(scope="module")
def megatron() -> Iterator[Worlds]:
    """Worlds of this module's own: a process has one arena, and the other modules ask for one of another size."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture
def ranks(megatron: Worlds) -> World:
    return megatron.at("DP2")


def test_both_resume_on_the_same_losses_while_saves_overlap_training(ranks: World, tmp_path: Path) -> None:
    for unbroken, resumed in ranks.call(f"{CASES}:resumed", str(tmp_path / "run")):
        assert resumed == unbroken
    checkpoint_dir = tmp_path / "run" / "checkpoint-1"
    assert verification.verify(checkpoint_dir) == []
    facts = manifests.read(checkpoint_dir).clusters
    assert facts["actor"]["framework"] == "deepspeed" and facts["critic"]["framework"] == "megatron-core"
    assert facts["critic"]["layout"]["dp"] == 2


def test_a_critic_in_another_layout_resumes_bit_for_bit(ranks: World, tmp_path: Path) -> None:
    for different in ranks.call(f"{CASES}:resumed_elsewhere", str(tmp_path / "run")):
        assert different == []


def test_another_critic_is_refused_before_the_actor_is_touched(ranks: World, tmp_path: Path) -> None:
    for outcome, untouched in ranks.call(f"{CASES}:another_critic", str(tmp_path / "run")):
        assert outcome.startswith("ModelMismatch") and "critic" in outcome and "shape" in outcome
        assert untouched


def test_a_cluster_saved_under_another_framework_is_refused(ranks: World, tmp_path: Path) -> None:
    for outcome in ranks.call(f"{CASES}:another_framework", str(tmp_path / "run")):
        assert outcome.startswith("ModelMismatch")
        assert "cluster critic" in outcome and "megatron-core" in outcome and "deepspeed" in outcome


def test_pretrained_files_and_client_state_come_with_a_megatron_cluster(ranks: World, tmp_path: Path) -> None:
    for outcome in ranks.call(f"{CASES}:pretrained_files", str(tmp_path / "run")):
        assert outcome == {"epochs": 3}
    checkpoint_dir = tmp_path / "run" / "checkpoint-1"
    assert "critic/config.json" in {receipt.path for receipt in manifests.read(checkpoint_dir).files}
    assert verification.verify(checkpoint_dir) == []


def test_what_a_safe_load_refuses_is_told_at_the_save_and_before_anything_is_loaded(
    ranks: World, tmp_path: Path
) -> None:
    for outcome, untouched, allowed in ranks.call(f"{CASES}:unloadable_client_state", str(tmp_path / "run")):
        assert (
            outcome.startswith("UnsupportedError")
            and "common.pt" in outcome
            and "load.allow" in outcome
            and "Custom" in outcome
        )
        assert untouched
        assert allowed == "Custom"
    assert "holds mixed_cases.Custom, which a safe load refuses" in ranks.log()


def test_a_cluster_that_saves_only_its_model_does_not_resume(ranks: World, tmp_path: Path) -> None:
    for outcome, untouched in ranks.call(f"{CASES}:only_model_resumes", str(tmp_path / "run")):
        assert outcome.startswith("UnsupportedError") and "save_only_model" in outcome and "cluster critic" in outcome
        assert untouched


def test_a_component_that_was_not_saved_is_missed_before_anything_is_loaded(ranks: World, tmp_path: Path) -> None:
    for outcome, untouched in ranks.call(f"{CASES}:new_component", str(tmp_path / "run")):
        assert outcome.startswith("NotFound") and "'loader'" in outcome
        assert untouched


@pytest.mark.long
def test_another_number_of_ranks_is_refused_before_anything_is_loaded(megatron: Worlds, tmp_path: Path) -> None:
    megatron.at("DP2").call(f"{CASES}:save_critic_alone", str(tmp_path / "run"))
    place = str(tmp_path / "elsewhere"), str(tmp_path / "run" / "checkpoint-1")
    for outcome, untouched in megatron.at("DP1").call(f"{CASES}:resume_critic_alone", *place):
        assert outcome.startswith("UnsupportedError") and "2 ranks saved cluster critic" in outcome
        assert untouched


def test_an_error_before_megatron_plans_holds_nobody_up(ranks: World, tmp_path: Path) -> None:
    for outcome in ranks.call(f"{CASES}:no_directory", str(tmp_path / "run")):
        assert all(problem.startswith("SaveFailed") and "no more directories" in problem for problem in outcome)
    saved = [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")]
    assert sorted(saved) == ["checkpoint-2", "checkpoint-4", "latest"]


def test_a_companion_with_the_name_of_a_frameworks_file_fails_the_save(ranks: World, tmp_path: Path) -> None:
    for outcome in ranks.call(f"{CASES}:collision", str(tmp_path / "run")):
        assert outcome.startswith("SaveFailed") and "metadata.json" in outcome and "cluster critic" in outcome
    assert not list((tmp_path / "run").glob("*checkpoint-*"))


def test_weights_alone_hold_no_optimizer_and_cannot_be_resumed(ranks: World, tmp_path: Path) -> None:
    for outcome, held in ranks.call(f"{CASES}:only_model", str(tmp_path / "run")):
        assert outcome.startswith("NotFound") and "save_only_model" in outcome
        assert held and not [name for name in held if name.startswith("optimizer")]


def test_what_cannot_be_meant_is_refused_by_name(ranks: World, tmp_path: Path) -> None:
    for outcome in ranks.call(f"{CASES}:refusals", str(tmp_path / "run")):
        assert outcome["frozen"].startswith("UnsupportedError") and "exclude_frozen_parameters" in outcome["frozen"]
        assert outcome["neither"].startswith("ConfigError") and "Tiny" in outcome["neither"]
        assert outcome["form"].startswith("UnsupportedError") and "fully_sharded_model_space" in outcome["form"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("background", [True, False])
def test_an_error_out_of_one_cluster_holds_nobody_up(ranks: World, tmp_path: Path, background: bool) -> None:
    outcome = ranks.call(f"{CASES}:escaping", str(tmp_path / "run"), background)
    assert outcome[1][0] == "out of the actor" and outcome[0][0] == "rank 1: RuntimeError: out of the actor"
    assert [left for _, left in outcome] == [["checkpoint-2"]] * 2


@pytest.mark.parametrize("background", [True, False])
def test_a_cluster_that_fails_before_it_can_vote_is_no_vote(ranks: World, tmp_path: Path, background: bool) -> None:
    for outcome, *left in ranks.call(f"{CASES}:failing_early", str(tmp_path / "run"), background):
        assert outcome == "RuntimeError: the actor is not there"
        assert left == ["checkpoint-2"]


def test_a_warm_save_meets_when_it_begins_and_when_it_is_staged(ranks: World, tmp_path: Path) -> None:
    for planned, replayed in ranks.call(f"{CASES}:rendezvous", str(tmp_path / "run")):
        assert planned[0] == 2 and planned[1] > 0
        assert replayed == [2, 0]
