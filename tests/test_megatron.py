"""The Megatron-core backend with real Megatron-core under torchrun, CPU and gloo.

This is the short form; tests/test_megatron_matrix.py has every layout against every other.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_worlds import (
    ANY_LAYOUT,
    COMMON_READER,
    FORMS,
    MAKES,
    MISSING,
    NO_RESHARDABLE,
    TWO_RANKS,
    UNGATHERED,
    WRITES_COMMON,
    Saved,
    Worlds,
    world,
)
from worlds import RankFailed

from roll_ckpt.transaction import verification

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

VPP = "PP2xVPP2"  # on two ranks
COMMON = ["common.pt"] if WRITES_COMMON else []
SOMEWHERE_ELSE = {"fully_sharded_model_space", "dp_reshardable", "fully_reshardable"} - MAKES
reshardable = pytest.mark.skipif(bool(NO_RESHARDABLE), reason=NO_RESHARDABLE)
CORE = pytest.mark.core("megatron-core")


@pytest.fixture(scope="module")
def saved_once(megatron: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint of ours in TP2, for tests that only read or copy it."""
    return megatron.save(tmp_path_factory.mktemp("saved_once") / "iter_2", "TP2")


@pytest.fixture(scope="module")
def stock_saved_once(megatron: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return megatron.save(tmp_path_factory.mktemp("stock_saved_once") / "iter_2", "TP2", who="stock")


@pytest.fixture
def stock_saved(stock_saved_once: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock_saved_once.directory, tmp_path / "iter_2"))


@pytest.fixture
def copied(saved_once: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_once.directory, tmp_path / "iter_2"))


@pytest.mark.parametrize(
    ("layout", "precision", "loads"),
    [
        pytest.param("TP2", "fp32", ["TP2 stock", "TP2 ours", "PP2 stock", "DP2 ours"], marks=CORE),
        pytest.param("PP2", "fp32", ["PP2 ours", "DP2 stock"], marks=[pytest.mark.long, CORE]),
        pytest.param("DP2", "bf16", ["DP2 stock", "PP2 ours"], marks=CORE),
        (VPP, "fp32", [f"{VPP} stock", f"{VPP} ours", "TP2 ours"]),
    ],
)
def test_stock_and_we_load_what_we_saved_in_other_layouts(
    megatron: Worlds, tmp_path: Path, layout: str, precision: str, loads: list[str]
) -> None:
    saved = megatron.save(tmp_path / "run" / "iter_2", layout, precision)
    for there, who in map(str.split, loads):
        megatron.check_load(saved, there, who)
    assert verification.verify(saved.directory) == []
    assert (tmp_path / "run" / "latest").read_text() == "iter_2"


def test_we_load_what_stock_saves_since_0_19_and_has_saved_until_0_15(megatron: Worlds, tmp_path: Path) -> None:
    saved = megatron.save(tmp_path / "iter_2", "TP2", who="stock as 0.19")
    assert not (saved.directory / "common.pt").exists()
    megatron.call("TP2", "make_index_of_0_15", str(saved.directory))
    megatron.check_load(saved, "TP2", "ours")


@CORE
def test_we_load_what_stock_saved_in_other_layouts(megatron: Worlds, stock_saved_once: Saved) -> None:
    for there in ("TP2", VPP):
        megatron.check_load(stock_saved_once, there, "ours")
    assert "cannot be verified" in megatron.at("TP2").log()


@CORE
@pytest.mark.parametrize(
    ("layout", "how", "loads"),
    [
        ("TP2", "stock with our strategy", ["PP2 stock"]),
        ("DP2", "stock's queue with our strategy", ["DP2 stock"]),
    ],
)
def test_stock_save_with_our_strategy_is_read_in_other_layouts(
    megatron: Worlds, tmp_path: Path, layout: str, how: str, loads: list[str]
) -> None:
    saved = megatron.save(tmp_path / "iter_2", layout, who=how)
    for there, who in map(str.split, loads):
        megatron.check_load(saved, there, who)
    names = {path.name for path in saved.directory.iterdir()}
    others = {".metadata", "metadata.json", *COMMON}
    assert names == {*others, *(name for name in names if name.endswith(".distcp"))}


