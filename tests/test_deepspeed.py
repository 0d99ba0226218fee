"""The DeepSpeed backend with real DeepSpeed on two torchrun ranks, CPU and gloo."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from worlds import ROOT, World, environment

from roll_ckpt.transaction import verification

CASES = "deepspeed_cases"

MATRIX = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("bf16", "fp32")]


@pytest.mark.core("deepspeed")
@pytest.mark.parametrize(("stage", "precision"), MATRIX)
def test_stock_and_we_continue_alike_from_what_we_saved(
    two_ranks: World, tmp_path: Path, stage: int, precision: str
) -> None:
    out = str(tmp_path / "run")
    for losses in two_ranks.call(f"{CASES}:save_with_us_load_with_all", out, stage, precision):
        assert losses["stock"] == losses["unbroken"]
        assert losses["ours"] == losses["unbroken"]
    files = sorted((tmp_path / "run").rglob("*.pt"))
    assert files
    for file in files:
        assert zipfile.ZipFile(file).testzip() is None


@pytest.mark.core("deepspeed")
@pytest.mark.parametrize(("stage", "precision"), MATRIX)
def test_we_continue_alike_from_what_stock_saved(two_ranks: World, tmp_path: Path, stage: int, precision: str) -> None:
    for losses in two_ranks.call(f"{CASES}:save_with_stock_load_with_us", str(tmp_path), stage, precision):
        assert losses["ours"] == losses["unbroken"]
    assert "cannot be verified" in two_ranks.log()


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.long) for stage in (1, 2)), 3])
def test_deepspeed_tools_read_our_files(two_ranks: World, tmp_path: Path, stage: int) -> None:
    two_ranks.call(f"{CASES}:write_for_tools", str(tmp_path / "run"), stage)
    script = tmp_path / "run" / "zero_to_fp32.py"
    tool(str(script), str(tmp_path / "run"), str(tmp_path / "fp32"))
    assert list((tmp_path / "fp32").iterdir())
    inject = ["--inject_missing_state"] if stage < 3 else []
    tool(
        *("-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(tmp_path / "run" / "global_step2")),
        *("--output_folder", str(tmp_path / "universal"), "--num_extract_workers", "1"),
        *("--num_merge_workers", "1", *inject),
    )
    assert (tmp_path / "universal" / "zero").is_dir()


def tool(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stage", [2, 3])
def test_a_state_four_times_the_arena_streams_through_it(two_ranks: World, tmp_path: Path, stage: int) -> None:
    for found in two_ranks.call(f"{CASES}:stream_through_a_quarter", str(tmp_path), stage):
        assert found["same"]
        assert found["capacity"] <= found["state"] / 4 + (1 << 17)
        assert 0 < found["peak"] <= found["capacity"]


def test_saves_at_every_step_hold_each_step(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:overlapping_saves", str(tmp_path)):
        assert found["losses"] == found["again"]
        assert found["latest"] == "t2"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_second_save_of_a_tag_wins(two_ranks: World, tmp_path: Path, asynchronous: bool) -> None:
    for found in two_ranks.call(f"{CASES}:save_one_tag_twice", str(tmp_path), asynchronous):
        assert found["losses"] == found["again"]
        assert found["step"] == 2


def test_frozen_parameters_can_be_left_out(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:leave_frozen_out", str(tmp_path)):
        assert found["frozen"] == [] and found["names"] > 5


@pytest.mark.parametrize("stage", [2, 3])
def test_16bit_model_is_stocks_and_leaves_no_temporary(two_ranks: World, tmp_path: Path, stage: int) -> None:
    for found in two_ranks.call(f"{CASES}:write_16bit_model", str(tmp_path), stage):
        assert found["same"] and found["files"] == ["stock.bin", "weights.bin"]


def test_a_failed_16bit_model_is_raised_on_every_rank(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:fail_16bit_model", str(tmp_path)):
        assert told.startswith("SaveFailed") and "weights.bin" in told


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_on_one_rank_hangs_nobody_and_commits_nothing(
    two_ranks: World, tmp_path: Path, asynchronous: bool
) -> None:
    for found in two_ranks.call(f"{CASES}:fail_on_one_rank", str(tmp_path / "run"), asynchronous):
        told = found["failures"][0] if asynchronous else found["told"]
        assert "rank 1" in told and "bad" in told and "abandoned" in told
        assert found["latest"] == "good"
        assert {"good", "next", "latest"} <= set(found["entries"]) and "bad" not in found["entries"]
        assert not [entry for entry in found["entries"] if entry.endswith(".tmp")]


def test_fail_training_raises_a_background_failure_at_the_next_fence(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:raise_at_the_fence", str(tmp_path)):
        assert told.startswith("SaveFailed") and "rank 1" in told


def test_ranks_that_disagree_touch_nothing(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:disagree_on_the_tag", str(tmp_path / "run")):
        assert found["told"].startswith("RanksDisagree") and "rank0" in found["told"] and "rank1" in found["told"]
        assert not found["touched"]


def test_ranks_with_different_settings_are_told_before_training(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:start_unlike", str(tmp_path / "run")):
        assert told.startswith("ConfigError: this DeepSpeed engine: run_id is 'rank 0' on rank 0 and 'rank 1' on")


@pytest.mark.parametrize("tag", ["a/../b", ".trash", "latest", ""])
def test_a_tag_that_cannot_be_a_name_touches_nothing(two_ranks: World, tmp_path: Path, tag: str) -> None:
    for found in two_ranks.call(f"{CASES}:bad_tag", str(tmp_path / "run"), tag):
        assert "tag" in found["told"] and not found["touched"]


def test_too_little_room_is_told_before_the_first_byte(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:lack_of_room", str(tmp_path / "run")):
        assert found["told"].startswith("NoRoom") and "1,000" in found["told"] and not found["touched"]


def test_another_model_is_refused_with_ten_differences(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:another_model", str(tmp_path)):
        assert found["told"].startswith("ModelMismatch") and found["untouched"]
        assert found["told"].count("shape [") == 10 and "more" in found["told"]


@pytest.mark.parametrize(
    "file",
    [
        "mp_rank_00_model_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "digests/model.0.json",
        "manifest.json",
    ],
)
def test_a_flipped_bit_is_refused_by_name_at_load(two_ranks: World, tmp_path: Path, file: str) -> None:
    for told in two_ranks.call(f"{CASES}:load_after_flip", str(tmp_path), file):
        assert told.startswith("Damaged") and file in told


def test_latest_wins_when_it_names_a_tag_else_the_newest(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:loads_with_edited_latest", str(tmp_path)):
        assert found == {"global_step1": "global_step1", "no_such_tag": "global_step2", None: "global_step2"}


def test_two_engines_of_one_process_do_not_disturb_each_other(two_ranks: World, tmp_path: Path) -> None:
    assert two_ranks.call(f"{CASES}:two_engines", str(tmp_path)) == [True, True]


def test_a_warm_save_adds_two_rendezvous_to_deepspeeds_own(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:collectives_of_one_save", str(tmp_path)):
        assert found["ours"] == 2 and found["other"] == 0
        assert found["barrier"] <= 2 and found["all_reduce"] <= 2


def test_what_changes_after_the_save_does_not_reach_the_file(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:changes_after_save_stay_out", str(tmp_path)):
        assert found == {"buffer": True, "client": True, "frozen": True, "late": True, "weight": True}


def test_a_failure_before_staging_commits_nothing(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:fails_before_staging", str(tmp_path)):
        assert "ZeroDivisionError" in found["told"] and "rank 0" in found["told"]
        assert "t" not in found["entries"] and "next" in found["entries"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_changes_the_state_waits_for_the_copies(two_ranks: World, tmp_path: Path, stage: int) -> None:
    for rank, told in enumerate(two_ranks.call(f"{CASES}:change_before_the_copies", str(tmp_path), stage)):
        writes = stage > 0 or rank == 0
        assert told and told == dict.fromkeys(told, (writes, True, "None"))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_that_does_not_wait_fails_the_save_by_name(two_ranks: World, tmp_path: Path, stage: int) -> None:
    for torn, after in two_ranks.call(f"{CASES}:step_without_the_fence", str(tmp_path), stage):
        assert "torn" in torn and re.search(r"_states\.pt: '(module|optimizer_state_dict)\.", torn)
        assert "roll_ckpt.fence()" in torn
        assert after == "None"
    assert not (tmp_path / "torn").exists() and verification.verify(tmp_path / "next") == []


def test_files_of_others_in_a_tag_are_not_deleted(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:foreign_files", str(tmp_path)):
        assert told == "nothing was raised" * 2


def test_an_error_of_the_disk_in_begin_is_raised_on_every_rank(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:os_error_in_begin", str(tmp_path)):
        assert "No space left" in told


NVME = {"device": "nvme", "nvme_path": "SWAP"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"checkpoint": {"roll_ckpt": {"asinc_save": True}}}, "did you mean 'async_save'"),
    "writer": ({"checkpoint": {"roll_ckpt": {}, "writer": {"type": "MOCK"}}}, "checkpoint.writer"),
    "datastates": ({"datastates_ckpt": {"some": "key"}}, "datastates_ckpt"),
    "node-local": ({"checkpoint": {"roll_ckpt": {}, "use_node_local_storage": True}}, "use_node_local_storage"),
    "NVMe optimizer": ({"zero_optimization": {"stage": 3, "offload_optimizer": NVME}}, "NVMe offload"),
    "NVMe parameters": ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, "NVMe offload"),
    "Twin-Flow": ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio"),
    "qwZ": ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
    "qgZ": ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients"),
    "quantized frozen weights": (
        {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
        "zero_quantized_nontrainable_weights",
    ),
    "ZenFlow": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": {}}},
        "ZenFlow",
    ),
    "SuperOffload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        "SuperOffload",
    ),
    "bf16 stages": ({"stages": 2, "zero_optimization": {"stage": 0}}, "a PipelineModule in bf16"),
    "cluster with qgZ": (
        {
            "cluster": {"save_only_model": False},
            "zero_optimization": {"stage": 3, "zero_quantized_gradients": True},
        },
        "zero_quantized_gradients",
    ),
    "cluster that saves one stage only": (
        {"cluster": {"save_only_model": True}, "stages": 2, "zero_optimization": {"stage": 1}},
        "a PipelineModule: ",
    ),
    "device mesh": ({"data_parallel_size": 1, "sequence_parallel_size": 2}, "over a device mesh"),
    "subset": ({"mpu": "every rank alone"}, "subset of the job's ranks"),
}


@pytest.fixture(scope="module")
def refused(two_ranks: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, list[str]]]]:
    """What each rank is told of each of REFUSED, and what then lies in a folder of its own."""
    place = tmp_path_factory.mktemp("refused")
    found: list[dict[str, tuple[str, list[str]]]] = two_ranks.call(
        f"{CASES}:refused", str(place), {name: more for name, (more, _) in REFUSED.items()}
    )
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name_before_the_disk_is_touched(
    refused: list[dict[str, tuple[str, list[str]]]], name: str
) -> None:
    for told, left in (rank[name] for rank in refused):
        assert told.startswith(("UnsupportedError: ", "ConfigError: ")), told
        assert REFUSED[name][1] in told, told
        assert left == []


LAST_LINE_SAVES = """
import sys
sys.path.insert(0, {tests!r})
import deepspeed, torch
deepspeed.init_distributed("gloo")
from tiny import engine, train
made = engine(2, "bf16", {{"async_save": True}})
train(made, 1, seed=1)
made.save_checkpoint({out!r}, tag="last")
"""


def test_a_script_whose_last_line_saves_loses_nothing(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LAST_LINE_SAVES.format(tests=str(ROOT / "tests"), out=str(tmp_path / "run")))
    launch(str(script))
    assert (tmp_path / "run" / "last" / "manifest.json").is_file()
    assert (tmp_path / "run" / "latest").read_text() == "last"


KNOWS_NOTHING_OF_US = """
import sys
import deepspeed, torch
deepspeed.init_distributed("gloo")
net = torch.nn.Linear(8, 8)
config = {{"train_micro_batch_size_per_gpu": 1, "optimizer": {{"type": "AdamW", "params": {{"torch_adam": True}}}},
          "checkpoint": {{"roll_ckpt": {{}}}}}}
