"""One folder with real engines: rollbacks, several engines, deletions, downloads, readers, and tags of all kinds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from worlds import World

from roll_ckpt.cli import main
from roll_ckpt.transaction import verification

CASES = "folder_cases"


def test_after_a_rollback_in_one_process_the_new_branch_stays(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:go_back_and_go_on", str(tmp_path / "run")):
        assert found == {"kept": ["s20", "s30"], "after": ["s20", "s21"], "newest": 21}


def test_two_engines_of_other_names_keep_and_find_their_own(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:two_engines", str(tmp_path / "run"), False):
        assert found == {"left": ["a200", "c2"], "loaded": [("a", 2), ("c", 2)]}


def test_two_engines_of_one_name_keep_their_own(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:two_engines", str(tmp_path / "run"), True):
        assert found == {"left": ["step2", "step200"]}


def test_tags_that_stock_takes_are_taken(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:nested_tags", str(tmp_path / "run")):
        assert found == {"epoch1/step5": (0, 0), ".best": (1, 1), "model": (2, 2), "latest": (3, 3), "after damage": 2}
    nested = tmp_path / "run/epoch1/step5"
    assert verification.verify(nested) == []
    assert main.main(["verify", str(nested)]) == 0 == main.main(["ls", str(tmp_path / "run")])


def test_saves_go_on_whatever_is_deleted(two_ranks: World, tmp_path: Path) -> None:
    for told in two_ranks.call(f"{CASES}:delete_all_between_async_saves", str(tmp_path / "run")):
        assert told == [True] * 6


@pytest.fixture
def saved(two_ranks: World, tmp_path: Path) -> tuple[Path, list[list[float]]]:
    return tmp_path / "run", two_ranks.call(f"{CASES}:save_once", str(tmp_path / "run"))


def test_a_job_that_only_loads_owns_and_changes_nothing(two_ranks: World, saved: tuple[Path, object]) -> None:
    out = saved[0]
    left = out.parent / ".run.roll_ckpt/.two.9.1.tmp/two/votes"  # a killed save that no vote completes
    left.mkdir(parents=True)
    for found in two_ranks.call(f"{CASES}:load_only", str(out)):
        assert found["step"] == 2 and not found["changed"] and not found["claimed"]
    assert left.is_dir()


@pytest.mark.parametrize("brought", ["links into a cache", "a local folder of hf", "a copy", "a folder of links"])
def test_a_checkpoint_that_was_brought_loads(
    two_ranks: World, saved: tuple[Path, list[list[float]]], tmp_path: Path, brought: str
) -> None:
    out, losses = saved
    there = tmp_path / "there" / "one"
    if brought == "links into a cache":  # as `hf download` leaves it
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        for number, path in enumerate(p for p in sorted((out / "one").rglob("*")) if p.is_file()):
            shutil.copy(path, blobs / str(number))
            (there / path.relative_to(out / "one")).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(blobs / str(number), there / path.relative_to(out / "one"))
    elif brought == "a folder of links":
        there.parent.mkdir()
        os.symlink(out / "one", there)
    else:
        shutil.copytree(out / "one", there)
        if brought == "a local folder of hf":
            (there / ".cache/huggingface/download").mkdir(parents=True)
            (there / ".cache/huggingface/.gitignore").write_text("*")
            (there / ".gitattributes").write_text("")
            (there / "README.md").write_text("# a model card")
    assert verification.verify(there) == []
    assert two_ranks.call(f"{CASES}:load_and_go_on", str(there.parent)) == losses


def test_a_signal_in_the_optimizer_step_saves_the_state_after_it(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.call(f"{CASES}:signal_in_the_step", str(tmp_path / "run")):
        assert found == {"steps": 2, "same": True}