@pytest.mark.parametrize(
    ("layout", "sharding_type"),
    [
        ("TP2", ANY_LAYOUT),
        pytest.param("PP2", UNGATHERED, marks=pytest.mark.long),
        pytest.param(VPP, UNGATHERED, marks=pytest.mark.long),
    ],
)
def test_random_states_make_the_difference_under_dropout(
    megatron: Worlds, tmp_path: Path, layout: str, sharding_type: str
) -> None:
    for told in megatron.call(layout, "resume_with_dropout", str(tmp_path / "iter_2"), sharding_type):
        assert told["resumed"] == told["unbroken"]
        assert told["without random states"] != told["unbroken"]
        assert told["without tracker"] != told["unbroken"]


@pytest.mark.long
@CORE
@pytest.mark.parametrize("sharding_type", FORMS)
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_killed_inside_a_save_a_model_resumes_on_the_same_losses(
    megatron: Worlds, tmp_path: Path, layout: str, sharding_type: str
) -> None:
    doomed = world(layout, torchrun=False)
    try:
        with pytest.raises(RankFailed, match="the process died"):
            doomed.call("megatron_cases:die_in_a_save", layout, str(tmp_path), sharding_type)
    finally:
        doomed.close()
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"iter_2", "latest"}
    for unbroken, step, resumed in megatron.call(layout, "go_on_after_a_kill", str(tmp_path), sharding_type):
        assert step == 2 and resumed == unbroken


def test_saves_in_the_background_hold_the_step_they_were_asked_at(megatron: Worlds, tmp_path: Path) -> None:
    for found in megatron.call("DP2", "save_three_times", str(tmp_path)):
        assert found == [[], [], []]


def test_every_item_of_our_files_is_a_sound_archive_where_the_metadata_says(saved_once: Saved) -> None:
    directory = saved_once.directory
    stored = pickle.loads((directory / ".metadata").read_bytes()).storage_data
    assert {info.relative_path for info in stored.values()} == {"__0_0.distcp", "__1_0.distcp"}
    for info in stored.values():
        data = (directory / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


@reshardable
def test_an_optimizer_of_another_layout_is_refused_by_name(megatron: Worlds, tmp_path: Path) -> None:
    saved = megatron.save(tmp_path / "iter_2", "TP2", sharding_type="dp_reshardable")
    for told, untouched in megatron.call("PP2", "refusal_of_load", str(saved.directory)):
        assert told.startswith("UnsupportedError") and "dp_reshardable" in told and "tp 2 to 1" in told
        assert untouched


@reshardable
def test_an_optimizer_that_stock_saved_in_another_layout_is_refused(megatron: Worlds, tmp_path: Path) -> None:
    """Stock code notes no layout: other shapes of the optimizer's buffers tell."""
    saved = megatron.save(tmp_path / "iter_2", "TP2", who="stock", sharding_type="dp_reshardable")
    for told, untouched in megatron.call("DP2", "refusal_of_load", str(saved.directory)):
        assert told.startswith("ModelMismatch") and "dp_reshardable" in told
        assert untouched


def test_a_form_that_stock_saved_and_we_do_not_know_is_refused_by_name(megatron: Worlds, tmp_path: Path) -> None:
    saved = megatron.save(tmp_path / "iter_2", "TP2", who="stock", sharding_type="dp_zero_gather_scatter")
    for told, untouched in megatron.call("TP2", "refusal_of_load", str(saved.directory)):
        assert told.startswith("UnsupportedError") and "dp_zero_gather_scatter" in told
        assert untouched


@pytest.mark.parametrize(
    "sharding_type",
    [*sorted(SOMEWHERE_ELSE), "fsdp_dtensor", "dp_zero_gather_scatter", "typo"],
)
def test_a_form_that_cannot_be_saved_is_refused_by_name(megatron: Worlds, sharding_type: str) -> None:
    for told in megatron.call("DP2", "refusal_of_form", sharding_type):
        assert told.startswith("UnsupportedError") and sharding_type in told and ANY_LAYOUT in told
        assert ("or use Megatron-core 0." in told) == (sharding_type in SOMEWHERE_ELSE)


def test_fsdp_is_refused_by_name(megatron: Worlds) -> None:
    for told in megatron.call("DP2", "refusal_of_setting", "use_megatron_fsdp"):
        assert told.startswith("UnsupportedError") and "FSDP" in told


@pytest.mark.parametrize(
    ("holder", "removed", "named"),
    [
        ("strategies.torch:TorchDistSaveShardedStrategy", "_get_save_and_finalize_callbacks", "_get_save_and_finalize"),
        ("strategies.filesystem_async", "_results_queue", "_results_queue"),
        ("strategies.torch", "_get_filesystem_reader", "_get_filesystem_reader"),
        ("strategies.fully_parallel:FullyParallelSaveStrategyWrapper", "__init__", "base_strategy"),
        (*COMMON_READER, "load_common"),
    ],
)
def test_a_megatron_without_what_we_rely_on_is_refused_at_import(
    megatron: Worlds, holder: str, removed: str, named: str
) -> None:
    for told in megatron.call("DP2", "refusal_of_import", holder, removed):
        assert told.startswith("UnsupportedError") and named in told and "megatron-core>=0.14" in told


@pytest.mark.parametrize(("version", "expected"), [("0.14.0", 0), ("0.19.7", 0), ("0.20.0rc1", 1), ("1.3", 1)])
def test_a_newer_version_that_has_everything_warns_once_on_rank_0(
    megatron: Worlds, version: str, expected: int
) -> None:
    first, second = megatron.call("DP2", "warnings_of_import", version)
    assert len(first) == expected and all(f"Megatron-core {version}" in told for told in first)
    assert second == []


def test_another_model_is_refused_before_anything_is_loaded(megatron: Worlds, saved_once: Saved) -> None:
    for told, untouched in megatron.call("DP2", "refusal_of_load", str(saved_once.directory), hidden=64):
        assert told.startswith("ModelMismatch") and "shape" in told
        assert untouched


@pytest.mark.parametrize("missing", ["metadata.json", ".metadata", "common.pt"])
def test_an_incomplete_directory_is_refused(megatron: Worlds, copied: Path, missing: str) -> None:
    (copied / missing).unlink()
    for told, untouched in megatron.call("TP2", "refusal_of_load", str(copied)):
        assert told.startswith("NotFound") and missing in told
        assert untouched


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "common.pt", "metadata.json"])
def test_a_flipped_bit_is_found_on_every_rank(megatron: Worlds, copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    for told, untouched in megatron.call("TP2", "refusal_of_load", str(copied)):
        assert told.startswith("Damaged") and name in told
        assert untouched


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("metadata.json", "{", "Damaged"),
        ("metadata.json", '{"sharded_backend": "zarr", "sharded_backend_version": 1}', "UnsupportedError"),
        ("common.pt", "PK", "Damaged"),
        (".metadata", "\x80", "Damaged"),
    ],
)
def test_a_strange_file_in_a_directory_that_stock_wrote_is_named(
    megatron: Worlds, stock_saved: Path, name: str, content: str, error: str
) -> None:
    (stock_saved / name).write_text(content)
    for told, untouched in megatron.call("TP2", "refusal_of_load", str(stock_saved)):
        assert told.startswith(error) and name in told
        assert untouched


