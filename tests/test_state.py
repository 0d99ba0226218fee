"""StateSaver: a state dictionary of a script without a framework."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import roll_ckpt
from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.state import Lifetime, StateSaver


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with process.installed(process.Process()):
        yield


def saver(**more: object) -> StateSaver:
    return StateSaver(Settings.parse({"staging": {"arena_bytes": 16 << 20}, "max_ckpt_to_keep": 2, **more}, "the test"))


def state(salt: float) -> dict[str, object]:
    return {"weight": torch.full((1000, 100), salt), "step": int(salt), "nested": {"bias": torch.arange(7)}}


def test_what_was_saved_is_loaded_and_old_checkpoints_go(tmp_path: Path) -> None:
    ours = saver()
    for step in (1, 2, 3):
        ours.save(state(step), tmp_path / f"step_{step}", step=step)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("step")) == ["step_2", "step_3"]
    loaded = ours.load(tmp_path / "step_3")
    assert torch.equal(loaded["weight"], state(3)["weight"]) and loaded["step"] == 3
    assert torch.equal(torch.load(tmp_path / "step_2/state_rank_0.pt")["weight"], state(2)["weight"])


def test_tensors_that_stay_until_the_fence_may_change_after_it(tmp_path: Path) -> None:
    ours, mine = saver(async_save=True), state(1)
    save = ours.save(mine, tmp_path / "one", unchanged=Lifetime.UNTIL_FENCE)
    roll_ckpt.fence()
    mine["weight"].fill_(9)  # type: ignore[attr-defined]
    save.wait(60)
    assert torch.equal(ours.load(tmp_path / "one")["weight"], state(1)["weight"])
    assert save.copy_stats()["nbytes"] > 400_000


def test_damage_and_absence_are_refused_by_name(tmp_path: Path) -> None:
    ours = saver()
    ours.save(state(1), tmp_path / "one")
    path = tmp_path / "one/state_rank_0.pt"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"state_rank_0\.pt"):
        ours.load(tmp_path / "one")
    with pytest.raises(NotFound):
        ours.load(tmp_path / "two")
