"""The pipeline under real torchrun: resume on the same losses after kills, worlds that commit together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from roll_ckpt_hub_dev import LocalHub
from worlds import ROOT, World, environment

from roll_ckpt import names
from roll_ckpt.formats import manifests
from roll_ckpt.transaction import verification

JOB = str(ROOT / "tests" / "job.py")
LIMIT_S = 150.0


class Jobs:
    """torchrun jobs of tests/job.py that share an output directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "run"

    @contextmanager
    def start(self, losses: str, *options: str, ranks: int = 2) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        with open(self.folder / f"{losses}.log", "ab") as log:
            job = subprocess.Popen(
                [*command, JOB, str(self.out), str(self.folder / losses), *options],
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                yield job
            finally:
                kill_tree(job.pid)
                job.wait()

    def run(self, losses: str, *options: str) -> None:
        with self.start(losses, *options) as job:
            assert job.wait(LIMIT_S) == 0, self.log(losses)

    def run_until_stopped(self, losses: str, ranks: set[int], *options: str) -> None:
        """Start, wait until these ranks are at the named point, then SIGKILL agent and workers by pid."""
        stopped = [self.folder / f"{losses}.stopped.{rank}" for rank in ranks]
        with self.start(losses, *options) as job:
            wait_for(lambda: all(path.exists() for path in stopped) or job.poll() is not None)
            assert job.poll() is None, self.log(losses)
        for path in self.folder.glob(f"{losses}.stopped.*"):
            path.unlink()

    def log(self, losses: str) -> str:
        return (self.folder / f"{losses}.log").read_text(errors="replace")[-5000:]

    def curve(self, losses: str, rank: int) -> dict[str, str]:
        """The loss that counts for each step: of the newest run that reached it."""
        lines = (self.folder / f"{losses}.{rank}").read_text().splitlines()
        return dict(line.split(" ", 1) for line in lines if not line.startswith("resumed"))

    def resumed(self, losses: str) -> list[str]:
        lines = (self.folder / f"{losses}.0").read_text().splitlines()
        return [line.split()[1] for line in lines if line.startswith("resumed")]


def wait_for(condition: object) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < limit, "the job did not get there in time"
        time.sleep(0.05)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants; torchrun's workers live in sessions of their own."""
    doomed = [pid]
    for at in doomed:
        for task in Path(f"/proc/{at}/task").glob("*/children"):
            doomed += [int(child) for child in task.read_text().split()]
    for at in doomed:
        try:
            os.kill(at, signal.SIGKILL)
        except ProcessLookupError:
            continue


def leftovers(out: Path) -> list[str]:
    leftover = [p.name for p in out.iterdir() if names.parse_attempt_dir(p.name)]
    for folder in (names.TRASH, names.SUPERSEDED):
        leftover += [str(p.relative_to(out)) for p in (out / folder).rglob("*") if p.is_file()]
    return leftover


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    jobs = Jobs(tmp_path_factory.mktemp("unbroken"))
    jobs.run("losses", "--upload", str(jobs.folder / "upload"))
    return jobs


def test_a_run_keeps_what_it_shall_and_uploads_all(unbroken: Jobs) -> None:
    assert sorted(p.name for p in unbroken.out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert (unbroken.out / "latest").read_text().strip() == "checkpoint-8"
    uploaded = unbroken.folder / "upload"
    assert sorted(p.name for p in uploaded.iterdir()) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
    for checkpoint_dir in [*uploaded.iterdir(), *unbroken.out.glob("checkpoint-*")]:
        assert verification.verify(checkpoint_dir) == []
    assert verification.verify_run(unbroken.out) == [] and leftovers(unbroken.out) == []


def test_the_log_history_holds_steps_and_metrics_with_the_step_they_belong_to(unbroken: Jobs) -> None:
    state = json.loads((unbroken.out / "checkpoint-8" / "pipeline" / "worker_state_pipeline.json").read_text())
    assert [entry["system/step"] for entry in state["log_history"]] == list(range(9))
    late = [e for e in state["log_history"] if "time/actor/do_checkpoint/commit" in e]
    assert late and all(e["time/actor/do_checkpoint/step"] < e["system/step"] for e in late)
    saved = [e for e in state["log_history"] if "time/actor/do_checkpoint/total" in e]
    assert [e["system/step"] for e in saved] == [2, 4, 6]
    assert [e["time/actor/do_checkpoint/host_collectives"] for e in saved] == [2, 2, 2]


KILLS = [
    ("write.done:checkpoint-4", {0, 1}, "2"),
    ("vote.cast:checkpoint-6:actor", {0, 1}, "4"),
    ("commit.renamed:checkpoint-8", {0}, "8"),
]


@pytest.mark.long
def test_killed_at_three_points_it_comes_back_on_the_same_losses(unbroken: Jobs, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    for point, ranks, _ in KILLS:
        jobs.run_until_stopped("losses", ranks, "--stop-at", point)
        assert [entry for entry in os.listdir(jobs.out) if names.parse_attempt_dir(entry)]
    jobs.run("losses")
    assert jobs.resumed("losses") == ["None", *(resumed for _, _, resumed in KILLS)]
    for rank in (0, 1):
        assert jobs.curve("losses", rank) == unbroken.curve("losses", rank)
    assert verification.verify_run(jobs.out) == [] and leftovers(jobs.out) == []
    assert sorted(p.name for p in jobs.out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.long
@pytest.mark.core("deepspeed")
def test_every_zero_stage_killed_inside_a_save_comes_back_on_the_same_losses(tmp_path: Path) -> None:
    stages = ("--clusters", "zero0=0,zero1=1,zero2=2,zero3=3")
    unbroken, killed = Jobs(tmp_path / "unbroken"), Jobs(tmp_path / "killed")
    for jobs in (unbroken, killed):
        jobs.folder.mkdir()
    unbroken.run("losses", *stages)
    killed.run_until_stopped("losses", {0, 1}, *stages, "--stop-at", "write.done:checkpoint-4")
    assert [entry for entry in os.listdir(killed.out) if names.parse_attempt_dir(entry)]
    killed.run("losses", *stages)
    assert killed.resumed("losses") == ["None", "2"]
    for rank in (0, 1):
        assert killed.curve("losses", rank) == unbroken.curve("losses", rank)
        assert all(len(losses.split()) == 4 for losses in killed.curve("losses", rank).values())
    assert verification.verify_run(killed.out) == [] and leftovers(killed.out) == []


@pytest.mark.long
def test_without_its_rng_a_resumed_run_goes_another_way(unbroken: Jobs, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    shutil.copytree(unbroken.folder / "upload" / "checkpoint-4", jobs.out / "checkpoint-4")
    jobs.run("losses", "--forget-rng")
    assert jobs.resumed("losses") == ["4"]
    other, same = jobs.curve("losses", 0), unbroken.curve("losses", 0)
    assert other["5"] != same["5"]


@pytest.mark.long
def test_resume_falls_back_past_a_damaged_checkpoint_and_saves_the_step_again(unbroken: Jobs, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    shutil.copytree(unbroken.out, jobs.out)
    shutil.copytree(unbroken.folder / "upload" / "checkpoint-4", jobs.out / "checkpoint-4")
    for name in ("checkpoint-8", "checkpoint-6"):
        damaged = next((jobs.out / name / "critic").rglob("*optim_states.pt"))
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 4
        damaged.write_bytes(data)
    jobs.run("losses")
    assert jobs.resumed("losses") == ["4"]
    assert "optim_states.pt" in jobs.log("losses") and "Falling back" in jobs.log("losses")
    assert {k: v for k, v in unbroken.curve("losses", 0).items() if int(k) > 4} == jobs.curve("losses", 0)
    assert verification.verify_run(jobs.out) == []


@pytest.mark.long
def test_a_run_resumes_from_the_hub_on_the_same_losses(
    unbroken: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    checkpoint_dir = unbroken.folder / "upload" / "checkpoint-4"
    with LocalHub(tmp_path / "hub", write_token="hf_writes") as hub:
        for name in [name for name in os.environ if name.upper().endswith("_PROXY")]:
            monkeypatch.delenv(name)
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_writes"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        command = [sys.executable, "-m", "roll_ckpt", "push", str(checkpoint_dir), "dev/run"]
        subprocess.run(command, env=environment(), check=True)
        jobs = Jobs(tmp_path / "jobs")
        jobs.folder.mkdir()
        jobs.run("losses", "--resume-from", "hf://dev/run@checkpoint-4")
    assert jobs.resumed("losses") == ["4"]
    for rank in (0, 1):
        assert jobs.curve("losses", rank) == {
            step: loss for step, loss in unbroken.curve("losses", rank).items() if int(step) > 4
        }
    pulled = Path(f"{jobs.out}{names.PULLED}")
    assert os.listdir(pulled) == ["checkpoint-4"] and verification.verify(pulled / "checkpoint-4") == []
    assert verification.verify_run(jobs.out) == [] and leftovers(jobs.out) == []


@pytest.mark.long
def test_two_worlds_commit_each_step_together(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    options = ["--expect", "1", "--keep", "0"]
    with jobs.start("actor", "--only", "actor", *options, ranks=1) as actor:
        with jobs.start("critic", "--only", "critic", *options, ranks=1) as critic:
            assert critic.wait(LIMIT_S) == 0, jobs.log("critic")
        assert actor.wait(LIMIT_S) == 0, jobs.log("actor")
    assert sorted(p.name for p in jobs.out.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
    assert verification.verify_run(jobs.out) == [] and leftovers(jobs.out) == []
    for checkpoint_dir in jobs.out.glob("checkpoint-*"):
        assert {"actor", "critic"} <= {p.name for p in checkpoint_dir.iterdir()}
        assert {p.name for p in (checkpoint_dir / "pipeline").iterdir()} == {"actor", "critic"}


CASES = "pipeline_cases"


def test_a_hub_that_cannot_be_reached_is_told_on_every_rank(two_ranks: World, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    for outcome in two_ranks.call(f"{CASES}:hub_out_of_reach", str(tmp_path / "run")):
        assert outcome.startswith("HubUnavailable") and "hf://dev/run@main" in outcome
    assert not (tmp_path / f"run{names.PULLED}").exists()


def test_a_destination_that_cannot_work_is_told_on_every_rank_before_training(two_ranks: World, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    for outcome in two_ranks.call(f"{CASES}:hub_too_old", str(tmp_path / "run")):
        assert outcome.startswith("UnsupportedError") and "huggingface_hub 0.33.5 is too old" in outcome
    assert not (tmp_path / "run").exists()


def test_bad_input_is_told_with_nothing_on_disk_touched(two_ranks: World, tmp_path: Path) -> None:
    for outcome in two_ranks.call(f"{CASES}:bad_input", str(tmp_path / "run")):
        assert outcome["twice"].startswith("ConfigError") and "actor" in outcome["twice"]
        assert outcome["step"].startswith("RanksDisagree") and "rank 1 is in save checkpoint-" in outcome["step"]
        assert outcome["room"].startswith("NoRoom")
        assert outcome["path"].startswith("NotFound") and "no complete checkpoint" in outcome["path"]
        assert outcome["unwritable"].startswith("ConfigError") and "file" in outcome["unwritable"]
    assert not (tmp_path / "run").exists()


def test_what_a_safe_load_refuses_of_a_component_is_told_once_on_each_rank(two_ranks: World, tmp_path: Path) -> None:
    two_ranks.call(f"{CASES}:unloadable_stateful", str(tmp_path / "run"))
    outcome = [line for line in two_ranks.log().splitlines() if str(tmp_path) in line and "a safe load refuses" in line]
    assert len(outcome) == 2 and all("'where'" in line and "load.allow" in line for line in outcome)


@pytest.mark.long
def test_a_second_live_run_is_refused_by_host_and_pid(two_ranks: World, tmp_path: Path) -> None:
    two_ranks.call(f"{CASES}:hold", str(tmp_path / "run"))
    before = sorted(str(p) for p in (tmp_path / "run").rglob("*"))
    jobs = Jobs(tmp_path)
    with jobs.start("second") as job:
        assert job.wait(LIMIT_S) != 0
    assert "RunIsLive" in jobs.log("second") and "process" in jobs.log("second")
    assert sorted(str(p) for p in (tmp_path / "run").rglob("*")) == before


def test_another_model_is_refused_before_anything_is_loaded(two_ranks: World, unbroken: Jobs, tmp_path: Path) -> None:
    for outcome in two_ranks.call(f"{CASES}:another_model", str(tmp_path / "run"), str(unbroken.out / "checkpoint-8")):
        assert outcome.startswith("ModelMismatch") and outcome.count("shape [") == 10


def test_pretrained_files_and_client_state_come_with_the_cluster(two_ranks: World, tmp_path: Path) -> None:
    for loaded in two_ranks.call(f"{CASES}:pretrained_files", str(tmp_path / "run")):
        assert loaded["client"] == {"epochs": 3}
    checkpoint_dir = tmp_path / "run" / "checkpoint-1"
    listed = {r.path for r in manifests.read(checkpoint_dir).files}
    assert {"actor/config.json", "actor/latest", "actor/zero_to_fp32.py"} <= listed
    assert verification.verify(checkpoint_dir) == []


def test_save_only_model_holds_the_weights_and_cannot_be_resumed(two_ranks: World, tmp_path: Path) -> None:
    for outcome in two_ranks.call(f"{CASES}:only_model", str(tmp_path / "run")):
        assert outcome.startswith("NotFound") and "save_only_model" in outcome
    assert (tmp_path / "run" / "checkpoint-1" / "actor" / "pytorch_model.bin").is_file()


def test_an_interrupt_while_staging_commits_nothing(two_ranks: World, tmp_path: Path) -> None:
    for entries in two_ranks.call(f"{CASES}:interrupted", str(tmp_path / "run")):
        assert "checkpoint-1" not in entries


def test_a_failing_client_state_is_told_on_every_rank(two_ranks: World, tmp_path: Path) -> None:
    for outcome in two_ranks.call(f"{CASES}:failing_client_state", str(tmp_path / "run")):
        assert "rank 1" in outcome and "no state today" in outcome
    assert not (tmp_path / "run").exists()


def test_the_step_resumed_by_path_stays_until_the_run_has_its_own(two_ranks: World, tmp_path: Path) -> None:
    for kept in two_ranks.call(f"{CASES}:resumed_by_path", str(tmp_path / "run")):
        assert kept == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.long
def test_another_number_of_ranks_is_refused_by_name(unbroken: Jobs, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    shutil.copytree(unbroken.out, jobs.out)
    with jobs.start("losses", ranks=1) as job:
        assert job.wait(LIMIT_S) != 0
    assert "was saved by 2 ranks and this job has 1" in jobs.log("losses")