class Evil:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_code_in_the_common_state_is_refused_and_not_run(megatron: Worlds, stock_saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"iteration": 2, "evil": Evil(mark)}, stock_saved / "common.pt")
    for told, untouched in megatron.call("TP2", "refusal_of_code", str(stock_saved)):
        assert told.startswith("UnsupportedError") and "common.pt" in told and "posix.mkdir" in told
        assert untouched
    assert not mark.exists()


def test_every_chunk_is_loaded_where_no_optimizer_restores_it(megatron: Worlds, tmp_path: Path) -> None:
    for told in megatron.call(VPP, "load_without_optimizer", str(tmp_path)):
        assert told == [[], []]


def test_a_save_that_fails_on_one_rank_leaves_nothing(megatron: Worlds, tmp_path: Path) -> None:
    directory = tmp_path / "run" / "iter_2"
    for told in megatron.call("TP2", "fail_on_one_rank", str(directory), "ours"):
        assert told.startswith("SaveFailed") and "no such tensor" in told
    assert [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")] == []


def test_a_stock_save_that_fails_on_one_rank_has_no_marker(megatron: Worlds, tmp_path: Path) -> None:
    directory = tmp_path / "iter_2"
    for told in megatron.call("TP2", "fail_on_one_rank", str(directory), "stock with our strategy"):
        assert told.startswith("SaveFailed") and "rank 1" in told and "no such tensor" in told
    assert {path.name for path in directory.iterdir()} == {"__0_0.distcp", *COMMON}


def test_the_newest_checkpoint_is_found_and_older_ones_are_pruned(megatron: Worlds, tmp_path: Path) -> None:
    for found in megatron.call("DP2", "save_and_keep_one", str(tmp_path)):
        assert found == [None, tmp_path / "iter_0", tmp_path / "iter_1"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("iter")] == ["iter_1"]
