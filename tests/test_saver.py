"""The save corridor of one process: what is held, what is released, and what is left when it fails."""

from __future__ import annotations

import errno
import gc
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from late_copies import late_copies

from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.disk import failpoints
from roll_ckpt.errors import ConfigError, NoRoom, RanksDisagree, SaveFailed
from roll_ckpt.formats import manifests
from roll_ckpt.formats.image import Extent, Extents, FileImage, Memory
from roll_ckpt.formats.records import Vote
from roll_ckpt.formats.torch_zip import layout
from roll_ckpt.native import extension
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import arena, one_file, pending
from roll_ckpt.save.begin import Request, _check_agreement
from roll_ckpt.save.begin import begin as begin_
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import ballot, verification
from roll_ckpt.transaction.attempts import Attempt

SMALL: dict[str, Any] = {
    "staging": {"arena_bytes": "1MiB", "check": "full"},
    "io": {"block_bytes": "64KiB"},
    "commit_timeout_s": 20,
}
SETTINGS = Settings.parse(SMALL, "the test")
ALONE = RankGroup(0, 1, None)


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """A registry of the test's own: its arena, its claims and its pending saves end with it."""
    with process.installed(process.Process()):
        yield
        failpoints.listener = failpoints.observer = None
        settle_all()
        assert wait_until(lambda: arena.mover(SETTINGS).arena.used_bytes == 0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def settle_all() -> None:
    for save in pending.pending():
        if not save.staged:  # a test that failed in the middle
            seal(save)
        assert save._finished.wait(20)


def wait_until(condition: Callable[[], bool], timeout_s: float = 5) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def begin(out: Path, name: str = "t1", settings: Settings = SETTINGS, **more: Any) -> Save:
    request = Request(out, name, 1, {"model": 1})
    return begin_(ALONE, request, settings, nbytes=1000, **more)


def stage(save: Save, state: object, *, overlappable: bool = False, file: str = "model.pt") -> ClusterSave:
    cluster_save = save.cluster_saves.get("model") or save.add_cluster("model", {"framework": "none"})
    image = layout.lay_out(state, Path(file).stem, lambda storage: overlappable)
    cluster_save.stage(save.attempt.checkpoint_dir / file, image, overlap=overlappable)
    return cluster_save


def seal(save: Save) -> None:
    with save.staging():
        pass


def save_now(out: Path, state: object, name: str = "t1") -> Save:
    save = begin(out, name)
    stage(save, state)
    seal(save)
    save.wait(20, uploaded=True)
    return save


def load(out: Path, name: str = "t1") -> Any:
    return torch.load(out / name / "model.pt", weights_only=True)


class Gate:
    """Stops every thread that comes to a named point of a save, until it is opened."""

    def __init__(self, point: str) -> None:
        self.point = point
        self.reached = threading.Event()
        self.opened = threading.Event()
        failpoints.listener = self

    def __call__(self, point: str, where: dict[str, object]) -> None:
        if point == self.point and not self.opened.is_set():
            self.reached.set()
            assert self.opened.wait(20)


# ---- begin, stage, seal, wait


def test_a_save_goes_from_begin_to_a_sound_checkpoint(out: Path) -> None:
    state = {"w": torch.arange(100_000.0), "n": 3}
    save = begin(out)
    assert not (out / "t1").exists() and save.attempt.checkpoint_dir.is_dir() and save.lead
    cluster_save = stage(save, state)
    cluster_save.parameters = {"w": {"dtype": "float32", "shape": [100_000]}}
    assert pending.pending() == [save] and not save.settled
    seal(save)
    save.wait(20)
    assert save.settled and save.failure is None and not save.attempt.directory.exists()
    assert torch.equal(load(out)["w"], state["w"])
    assert verification.verify(out / "t1") == []
    assert (out / "latest").read_text() == "t1"
    save.wait(20, uploaded=True)
    assert save.finished and pending.pending() == []
    manifest = manifests.read(out / "t1")
    assert manifest.clusters == {"model": {"world_size": 1, "framework": "none"}} and manifest.step == 1
    assert {receipt.path for receipt in manifest.files} == {
        *("model.pt", "digests/model.0.json", "tensors/model.0.index", "votes/expected.json"),
    }


def test_what_changes_after_an_eager_stage_does_not_reach_the_file(out: Path) -> None:
    weight = torch.ones(200_000)
    save = begin(out)
    stage(save, {"w": weight})
    weight.zero_()
    seal(save)
    save.wait(20)
    assert torch.equal(load(out)["w"], torch.ones(200_000))


def test_what_changes_after_the_fence_does_not_reach_the_file(out: Path) -> None:
    weight = torch.ones(200_000)
    save = begin(out)
    stage(save, {"w": weight}, overlappable=True)
    pending.fence()
    weight.zero_()
    seal(save)
    save.wait(20)
    assert torch.equal(load(out)["w"], torch.ones(200_000))


def test_a_state_larger_than_the_arena_streams_through_it(out: Path) -> None:
    weight = torch.rand(1_000_000)
    save = begin(out)
    cluster_save = stage(save, {"w": weight}, overlappable=True)
    weight.zero_()  # stage could not overlap, so all is copied
    seal(save)
    save.wait(20)
    assert cluster_save.nbytes > 3 * (1 << 20) and load(out)["w"].count_nonzero() > 900_000


def test_wait_tells_when_it_was_not_done_in_time_and_the_save_goes_on(out: Path) -> None:
    gate = Gate("vote.before")
    save = begin(out)
    stage(save, {"w": torch.ones(3)})
    seal(save)
    assert gate.reached.wait(20)
    with pytest.raises(TimeoutError, match=r"t1.*it goes on"):
        save.wait(0.01)
    gate.opened.set()
    save.wait(20)


def test_what_somebody_else_wrote_is_adopted(out: Path) -> None:
    save = begin(out)
    cluster_save = stage(save, {"w": torch.ones(3)})
    (save.attempt.checkpoint_dir / "tokenizer.json").write_text("{}")
    cluster_save.adopt(save.attempt.checkpoint_dir / "tokenizer.json")
    seal(save)
    save.wait(20)
    assert verification.verify(out / "t1") == []
    assert "tokenizer.json" in {receipt.path for receipt in manifests.read(out / "t1").files}


def test_a_file_that_nobody_listed_and_stock_code_would_load_prevents_the_commit(out: Path) -> None:
    save = begin(out)
    stage(save, {"w": torch.ones(3)})
    (save.attempt.checkpoint_dir / "x_states.pt").write_text("x")
    seal(save)
    with pytest.raises(SaveFailed, match=r"x_states\.pt"):
        save.wait(20)
    assert not (out / "t1").exists()


def test_the_hook_runs_after_the_commit_and_its_failure_is_told(out: Path) -> None:
    seen = []

    def hook(save: Save) -> None:
        seen.append((save.attempt.final / "manifest.json").is_file())
        raise OSError("no room for the upload")

    save = begin(out, on_commit=hook)
    stage(save, {"w": torch.ones(3)})
    seal(save)
    with pytest.raises(SaveFailed, match=r"t1.*committed and sound.*no room for the upload"):
        save.wait(20, uploaded=True)
    assert seen == [True] and verification.verify(out / "t1") == []


def test_what_a_refused_fsync_leaves_open_is_told_and_nothing_is_pruned_for_it(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[Save] = []
    save = begin(out, on_commit=followed.append)
    stage(save, {"w": torch.ones(3)})

    def observe(operation: str, paths: tuple[str, ...]) -> None:
        if (operation, paths[0]) == ("fsync_dir", str(save.attempt.output_dir)):
            monkeypatch.setattr(failpoints, "observer", None)
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(failpoints, "observer", observe)
    seal(save)
    with pytest.raises(SaveFailed, match="committed and whole, but the disk did not say that it is durable"):
        save.wait(30, uploaded=True)
    assert verification.verify(out / "t1") == [] and not followed


# ---- failures


@pytest.mark.parametrize("overlappable", [False, True])
def test_a_failed_write_names_the_path_and_leaves_older_checkpoints_alone(out: Path, overlappable: bool) -> None:
    save_now(out, {"w": torch.ones(3)}, "old")
    before = (out / "old" / "model.pt").read_bytes()
    save = begin(out, "new")
    (save.attempt.checkpoint_dir / "model.pt").mkdir()  # in the way
    cluster_save = stage(save, {"w": torch.ones(100_000)}, overlappable=overlappable)
    seal(save)
    with pytest.raises(SaveFailed) as caught:
        save.wait(20)
    assert "model.pt" in str(caught.value) and "new" in str(caught.value) and "rank 0" in str(caught.value)
    assert cluster_save.error is not None and save.reported
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == ["latest", "old"]
    assert not save.attempt.directory.exists()
    assert (out / "old" / "model.pt").read_bytes() == before and verification.verify(out / "old") == []
    assert (out / "latest").read_text() == "old"
    again = save_now(out, {"w": torch.zeros(5)}, "new")
    assert again.attempt.attempt == 2 and torch.equal(load(out, "new")["w"], torch.zeros(5))


def test_a_cluster_save_that_failed_gives_the_arena_back_and_commits_nothing(out: Path) -> None:
    save = begin(out)
    cluster_save = stage(save, {"w": torch.ones(100_000)}, overlappable=True)
    cluster_save.fail(RuntimeError("out of luck"))
    cluster_save.fail(RuntimeError("another"))  # the first error is the one that is reported
    seal(save)
    with pytest.raises(SaveFailed, match=r"cluster 'model' rank 0 failed: RuntimeError: out of luck"):
        save.wait(20)
    assert wait_until(lambda: arena.mover(SETTINGS).arena.used_bytes == 0)
    assert not (out / "t1").exists() and not (out / "latest").exists()


def test_an_error_while_staging_is_the_callers_and_a_no(out: Path) -> None:
    save = begin(out)
    with pytest.raises(ValueError, match="extent"), save.staging():
        outside = FileImage(10, Extents.of([Extent(8, b"abc")]))
        save.add_cluster("model", {}).stage(save.attempt.checkpoint_dir / "x", outside, overlap=True)
    with pytest.raises(SaveFailed, match=r"ValueError: .*extent"):
        save.wait(20)


@pytest.mark.parametrize("kind", [TypeError, ValueError, ConfigError])
def test_an_error_while_voting_abandons_the_save_on_every_rank_at_once(
    out: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    lead = begin_(ALONE, Request(out, "t1", 1, {"model": 2}), SETTINGS, nbytes=1000)
    peer = Save(lead.attempt, SETTINGS, 1, ("model",))
    stage(lead, {"w": torch.ones(3)})
    stage(peer, {"w": torch.ones(3)}, file="other.pt")
    cast = ballot.cast

    def cast_or_raise(attempt: Attempt, vote: Vote) -> None:
        if vote.rank == 1:
            raise kind("no such vote")
        cast(attempt, vote)

    monkeypatch.setattr(ballot, "cast", cast_or_raise)
    began = time.monotonic()
    for save in (lead, peer):
        seal(save)
    for save in (lead, peer):
        with pytest.raises(SaveFailed, match=r"t1.*abandoned.*no such vote"):
            save.wait(10)
    assert time.monotonic() - began < SETTINGS.commit_timeout_s / 2
    assert not lead.attempt.directory.exists() and not (out / "t1").exists()


def test_facts_that_no_vote_can_hold_fail_the_save_by_the_name_of_the_cluster(out: Path) -> None:
    save = begin(out)
    stage(save, {"w": torch.ones(3)}).facts["strange"] = object()
    seal(save)
    with pytest.raises(SaveFailed, match=r"abandoned: .*cluster 'model' rank 0 could not vote: TypeError"):
        save.wait(10)
    assert not save.attempt.directory.exists()


def test_an_interrupt_while_staging_abandons_the_save(out: Path) -> None:
    save = begin(out)
    with pytest.raises(KeyboardInterrupt), save.staging():
        stage(save, {"w": torch.ones(100_000)}, overlappable=True)
        raise KeyboardInterrupt
    with pytest.raises(SaveFailed, match="KeyboardInterrupt"):
        save.wait(20)
    assert not (out / "t1").exists()


def test_a_cluster_that_was_never_staged_votes_no(out: Path) -> None:
    save = begin(out)
    seal(save)
    with pytest.raises(SaveFailed, match=r"cluster 'model' rank 0 failed: .*before this cluster was staged"):
        save.wait(20)


def test_a_save_inside_of_a_save_is_refused_and_does_not_hang(out: Path) -> None:
    save = begin(out)
    with pytest.raises(SaveFailed, match="it is being staged by this very call"), save.staging():
        begin(out)


def test_a_vanished_directory_is_told(out: Path) -> None:
    save = begin(out)
    stage(save, {"w": torch.ones(3)})
    save.attempt.directory.rename(out / "elsewhere")
    seal(save)
    with pytest.raises(SaveFailed, match="t1"):
        save.wait(20)


def test_the_log_tells_a_failure_and_what_is_left(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    save = begin(out)
    stage(save, {"w": torch.ones(3)}).fail(RuntimeError("out of luck"))
    seal(save)
    with pytest.raises(SaveFailed):
        save.wait(20)
    messages = [r.getMessage() for r in caplog.records if r.name == "roll_ckpt"]
    assert len(messages) == 1 and "out of luck" in messages[0] and "lder checkpoints are untouched" in messages[0]


# ---- beginning


def test_nothing_is_touched_when_ranks_bring_a_problem(out: Path) -> None:
    with pytest.raises(SaveFailed, match="not begun: rank 0: no such tag"):
        begin(out, problem="no such tag")
    assert not out.exists() and pending.pending() == []


def test_nothing_is_touched_when_there_is_no_room(out: Path) -> None:
    request = Request(out, "t1", 1, {"model": 1})
    with pytest.raises(NoRoom, match=r"1,152,921,504,606,846,976"):
        begin_(ALONE, request, SETTINGS, nbytes=1 << 60)
    assert not out.exists() and pending.pending() == []


def test_a_save_that_is_not_begun_counts_so_that_worlds_keep_in_step(out: Path) -> None:
    """Another job, with room enough for its part, has begun that attempt."""
    save_now(out, {"w": torch.ones(3)})
    refused = begin_(ALONE, Request(out, "t2", 2, {"model": 1}), SETTINGS, nbytes=1 << 60)
    assert not refused.begun and isinstance(refused.failure, NoRoom)
    save = begin(out, "t2")
    assert save.attempt.attempt == 2
    stage(save, {"w": torch.ones(3)})
    seal(save)
    save.wait(20)


@pytest.mark.parametrize("key", ["output_dir", "name", "step", "clusters", "save_latest"])
def test_ranks_that_ask_for_different_saves_are_told_what_differs(key: str) -> None:
    wish = {"output_dir": "a", "name": "n", "step": 1, "clusters": {"m": 2}, "save_latest": True}
    posts = [{"request": wish, "problem": None}, {"request": {**wish, key: "else"}, "problem": None}]
    with pytest.raises(RanksDisagree, match=rf"rank 1 and rank 0 .*: {key} 'else' and"):
        _check_agreement(posts)
    _check_agreement([posts[0], posts[0]])


def test_a_save_waits_for_a_pending_one_of_the_same_name(out: Path) -> None:
    gate = Gate("vote.before")
    first = begin(out)
    stage(first, {"w": torch.ones(3)})
    seal(first)
    assert gate.reached.wait(20)
    second: list[Save] = []
    thread = threading.Thread(target=lambda: second.append(begin(out)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not second, "the second save of the name has begun while the first is pending"
    gate.opened.set()
    thread.join(20)
    assert first.settled and second[0].attempt.attempt == 2
    stage(second[0], {"w": torch.zeros(3)})
    seal(second[0])
    second[0].wait(20)
    assert torch.equal(load(out)["w"], torch.zeros(3)) and verification.verify(out / "t1") == []


def test_saves_of_other_names_overlap_and_are_settled_in_order(out: Path) -> None:
    gate = Gate("vote.before")
    saves = [begin(out, name) for name in ("a", "b", "c")]
    for save in saves:
        stage(save, {"name": save.attempt.name})
        seal(save)
    assert gate.reached.wait(20) and pending.pending() == saves
    assert not any(save.settled for save in saves)
    order = []
    failpoints.listener = lambda point, where: order.append(where["name"]) if point == "commit.renamed" else None
    gate.opened.set()
    for save in saves:
        save.wait(20, uploaded=True)
    assert order == ["a", "b", "c"] and (out / "latest").read_text() == "c"


def test_a_failure_does_not_stop_the_save_behind_it(out: Path) -> None:
    gate = Gate("vote.before")
    bad, good = begin(out, "bad"), begin(out, "good")
    stage(bad, {}).fail(RuntimeError("x"))
    stage(good, {"w": torch.ones(2)})
    seal(bad)
    seal(good)
    gate.opened.set()
    good.wait(20)
    assert bad.failure is not None and verification.verify(out / "good") == [] and not (out / "bad").exists()


def test_one_process_has_one_arena(out: Path) -> None:
    save_now(out, {"w": torch.ones(3)})
    other = Settings.parse({**SMALL, "staging": {"arena_bytes": "2MiB"}}, "the test")
    with pytest.raises(ConfigError, match=r"different staging.*1048576.*2097152"):
        arena.mover(other)
    assert arena.mover(SETTINGS) is arena.mover(Settings.parse({**SMALL, "run_id": "x"}, "the test"))


# ---- sources


class Owner:
    """Keeps memory alive, as a storage does, and can be watched."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)


def owned_image(nbytes: int) -> tuple[FileImage, weakref.ref[Owner]]:
    owner = Owner(nbytes)
    source = Memory(extension.address_of(owner.data)[0], nbytes, owner)
    return FileImage(nbytes, Extents.of([Extent(0, source, lifetime=True)])), weakref.ref(owner)


def test_sources_are_held_until_the_fence_and_no_longer(out: Path) -> None:
    with late_copies(SETTINGS):
        save = begin(out)
        cluster_save = save.add_cluster("model", {})
        image, owner = owned_image(300_000)
        cluster_save.stage(save.attempt.checkpoint_dir / "f", image, overlap=True)
        del image
        gc.collect()
        assert owner() is not None, "copies are still to be made, and their source is gone"
        save.fence()
        gc.collect()
        assert owner() is None, "everything is copied, and the source is still held"
        seal(save)
        save.wait(20)


def test_sources_of_a_stage_without_overlap_are_not_held(out: Path) -> None:
    save = begin(out)
    image, owner = owned_image(300_000)
    save.add_cluster("model", {}).stage(save.attempt.checkpoint_dir / "f", image, overlap=False)
    del image
    gc.collect()
    assert owner() is None
    seal(save)
    save.wait(20)


@pytest.mark.parametrize("fails", [False, True])
def test_sources_are_released_without_a_fence_once_the_save_has_ended(out: Path, fails: bool) -> None:
    save = begin(out)
    cluster_save = save.add_cluster("model", {})
    image, owner = owned_image(300_000)
    cluster_save.stage(save.attempt.checkpoint_dir / "f", image, overlap=True)
    del image
    if fails:
        cluster_save.fail(RuntimeError("x"))
    seal(save)
    assert wait_until(lambda: save.finished)
    gc.collect()
    assert owner() is None and (save.failure is not None) == fails


# ---- sources that are changed before they are copied


def checked(check: str, **more: Any) -> Settings:
    return Settings.parse({**SMALL, "staging": {**SMALL["staging"], "check": check}, **more}, "the test")


def two_tensors() -> dict[str, torch.Tensor]:
    return {"first": torch.arange(50_000.0), "last": torch.arange(50_000.0)}


@pytest.mark.parametrize("check", ["sample", "full"])
def test_a_tensor_that_is_changed_before_the_fence_fails_the_save_by_name(out: Path, check: str) -> None:
    save_now(out, two_tensors(), "old")
    state = two_tensors()
    with late_copies(SETTINGS):
        save = begin(out, settings=checked(check))
        stage(save, state, overlappable=True)
        state["last"].data.add_(1)
        seal(save)
    with pytest.raises(SaveFailed) as caught:
        save.wait(20)
    for what in ("t1", "cluster 'model' rank 0", "model.pt: 'last' ", "roll_ckpt.fence()", "staging.overlap: false"):
        assert what in str(caught.value)
    assert "first" not in str(caught.value)
    assert (
        not (out / "t1").exists() and (out / "latest").read_text() == "old" and verification.verify(out / "old") == []
    )
    save_now(out, state)
    assert torch.equal(load(out)["last"], state["last"]) and verification.verify(out / "t1") == []


def test_what_is_changed_when_it_was_copied_fails_nothing(out: Path) -> None:
    state = two_tensors()
    with late_copies(SETTINGS):
        late, early = begin(out, "late"), begin(out, "early")
        stage(late, state, overlappable=True)
        stage(early, state)
        seal(early)
        late.fence()
        state["last"].data.add_(1)
        seal(late)
    for save in (late, early):
        save.wait(20)
        assert torch.equal(load(out, save.attempt.name)["last"], two_tensors()["last"])


def test_with_fail_training_a_changed_tensor_is_raised_at_the_next_fence(out: Path) -> None:
    state = two_tensors()
    with late_copies(SETTINGS):
        save = begin(out, settings=checked("full", fail_training=True))
        stage(save, state, overlappable=True)
        state["first"].data.add_(1)
        seal(save)
    with pytest.raises(SaveFailed, match="'first'"):
        pending.wait_copied([save])


def test_what_is_looked_at_does_not_change_what_is_written(out: Path) -> None:
    written = set()
    for check in ("off", "sample", "full"):
        save = begin(out, check, checked(check))
        stage(save, two_tensors(), overlappable=True)
        seal(save)
        save.wait(20)
        written.add((out / check / "model.pt").read_bytes())
    assert len(written) == 1


# ---- forks and exits


def in_a_process(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_forked_child_has_no_pending_saves_and_commits_nothing_at_its_exit(out: Path) -> None:
    output = in_a_process(
        """
        import os, sys, torch
        from pathlib import Path
        import test_saver as t
        from roll_ckpt.save import one_file, pending
        out = Path(sys.argv[1])
        gate = t.Gate("vote.before")
        save = t.begin(out)
        t.stage(save, {"w": torch.ones(3)})
        t.seal(save)
        assert gate.reached.wait(20)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            assert pending.pending() == []
            pending.fence()
            pending.wait_pending()
            sys.exit(7)  # exit handlers run
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, (out / "t1").exists(), pending.pending() == [save])
        gate.opened.set()
        save.wait(20)
        print((out / "t1" / "manifest.json").is_file())
        """,
        str(out),
    )
    assert output.split() == ["7", "False", "True", "True"]


def test_a_process_that_ends_finishes_its_pending_saves(out: Path) -> None:
    in_a_process(
        """
        import sys, torch
        from pathlib import Path
        import test_saver as t
        save = t.begin(Path(sys.argv[1]))
        t.stage(save, {"w": torch.ones(100_000)}, overlappable=True)
        t.seal(save)
        """,
        str(out),
    )
    assert verification.verify(out / "t1") == [] and load(out)["w"].sum() == 100_000


# ---- one file by itself


def image_of(state: object) -> FileImage:
    return layout.lay_out(state, "weights")


def test_write_file_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x" * 500_000)
    one_file.write_file(path, image_of({"w": torch.ones(3)}), SETTINGS)
    assert torch.equal(torch.load(path)["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.bin"]


def test_write_file_never_shows_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    seen: list[tuple[str, bytes]] = []
    failpoints.observer = lambda op, paths: seen.append((op, path.read_bytes()))
    one_file.write_file(path, image_of({"w": torch.ones(100_000)}), SETTINGS)
    assert seen == [("rename", b"old"), ("fsync_dir", path.read_bytes())] and len(path.read_bytes()) > 400_000


@pytest.mark.parametrize("how", ["rename fails", "a directory in the way"])
def test_write_file_leaves_the_older_file_and_no_temporary_when_it_fails(tmp_path: Path, how: str) -> None:
    path = tmp_path / "weights.bin"
    if how == "rename fails":
        path.write_bytes(b"old")

        def refuse(operation: str, paths: tuple[str, ...]) -> None:
            if operation == "rename":
                raise OSError(28, "No space left on device", paths[1])

        failpoints.observer = refuse
    else:
        path.mkdir()
    with pytest.raises(OSError, match=r"weights\.bin"):
        one_file.write_file(path, image_of({"w": torch.ones(3)}), SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.bin"]
    assert path.is_dir() or path.read_bytes() == b"old"


def test_write_file_stops_in_the_middle_when_the_disk_is_full(tmp_path: Path) -> None:
    output = in_a_process(
        """
        import resource, signal, sys, torch
        from pathlib import Path
        import test_saver as t
        from roll_ckpt.save import one_file, pending
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        path = Path(sys.argv[1])
        path.write_bytes(b"old")
        try:
            one_file.write_file(path, t.image_of({"w": torch.ones(1_000_000)}), t.SETTINGS)
        except OSError as problem:
            print(type(problem).__name__, problem.errno, path.read_bytes(), len(list(path.parent.iterdir())))
        """,
        str(tmp_path / "weights.bin"),
    )
    assert output.split() == ["OSError", "27", "b'old'", "1"]


def test_write_file_into_a_directory_that_is_not_there_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        one_file.write_file(tmp_path / "none" / "weights.bin", image_of({}), SETTINGS)
    assert "none" in str(caught.value) and caught.value.__context__ is None


def test_one_line_tells_of_a_save_and_how_long_training_stood_still(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="roll_ckpt"):
        save_now(out, {"w": torch.ones(1000)}, "t1")
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert re.match(
        rf"{out / 't1'}: committed [0-9.]+ s after it began \(this rank wrote [0-9]+ bytes\); "
        r"training stood still for [0-9.]+ s$",
        line,
    )
