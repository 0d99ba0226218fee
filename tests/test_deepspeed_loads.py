"""`engine.load_checkpoint` without the optimizer, and what it refuses, with real DeepSpeed on CPU and gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import World

CASES = "deepspeed_load_cases"

NO_OPTIMIZER = {"load_optimizer_states": False}
MODULE_ONLY = {"load_module_only": True}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[World]:
    world = World(1, torchrun=False)
    yield world
    world.close()


def check_loaded(loads: list[dict[str, Any]]) -> None:
    for load in loads:
        assert load["other weights"] == [] and load["buffers"], load
        assert load["path"] and load["note"] == "kept", load
        assert load["moved"] < 0.05, f"a step brought other weights back: {load}"
        assert load["steps"] == (0 if "load_module_only" in load["told"] else 2), load


def test_weights_alone_come_from_the_tag_asked_for_into_every_stage(two_ranks: World, tmp_path: Path) -> None:
    saved = [(0, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")]
    two_ranks.call(f"{CASES}:saved_at", str(tmp_path), saved, "ours")
    for latest in tmp_path.glob("*/latest"):
        latest.unlink()
    loads = [
        *(((stage, "bf16"), (stage, "bf16"), how) for stage in (0, 2, 3) for how in (NO_OPTIMIZER, MODULE_ONLY)),
        ((3, "fp32"), (3, "fp32"), NO_OPTIMIZER),
        *(((3, "fp32"), (stage, "fp32"), NO_OPTIMIZER) for stage in (0, 1, 2)),
        *(((3, "bf16"), (stage, "bf16"), MODULE_ONLY) for stage in (0, 1)),
        *(((stage, "bf16"), (3, "bf16"), NO_OPTIMIZER) for stage in (0, 2)),
    ]
    for found in two_ranks.call(f"{CASES}:loaded_from", str(tmp_path), loads):
        check_loaded(found)


@pytest.mark.parametrize("by", ["ours", "stock"])
def test_weights_alone_load_on_another_number_of_ranks(
    two_ranks: World, one_rank: World, tmp_path: Path, by: str
) -> None:
    loads = [
        ((3, "bf16"), (3, "bf16"), NO_OPTIMIZER),
        ((3, "bf16"), (3, "bf16"), MODULE_ONLY),
        ((2, "fp32"), (2, "fp32"), NO_OPTIMIZER),
        ((3, "bf16"), (1, "bf16"), NO_OPTIMIZER),
        ((2, "fp32"), (3, "fp32"), MODULE_ONLY),
    ]
    for save, load in ((two_ranks, one_rank), (one_rank, two_ranks)):
        out = str(tmp_path / str(save.size))
        save.call(f"{CASES}:saved_at", out, [(3, "bf16"), (2, "fp32")], by)
        for found in load.call(f"{CASES}:loaded_from", out, loads):
            check_loaded(found)
    assert by == "ours" or "cannot be verified" in one_rank.log()


def test_weights_of_stock_load_into_parameters_on_the_cpu(two_ranks: World, tmp_path: Path) -> None:
    assert all(found["same"] for found in two_ranks.call(f"{CASES}:weights_offloaded", str(tmp_path)))


def test_a_custom_load_function_gets_whole_weights_under_zero_3(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:custom", str(tmp_path)):
        assert found == {"given": True, "tied": True, "twice": True}


def test_another_model_is_refused_unless_names_may_be_missing(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:other_model", str(tmp_path)):
        strict, loose = found["True"], found["False"]
        assert strict["told"].startswith("ModelMismatch") and "more.weight" in strict["told"] and strict["unchanged"]
        assert loose["told"] == "nothing was raised" and loose["loaded"] and loose["kept"]


def test_weights_alone_run_no_code_of_a_checkpoint(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:runs_code", str(tmp_path)):
        assert found["told"].startswith("UnsupportedError") and found["unchanged"] and not found["ran"]


# --- refused loads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "pairs"), [("ours", [(0, 1), (1, 0), (3, 2)]), ("stock", [(0, 2), (1, 0), (2, 3)])])
def test_another_zero_stage_is_refused_before_anything_changes(
    two_ranks: World, tmp_path: Path, by: str, pairs: list[tuple[int, int]]
) -> None:
    for found in two_ranks.call(f"{CASES}:refused_stages", str(tmp_path), pairs, by):
        for (saved, live), refusal in zip(pairs, found, strict=True):
            assert refusal["told"].startswith("ModelMismatch") and refusal["unchanged"]
            assert f"saved at ZeRO stage {saved}" in refusal["told"] and f"stage {live}" in refusal["told"]
            assert "load_optimizer_states=False" in refusal["told"] and refusal["steps"] == 1


@pytest.mark.parametrize(
    ("by", "stage"),
    [("ours", 2), *(pytest.param(*case, marks=pytest.mark.long) for case in (("ours", 0), ("stock", 3)))],
)
def test_another_optimizer_is_refused_before_anything_changes(
    two_ranks: World, tmp_path: Path, by: str, stage: int
) -> None:
    pairs = [("sgd", "adamw"), ("momentum", "adamw"), ("adamw", "momentum"), ("rmsprop", "adagrad")]
    alike = [("adam", "adamw"), ("sgd", "momentum"), ("momentum", "sgd")]
    for found in two_ranks.call(f"{CASES}:other_optimizers", str(tmp_path), pairs + alike, stage, by):
        for refusal in found[: len(pairs)]:
            assert refusal["told"].startswith("ModelMismatch") and refusal["unchanged"], refusal
            assert "its optimizer was" in refusal["told"] and "this engine's is" in refusal["told"]
        for allowed in found[len(pairs) :]:
            assert allowed["told"] == "nothing was raised" and allowed["steps"] == 2, allowed


@pytest.mark.parametrize("by", ["ours", pytest.param("stock", marks=pytest.mark.long)])
def test_another_precision_is_refused_before_anything_changes(two_ranks: World, tmp_path: Path, by: str) -> None:
    for found in two_ranks.call(f"{CASES}:other_precisions", str(tmp_path), by):
        for refusal in found:
            assert refusal["told"].startswith("ModelMismatch") and refusal["unchanged"], refusal
            assert "this engine" in refusal["told"] and refusal["steps"] == 1


def test_a_missing_tag_is_refused_with_those_that_are_there(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:missing_tags", str(tmp_path)):
        assert found.pop("nothing there")["returned"] == [(None, None)] * 2
        for refusal in found.values():
            assert refusal["told"].startswith("NotFound") and refusal["unchanged"], refusal
        assert "third, second, first" in found["asked"]["told"]
        assert "theirs" in found["of stock"]["told"]
        assert "no tag gone" in found["latest"]["told"] and "theirs" in found["latest"]["told"]


def test_what_is_no_checkpoint_of_deepspeed_is_named(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:foreign_kinds", str(tmp_path)):
        assert found["plain"]["told"].startswith("ModelMismatch") and "StateSaver" in found["plain"]["told"]
        assert found["pipeline"]["told"].startswith("NotFound") and "actor" in found["pipeline"]["told"]
        assert found["none"]["told"].startswith("NotFound") and "no DeepSpeed checkpoint" in found["none"]["told"]
        assert all(refusal["unchanged"] for refusal in found.values())


@pytest.mark.parametrize(("stage", "how"), [(2, {}), (3, NO_OPTIMIZER)])
def test_damage_that_one_rank_finds_stops_all_before_anything_changes(
    two_ranks: World, tmp_path: Path, stage: int, how: dict[str, Any]
) -> None:
    for refusal in two_ranks.call(f"{CASES}:damaged_on_one_rank", str(tmp_path), stage, how):
        assert refusal["told"].startswith("Damaged") and "rank_1" in refusal["told"] and refusal["unchanged"]


def test_stages_1_and_2_and_offload_on_and_off_load_each_others(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:goes_on", str(tmp_path)):
        assert all(found.values()), found