engine = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]
assert sys.argv[1:] == ["--flag", "x"], sys.argv
engine.save_checkpoint({out!r}, tag="t")
"""


def test_run_installs_us_for_a_script_that_does_not_know_us(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(KNOWS_NOTHING_OF_US.format(out=str(tmp_path / "run")))
    launch("-m", "roll_ckpt.run", str(script), "--flag", "x")
    assert (tmp_path / "run" / "t" / "manifest.json").is_file()


OTHERS_WRAP_TOO = """
import functools
from deepspeed.runtime.engine import DeepSpeedEngine

def wrap(name):
    behind = getattr(DeepSpeedEngine, name)
    @functools.wraps(behind)
    def wrapper(*args, **kwargs):
        return behind(*args, **kwargs)
    setattr(DeepSpeedEngine, name, wrapper)
    return wrapper

METHODS = ("_configure_checkpointing", "save_checkpoint", "load_checkpoint")
before = {name: wrap(name) for name in METHODS}
import roll_ckpt.deepspeed
from roll_ckpt.backends.deepspeed import install
for name in METHODS:
    assert getattr(DeepSpeedEngine, name) is not before[name], f"{name}: not wrapped, we are inert"
    assert install.stock(name) is before[name], name

ours = DeepSpeedEngine._take_model_step
after = {name: [wrap(name), wrap(name)][-1] for name in METHODS}
install.install()
for name in METHODS:
    assert getattr(DeepSpeedEngine, name) is after[name], f"{name}: wrapped a second time"
    assert install.stock(name) is before[name], name
