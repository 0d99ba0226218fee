"""The tensor index alone puts every model together again, whatever saved it. Its bytes: tests/test_tensor_format.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from megatron_worlds import FORMS, FOUR_RANKS, MISSING, TWO_RANKS, Worlds
from worlds import ROOT, World

from roll_ckpt.formats import manifests
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.transaction import listing, verification

CASES = "tensor_index_cases"
STATES = {"exp_avg", "exp_avg_sq"}


TIED = ("head.weight",)
"""The second name of a tied weight, which ZeRO-3, whose files have masters alone, does not know."""


def check(told: dict[str, Any], *, roles: set[str], lacks: tuple[str, ...] = ()) -> None:
    """Nothing has other bits, or is there that should not; what is missing has a part of its name in `lacks`."""
    assert told["differs"] == [] and told["beyond"] == []
    assert [missing for missing in told["lacks"] if not any(part in missing[0] for part in lacks)] == []
    assert {*told["roles"], *(["parameter"] if told.get("cast") else [])} == roles


ZERO = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("bf16", "fp32")]


@pytest.mark.parametrize(("stage", "precision"), ZERO)
def test_zero(two_ranks: World, tmp_path: Path, stage: int, precision: str) -> None:
    for told in two_ranks.call(f"{CASES}:of_zero", str(tmp_path), stage, precision):
        masters = {"master"} if stage or precision == "bf16" else set()
        check(told, roles={"parameter", *masters, *STATES}, lacks=TIED if stage == 3 else ())
        assert told["cast"] == (9 if stage == 3 else 0)
        assert told["roles"]["exp_avg"] == 9


CPU = {"device": "cpu", "pin_memory": False}
OFFLOAD = [
    (1, {"offload_optimizer": CPU}),
    (2, {"offload_optimizer": CPU}),
    (3, {"offload_optimizer": CPU, "offload_param": CPU}),
    (3, {"zero_hpz_partition_size": 2}),
]


@pytest.mark.parametrize(("stage", "more"), OFFLOAD)
def test_zero_with_offload_or_second_partitions(
    two_ranks: World, tmp_path: Path, stage: int, more: dict[str, Any]
) -> None:
    for told in two_ranks.call(f"{CASES}:of_zero", str(tmp_path), stage, "bf16", **more):
        check(told, roles={"parameter", "master", *STATES}, lacks=TIED if stage == 3 else ())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_that_are_offloaded_when_they_are_saved(two_ranks: World, tmp_path: Path, stage: int) -> None:
    for told in two_ranks.call(f"{CASES}:of_offloaded", str(tmp_path), stage):
        check(told, roles={"parameter", "master", *STATES}, lacks=TIED if stage == 3 else ())


@pytest.mark.parametrize(("stage", "sub_group_size"), [(1, 0), (2, 0), (3, 10**9), (3, 500)])
def test_several_groups_of_parameters(two_ranks: World, tmp_path: Path, stage: int, sub_group_size: int) -> None:
    for told in two_ranks.call(f"{CASES}:of_groups", str(tmp_path), stage, sub_group_size or 10**9):
        check(told, roles={"parameter", "master", *STATES}, lacks=TIED if stage == 3 else ())


@pytest.mark.parametrize("more", [{"round_robin_gradients": True}, {"parameter_alignment": True}])
def test_partitions_that_deepspeed_orders_or_pads_otherwise(
    two_ranks: World, tmp_path: Path, more: dict[str, Any]
) -> None:
    for told in two_ranks.call(f"{CASES}:of_other_orders", str(tmp_path), **more):
        check(told, roles={"parameter", "master", *STATES})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_optimizer_with_a_state_of_its_own(two_ranks: World, tmp_path: Path, stage: int) -> None:
    for told in two_ranks.call(f"{CASES}:of_momentum", str(tmp_path), stage):
        check(told, roles={"parameter", "master", "momentum_buffer"}, lacks=TIED if stage == 3 else ())


def test_frozen_parameters_that_are_left_out(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:without_frozen", str(tmp_path)):
        check(told, roles={"parameter", "master", *STATES}, lacks=("frozen",))
        assert len(told["lacks"]) == 2


KINDS: dict[str, tuple[Any, ...]] = {
    "LoRA": ("with_lora",),
    "MoE, ZeRO-2": ("with_experts", 2),
    "PipelineModule": ("with_stages", 1),
    "Ulysses": ("with_sequence_parallel", 2),
    "AutoTP, ZeRO-2": ("with_tensor_parallel", 2),
}
DEEPER: dict[str, tuple[Any, ...]] = {
    "MoE, ZeRO-0": ("with_experts", 0),
    "MoE, ZeRO-1": ("with_experts", 1),
    "Ulysses, ZeRO-3": ("with_sequence_parallel", 3),
    "AutoTP, ZeRO-0": ("with_tensor_parallel", 0),
    "AutoTP, ZeRO-3": ("with_tensor_parallel", 3),
    "BF16_Optimizer": ("with_zero", 1, "fp32"),
}


@pytest.mark.parametrize("name", [*KINDS, *DEEPER])
def test_engines_of_other_kinds(two_ranks: World, tmp_path: Path, name: str) -> None:
    for told in two_ranks.call(f"{CASES}:of_kind", str(tmp_path), *{**KINDS, **DEEPER}[name]):
        check(told, roles={"parameter", "master", *STATES}, lacks=TIED if "ZeRO-3" in name else ())


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_that_deepspeed_spreads_by_itself(two_ranks: World, tmp_path: Path, stage: int) -> None:
    for told in two_ranks.call(f"{CASES}:of_autoep", str(tmp_path), stage):
        check(told, roles={"parameter", "master", *STATES}, lacks=("gate.gate.weight",) if stage == 3 else ())
        assert told["roles"]["master"] == 13


def test_flat_masters_below_zero_1(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:of_fused", str(tmp_path)):
        check(told, roles={"parameter", "master", *STATES})


def test_a_cluster_that_saves_its_weights_alone(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:of_model_only", str(tmp_path / "run")):
        check(told, roles={"parameter"})


def test_each_save_of_a_run_tells_of_itself(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:of_each_step", str(tmp_path)):
        for step in told:
            check(step, roles={"parameter", "master", *STATES})
        indexes = [step["bytes"] for step in told]
        assert indexes[0] == indexes[1] != indexes[2] == indexes[3]


# --- Megatron -------------------------------------------------------------------------------------

needs_megatron = pytest.mark.skipif(bool(MISSING), reason=MISSING)
MORE = ("PP2xVPP2",)
LAYOUTS = [
    *TWO_RANKS,
    *MORE,
    *(pytest.param(layout, marks=pytest.mark.matrix) for layout in FOUR_RANKS),
]


@needs_megatron
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bf16", [True, False])
def test_megatron(megatron: Worlds, tmp_path: Path, layout: str, form: str, bf16: bool) -> None:
    case = "tensor_index_megatron_cases:index"
    for told in megatron.at(layout).call(case, layout, str(tmp_path), form, bf16=bf16):
        for save in told:
            assert save["lacks"] == [] and save["beyond"] == [] and save["differs"] == []
            assert save["roles"] == ["exp_avg", "exp_avg_sq", "master", "parameter"]


@needs_megatron
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("layout", "kind"), [("TP2", "gated"), ("DP2", "gated"), ("PP2", "tied"), ("DP2", "tied")])
def test_megatron_with_gated_layers_and_tied_embeddings(
    megatron: Worlds, tmp_path: Path, layout: str, kind: str, form: str
) -> None:
    case = "tensor_index_megatron_cases:index"
    for told in megatron.at(layout).call(case, layout, str(tmp_path), form, **{kind: True}):
        for save in told:
            assert save["lacks"] == [] and save["beyond"] == [] and save["differs"] == []


@needs_megatron
def test_megatron_state_that_nobody_attached(megatron: Worlds, tmp_path: Path) -> None:
    case = "tensor_index_megatron_cases:index_without_optimizer"
    for told in megatron.at("DP2").call(case, "DP2", str(tmp_path)):
        assert told == {"lacks": [], "beyond": [], "differs": [], "roles": ["parameter"]}


# --- checkpoints of format 1 ----------------------------------------------------------------------

FORMAT_1 = ROOT / "tests" / "data" / "format1"


@pytest.fixture
def format_1(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMAT_1 / "checkpoint-1", tmp_path / "run" / "checkpoint-1"))


def test_a_checkpoint_of_format_1_is_sound_and_listed(format_1: Path) -> None:
    assert verification.verify(format_1) == []
    assert manifests.read(format_1).format == 1
    assert [found.name for found in listing.newest_first(format_1.parent)] == ["checkpoint-1"]
    opened = OpenedCheckpoint(format_1)
    assert opened.parameters("actor", 1)["norm.weight"] == {"dtype": "bfloat16", "shape": [16]}
    assert opened.tensor_index("actor", 0) is None


def test_the_manifest_of_an_attempt_of_format_1_is_of_format_1(format_1: Path) -> None:
    """An attempt that an older roll_ckpt began and left, with all votes cast, is finished as it would have been."""
    votes = {path.name: path.read_bytes() for path in (format_1 / "votes").iterdir() if path.name != "expected.json"}
    expected = (format_1 / "votes" / "expected.json").read_bytes()
    assert manifests.build(votes, expected) == (format_1 / "manifest.json").read_bytes()


def test_a_run_resumes_from_a_checkpoint_of_format_1(two_ranks: World, format_1: Path) -> None:
    known = json.loads((FORMAT_1 / "known.json").read_text())
    for told in two_ranks.call(f"{CASES}:resume_format_1", str(format_1.parent)):
        assert told == known
    assert manifests.read(format_1.parent / "checkpoint-2").format == 3
    assert verification.verify(format_1.parent / "checkpoint-2") == []
