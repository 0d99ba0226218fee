"""The Megatron-core backend with real Megatron-core on two torchrun ranks, CPU and gloo."""

from __future__ import annotations

import importlib.util
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import World

from roll_ckpt import verify

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
    reason="megatron-core is not installed: pip install megatron-core==0.16.1",
)

CASES = "megatron_cases"
LAYOUTS = ["TP2", "PP2", "DP2"]


@pytest.fixture(scope="module")
def megatron() -> Iterator[World]:
    """Two ranks of their own: the patches of tests/megatron_cpu.py are for good."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TORCHDYNAMO_DISABLE", "1")
        world = World(2)
    yield world
    world.close()


def check(results: list[tuple[list[object], dict[str, tuple[list[str], list[object]]]]], layout: str) -> None:
    """Bit-equal in every layout; in the layout that saved, the next steps too."""
    for unbroken, found in results:
        assert set(found) == {f"{there} {who}" for there in LAYOUTS for who in ("stock", "ours")}
        assert {name: different for name, (different, _) in found.items() if different} == {}
        for who in ("stock", "ours"):
            assert found[f"{layout} {who}"][1] == unbroken


@pytest.mark.parametrize(("layout", "bf16"), [("TP2", False), ("PP2", False), ("DP2", False), ("DP2", True)])
def test_stock_and_we_load_what_we_saved_in_every_layout(
    megatron: World, tmp_path: Path, layout: str, bf16: bool
) -> None:
    directory = tmp_path / "run" / "iter_2"
    check(megatron.call(f"{CASES}:save_with_us_load_with_all", str(directory), layout, bf16), layout)
    assert verify.verify(directory) == []
    assert (tmp_path / "run" / "latest").read_text() == "iter_2"


@pytest.mark.parametrize("layout", ["TP2", "DP2"])
def test_we_load_what_stock_saved_in_every_layout(megatron: World, tmp_path: Path, layout: str) -> None:
    check(megatron.call(f"{CASES}:save_with_stock_load_with_all", str(tmp_path / "iter_2"), layout), layout)
    assert "cannot be verified" in megatron.log()


@pytest.mark.parametrize(
    ("layout", "wrapped", "queued"),
    [("TP2", False, False), ("DP2", True, True)],
)
def test_stock_save_with_our_strategy_is_read_in_every_layout(
    megatron: World, tmp_path: Path, layout: str, wrapped: bool, queued: bool
) -> None:
    directory = tmp_path / "iter_2"
    check(megatron.call(f"{CASES}:save_through_stock", str(directory), layout, wrapped, queued), layout)
    names = {path.name for path in directory.iterdir()}
    assert names == {".metadata", "common.pt", "metadata.json", *(name for name in names if name.endswith(".distcp"))}


@pytest.mark.parametrize("form", ["dp_reshardable", "fully_reshardable"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_states_make_the_difference_under_dropout(
    megatron: World, tmp_path: Path, layout: str, form: str
) -> None:
    for told in megatron.call(f"{CASES}:resume_with_dropout", str(tmp_path / "iter_2"), layout, form):
        assert told["resumed"] == told["unbroken"]
        assert told["without random states"] != told["unbroken"]
        assert told["without tracker"] != told["unbroken"]


def test_saves_in_the_background_hold_the_step_they_were_asked_at(megatron: World, tmp_path: Path) -> None:
    for found in megatron.call(f"{CASES}:save_three_times", str(tmp_path), "DP2"):
        assert found == [[], [], []]


def test_every_item_of_our_files_is_a_sound_archive_where_the_metadata_says(megatron: World, tmp_path: Path) -> None:
    directory = tmp_path / "iter_2"
    megatron.call(f"{CASES}:save_as", str(directory), "TP2")
    stored = pickle.loads((directory / ".metadata").read_bytes()).storage_data
    assert {info.relative_path for info in stored.values()} == {"__0_0.distcp", "__1_0.distcp"}
    for info in stored.values():
        data = (directory / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


def test_an_optimizer_of_another_layout_is_refused_by_name(megatron: World, tmp_path: Path) -> None:
    directory = str(tmp_path / "iter_2")
    megatron.call(f"{CASES}:save_as", directory, "TP2", "dp_reshardable")
    for told, untouched in megatron.call(f"{CASES}:refusal_of_load", directory, "PP2"):
        assert told.startswith("UnsupportedError") and "dp_reshardable" in told and "tp 2 to 1" in told
        assert untouched


@pytest.mark.parametrize("form", ["fully_sharded_model_space", "fsdp_dtensor", "dp_zero_gather_scatter", "typo"])
def test_a_form_that_cannot_be_saved_is_refused_by_name(megatron: World, form: str) -> None:
    for told in megatron.call(f"{CASES}:refusal_of_form", form):
        assert told.startswith("UnsupportedError") and form in told and "fully_reshardable" in told


@pytest.mark.parametrize("name", ["overlap_param_gather", "use_megatron_fsdp"])
def test_what_was_not_tried_is_refused_by_name(megatron: World, name: str) -> None:
    for told in megatron.call(f"{CASES}:refusal_of_setting", name):
        assert told.startswith("UnsupportedError") and ("FSDP" if "fsdp" in name else name) in told


def test_another_model_is_refused_before_anything_is_loaded(megatron: World, tmp_path: Path) -> None:
    directory = str(tmp_path / "iter_2")
    megatron.call(f"{CASES}:save_as", directory, "DP2")
    for told, untouched in megatron.call(f"{CASES}:refusal_of_load", directory, "DP2", hidden=64):
        assert told.startswith("ModelMismatch") and "shape" in told
        assert untouched


@pytest.mark.parametrize("missing", ["metadata.json", ".metadata"])
def test_an_incomplete_directory_is_refused(megatron: World, tmp_path: Path, missing: str) -> None:
    directory = tmp_path / "iter_2"
    megatron.call(f"{CASES}:save_as", str(directory), "DP2")
    (directory / missing).unlink()
    for told, untouched in megatron.call(f"{CASES}:refusal_of_load", str(directory), "DP2"):
        assert told.startswith("NotFound") and missing in told
        assert untouched


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "common.pt"])
def test_a_flipped_bit_is_found_on_every_rank(megatron: World, tmp_path: Path, name: str) -> None:
    directory = tmp_path / "iter_2"
    megatron.call(f"{CASES}:save_as", str(directory), "TP2")
    data = bytearray((directory / name).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / name).write_bytes(data)
    for told, untouched in megatron.call(f"{CASES}:refusal_of_load", str(directory), "TP2"):
        assert told.startswith("Damaged") and name in told
        assert untouched


def test_a_save_that_fails_on_one_rank_leaves_nothing(megatron: World, tmp_path: Path) -> None:
    directory = tmp_path / "run" / "iter_2"
    for told in megatron.call(f"{CASES}:fail_on_one_rank", str(directory), "ours"):
        assert told.startswith("SaveFailed") and "no such tensor" in told
    assert [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")] == []


def test_a_stock_save_that_fails_on_one_rank_has_no_marker(megatron: World, tmp_path: Path) -> None:
    directory = tmp_path / "iter_2"
    for told in megatron.call(f"{CASES}:fail_on_one_rank", str(directory), "stock"):
        assert told.startswith("SaveFailed") and "rank 1" in told and "no such tensor" in told
    assert {path.name for path in directory.iterdir()} == {"__0_0.distcp", "common.pt"}


def test_older_checkpoints_are_pruned(megatron: World, tmp_path: Path) -> None:
    megatron.call(f"{CASES}:save_and_keep_one", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("iter")] == ["iter_1"]