assert DeepSpeedEngine._take_model_step is ours
"""


def test_wrappers_of_others_neither_hide_ours_nor_pass_for_it() -> None:
    tool("-c", OTHERS_WRAP_TOO)


def launch(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


CPU = {"device": "cpu", "pin_memory": False}
LATE = {
    "optimizer offload": ("with_zero", 2, {"offload_optimizer": CPU}),
    "optimizer and parameter offload": ("with_zero", 3, {"offload_optimizer": CPU, "offload_param": CPU}),
    "hpZ": ("with_zero", 3, {"zero_hpz_partition_size": 2}),
    "MoE": ("with_experts", 2, {}),
    "PipelineModule": ("with_stages", 1, {}),
    "Ulysses": ("with_sequence_parallel", 2, {}),
    "AutoTP": ("with_tensor_parallel", 2, {}),
}
DEEPER = {
    "optimizer offload, ZeRO-1": ("with_zero", 1, {"offload_optimizer": CPU}),
    "BF16_Optimizer": ("with_zero", 1, {"gradients": "fp32"}),
    "MoE, ZeRO-0": ("with_experts", 0, {}),
    "MoE, ZeRO-1": ("with_experts", 1, {}),
    "Ulysses, ZeRO-3": ("with_sequence_parallel", 3, {}),
    "AutoTP, ZeRO-0": ("with_tensor_parallel", 0, {}),
    "AutoTP, ZeRO-3": ("with_tensor_parallel", 3, {}),
}


@pytest.mark.parametrize("name", [*LATE, *(pytest.param(name, marks=pytest.mark.long) for name in DEEPER)])
def test_what_is_copied_under_training_does_not_change_before_the_step(
    two_ranks: World, tmp_path: Path, name: str
) -> None:
    case, stage, more = {**LATE, **DEEPER}[name]
    for found in two_ranks.call(f"{CASES}:{case}", str(tmp_path), stage, **more):
        assert found["late"] > 0.8 and found["changed"] == 0
        assert found["alike"] == [True, True]
        parted = case in {"with_experts", "with_stages"} or (case == "with_tensor_parallel" and stage < 3)
        assert ("only the part that rank 0 holds" in found["whole"]) == parted
        assert not (parted and (tmp_path / "weights.bin").exists())


def test_what_may_change_between_two_steps_is_copied_at_once(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:with_lora", str(tmp_path)):
        assert found["late"] == 0
        assert found["alike"] == [True, True]


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_without_optimizer_starts_and_its_save_is_refused(
    two_ranks: World, tmp_path: Path, stage: int
) -> None:
    for told in two_ranks.call(f"{CASES}:without_optimizer", str(tmp_path / "run"), stage):
        assert told.startswith("UnsupportedError") and "optimizer" in told
    assert not (tmp_path / "run").exists()
