"""A pipeline whose checkpoints go to the Hub, under real torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import settings
from hub_runs import TOKEN, assert_there_once, contents
from roll_ckpt_hub_dev import Fault, LocalHub
from test_pipeline import Jobs
from worlds import World

from roll_ckpt.transaction import verification
from roll_ckpt.upload.hub import push_queue

pytest.importorskip("huggingface_hub")

CASES = "hub_cases"
REPO = "dev/run"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", write_token=TOKEN) as hub:
        yield hub


def environment(hub: LocalHub, tmp_path: Path) -> dict[str, str]:
    return {**settings(hub.url, tmp_path / "home"), "HF_TOKEN": TOKEN, "ROLL_CKPT_HUB_TIMEOUT_S": "2"}


@pytest.mark.long
def test_a_killed_job_and_a_hub_that_is_down_cost_no_checkpoint(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(hub, tmp_path).items():
        monkeypatch.setenv(name, value)
    jobs = Jobs(tmp_path)
    options = ["--hub", REPO, "--keep", "1"]
    hub.faults.add(Fault("repo_info", status=503, times=0))
    jobs.run_until_stopped("losses", {0}, *options, "--stop-at", "commit.renamed:checkpoint-6")
    assert [p.name for p in sorted(jobs.out.glob("checkpoint-*"))] == [f"checkpoint-{n}" for n in (2, 4, 6)]
    assert len(push_queue.owed(jobs.out)) == 3 and not hub.store.root.joinpath("repos", REPO).exists()
    hub.faults.clear()
    jobs.run("losses", *options)
    assert [p.name for p in jobs.out.glob("checkpoint-*")] == ["checkpoint-8"]
    assert {entry.name: entry.state for entry in push_queue.list_entries(jobs.out)} == {
        f"checkpoint-{n}": "done" for n in (2, 4, 6, 8)
    }
    assert_there_once(hub, REPO, jobs.out / "checkpoint-8", tmp_path)
    history = [c.title for c in hub.store.history(hub.store.repo(REPO), "main")]
    assert history == [*(f"checkpoint-{n}" for n in (8, 6, 4, 2)), "initial commit"]
    for name, commit in hub.store.repo(REPO).tags.items():
        assert hub.store.resolve(hub.store.repo(REPO), commit).title == name
    assert "checkpoint-8" in contents(hub, REPO)["README.md"].decode()
    assert verification.verify_run(jobs.out) == []
    for path in [*tmp_path.glob("losses*"), *jobs.out.rglob("*"), hub.log_path]:
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


@pytest.mark.core("huggingface_hub")
def test_training_goes_on_and_hears_later(two_ranks: World, hub: LocalHub, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (saved, later), _ = two_ranks.call(f"{CASES}:two_steps", str(out), environment(hub, tmp_path), REPO)
    assert "checkpoint/upload" not in saved
    assert [set(r) & {"checkpoint/upload", "checkpoint/failed"} for r in later["checkpoint/ended"]] == [
        set(),
        {"checkpoint/upload"},
    ]
    assert [r["checkpoint/step"] for r in later["checkpoint/ended"]] == [2, 2]
    assert_there_once(hub, REPO, out / "checkpoint-2", tmp_path)


@pytest.mark.parametrize("strict", [False, True])
def test_a_no_is_heard_later(two_ranks: World, hub: LocalHub, tmp_path: Path, strict: bool) -> None:
    hub.store.create(REPO, private=False)
    (_, later), (_, of_the_other_rank) = two_ranks.call(
        f"{CASES}:two_steps", str(tmp_path / "run"), environment(hub, tmp_path), REPO, fail_training=strict
    )
    told = later["raised" if strict else "checkpoint/failed"]
    assert of_the_other_rank.get("raised") == later.get("raised")
    assert "public" in told and "roll-ckpt push" in told and "unpruned" in told
    assert push_queue.list_entries(tmp_path / "run")[0].state == "failed"


def test_without_async_upload_a_save_returns_when_it_is_on_the_hub(
    two_ranks: World, hub: LocalHub, tmp_path: Path
) -> None:
    hub.faults.add(Fault("commit", status=500, landed=True))
    (saved, later), _ = two_ranks.call(
        f"{CASES}:two_steps", str(tmp_path / "run"), environment(hub, tmp_path), REPO, async_upload=False
    )
    assert saved["checkpoint/upload"] > 0 and saved["checkpoint/step"] == 2 and "checkpoint/ended" not in later
    assert_there_once(hub, REPO, tmp_path / "run/checkpoint-2", tmp_path)


def test_the_last_step_waits_for_the_hub(two_ranks: World, hub: LocalHub, tmp_path: Path) -> None:
    told, _ = two_ranks.call(f"{CASES}:last_step", str(tmp_path / "run"), environment(hub, tmp_path), REPO)
    assert told["raised"] == "nothing was raised" and told["checkpoint/upload"] > 0
    for name in ("checkpoint-1", "checkpoint-2"):
        assert_there_once(hub, REPO, tmp_path / "run" / name, tmp_path)


@pytest.mark.long
def test_the_last_step_does_not_wait_for_ever(two_ranks: World, hub: LocalHub, tmp_path: Path) -> None:
    hub.faults.add(Fault("commit", status=503, times=0))
    for told in two_ranks.call(
        f"{CASES}:last_step", str(tmp_path / "run"), environment(hub, tmp_path), REPO, exit_timeout_s=8
    ):
        assert told["raised"].startswith("SaveFailed") and "503" in told["raised"] and REPO in told["raised"]
    assert push_queue.owed(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]
