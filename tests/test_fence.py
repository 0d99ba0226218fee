"""Changes while a save still reads: each waits, or fails the save by name; no mixture is ever committed."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from late_copies import copied, copy_a_block, hooks_off, late_copies
from worlds import World

import roll_ckpt
from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.formats.records import Vote
from roll_ckpt.save import hooks, pending, source_versions
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.state import Lifetime, StateSaver
from roll_ckpt.transaction import ballot
from roll_ckpt.transaction.attempts import Attempt

BLOCK = 64 << 10


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with process.installed(process.Process()):
        yield


def saver(check: str = "sample") -> StateSaver:
    staging = {"arena_bytes": 16 << 20, "check": check}
    return StateSaver(
        Settings.parse({"async_save": True, "io": {"block_bytes": BLOCK}, "staging": staging}, "the test")
    )


class Trained:
    """A model of a few blocks with an optimizer that has made a step."""

    def __init__(self, **how: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 300))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, **how)
        self.step()

    def step(self) -> None:
        self.model(torch.ones(1, 300)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def bits(self) -> list[torch.Tensor]:
        state = self.optimizer.state_dict()["state"].values()
        return [t.clone() for t in (*self.model.state_dict().values(), *(v for s in state for v in s.values()))]


def changed(trained: Trained, out: Path, change: Callable[[Trained], object], *, check: str = "sample") -> str:
    """Change `trained` when a part of a save of it is copied: "as it was" or "torn", or how the save failed."""
    ours, wanted = saver(check), trained.bits()
    with late_copies(ours.settings):
        save = ours.save(trained.state(), out / "saved", unchanged=Lifetime.UNTIL_FENCE)
        copy_a_block(save)
        assert not copied(save)
        change(trained)
    if save.failure is not None:
        return str(save.failure)
    loaded = ours.load(out / "saved")
    again = Trained()
    again.model.load_state_dict(loaded["model"])
    again.optimizer.load_state_dict(loaded["optimizer"])
    return "as it was" if all(map(torch.equal, again.bits(), wanted)) else "torn"


def load(trained: Trained) -> None:
    trained.model.load_state_dict({name: value * 2 for name, value in trained.model.state_dict().items()})


def load_a_part(trained: Trained) -> None:
    trained.model[1].load_state_dict({"weight": torch.zeros(300, 300), "bias": torch.zeros(300)})


def other_data(trained: Trained) -> None:
    for parameter in trained.model.parameters():
        parameter.data = torch.zeros_like(parameter.data)


@pytest.mark.parametrize("change", [Trained.step, load, load_a_part, other_data])
def test_a_change_by_a_function_of_torch_waits(tmp_path: Path, change: Callable[[Trained], object]) -> None:
    assert changed(Trained(), tmp_path, change) == "as it was"
    roll_ckpt.fence()
    if change is not other_data:
        with hooks_off():
            assert "SourceChanged" in changed(Trained(), tmp_path / "not", change)


def test_a_fused_step_counts_no_version_and_waits(tmp_path: Path) -> None:
    assert changed(Trained(fused=True), tmp_path, Trained.step, check="off") == "as it was"


class OwnOptimizer(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.copy_(torch.zeros_like(parameter))


def test_a_step_of_an_optimizer_of_ones_own_waits(tmp_path: Path) -> None:
    assert changed(Trained(), tmp_path, lambda t: OwnOptimizer(t.model.parameters()).step(), check="off") == "as it was"


@torch.no_grad()
def one_element(trained: Trained) -> None:
    trained.model[1].weight[200, 100] = 5  # none of the samples, most likely


@torch.no_grad()
def one_moment(trained: Trained) -> None:
    trained.optimizer.state[trained.model[1].weight]["exp_avg"].view(-1)[50_000] = 5


@torch.no_grad()
def foreach(trained: Trained) -> None:
    torch._foreach_add_(list(trained.model.parameters()), 1.0)


@pytest.mark.parametrize(
    ("change", "name"), [(one_element, "model.1.weight"), (one_moment, "optimizer.state.2.exp_avg")]
)
def test_one_element_that_no_sample_holds_is_noticed_by_name(
    tmp_path: Path, change: Callable[[Trained], None], name: str
) -> None:
    told = changed(Trained(), tmp_path, change)
    assert "SourceChanged" in told and f"'{name}' (bytes" in told and "roll_ckpt.fence()" in told
    assert not (tmp_path / "saved").exists()


def test_a_change_in_place_fails_the_save(tmp_path: Path) -> None:
    assert "SourceChanged" in changed(Trained(), tmp_path / "foreach", foreach)
    assert "SourceChanged" in changed(
        Trained(), tmp_path / "ema", lambda t: [p.data.copy_(p.data / 2) for p in t.model.parameters()]
    )


def test_parameters_in_a_state_are_watched_themselves(tmp_path: Path) -> None:
    ours = saver()
    state = {"weight": torch.nn.Parameter(torch.ones(300, 300)), "step": torch.ones(())}
    with late_copies(ours.settings):
        save = ours.save(state, tmp_path / "saved", unchanged=Lifetime.UNTIL_FENCE)
        with torch.no_grad():
            state["weight"][100, 100] = 5
    assert "SourceChanged" in str(save.failure) and "'weight'" in str(save.failure)


def test_what_is_laid_aside_may_change_elsewhere() -> None:
    """As `reload_states` of DeepSpeed does with offloaded state that is still being written."""
    tensors = [torch.ones(3), torch.ones(3)]
    versions = source_versions.SourceVersions(tensors, staying=True)
    tensors[0].data = torch.ones(3)
    tensors[0].add_(1)
    assert versions.changed() == []
    tensors[1].add_(1)
    assert versions.changed() == tensors[1:]


def test_inference_tensors_have_no_counter_and_are_saved(tmp_path: Path) -> None:
    ours = saver()
    with torch.inference_mode():
        state = {"weight": torch.ones(300, 300)}
    ours.save(state, tmp_path / "saved", unchanged=Lifetime.UNTIL_FENCE).wait(60)
    assert torch.equal(ours.load(tmp_path / "saved")["weight"], torch.ones(300, 300))


def test_a_change_after_the_copy_is_none_of_the_saves_business(tmp_path: Path) -> None:
    """With the fence, and without it once the copies are made, long before the vote."""
    ours, trained, may_vote = saver(), Trained(), threading.Event()
    cast = ballot.cast

    def late(attempt: Attempt, vote: Vote) -> None:
        may_vote.wait(20)
        cast(attempt, vote)

    with mock.patch.object(ballot, "cast", late):
        fenced = ours.save(trained.state(), tmp_path / "fenced", unchanged=Lifetime.UNTIL_FENCE)
        roll_ckpt.fence()
        foreach(trained)
        alone = ours.save(trained.state(), tmp_path / "alone", unchanged=Lifetime.UNTIL_FENCE)
        may_vote.set()
        fenced.wait(60)
        may_vote.clear()
        assert wait_until(lambda: not versions_of(alone))
        foreach(trained)
        may_vote.set()
        alone.wait(60)


def test_a_step_between_a_copy_and_its_confirmation_fails_nothing(tmp_path: Path) -> None:
    ours, trained, may_confirm = saver(), Trained(), threading.Event()
    confirm = ClusterSave.confirm_copies

    def late(part: ClusterSave) -> None:
        may_confirm.wait(20)
        confirm(part)

    with mock.patch.object(ClusterSave, "confirm_copies", late), late_copies(ours.settings):
        save = ours.save(trained.state(), tmp_path / "saved", unchanged=Lifetime.UNTIL_FENCE)
        copy_a_block(save, 20)
        assert copied(save)
        trained.step()
        may_confirm.set()
        save.wait(60)


def test_a_save_behind_a_slow_one_confirms_its_copies_at_once(tmp_path: Path) -> None:
    ours, trained, may_vote = saver(), Trained(), threading.Event()
    cast = ballot.cast

    def late(attempt: Attempt, vote: Vote) -> None:
        may_vote.wait(20)
        cast(attempt, vote)

    with mock.patch.object(ballot, "cast", late), late_copies(ours.settings):
        first = ours.save(trained.state(), tmp_path / "first", unchanged=Lifetime.UNTIL_FENCE)
        second = ours.save(trained.state(), tmp_path / "second", unchanged=Lifetime.UNTIL_FENCE)
        assert versions_of(second)
        copy_a_block(first, 20)
        copy_a_block(second, 20)
        assert wait_until(lambda: not versions_of(second)) and not first.settled
        foreach(trained)
        may_vote.set()
        second.wait(60)


def versions_of(save: Save) -> list[Any]:
    return [staged for part in save.cluster_saves.values() for staged in part._staged if staged.versions]


def wait_until(condition: Callable[[], bool]) -> bool:
    event = threading.Event()
    return any(condition() or event.wait(0.01) for _ in range(2000))


def test_the_step_of_another_optimizer_does_not_wait(tmp_path: Path) -> None:
    ours, actor, critic = saver(), Trained(), Trained()
    with late_copies(ours.settings):
        save = ours.save(actor.state(), tmp_path / "saved", unchanged=Lifetime.UNTIL_FENCE)
        critic.step()
        critic.model.load_state_dict(actor.model.state_dict())
        critic.optimizer.load_state_dict(critic.optimizer.state_dict())
        assert not copied(save)
        actor.optimizer.load_state_dict(actor.optimizer.state_dict())
        assert copied(save)
    save.wait(60)


def test_the_functions_of_torch_keep_their_signatures() -> None:
    hooks.install()
    assert list(inspect.signature(torch.nn.Module.load_state_dict).parameters) == [
        "self", "state_dict", "strict", "assign",
    ]  # fmt: skip
    assert torch.nn.Module.load_state_dict.__qualname__ == "Module.load_state_dict"
    assert torch.optim.Optimizer.load_state_dict.__name__ == "load_state_dict"
    assert pending.pending() == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_that_is_changed_by_other_means_is_never_saved_torn(
    two_ranks: World, tmp_path: Path, stage: int
) -> None:
    for told in two_ranks.call("fence_cases:change_by_other_means", str(tmp_path), stage):
        assert len(told) >= 7
        for what, (ended, reason) in told.items():
            assert ended == EXPECTED[what], (what, ended, reason)
            assert ended == "fenced" or ("SourceChanged" in reason and "_states.pt: '" in reason)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_model_that_changes_in_its_forward_pass_is_saved_as_it_was(
    two_ranks: World, tmp_path: Path, stage: int
) -> None:
    assert two_ranks.call("fence_cases:change_in_the_forward_pass", str(tmp_path / "run"), stage) == [True, True]


EXPECTED = {
    **dict.fromkeys(("module.load_state_dict", "base optimizer", "safe_set", "other data"), "fenced"),
    **dict.fromkeys(("ema", "add_", "foreach", "one element", "flat buffer", "moments"), "refused"),
}
